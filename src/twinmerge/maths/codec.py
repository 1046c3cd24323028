"""Numbers in fewer bits: what a codec is, how it is found, and how tensors are stored by it.

Every file of `maths/codecs/` is a codec, named as the file; other packages offer theirs as entry points of
`twinmerge.codecs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from twinmerge.errors import DamagedFile, DataError
from twinmerge.maths.codecs.kit.base import TINY as TINY
from twinmerge.maths.codecs.kit.base import Codec as Codec
from twinmerge.maths.codecs.kit.base import divisor as divisor
from twinmerge.maths.codecs.kit.base import half as half
from twinmerge.maths.codecs.kit.base import rounded_up as rounded_up
from twinmerge.maths.codecs.kit.sound import check_class, made
from twinmerge.plugins import Plugins
from twinmerge.results import Listing

if TYPE_CHECKING:  # the command's help names the codecs, without PyTorch's import
    from torch import Tensor

NONE = "none"  # no codec: numbers are stored as they are
SCALE = "#scale"  # of the tensor whose name stands before it
CODECS = Plugins[Codec](
    Codec,
    "codec",
    "twinmerge.maths.codecs",
    "twinmerge.codecs",
    check_class,
    lambda: f" Choose from {', '.join(codec_names())}, or install the package that offers it.",
)


def codec_names() -> list[str]:
    """All codecs, `NONE` first.

    Example:
        >>> codec_names()[0], "int8" in codec_names()
        ('none', True)
    """
    return [NONE, *CODECS.names()]


@lru_cache
def codec_of(name: str) -> Codec:
    """The codec of that name, which is not `NONE`.

    Raises:
        TwinmergeError: an unknown one (with the nearest right one), or one that lacks something.
    """
    return made(CODECS.find(name), name)


def encode(x: Tensor, codec: str, dim: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are stored, and the scales that go with them.

    Without a `dim`, numbers that a codec of slices is asked for are stored in half precision.

    Args:
        x: any shape, a floating dtype.
        codec: see `codec_names`.
        dim: whose slices have scales of their own.

    Returns:
        stored: x's shape; of a codec that packs (x.shape[dim], …). scales: (x.shape[dim], …), or None.

    Raises:
        TwinmergeError: an unknown codec, or numbers beyond half precision.

    Example:
        >>> import torch
        >>> stored, scale = encode(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), "int8", 0)
        >>> stored.tolist(), decode(stored, scale, "int8", 0)
        ([[127, -63], [0, 0]], tensor([[ 1.0000, -0.4961],
            [ 0.0000,  0.0000]]))
        >>> stored, scale = encode(torch.tensor([[7.0, -2.0, 3.0]]), "int4", 0)
        >>> stored.tolist(), scale.tolist(), decode(stored, scale, "int4", 0, (1, 3)).tolist()
        ([[111, 139]], [[1.0]], [[7.0, -2.0, 3.0]])
    """
    if codec == NONE:
        return x, None
    found, x = codec_of(codec), x.float()
    if not found.sliced:
        stored, scales = found.encode(x.reshape(1, -1))
        return stored.reshape(x.shape), scales
    if dim is None or not x.numel():
        return half(x), None
    front = x.movedim(dim, 0)
    stored, scales = found.encode(front.reshape(len(front), -1))
    return stored if found.packs else stored.reshape(front.shape).movedim(0, dim).contiguous(), scales


def decode(
    stored: Tensor, scales: Tensor | None, codec: str, dim: int | None = None, shape: Sequence[int] | None = None
) -> Tensor:
    """What `encode` stored, in float32 (as it was, without a codec).

    Args:
        shape: of the numbers of a codec that packs, which their bytes do not tell.

    Raises:
        TwinmergeError: an unknown codec.
        ValueError: stored numbers or scales that are not of this shape.
    """
    if codec == NONE:
        return stored
    found = codec_of(codec)
    if not found.sliced:
        return found.decode(stored.reshape(1, -1), None, stored.numel()).reshape(stored.shape)
    if scales is None or dim is None:
        return stored.float()
    front = stored if found.packs else stored.movedim(dim, 0)
    whole = list(stored.shape if shape is None else shape)
    moved = [whole[dim], *whole[:dim], *whole[dim + 1 :]]
    length = 1
    for size in moved[1:]:
        length *= size
    rows = found.decode(front.reshape(len(front), -1), scales, length)
    return rows.reshape(moved).movedim(0, dim).contiguous()


def slice_bytes(length: int, codec: str, plain: int = 4) -> int:
    """Bytes of a slice of so many numbers with its scales; `plain`: bytes of a number without a codec.

    Example:
        >>> {codec: slice_bytes(384, codec) for codec in ("none", "float16", "int8", "int4")}
        {'none': 1536, 'float16': 768, 'int8': 388, 'int4': 204}
    """
    return plain * length if codec == NONE else codec_of(codec).slice_bytes(length)


def projected(x: Tensor, codec: str, dim: int | None = None) -> Tensor:
    """The numbers as they read once they were stored."""
    stored, scales = encode(x, codec, dim)
    return decode(stored, scales, codec, dim, x.shape)


def pack(
    tensors: Mapping[str, Tensor], codec: str, dims: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors as they are stored, scales under names of their own, and what `unpack` needs to know.

    Args:
        dims: tensor -> whose slices have scales of their own.

    Example:
        >>> import torch
        >>> stored, header = pack({"w": torch.tensor([[2.0, 1.0]])}, "int8", {"w": 0})
        >>> sorted(stored), header, unpack(stored, header)["w"].round(decimals=2).tolist()
        (['w', 'w#scale'], {'codec': 'int8', 'dims': {'w': 0}}, [[2.0, 0.9900000095367432]])
    """
    if codec == NONE:
        return dict(tensors), {}
    stored: dict[str, Tensor] = {}
    used: dict[str, int] = {}
    for name, tensor in tensors.items():
        stored[name], scales = encode(tensor, codec, dims.get(name))
        if scales is not None:
            stored[name + SCALE], used[name] = scales, dims[name]
    packs = codec_of(codec).packs
    shapes = {"shapes": {name: list(tensors[name].shape) for name in used}} if packs else {}
    return stored, {"codec": codec, "dims": used, **shapes}


def unpack(stored: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that were packed.

    Raises:
        TwinmergeError: a scale is missing, or the codec is unknown.
    """
    codec = header.get("codec", NONE)
    if codec == NONE:
        return dict(stored)
    if codec not in codec_names():
        raise DataError(
            f"The numbers are stored by the codec {codec!r:.80}, which neither this release nor an installed package "
            "has. Install the package that offers it, or build the file again."
        )
    found: dict[str, Tensor] = {}
    dims: Mapping[str, int] = header["dims"]
    packs = codec_of(codec).packs
    shapes: Mapping[str, Sequence[int]] = {name: header["shapes"][name] for name in dims} if packs else {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if name in dims and name + SCALE not in stored:
            raise DamagedFile(f"The scale of {name!r} is missing. Build the file again.")
        found[name] = decode(tensor, stored.get(name + SCALE), codec, dims.get(name), shapes.get(name))
    return found


class Codecs(Listing):
    """Codec -> about, sliced, packs."""


def list_codecs() -> Codecs:
    """What the numbers of a twin can be stored in on the disk; "none" keeps them as they are.

    Example:
        >>> "int8" in list_codecs()
        True
    """
    found = CODECS.all()
    first = {name: (inspect.getdoc(cls) or "").partition("\n")[0] for name, cls in found.items()}
    return Codecs({n: {"about": first[n], "sliced": cls.sliced, "packs": cls.packs} for n, cls in found.items()})
