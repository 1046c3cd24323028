"""A merge as data: of every tensor of the output what it is made of, and by which rule.

Nothing here is open, and nothing reads a file: a plan can be looked at, pickled, sent elsewhere, and written down
(`engine/plan_file.py`). `engine/planning.py` makes it, `engine/inputs.py` opens and reads what it names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from twinmerge.engine.ranges import Grains
from twinmerge.engine.rounding import Rounding
from twinmerge.engine.view import WHOLE, View
from twinmerge.methods.kit.base import Grain, Method, Need, Place
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.lines import Lines, Scaled, at_depth, coefficient
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.used import of_rules, parameters_used
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import SIZES

BASE = "base"


@dataclass(frozen=True)
class Source:
    """What one model gives to one tensor of the output.

    Attributes:
        tensor: its canonical name in that model.
        code: the dtype that it is read in, as safetensors calls it.
        view: which part of it.
    """

    tensor: str
    code: str
    view: View = WHOLE


@dataclass(frozen=True)
class Entry:
    """One tensor of the output.

    Attributes:
        place: its name in the output, its shape, and what the model's class says of it.
        spec: the dtype and shape that are written.
        tensor: its canonical name, under which statistics and masks are kept.
        experts: what each expert gives, in the order of `place.experts`; empty for what is copied.
        base: what the base gives, None where the method does not read it.
        base_label: which model that is: "base", or the name of an expert where a slice has a base of its own.
        method: the rule, with the parameters that hold for this tensor; None for what is copied from the base.
        grain: which tiles the rule can work on.
    """

    place: Place
    spec: Spec
    tensor: str
    experts: tuple[Source, ...] = ()
    base: Source | None = None
    method: Method | None = None
    grain: Grain = "element"
    base_label: str = BASE

    @property
    def name(self) -> str:
        """In the output."""
        return self.place.name

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.place.shape)

    @property
    def sources(self) -> dict[str, Source]:
        """Label of the input -> what it gives."""
        found = dict(zip(self.place.experts, self.experts, strict=True)) if self.experts else {}
        return found if self.base is None else {**found, self.base_label: self.base}

    @property
    def rule(self) -> Method:
        """The method of a tensor that is merged."""
        assert self.method is not None, f"{self.name} is copied"
        return self.method


Entries = Mapping[str, Entry]
"""Name in the output -> what it is made of."""


@dataclass(frozen=True)
class Input:
    """A model that a plan names.

    Attributes:
        model: where it is, or the model itself where it is in memory.
        name: how messages call it.
        commit: the hub's commit that was found.
        files: that are read, empty for models in memory.
        fingerprint: of its tensors, where the plan was sealed (`Models.seal`).
    """

    model: ModelLike
    name: str
    commit: str | None = None
    files: tuple[Path, ...] = ()
    fingerprint: str | None = None


@dataclass(frozen=True)
class Plan:
    """All of a merge.

    Attributes:
        recipe: what was asked for.
        method: its method.
        base: the model whose names, config and side files the output has: the base, or the first expert where the
            recipe names no base.
        experts: name -> model, in the order in which the method sees them.
        merged: name in the output -> entry, in the order in which they are read.
        copied: the same of what the base gives alone: integers, buffers, parts that no expert has.
        heads: expert -> canonical names of its own output layers.
        ignored: expert -> what loading it passes over.
        configs: expert -> keys of its config that say something else than the base's: its value and the base's.
        blocks: path -> number of blocks of each stack of them, where LiNeS asks.
        lines: LiNeS, with the a that is used once it is known; None where it is not asked for.
        architecture: the models' classes were asked what their tensors are.
        tile: elements that are read and written at once.
        config: what the output's config says otherwise than the base's.
        edited: it was read from a file whose rules are not those that the recipe gives.
        key: of a sealed plan, under which a worker keeps what it has opened.
    """

    recipe: Recipe
    method: Method
    base: Input
    experts: Mapping[str, Input]
    merged: Entries
    copied: Entries
    heads: Mapping[str, list[str]] = field(default_factory=dict)
    ignored: Mapping[str, list[str]] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    lines: Lines | None = None
    architecture: bool = False
    tile: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    edited: bool = False
    key: str | None = None

    @cached_property
    def entries(self) -> Entries:
        """All of them."""
        return {**self.merged, **self.copied}

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Name in the output -> dtype and shape of every tensor of it."""
        return {name: entry.spec for name, entry in self.entries.items()}

    @cached_property
    def canonical(self) -> dict[str, str]:
        """Name in the output -> canonical name."""
        return {name: entry.tensor for name, entry in self.entries.items()}

    @property
    def inputs(self) -> dict[str, Input]:
        """The base and the experts by the labels that the provenance gives them."""
        return {"base": self.base, **{f"expert {name}": model for name, model in self.experts.items()}}

    @property
    def output_bytes(self) -> int:
        """Of all tensors that are written."""
        return sum(spec.bytes for spec in self.specs.values())

    @property
    def written_dtype(self) -> str | None:
        """What the output's config is to say: the recipe's, or the widest that is written where that is another than
        the base's, so that loading rounds nothing off; None for the base's."""
        if not self.edited and (self.recipe.dtype is not None or not self._widened):
            return self.recipe.dtype
        written = [entry.spec for entry in self.entries.values() if entry.spec.is_float]
        return max(written, key=lambda spec: (spec.itemsize, spec.code == "BF16")).name

    @property
    def _widened(self) -> bool:
        """Whether a tensor is wider than one of its inputs, as mergekit writes them of several dtypes."""
        return self.recipe.semantics == "mergekit" and any(
            entry.spec.itemsize > min(SIZES[source.code] for source in entry.sources.values())
            for entry in self.merged.values()
        )

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The method's parameters with their defaults, as `parameters_used` has them; or those of an edited plan's
        rules, and "by tensor" for those that differ between them."""
        if not self.edited:
            return parameters_used(self.recipe)
        own = {rule.method if isinstance(rule, Scaled) else rule: None for rule in methods_of(self.merged)}
        return of_rules(self.recipe, own)

    def rounding(self, name: str) -> Rounding:
        """How a tensor of the output is rounded."""
        return Rounding(self.entries[name].spec.code, self.recipe.stochastic)

    def with_lines(self, a: float) -> Plan:
        """The plan with every rule scaled by LiNeS' coefficient of its depth, now that a is known."""
        assert self.lines is not None
        b = self.lines.b
        merged = {
            name: replace(entry, method=at_depth(entry.rule, coefficient(entry.tensor, self.blocks, a, b)))
            for name, entry in self.merged.items()
        }
        return replace(self, merged=merged, lines=Lines(a, b))


def shapes_of(entries: Entries) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: entry.place.shape for name, entry in entries.items()}


def grains_of(entries: Entries) -> Grains:
    """Name -> which tiles its rule can work on."""
    return {name: entry.grain for name, entry in entries.items()}


def methods_of(entries: Entries) -> Iterator[Method]:
    """The rules of the entries, each object once."""
    return iter({id(entry.method): entry.method for entry in entries.values() if entry.method is not None}.values())


def needs_of(entries: Entries) -> set[Need]:
    """The statistics that the rules read."""
    return {need for method in methods_of(entries) for need in method.needs}


def element_bytes(merged: Entries, specs: Mapping[str, Spec]) -> int:
    """Of one element of every input, of its statistics and of the output, each of the widest dtype that it has."""
    count = max((len(entry.sources) for entry in merged.values()), default=0)
    codes = [[source.code for source in entry.sources.values()] for entry in merged.values()]
    inputs = sum(max((SIZES[of[i]] for of in codes if i < len(of)), default=0) for i in range(count))
    fisher = SIZES["F32"] * max((len(e.experts) for e in merged.values()), default=0) * ("fisher" in needs_of(merged))
    return inputs + fisher + max((spec.itemsize for spec in specs.values()), default=1)
