"""What a recipe gives each tensor of the output: its sources and parameters, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from twinmerge.arguments import strict
from twinmerge.engine.merge import Merge
from twinmerge.engine.plan import BASE, Entry, Plan
from twinmerge.methods.kit.registry import is_per_expert
from twinmerge.models.blocks import block_of
from twinmerge.recipes.documents import read_all
from twinmerge.recipes.lines import Scaled
from twinmerge.recipes.override import overridden
from twinmerge.recipes.recipe import Recipe
from twinmerge.results import Table, cell


class Part(NamedTuple):
    """Tensors of the output that are made in the same way.

    Attributes:
        layers: the first and the last of the output's layers, None for what is outside them.
        tensors: their names inside a layer, or in the model.
        sources: model -> the number of its first layer, or None where it gives the tensor of the same name.
        base: the model that changes are taken against, None where none is read.
        parameters: of the method; what differs between models by their names.
        amounts: model -> its part in what comes out, as far as parameters say it; None where values alone decide.
    """

    layers: tuple[int, int] | None
    tensors: tuple[str, ...]
    sources: Mapping[str, int | None]
    base: str | None
    parameters: Mapping[str, Any]
    amounts: Mapping[str, float] | None


class _Explained(NamedTuple):
    method: str
    semantics: str
    parts: list[Part]
    copied: list[str]
    made: Mapping[str, str] = MappingProxyType({})
    documents: Mapping[str, Explained] = MappingProxyType({})


class Explained(Table, _Explained):
    """What a recipe gives each tensor. As a table: a row for each kind of tensor and run of layers.

    Attributes:
        method: that merges.
        semantics: whose its formula is.
        parts: in the order of the layers, what is outside them first.
        copied: tensors that the base gives as they are.
        made: source -> the document that it is, where a recipe of several stands in the place of a model.
        documents: name -> what is said of it, each after those that it takes.
    """

    def _summary(self) -> str:
        return f"{self.method}, {len(self.parts)} kinds of tensors, {len(self.copied)} copied"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        rows = [(_layers(p), _names(p.tensors), _sources(p, self.made), _settings(p.parameters)) for p in self.parts]
        return ("layers", "tensors", "made of", "parameters"), rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge recipe explain --json` prints."""
        parts = [
            {**p._asdict(), "tensors": list(p.tensors), "layers": list(p.layers) if p.layers else None}
            for p in self.parts
        ]
        found = {**self._asdict(), "parts": parts, "made": dict(self.made)}
        return {**found, "documents": {name: each.to_dict() for name, each in self.documents.items()}}

    @property
    def in_turn(self) -> list[tuple[str, Explained]]:
        """The documents, then this one, which has no name."""
        return [*self.documents.items(), ("", self)]


@strict
def explain_recipe(recipe: Recipe | str | Path, parameters: Mapping[str, Any] | None = None) -> Explained:
    """Say of every tensor of the output which models and layers it is made of, and by which parameters.

    Of several documents each is explained in turn. Headers are read, and no weights but the beginning of one matrix.

    Args:
        recipe: or its file.
        parameters: that take the place of the recipe's, as `twinmerge merge -p` has them.

    Raises:
        TwinmergeError: as a merge of it.
    """
    if isinstance(recipe, Recipe):
        found, names = recipe, {}
    else:
        several = read_all(recipe)
        found, names = several.nested, {id(each): name for name, each in several.made.items()}
    if parameters:
        found = overridden(found, parameters)[0]
    documents: dict[str, Explained] = {}
    whole = _explained(found, names, documents)
    return whole._replace(documents=documents)


