"""Numbers in fewer bits: half precision, eight bits with a scale for each row or column, four with one for each 64 numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.errors import TwinmergeError, nearest

CODECS = ("none", "float16", "int8", "int4")
SCALE = "#scale"  # of the tensor whose name stands before it
LEVELS = {"int8": 127, "int4": 7}
GROUP = 64  # numbers of four bits that share a scale
MANTISSA = {
    "int8": 16,
    "int4": 8,
}  # bits of a scale: level · scale is then exact, so that decoded numbers encode to the same bytes
LEAST = 2.0**-126  # of a scale of 16 bits that keeps all its bits


def encode(x: Tensor, codec: str, dim: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are stored, and the scales that they are to be multiplied with.

    Eight bits: q = round(x / s), s = max |x| / 127 of each slice along `dim`, rounded up to 16 bits. Four bits: s = max |x| / 7
    of each 64 numbers of a slice, rounded up to bfloat16; two numbers to a byte, the earlier one in the low half, 8 more than q.
    Encoding what was decoded gives the same bytes. Without a `dim`, numbers that either is asked for are stored in half
    precision.

    Args:
        x: any shape, a floating dtype.
        codec: "none", "float16", "int8" or "int4".
        dim: whose slices have scales of their own.

    Returns:
        stored: x's shape; (x.shape[dim], ⌈numbers of a slice / 2⌉) of four bits. scale: None, float32 (x.shape[dim],), or of
        four bits bfloat16 (x.shape[dim], ⌈numbers of a slice / 64⌉).

    Raises:
        TwinmergeError: an unknown codec, or numbers beyond half precision.

    Example:
        >>> stored, scale = encode(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), "int8", 0)
        >>> stored.tolist(), decode(stored, scale, 0)
        ([[127, -63], [0, 0]], tensor([[ 1.0000, -0.4961],
            [ 0.0000,  0.0000]]))
        >>> stored, scale = encode(torch.tensor([[7.0, -2.0, 3.0]]), "int4", 0)
        >>> stored.tolist(), scale.tolist(), decode(stored, scale, 0, (1, 3)).tolist()
        ([[111, 139]], [[1.0]], [[7.0, -2.0, 3.0]])
    """
    _check(codec)
    if codec == "none":
        return x, None
    x = x.float()
    if codec in LEVELS and dim is not None and x.numel():
        if codec == "int4":
            return _in_four_bits(x.movedim(dim, 0).flatten(1))
        others = [d for d in range(x.dim()) if d != dim]
        scale, divisor = _scales(x.abs().amax(others), codec)
        return (x / divisor.reshape(_along(dim, x.dim()))).round().to(torch.int8), scale
    half = x.half()
    if not bool(half.isfinite().all()):
        raise TwinmergeError(f"{float(x.abs().max()):.4g} is beyond half precision. Use no codec.")
    return half, None


