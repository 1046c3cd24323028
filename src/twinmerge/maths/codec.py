"""Numbers in fewer bits: half precision, or eight bits with a scale for each row or column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError, nearest

CODECS = ("none", "float16", "int8")
SCALE = "#scale"  # of the tensor whose name stands before it
LEVELS = 127
_MANTISSA = 16  # bits of a scale: LEVELS · scale is then exact, so that decoded numbers encode to the same bytes


def encode(x: Tensor, codec: str, dim: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are stored, and the scales that they are to be multiplied with.

    Eight bits: q = round(x / s), s = max |x| / 127 of each slice along `dim`, rounded up to 16 bits, so that encoding what
    was decoded gives the same bytes. Without a `dim`, numbers that "int8" asks for are stored in half precision.

    Args:
        x: any shape, a floating dtype.
        codec: "none", "float16" or "int8".
        dim: whose slices have a scale each.

    Returns:
        stored; scale: float32, (x.shape[dim],), or None.

    Raises:
        TwinmergeError: an unknown codec, or numbers beyond half precision.

    Example:
        >>> stored, scale = encode(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), "int8", 0)
        >>> stored.tolist(), decode(stored, scale, 0)
        ([[127, -63], [0, 0]], tensor([[ 1.0000, -0.4961],
            [ 0.0000,  0.0000]]))
    """
    if codec not in CODECS:
        raise TwinmergeError(f"Unknown codec {codec!r}.{nearest(codec, CODECS)} Choose from {', '.join(CODECS)}.")
    if codec == "none":
        return x, None
    x = x.float()
    if codec == "int8" and dim is not None and x.numel():
        others = [d for d in range(x.dim()) if d != dim]
        scale = _rounded_up(x.abs().amax(others) / LEVELS)
        shape = [-1 if d == dim else 1 for d in range(x.dim())]
        divisor = torch.where(scale > 0, scale, 1.0).reshape(shape)
        return (x / divisor).round().to(torch.int8), scale
    half = x.half()
    if not bool(half.isfinite().all()):
        raise TwinmergeError(f"{float(x.abs().max()):.4g} is beyond half precision. Use no codec.")
    return half, None


def decode(stored: Tensor, scale: Tensor | None, dim: int | None = None) -> Tensor:
    """What `encode` stored, in float32 (as it was, without a codec)."""
    if scale is None or dim is None:
        return stored.float() if stored.dtype == torch.float16 else stored
    return stored.float() * scale.reshape([-1 if d == dim else 1 for d in range(stored.dim())])


def projected(x: Tensor, codec: str, dim: int | None = None) -> Tensor:
    """The numbers as they read once they were stored."""
    stored, scale = encode(x, codec, dim)
    return x if codec == "none" else decode(stored, scale, dim)


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
    return stored, {"codec": codec, "dims": used}


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
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if name in dims and name + SCALE not in stored:
            raise TwinmergeError(f"The scale of {name!r} is missing. Build the file again.")
        found[name] = decode(tensor, stored.get(name + SCALE), dims.get(name))
    return found


def _rounded_up(scale: Tensor) -> Tensor:
    """To the next number of 16 bits; zero, and numbers that are nearly zero, stay what they are."""
    mantissa, exponent = torch.frexp(scale.double())
    return torch.ldexp((mantissa * 2**_MANTISSA).ceil() / 2**_MANTISSA, exponent).float()
