"""The experts' parts of each parameter, gathered for the modules that use it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import ModelError
from twinmerge.models.headed import HeadedModel
from twinmerge.twin.mixing.kinds import takes_factors
from twinmerge.twin.mixing.parts import Dense, Low, Masks, Part
from twinmerge.twin.split import Exclusive, Masked, shared_vectors


class Place(NamedTuple):
    """Where a parameter is used: a module by its path, and the name that it has there."""

    path: str
    module: nn.Module
    attribute: str


def places_of(model: HeadedModel) -> dict[str, list[Place]]:
    """Canonical name of a parameter -> where the body uses it."""
    owners: dict[str, list[Place]] = {}
    for path, module in model.body.named_modules():
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            canonical = model.canonical(f"{path}.{attribute}" if path else attribute)
            canonical = model.architecture.aliases.get(canonical, canonical)
            owners.setdefault(canonical, []).append(Place(path, module, attribute))
    return owners


def tensors_of(expert: Exclusive, name: str) -> list[Tensor]:
    if name in expert.low:
        return [expert.low[name].b, expert.low[name].a]
    if name in expert.masked:
        return [expert.masked[name].vector]
    return [expert.dense[name]] if name in expert.dense else []


def require_known(known: Collection[str], experts: Sequence[Exclusive]) -> None:
    """Refuse experts that change what the model does not have.

    Args:
        known: canonical names of what it has.

    Raises:
        ModelError: such a name.
    """
    if missing := sorted({n for e in experts for n in e.names if n not in known}):
        raise ModelError(
            f"The model has no parameter {missing[0]!r}, which the experts change. Build the twin on the model that "
            "they were tuned from."
        )


def broken_parts(experts: Sequence[Exclusive]) -> dict[int, str]:
    """Number of an expert -> name of a parameter for which its part holds NaN or infinity."""
    finite = {id(v): bool(v.isfinite().all()) for v in shared_vectors(experts).values()}  # each looked at once

    def whole(tensor: Tensor) -> bool:
        return finite[id(tensor)] if id(tensor) in finite else bool(tensor.isfinite().all())

    return {
        i: name
        for i, e in enumerate(experts)
        for name in sorted(e.names)
        if not all(whole(t) for t in tensors_of(e, name))
    }


def refuse_broken(broken: Mapping[int, str], used: Sequence[int]) -> None:
    """Refuse experts whose parts are no numbers; those of no weight are never read.

    Raises:
        ModelError: such an expert.
    """
    for expert in used:
        if expert in broken:
            raise ModelError(
                f"The part of expert number {expert} for {broken[expert]!r} holds NaN or infinity. Build the twin "
                "again."
            )


def gather(name: str, experts: Sequence[Exclusive], place: Place) -> Part:
    """The experts' parts of one parameter, in its dtype."""
    parameter: Tensor = getattr(place.module, place.attribute)
    if any(name in e.masked for e in experts):
        return _gather_masks(name, [e.masked.get(name) for e in experts], place, parameter)
    factors = {i: (e.low[name].b, e.low[name].a) for i, e in enumerate(experts) if name in e.low}
    if not factors and place.attribute == "weight" and takes_factors(place.module):
        factors = {i: _own_factors(e.dense[name]) for i, e in enumerate(experts) if name in e.dense}
    if factors:
        low = {i: (b.to(parameter), a.to(parameter)) for i, (b, a) in factors.items()}
        return Low(name, low, len(experts), transposed=isinstance(place.module, Conv1D))
    dense = [e.dense.get(name) for e in experts]
    return Dense(name, torch.stack([torch.zeros_like(parameter) if d is None else d.to(parameter) for d in dense]))


def _gather_masks(name: str, masks: Sequence[Masked | None], place: Place, parameter: Tensor) -> Masks | Dense:
    """Masks as they are, τ once; a parameter that is a vector, or has an axis of rows to spare, is small and made
    dense."""
    multiplied = place.attribute == "weight" and takes_factors(place.module)
    if (parameter.dim() == 1 or parameter.shape[0] == 1) and not multiplied:
        dense = [torch.zeros_like(parameter) if m is None else m.dense().to(parameter) for m in masks]
        return Dense(name, torch.stack(dense))
    vector = next(m.vector for m in masks if m is not None)
    bits = [m.bits if m is not None and bool(m.bits.any()) else None for m in masks]
    return Masks(name, vector.to(parameter), bits, [0.0 if m is None else m.scale for m in masks])


def _own_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A single row or column is its own factor."""
    flat = matrix.flatten(1)
    one = flat.new_ones(1, 1)
    return (one, flat) if len(flat) == 1 else (flat, one)