def decode(stored: Tensor, scale: Tensor | None, dim: int | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """What `encode` stored, in float32 (as it was, without a codec).

    Args:
        shape: of numbers of four bits, which their bytes do not tell.

    Raises:
        ValueError: stored numbers or scales that are not of this shape.
    """
    if scale is None or dim is None:
        return stored.float() if stored.dtype == torch.float16 else stored
    if shape is None:
        return stored.float() * scale.reshape(_along(dim, stored.dim()))
    moved = [shape[dim], *shape[:dim], *shape[dim + 1 :]]
    return _out_of_four_bits(stored, scale, math.prod(moved[1:])).reshape(moved).movedim(0, dim)


def _check(codec: str) -> None:
    if codec not in CODECS:
        raise TwinmergeError(f"Unknown codec {codec!r}.{nearest(codec, CODECS)} Choose from {', '.join(CODECS)}.")


def _in_four_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    grouped = F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale, divisor = _scales(grouped.abs().amax(2), "int4")
    q = (grouped / divisor[..., None]).round().add(8).to(torch.uint8).flatten(1)[:, : rows.shape[1] + rows.shape[1] % 2]
    return q[:, 0::2] | q[:, 1::2] << 4, scale.bfloat16()


def _out_of_four_bits(stored: Tensor, scale: Tensor, length: int) -> Tensor:
    """(slices, length)."""
    if stored.dtype != torch.uint8 or stored.shape[1:] != (-(-length // 2),):
        raise ValueError("four bits")
    if scale.shape != (len(stored), -(-length // GROUP)):
        raise ValueError("scales of four bits")
    q = torch.stack([stored & 15, stored >> 4], 2).flatten(1)[:, :length]
    return (q.float() - 8) * scale.float().repeat_interleave(GROUP, 1)[:, :length]


def _scales(most: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """The scales of slices or groups with these largest magnitudes, and what to divide by: 1 where all is zero."""
    scale = _rounded_up(most / LEVELS[codec], MANTISSA[codec])
    if codec == "int4":
        scale = torch.where(scale < LEAST, 0.0, scale)
    return scale, torch.where(scale > 0, scale, 1.0)


def _along(dim: int, dims: int) -> list[int]:
    return [-1 if d == dim else 1 for d in range(dims)]


def slice_bytes(length: int, codec: str, plain: int = 4) -> int:
    """Bytes of a slice of so many numbers with its scales; `plain`: bytes of a number without a codec.

    Example:
        >>> [slice_bytes(384, codec) for codec in CODECS]
        [1536, 768, 388, 204]
    """
    _check(codec)
    if codec == "int4":
        return -(-length // 2) + 2 * -(-length // GROUP)
    return {"none": plain, "float16": 2, "int8": 1}[codec] * length + (4 if codec == "int8" else 0)


def projected(x: Tensor, codec: str, dim: int | None = None) -> Tensor:
    """The numbers as they read once they were stored."""
    stored, scale = encode(x, codec, dim)
    return x if codec == "none" else decode(stored, scale, dim, x.shape if codec == "int4" else None)


def pack(
    tensors: Mapping[str, Tensor], codec: str, dims: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors as they are stored, scales under names of their own, and what `unpack` needs to know.

    Args:
        dims: tensor -> whose slices have a scale each.

    Example:
        >>> stored, header = pack({"w": torch.tensor([[2.0, 1.0]])}, "int8", {"w": 0})
        >>> sorted(stored), header, unpack(stored, header)["w"].round(decimals=2).tolist()
        (['w', 'w#scale'], {'codec': 'int8', 'dims': {'w': 0}}, [[2.0, 0.9900000095367432]])
    """
    if codec == "none":
        return dict(tensors), {}
    stored: dict[str, Tensor] = {}
    used: dict[str, int] = {}
    for name, tensor in tensors.items():
        stored[name], scale = encode(tensor, codec, dims.get(name))
        if scale is not None:
            stored[name + SCALE], used[name] = scale, dims[name]
    shapes = {"shapes": {name: list(tensors[name].shape) for name in used}} if codec == "int4" else {}
    return stored, {"codec": codec, "dims": used, **shapes}


def unpack(stored: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that were packed.

    Raises:
        TwinmergeError: a scale is missing, or the codec is unknown.
    """
    codec = header.get("codec", "none")
    if codec == "none":
        return dict(stored)
    if codec not in CODECS:
        raise TwinmergeError(f"The codec {codec!r} is unknown to this release. Build the file again.")
    found: dict[str, Tensor] = {}
    dims: Mapping[str, int] = header["dims"]
    shapes: Mapping[str, Sequence[int]] = {n: header["shapes"][n] for n in dims} if codec == "int4" else {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if name in dims and name + SCALE not in stored:
            raise TwinmergeError(f"The scale of {name!r} is missing. Build the file again.")
        found[name] = decode(tensor, stored.get(name + SCALE), dims.get(name), shapes.get(name))
    return found


def _rounded_up(scale: Tensor, bits: int) -> Tensor:
    """To the next number of so many bits; zero, and numbers that are nearly zero, stay what they are."""
    mantissa, exponent = torch.frexp(scale.double())
    return torch.ldexp((mantissa * 2**bits).ceil() / 2**bits, exponent).float()