def _explained(found: Recipe, known: dict[int, str], documents: dict[str, Explained]) -> Explained:
    """What is said of one recipe alone; that of the recipes that are its models is put among the documents.

    Args:
        found: the recipe.
        known: names of recipes that are models, by their identity.
        documents: what is known so far.
    """
    made: dict[str, str] = {}
    for label, model in {BASE: found.base, **found.experts}.items():
        inner = getattr(model, "recipe", model)
        if isinstance(inner, Recipe):
            name = known.setdefault(id(inner), _free(label, known.values()))
            if name not in documents:
                documents[name] = _explained(inner, known, documents)
            made[label] = name
    plan = Merge(found, progress=False).plan
    kinds: dict[tuple[Any, ...], list[tuple[int | None, str]]] = {}
    said: dict[tuple[Any, ...], Entry] = {}
    for entry in plan.merged.values():
        place = block_of(entry.tensor)
        inside = _inside(entry.tensor) if place else entry.tensor
        shifts = tuple((label, _shift(entry.tensor, source.tensor)) for label, source in entry.sources.items())
        key = (entry.rule, entry.place.experts, entry.base is not None and entry.base_label, shifts)
        kinds.setdefault(key, []).append((place[1] if place else None, inside))
        said.setdefault(key, entry)
    parts = []
    for key, members in kinds.items():
        by_layer: dict[int | None, set[str]] = {}
        for layer, name in members:
            by_layer.setdefault(layer, set()).add(name)
        for first, last, names in _runs(by_layer):
            parts.append(_part(plan, said[key], first, last, names, key[3]))
    parts.sort(key=lambda p: (p.layers is not None, p.layers or (0, 0), p.tensors))
    return Explained(found.method_name, found.semantics, parts, sorted(e.tensor for e in plan.copied.values()), made)


def _free(label: str, taken: Collection[str]) -> str:
    """A name that no document has yet."""
    names = chain([label], (f"{label}_{i}" for i in count(2)))
    return next(name for name in names if name not in taken)


def _part(
    plan: Plan, entry: Entry, first: int | None, last: int | None, names: set[str], shifts: tuple[tuple[str, int], ...]
) -> Part:
    rule = entry.rule
    method = rule.method if isinstance(rule, Scaled) else rule
    fields = {**method.model_dump(), **({"by": rule.by} if isinstance(rule, Scaled) else {})}
    fields.pop("compat", None)
    for key, value in fields.items():
        if key in type(method).model_fields and is_per_expert(type(method), key) and isinstance(value, tuple):
            fields[key] = dict(zip(entry.place.experts, value, strict=True))
    sources = {label: None if first is None else first + shift for label, shift in shifts}
    layers = None if first is None or last is None else (first, last)
    base = entry.base_label if entry.base is not None else None
    amounts = method.amounts(len(entry.place.experts))
    by_name = None if amounts is None else dict(zip(entry.place.experts, amounts, strict=True))
    return Part(layers, tuple(sorted(names)), sources, base, fields, by_name)


def _runs(by_layer: Mapping[int | None, set[str]]) -> list[tuple[int | None, int | None, set[str]]]:
    """Layers that follow each other and have the same tensors, together."""
    found: list[tuple[int | None, int | None, set[str]]] = []
    for layer in sorted(by_layer, key=lambda n: (n is not None, n or 0)):
        names = by_layer[layer]
        last = found[-1] if found else None
        if last and layer is not None and last[1] is not None and last[1] + 1 == layer and last[2] == names:
            found[-1] = (last[0], layer, names)
        else:
            found.append((layer, layer, names))
    return found


def _inside(name: str) -> str:
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[at + 1 :])


def _shift(name: str, other: str) -> int:
    """By how many layers the source lies further on than the output."""
    here, there = block_of(name), block_of(other)
    return there[1] - here[1] if here and there else 0


def _layers(part: Part) -> str:
    if part.layers is None:
        return "–"
    first, last = part.layers
    return str(first) if first == last else f"{first}–{last}"


def _names(names: Sequence[str]) -> str:
    """The names by their first component, with how many there are."""
    heads: dict[str, list[str]] = {}
    for name in names:
        heads.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(own[0] if len(own) == 1 else f"{head}.* ({len(own)})" for head, own in heads.items())


def _sources(part: Part, made: Mapping[str, str]) -> str:
    said = []
    for label, layer in part.sources.items():
        run = ""
        if layer is not None and part.layers is not None:
            last = layer + part.layers[1] - part.layers[0]
            run = f" {layer}" if last == layer else f" {layer}–{last}"
        document = "" if label not in made else "document" if made[label] == label else f"document {made[label]}"
        roles = ", ".join(filter(None, ("base" if label == part.base else "", document)))
        said.append(f"{label}{run}{f' ({roles})' if roles else ''}")
    return ", ".join(said)


def _settings(parameters: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {'/'.join(cell(v) for v in value.values()) if isinstance(value, dict) else cell(value)}"
        for name, value in parameters.items()
    )
