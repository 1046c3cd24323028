"""What a codec that is not ours is held to: tried on a small matrix before it stores anything, and watched after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from twinmerge.errors import TwinmergeError, UsageError, in_one_line
from twinmerge.maths.codecs.kit.base import Codec
from twinmerge.origin import is_ours, misspelt, other_arguments

if TYPE_CHECKING:
    from torch import Tensor

STORED = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""The dtypes that files hold (`store/header.py`)."""
TAKES = {"encode": "rows", "decode": "stored, scales, length", "slice_bytes": "length", "bound": "rows"}


def check_class(cls: type[Codec], name: str) -> None:
    """Refuse a class that lacks what a codec needs.

    Raises:
        UsageError: it does; the message says what to change.
    """
    for attribute in ("sliced", "packs"):
        if not isinstance(value := getattr(cls, attribute), bool):
            raise UsageError(f"{name}: {attribute} is {value!r:.80}. Write True or False.")
    if cls.packs and not cls.sliced:
        raise UsageError(f"{name} packs numbers, and has no slices to pack them in. Let it be sliced.")
    if (wrong := misspelt(cls, Codec)) is not None:
        raise UsageError(f"{name}: {wrong[0]} is no attribute of a codec. Did you mean {wrong[1]!r}?")
    if (other := other_arguments(cls, TAKES)) is not None:
        raise UsageError(f"{name}: {other}")


def made(cls: type[Codec], name: str) -> Codec:
    """The codec of a class; one that is not ours is tried first.

    Raises:
        UsageError: it cannot be made, or does not do what a codec does.
    """
    if is_ours(cls):  # the tests look at our own
        return cls()
    try:
        found = cls()
    except Exception as error:
        raise _broken(name, f"cannot be made without arguments: {in_one_line(error)}") from error
    watched = Watched(found, name)
    try_codec(watched, name)
    return watched


class Watched(Codec):
    """A codec that is not ours, with copies of what it is given; what it gives is looked at each time.

    Args:
        codec: that is watched.
        name: what messages call it.
    """

    def __init__(self, codec: Codec, name: str) -> None:
        self.codec, self.name = codec, name
        self.sliced, self.packs = codec.sliced, codec.packs  # type: ignore[misc]

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        try:
            found: Any = self.codec.encode(rows.clone())
        except Exception as error:
            self._failed("encode", error)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], torch.Tensor)):
            raise _broken(self.name, f"encode gives {type(found).__name__}, not what is stored and its scales")
        stored, scales = found
        want = f"({len(rows)}, …)" if self.packs else str(tuple(rows.shape))
        if (tuple(stored.shape[:1]) if self.packs else tuple(stored.shape)) != tuple(rows.shape)[
            : 1 if self.packs else 2
        ]:
            raise _broken(self.name, f"encode stores {tuple(stored.shape)} of {tuple(rows.shape)}, not {want}")
        if self.sliced != isinstance(scales, torch.Tensor) or (not self.sliced and scales is not None):
            raise _broken(
                self.name,
                f"encode gives {'no scales' if scales is None else 'scales'}, and sliced is {self.sliced}",
            )
        if scales is not None and tuple(scales.shape[:1]) != (len(rows),):
            raise _broken(self.name, f"encode gives scales of shape {tuple(scales.shape)} for {len(rows)} slices")
        for each in (stored, *([] if scales is None else [scales])):
            if (dtype := str(each.dtype).removeprefix("torch.")) not in STORED:
                raise _broken(self.name, f"encode gives {dtype}, which our files do not hold")
        size = stored.nbytes + (0 if scales is None else scales.nbytes)
        if size != (said := self.slice_bytes(rows.shape[1]) * len(rows)):
            raise _broken(self.name, f"encode stores {size} bytes, and slice_bytes says {said}")
        return stored, scales

    def decode(self, stored: Tensor, scales: Tensor | None, length: int) -> Tensor:
        import torch

        try:
            found: Any = self.codec.decode(stored.clone(), None if scales is None else scales.clone(), length)
        except ValueError:  # what is stored is damaged, as a codec may say
            raise
        except Exception as error:
            self._failed("decode", error)
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != (len(stored), length):
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise _broken(self.name, f"decode gives {shape}, not {(len(stored), length)}")
        if found.dtype != torch.float32:
            raise _broken(self.name, f"decode gives {found.dtype}, not torch.float32")
        if not bool(found.isfinite().all()):
            raise _broken(self.name, "decode gives NaN or infinity")
        return found

    def slice_bytes(self, length: int) -> int:
        try:
            found: Any = self.codec.slice_bytes(length)
        except Exception as error:
            self._failed("slice_bytes", error)
        if type(found) is not int or found < 1:
            raise _broken(self.name, f"slice_bytes gives {found!r:.80}, not a whole number of bytes")
        return found

    def bound(self, rows: Tensor) -> Tensor:
        import torch

        try:
            found: Any = self.codec.bound(rows.clone())
        except Exception as error:
            self._failed("bound", error)
        if not isinstance(found, torch.Tensor) or found.shape != rows.shape:
            raise _broken(self.name, "bound gives no tensor of the shape of its rows")
        return found

    def _failed(self, function: str, error: Exception) -> NoReturn:
        if isinstance(error, TwinmergeError):
            raise error
        raise _broken(self.name, f"{function} fails: {in_one_line(error)}") from error


