"""Experts that are masks of one vector: made from tensors, and as twin.safetensors holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import UsageError, nearest
from twinmerge.maths.bits import byte_count, check, pack
from twinmerge.models.opened import OpenedModel
from twinmerge.store.artefact import Artefact
from twinmerge.twin import SCALES, TWIN_VERSION
from twinmerge.twin.split import Exclusive, Masked, shared_vectors


def masked(
    vector: Mapping[str, Tensor],
    masks: Mapping[str, Mapping[str, Tensor]],
    scales: Mapping[str, float] | None = None,
) -> dict[str, Exclusive]:
    """The exclusive parts vt = st · mt ⊙ τ of experts that share τ.

    Args:
        vector: canonical name -> τ, in the parameter's shape and dtype.
        masks: expert -> canonical name -> mt, bool, of that shape; a parameter without one stays the shared model's.
        scales: expert -> st; 1 where it is not given.

    Raises:
        TwinmergeError: a mask of a parameter that has no vector, of another shape or dtype, or a scale that is not
            finite.

    Example:
        >>> parts = masked({"w": torch.tensor([1.0, 2.0])}, {"a": {"w": torch.tensor([True, False])}, "b": {}})
        >>> parts["a"].masked["w"].dense().tolist(), parts["b"].masked["w"].dense().tolist()
        ([1.0, 0.0], [0.0, 0.0])
    """
    found = {}
    for expert, own in masks.items():
        scale = float((scales or {}).get(expert, 1.0))
        if not math.isfinite(scale):
            raise UsageError(f"The scale of {expert!r} is {scale}. Give a finite one.")
        for name, mask in own.items():
            if name not in vector:
                raise UsageError(f"The vector lacks {name!r}, which {expert!r} masks.{nearest(name, vector)} Add it.")
            if mask.dtype != torch.bool or mask.shape != vector[name].shape:
                raise UsageError(
                    f"The mask of {name!r} of {expert!r} is {list(mask.shape)} of {mask.dtype}, the vector is "
                    f"{list(vector[name].shape)}. Give booleans of that shape."
                )
        bits = {n: pack(own[n]) if n in own else _none(v) for n, v in vector.items()}
        found[expert] = Exclusive({}, {}, masked={n: Masked(v, bits[n], scale) for n, v in vector.items()})
    return found


def unmasked(base: Tensor, vector: Tensor, mask: Tensor, scale: float) -> Tensor:
    """θ0 + s · m ⊙ τ, rounded once to the base's dtype; the base's own bits where the mask is 0.

    Example:
        >>> base, vector = torch.tensor([1.0, -0.0, 2.0]), torch.tensor([0.5, 0.5, -4.0])
        >>> unmasked(base, vector, torch.tensor([True, False, True]), 0.5).tolist()
        [1.25, -0.0, 0.0]
    """
    moved = torch.add(base.double(), vector.double(), alpha=scale).to(base.dtype)
    return torch.where(mask, moved, base)


def _none(vector: Tensor) -> Tensor:
    return torch.zeros(byte_count(vector.numel()), dtype=torch.uint8)


def pack_masks(parts: Mapping[str, Exclusive], base: str, record: Mapping[str, Any]) -> Artefact:
    """twin.safetensors of masked experts.

    Args:
        base: fingerprint of the shared model.
        record: more of the header: the method and its fields.

    Raises:
        UsageError: an expert of another kind among them.
    """
    vectors = shared_vectors(parts.values())
    tensors: dict[str, Tensor] = {f"vector/{name}": vector for name, vector in vectors.items()}
    scales = []
    for i, (expert, part) in enumerate(parts.items()):
        if part.low or part.dense:
            raise UsageError(f"{expert!r} is no mask, other experts are. Keep experts of one kind in a twin.")
        own = {n: part.masked[n].bits if n in part.masked else _none(v) for n, v in vectors.items()}
        tensors |= {f"{i}/m/{name}": bits for name, bits in own.items()}
        scales.append(next((m.scale for m in part.masked.values()), 1.0))
    tensors[SCALES] = torch.tensor(scales, dtype=torch.float64)
    lengths = {name: vector.numel() for name, vector in vectors.items()}
    masks = {"method": "masks", **record, "lengths": lengths}
    return Artefact("twin", TWIN_VERSION, base, {"experts": list(parts), "masks": masks}, tensors)


def unpack_masks(artefact: Artefact, shared: OpenedModel) -> dict[str, Exclusive]:
    """The parts of masked experts out of twin.safetensors, strictly.

    Raises:
        ValueError, LookupError, TypeError: anything that does not fit together, or the shared model's tensors.
    """
    experts: list[str] = artefact.header["experts"]
    lengths: dict[str, int] = artefact.header["masks"]["lengths"]
    tensors = dict(artefact.tensors)
    scales = tensors.pop(SCALES)
    if scales.dtype != torch.float64 or scales.shape != (len(experts),) or not bool(scales.isfinite().all()):
        raise ValueError(SCALES)
    vectors = {name: tensors.pop(f"vector/{name}") for name in lengths}
    for name, vector in vectors.items():
        own = shared.specs.get(name)  # what the model does not have is refused by name later
        if own is not None and (tuple(vector.shape), vector.dtype) != (own.shape, own.dtype):
            raise ValueError(name)
        if not vector.is_floating_point() or type(lengths[name]) is not int or vector.numel() != lengths[name]:
            raise ValueError(name)
    parts = {}
    for i, (expert, scale) in enumerate(zip(experts, scales.tolist(), strict=True)):
        own_masks = {name: Masked(vector, tensors.pop(f"{i}/m/{name}"), scale) for name, vector in vectors.items()}
        for name, mask in own_masks.items():
            check(mask.bits, lengths[name])
        parts[str(expert)] = Exclusive({}, {}, masked=own_masks)
    if not experts or len(parts) < len(experts) or tensors:
        raise ValueError("experts")
    return parts


def told_of(artefact: Artefact) -> dict[str, Any]:
    """What the header says of the masks beside their lengths: the method and its fields."""
    record = {key: value for key, value in artefact.header["masks"].items() if key != "lengths"}
    if not isinstance(record["method"], str):
        raise ValueError("method")
    return record


def record_without(record: Mapping[str, Any], expert: int, count: int) -> dict[str, Any]:
    """The same where an expert is gone: fields of one value for each expert lose its own.

    Example:
        >>> record_without({"method": "tall_masks", "thresholds": [0.2, 0.4]}, 0, 2)
        {'method': 'tall_masks', 'thresholds': [0.4]}
    """
    return {
        key: value[:expert] + value[expert + 1 :] if isinstance(value, list) and len(value) == count else value
        for key, value in record.items()
    }
