"""From a recipe and its opened models to a plan: which tensor goes where, in which order, by which rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from twinmerge.engine.models import Models
from twinmerge.engine.plan import Entry, Input, Plan, Source, element_bytes
from twinmerge.engine.ranges import tile_of
from twinmerge.engine.slicing import Sliced
from twinmerge.engine.targets import Target, whole
from twinmerge.engine.view import WHOLE, View
from twinmerge.errors import RecipeError
from twinmerge.methods.kit.base import Method, Place
from twinmerge.models.matching import Matched, layers_of
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.rules import Rules
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import CODES


def planned(
    recipe: Recipe,
    models: Models,
    matched: Matched,
    architecture: bool,
    tile: int | None,
    sliced: Sliced | None = None,
) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: what is to be merged.
        models: its opened models.
        matched: which tensor of each goes where.
        architecture: the models' classes were asked.
        tile: elements that are read and written at once; by their bytes where None.
        sliced: the tensors of a model that is put together out of layers; whole models are merged where None.

    Raises:
        TwinmergeError: a parameter that some tensor has no value of.
    """
    base, rules = models.base, Rules(recipe)
    code = CODES[recipe.dtype] if recipe.dtype else None
    targets = list(whole(recipe, models, matched)) if sliced is None else sliced.targets
    if code is None and recipe.semantics == "mergekit":
        targets = _widened(models, targets)

    def spec_of(spec: Spec) -> Spec:
        return Spec(code, spec.shape) if code and spec.is_float else spec

    def place_of(target: Target) -> tuple[int, int]:
        first = target.experts[0]
        return models.experts[first].place(target.tensors[first])

    reads_base = models.has_base and (rules.method.space != "parameters" or recipe.lines is not None)
    merged: dict[str, Entry] = {}
    copied = [target for target in targets if not target.experts]
    for target in sorted(
        (target for target in targets if target.experts), key=lambda target: (place_of(target), target.out)
    ):
        stored = {label: models.experts[label].stored_name(target.tensors[label]) for label in target.experts}
        method = rules.of(target.out, target.experts, stored, target.depth, target.parameters)
        merged[target.out] = entry_of(models, target, method, reads_base, spec_of(target.spec))
    rules.warn_of_unfit(4)
    blocks: Mapping[str, int] = {}
    if recipe.lines is not None:
        blocks = layers_of(base)
        if not blocks and recipe.lines.b:
            _warn_of_no_blocks(base)
    as_is = {target.out: copied_of(models, target, spec_of(target.spec)) for target in copied}
    specs = {name: entry.spec for name, entry in {**merged, **as_is}.items()}
    plan = Plan(
        recipe,
        rules.method,
        _input(base, recipe.base if recipe.base is not None else next(iter(recipe.experts.values()))),
        {name: _input(model, recipe.experts[name]) for name, model in models.experts.items()},
        merged,
        as_is,
        matched.heads,
        matched.ignored,
        matched.configs,
        blocks,
        recipe.lines,
        architecture,
        tile or tile_of(element_bytes(merged, specs)),
        config={} if sliced is None else sliced.config,
    )
    known = plan.lines is not None and plan.lines.a is not None
    return plan.with_lines(plan.lines.a) if known else plan  # type: ignore[union-attr,arg-type]


def entry_of(
    models: Models,
    target: Target,
    method: Method,
    reads_base: bool,
    spec: Spec,
    views: Mapping[str, View] | None = None,
) -> Entry:
    """What one merged tensor is made of.

    Args:
        models: the opened models.
        target: which tensor of which model goes into which of the output.
        method: its rule.
        reads_base: whether the base is read.
        spec: what is written.
        views: label of an input -> which part of its tensor, where that is not all of it.

    Raises:
        TwinmergeError: a tensor that a model lacks, a view that it does not have, parts of several shapes.
    """
    views = views or {}
    read = target.models(models, reads_base)
    found = {
        label: _source(model, label, target.tensors[label], views.get(label, WHOLE)) for label, model in read.items()
    }
    shapes = {label: shape for label, (_, shape) in found.items()}
    first, shape = next(iter(shapes.items()))
    if odd := next((label for label, other in shapes.items() if other != shape), None):
        raise RecipeError(
            f"For {target.out!r}, {first!r} gives a tensor of shape {list(shape)} and {odd!r} one of "
            f"{list(shapes[odd])}. Give parts of one shape."
        )
    known = target.models(models, models.has_base)
    label = next((label for label, model in known.items() if model.knows_class), first)
    place = Place(target.out, shape, 0, target.experts, *_meant(known[label], target.tensors[label], shape))
    place = place._replace(wide="F64" in {source.code for source, _ in found.values()})
    grain = method.grain_of(place)
    if grain == "rows" and not views and any(models.experts[e].low_rank(target.tensors[e]) for e in target.experts):
        grain = "matrix"  # a core space is that of a tensor in one piece
    sources = {label: source for label, (source, _) in found.items()}
    base = sources.pop(target.base) if reads_base else None
    return Entry(place, spec, target.name, tuple(sources.values()), base, method, grain, target.base)


def copied_of(models: Models, target: Target, spec: Spec) -> Entry:
    """A tensor of the base, or of the model that stands for it, as it is."""
    source, shape = _source(models.labelled(target.base), target.base, target.tensors[target.base], WHOLE)
    return Entry(Place(target.out, shape), spec, target.name, base=source, base_label=target.base)


def _source(model: OpenedModel, label: str, name: str, view: View) -> tuple[Source, tuple[int, ...]]:
    if not model.has(name):
        raise RecipeError(f"{model.name} ({label}) has no tensor {name!r}. Name one that it has.")
    return Source(name, model.range_code(name), view), view.shape(model.spec(name).shape)


def _meant(model: OpenedModel, name: str, shape: Sequence[int]) -> tuple[bool, bool, bool]:
    """Whether a tensor is stored (in, out), is a table, is a stack; of a part of one what still holds."""
    same = len(model.spec(name).shape) == len(shape)
    return model.transposed(name), model.table(name), model.stacked(name) and same


def _input(model: OpenedModel, ref: ModelLike) -> Input:
    return Input(ref, model.name, model.commit, model.files)


def _widened(models: Models, targets: Sequence[Target]) -> list[Target]:
    """The targets with the dtype that mergekit writes where the recipe names none: one that holds all of its inputs'
    numbers."""
    found = []
    told = ""
    for target in targets:
        read = target.models(models, models.has_base) if target.experts else {}
        codes = {model.spec(target.tensors[label]).code for label, model in read.items()}
        if len(codes) > 1 and target.spec.is_float:
            wide = Spec("F64" if "F64" in codes else "F32", target.spec.shape)
            names = ", ".join(sorted({Spec(code, ()).name for code in codes}))
            told = told or f"{names} for {target.name!r}, which is written in {wide.name}"
            target = replace(target, spec=wide)
        found.append(target)
    if told:
        warnings.warn(
            f"The models have different dtypes, and the recipe says not which is written: as by mergekit, each tensor "
            f"has one that holds the numbers of all ({told}). Add dtype: to write one.",
            stacklevel=5,
        )
    return found


def _warn_of_no_blocks(base: OpenedModel) -> None:
    warnings.warn(
        f"LiNeS finds no stack of two or more blocks in {base.name}, so that every tensor is scaled by a alone. Look "
        "at "
        "the names of its tensors, or leave lines out.",
        stacklevel=5,
    )
