"""The exclusive parts of all experts, attached to the shared model: mixed row by row, or folded into one set of weights.

The modules, their names and their weights stay as transformers made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import TwinmergeError
from twinmerge.models.headed import HeadedModel
from twinmerge.twin.converted import Converted, Slot, converted
from twinmerge.twin.forward import State, takes_factors
from twinmerge.twin.mixture import Mixture
from twinmerge.twin.modules import attach
from twinmerge.twin.parts import Dense, Low, Masks, Part
from twinmerge.twin.split import Exclusive, Masked, shared_vectors


class Place(NamedTuple):
    """Where a parameter is used: a module by its path, and the name that it has there."""

    path: str
    module: nn.Module
    attribute: str


class Runtime(nn.Module):
    """The exclusive parts of all experts, attached to a model.

    Args:
        model: the shared model; modules of its `body` are made to add each row's part.
        experts: in the order of the mixture's columns.

    Attributes:
        refused: why some modules cannot mix row by row, a sentence for each; such a twin takes one mixture at a time.
        broken: names of parameters that hold NaN or infinity, by expert.

    Errors:
        TwinmergeError: a parameter that the body does not have.
    """

    def __init__(self, model: HeadedModel, experts: Sequence[Exclusive]) -> None:
        super().__init__()
        self.state = State()
        self.parts = nn.ModuleDict()
        self.places: list[tuple[Place, Part | Converted]] = []
        self.refused: list[str] = []
        self._folded: tuple[list[float], list[nn.Parameter]] | None = None  # of one mixture
        owners = _owners(model)
        names = sorted({n for e in experts for n in e.names})
        if missing := [n for n in names if n not in owners and n not in model.conversions]:
            raise TwinmergeError(
                f"The model has no parameter {missing[0]!r}, which the experts change. Build the twin on the model that "
                "they were tuned from."
            )
        finite = {id(v): bool(v.isfinite().all()) for v in shared_vectors(experts).values()}  # each looked at once
        self.broken = {
            i: name
            for i, e in enumerate(experts)
            for name in names
            if not all(finite[id(t)] if id(t) in finite else bool(t.isfinite().all()) for t in _tensors(e, name))
        }
        changed: dict[str, dict[str, Part]] = {}
        modules: dict[str, nn.Module] = {}
        for parameter, conversion, own in converted(model.conversions, model.shapes, names):
            like = getattr(owners[parameter][0].module, owners[parameter][0].attribute)
            slots = {n: Place(n, Slot(model.shapes[n], like), "part") for n in own}
            whole = Converted(
                parameter, conversion, model.shapes, {n: _gather(n, experts, slot) for n, slot in slots.items()}
            )
            self.parts[parameter.replace(".", "/")] = whole
            for place in owners[parameter]:
                self.places.append((place, whole))
                self.refused.append(
                    f"The module {place.path!r} ({type(place.module).__name__}) holds {len(conversion.parts)} stored tensors in one, "
                    f"{place.attribute}, which has no exact mixture per row."
                )
        for name in (n for n in names if n not in model.conversions):
            part = _gather(name, experts, owners[name][0])
            self.parts[name.replace(".", "/")] = part
            for place in owners[name]:
                modules[place.path] = place.module
                changed.setdefault(place.path, {})[place.attribute] = part
                self.places.append((place, part))
        parents = dict(model.body.named_modules())
        for path, parameters in changed.items():
            parent = parents[path.rpartition(".")[0]] if path else None
            if (why := attach(self.state, path, modules[path], parent, parameters)) is not None:
                self.refused.append(why)

    @contextmanager
    def mixing(self, mixture: Mixture, biases: Mixture | None = None, copies: bool = False) -> Iterator[None]:
        """Within the context every forward of the body uses this mixture."""
        self.check(mixture.used)
        if self.refused and mixture.used:
            raise TwinmergeError(
                f'{self.refused[0]} Say strategy="rebuild", or keep these parameters with the heads (--head).'
            )
        self.state.mixture, self.state.biases, self.state.copies = mixture, biases, copies
        try:
            yield
        finally:
            self.state.mixture, self.state.biases, self.state.copies = None, None, False

    @contextmanager
    def folded(self, weights: Tensor) -> Iterator[None]:
        """Within the context the body has the dense weights θs + Σ wt vt of one mixture, weights (experts,).

        The parameters themselves are not touched: others take their place meanwhile. The weights of the last mixture are
        kept, so that the next call with it starts at once.
        """
        self.check(weights.nonzero()[:, 0].tolist())
        dense = self._dense_weights(weights)
        own = [place.module._parameters[place.attribute] for place, _ in self.places]
        try:
            for (place, _), parameter in zip(self.places, dense, strict=True):
                _put(place, parameter)
            yield
        finally:
            for (place, _), before in zip(self.places, own, strict=True):
                _put(place, before)

    def is_folded(self, weights: Tensor) -> bool:
        """True where the dense weights of this mixture are at hand."""
        return self._folded is not None and self._folded[0] == weights.tolist()

    def forget(self) -> None:
        """Give back the memory of the mixture that was folded last."""
        self._folded = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Runtime:
        """On the way to another device or dtype: what was folded stays behind."""
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _dense_weights(self, weights: Tensor) -> list[nn.Parameter]:
        if self._folded is None or not self.is_folded(weights):
            self._folded = None  # before the next one is made
            made: dict[int, nn.Parameter] = {}  # a tied parameter is one tensor at all its places
            for place, part in self.places:
                if id(part) not in made:
                    mixed = part.mixed(getattr(place.module, place.attribute), weights)
                    made[id(part)] = nn.Parameter(mixed, requires_grad=False)
            self._folded = (weights.tolist(), [made[id(part)] for _, part in self.places])
        return self._folded[1]

    def check(self, used: Sequence[int]) -> None:
        """Refuse experts whose parts are no numbers; those of no weight are never read."""
        for expert in used:
            if expert in self.broken:
                raise TwinmergeError(
                    f"The part of expert number {expert} for {self.broken[expert]!r} holds NaN or infinity. Build the twin again."
                )


def _put(place: Place, parameter: nn.Parameter | None) -> None:
    if isinstance(place.module, nn.RNNBase):  # it keeps a list of its weights besides
        setattr(place.module, place.attribute, parameter)
    else:
        place.module._parameters[place.attribute] = parameter


def _owners(model: HeadedModel) -> dict[str, list[Place]]:
    """Canonical name of a parameter -> where the body uses it."""
    owners: dict[str, list[Place]] = {}
    for path, module in model.body.named_modules():
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            canonical = model.canonical(f"{path}.{attribute}" if path else attribute)
            canonical = model.architecture.aliases.get(canonical, canonical)
            owners.setdefault(canonical, []).append(Place(path, module, attribute))
    return owners


def _tensors(expert: Exclusive, name: str) -> list[Tensor]:
    if name in expert.low:
        return [expert.low[name].b, expert.low[name].a]
    if name in expert.masked:
        return [expert.masked[name].vector]
    return [expert.dense[name]] if name in expert.dense else []


def _gather(name: str, experts: Sequence[Exclusive], place: Place) -> Part:
    """The experts' parts of one parameter, in its dtype."""
    parameter: Tensor = getattr(place.module, place.attribute)
    if any(name in e.masked for e in experts):
        return _gather_masks(name, [e.masked.get(name) for e in experts], place, parameter)
    factors = {i: (e.low[name].b, e.low[name].a) for i, e in enumerate(experts) if name in e.low}
    if not factors and place.attribute == "weight" and takes_factors(place.module):
        factors = {i: _own_factors(e.dense[name]) for i, e in enumerate(experts) if name in e.dense}
    if factors:
        low = {i: (b.to(parameter), a.to(parameter)) for i, (b, a) in factors.items()}
        return Low(name, low, len(experts), turned=isinstance(place.module, Conv1D))
    dense = [e.dense.get(name) for e in experts]
    return Dense(name, torch.stack([torch.zeros_like(parameter) if d is None else d.to(parameter) for d in dense]))


def _gather_masks(name: str, masks: Sequence[Masked | None], place: Place, parameter: Tensor) -> Masks | Dense:
    """Masks as they are, τ once; a parameter that is a vector, or has an axis of rows to spare, is small and made dense."""
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
