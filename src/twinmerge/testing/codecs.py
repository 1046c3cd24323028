"""What every codec must do."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from twinmerge.errors import in_one_line
from twinmerge.maths.codec import CODECS, TINY, Codec
from twinmerge.maths.codecs.kit.sound import Watched, try_codec

SHAPES = ((1, 1), (3, 1), (1, 5), (2, 63), (5, 64), (4, 65), (2, 130), (64, 3))
SIZES = (1e-30, 1e-6, 1.0, 1e3)
EDGES = (0.0, -0.0, 1e-45, -1e-40, 2.0**-126, -(2.0**-24), 0.5, -1.0, 1.0, 65504.0, -65504.0)


def check_codec(given: str | type[Codec]) -> None:
    """Hold a codec to all that a codec must do.

    Args:
        given: a name, or a class of your own.

    Raises:
        AssertionError: it does something else; the message says what.
        TwinmergeError: its class lacks something.
    """
    codec = opened(given)
    for check in CODEC_CHECKS:
        check(codec)


def opened(given: str | type[Codec]) -> Watched:
    """The codec, with an eye on what it gives.

    Raises:
        TwinmergeError: its class lacks something.
    """
    cls = CODECS.find(given) if isinstance(given, str) else CODECS.require(given, given.__name__)
    return Watched(cls(), given if isinstance(given, str) else given.__name__)


def check_rows(codec: Codec, rows: Tensor) -> None:
    """The bytes are as many as the codec says, no number is off by more than it says, and what is read encodes to the
    same bytes.

    Args:
        codec: any.
        rows: (slices, length) float32; of a codec that is not `sliced`, (1, length).
    """
    shape, kept = tuple(rows.shape), rows.clone()
    stored, scales = codec.encode(rows)
    nbytes = stored.nbytes + (0 if scales is None else scales.nbytes)
    assert nbytes == len(rows) * codec.slice_bytes(rows.shape[1]), f"{nbytes} bytes of {shape}, not what it says"
    assert (scales is not None) == codec.sliced, "scales, and it is not sliced; or the other way round"
    assert codec.packs or stored.shape == rows.shape, f"it stores {tuple(stored.shape)} of {shape}, and does not pack"
    read = codec.decode(stored, scales, rows.shape[1])
    assert read.dtype == torch.float32 and read.shape == rows.shape, f"{read.dtype} of {tuple(read.shape)} is read"
    assert bool(read.isfinite().all()), f"NaN or infinity is read of {rows.tolist()}"
    off = (rows - read).abs() - codec.bound(rows)
    assert bool((off <= 0).all()), f"{rows.flatten()[off.argmax()]} is off by more than bound says"
    twice, same = codec.encode(read)
    assert torch.equal(twice, stored), f"what is read of {shape} encodes to other numbers"
    assert same is scales is None or (same is not None and scales is not None and torch.equal(same, scales)), (
        f"what is read of {shape} encodes to other scales"
    )
    assert torch.equal(rows, kept), "it changes the numbers that it is given"


def _says_what_it_is(codec: Watched) -> None:
    cls = type(codec.codec)
    assert cls.__doc__ and inspect.getdoc(cls) != inspect.getdoc(Codec), f"{cls.__name__} has no docstring"


def _does_what_is_tried_at_its_first_use(codec: Watched) -> None:
    try_codec(codec, codec.name)


def _takes_any_shape(codec: Watched) -> None:
    for seed, shape in enumerate(SHAPES):
        for size in SIZES:
            x = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for rows in (x, x.T):  # the second is not contiguous
                check_rows(codec, rows if codec.sliced else rows.reshape(1, -1))


def _takes_numbers_at_the_edges(codec: Watched) -> None:
    x = torch.tensor(EDGES)
    table = torch.stack([x.roll(i) for i in range(len(x))])
    for rows in (table, table[:, :1], x[None]):
        check_rows(codec, rows if codec.sliced else rows.reshape(1, -1))


def _keeps_zeros(codec: Watched) -> None:
    for value, off in ((0.0, 0.0), (1e-44, TINY + 2.0**-25)):
        x = torch.full((3, 4) if codec.sliced else (1, 12), value)
        stored, scales = codec.encode(x)
        read = codec.decode(stored, scales, x.shape[1])
        assert bool(((read - x).abs() <= off).all()), f"{value} is read as {read.abs().max()}"


def _refuses_what_is_not_its_own(codec: Watched) -> None:
    """Stored numbers or scales of another dtype or shape: damage becomes a sentence where the file is read."""
    if not codec.sliced:
        return
    x = torch.arange(1.0, 11.0).reshape(2, 5)
    stored, scales = codec.encode(x)
    assert scales is not None
    damaged = {
        "a piece of what was stored": (stored[:, :-1] if codec.packs else stored[:1], scales),
        "another dtype": (stored.float(), scales),
        "a scale too few": (stored, scales[:1]),
        "no scales": (stored, None),
    }
    for what, (one, other) in damaged.items():
        try:
            codec.codec.decode(one, other, 5)
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"{what}, and decode raises {in_one_line(error)}, not a ValueError") from error
        raise AssertionError(f"{what}, and decode raises no ValueError")


CODEC_CHECKS: tuple[Callable[[Watched], None], ...] = (
    _says_what_it_is,
    _does_what_is_tried_at_its_first_use,
    _takes_any_shape,
    _takes_numbers_at_the_edges,
    _keeps_zeros,
    _refuses_what_is_not_its_own,
)
"""Each takes what `opened` gives."""