def try_codec(codec: Codec, name: str) -> None:
    """Refuse a codec that does not do what a codec does, by small matrices: many rows, of several sizes, some of zeros.

    Raises:
        UsageError: its numbers are off by more than it says; what is read encodes to other bytes; it is another each
            time; or its tensors cannot be written.

    Example:
        >>> class Shrinking(Codec):
        ...     sliced = False
        ...     def encode(self, rows):
        ...         return rows.half(), None
        ...     def decode(self, stored, scales, length):
        ...         return 0.9 * stored.float()
        ...     def slice_bytes(self, length):
        ...         return 2 * length
        ...     def bound(self, rows):
        ...         return 0.2 * rows.abs() + 1e-6
        >>> try_codec(Watched(Shrinking(), "shrinking"), "shrinking")
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: The codec shrinking is broken: what is read encodes to other bytes. Mend it, or \
choose another codec.
    """
    import torch

    rng = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 0.0, 30.0, 1e-30]).repeat(50)
    large = torch.randn(250, 70, generator=rng) * sizes[:, None]
    with torch.random.fork_rng(devices=[]):
        for rows in (large, large[:3, :1]) if codec.sliced else (large.reshape(1, -1),):
            stored, scales = codec.encode(rows)
            try:
                read = codec.decode(stored, scales, rows.shape[1])
            except TwinmergeError:
                raise
            except ValueError as error:
                raise _broken(name, f"decode refuses what encode stored: {in_one_line(error)}") from error
            again = codec.encode(rows)
            if not (_same(again, (stored, scales)) and torch.equal(codec.decode(stored, scales, rows.shape[1]), read)):
                raise _broken(name, "the same numbers are not stored, or read, alike each time")
            if not bool(((read - rows).abs() <= codec.bound(rows)).all()):
                raise _broken(name, "numbers are off by more than bound says")
            if not _same(codec.encode(read), (stored, scales)):
                raise _broken(name, "what is read encodes to other bytes")


def _same(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> bool:
    """Whether the same bytes are written."""

    def bits(x: Tensor | None) -> tuple[Any, ...]:
        return () if x is None else (x.dtype, tuple(x.shape), x.contiguous().reshape(-1).view(_bytes()).tolist())

    return [bits(x) for x in one] == [bits(x) for x in other]


def _bytes() -> Any:
    import torch

    return torch.uint8


def _broken(name: str, what: str) -> UsageError:
    return UsageError(f"The codec {name} is broken: {what}. Mend it, or choose another codec.")
