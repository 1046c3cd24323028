"""From a recipe and its opened models to a plan: which tensor goes where, in which order, by which rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from twinmerge.engine.models import Models
from twinmerge.engine.plan import BASE, Entry, Input, Plan, Source, element_bytes
from twinmerge.engine.ranges import tile_of
from twinmerge.engine.view import WHOLE, View
from twinmerge.errors import RecipeError
from twinmerge.methods.kit.base import Method, Place
from twinmerge.models.blocks import stacks
from twinmerge.models.matching import Matched
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import CODES


def planned(recipe: Recipe, models: Models, matched: Matched, architecture: bool, tile: int | None) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: what is to be merged.
        models: its opened models.
        matched: which tensor of each goes where.
        architecture: the models' classes were asked.
        tile: elements that are read and written at once; by their bytes where None.

    Raises:
        TwinmergeError: dtypes that differ where the recipe says not which is written.
    """
    base, method = models.base, recipe.make_method()
    code = CODES[recipe.dtype] if recipe.dtype else None
    if code is None and recipe.semantics == "mergekit":
        _require_one_dtype(models, matched)

    def spec_of(name: str) -> Spec:
        spec = base.spec(name)
        return Spec(code, spec.shape) if code and spec.is_float else spec

    first = next(iter(models.experts.values()))
    order = sorted(matched.merged, key=first.place)
    reads_base = models.has_base and (method.space == "deltas" or recipe.lines is not None)
    merged = {
        base.stored[name]: entry_of(models, base.stored[name], name, method, reads_base, spec_of(name))
        for name in order
    }
    copied = {
        base.stored[name]: copied_of(models, base.stored[name], name, spec_of(name)) for name in matched.from_base
    }
    blocks: Mapping[str, int] = {}
    if recipe.lines is not None:
        blocks = stacks(base.specs)
        if not blocks and recipe.lines.b:
            _warn_of_no_blocks(base)
    specs = {name: entry.spec for name, entry in {**merged, **copied}.items()}
    plan = Plan(
        recipe,
        method,
        _input(base, recipe.base if recipe.base is not None else next(iter(recipe.experts.values()))),
        {name: _input(model, recipe.experts[name]) for name, model in models.experts.items()},
        merged,
        copied,
        matched.heads,
        matched.ignored,
        matched.configs,
        blocks,
        recipe.lines,
        architecture,
        tile or tile_of(element_bytes(merged, specs)),
    )
    known = plan.lines is not None and plan.lines.a is not None
    return plan.with_lines(plan.lines.a) if known else plan  # type: ignore[union-attr,arg-type]


def entry_of(
    models: Models,
    out: str,
    name: str,
    method: Method,
    reads_base: bool,
    spec: Spec | None = None,
    views: Mapping[str, tuple[str, View]] | None = None,
) -> Entry:
    """What one merged tensor is made of.

    Args:
        models: the opened models.
        out: its name in the output.
        name: its canonical name.
        method: its rule.
        reads_base: whether the base is read.
        spec: what is written; what the base has where None.
        views: label of an input -> canonical name of the tensor there and which part of it, where that is not `name`,
            whole.

    Raises:
        TwinmergeError: a tensor that a model lacks, a view that it does not have, parts of several shapes.
    """
    views = views or {}
    experts = [_source(model, label, *views.get(label, (name, WHOLE))) for label, model in models.experts.items()]
    shapes = {label: shape for (_, shape), label in zip(experts, models.experts, strict=True)}
    base = None
    if reads_base:
        base, shapes[BASE] = _source(models.base, BASE, *views.get(BASE, (name, WHOLE)))
    shape = next(iter(shapes.values()))
    if odd := next((label for label, other in shapes.items() if other != shape), None):
        raise RecipeError(
            f"For {out!r}, {next(iter(shapes))!r} gives a tensor of shape {list(shape)} and {odd!r} one of "
            f"{list(shapes[odd])}. "
            "Give parts of one shape."
        )
    model = models.named_by_class
    place = Place(out, shape, 0, tuple(models.experts), *_meant(model, name, shape))
    sources = tuple(source for source, _ in experts)
    place = place._replace(wide="F64" in {source.code for source in filter(None, (*sources, base))})
    grain = method.grain_of(place)
    if grain == "rows" and not views and any(model.low_rank(name) for model in models.experts.values()):
        grain = "matrix"  # a core space is that of a tensor in one piece
    return Entry(place, spec or models.base.spec(name), name, sources, base, method, grain)


def copied_of(models: Models, out: str, name: str, spec: Spec) -> Entry:
    """A tensor of the base as it is."""
    source, shape = _source(models.base, BASE, name, WHOLE)
    return Entry(Place(out, shape), spec, name, base=source)


def _source(model: OpenedModel, label: str, name: str, view: View) -> tuple[Source, tuple[int, ...]]:
    if not model.has(name):
        raise RecipeError(f"{model.name} ({label}) has no tensor {name!r}. Name one that it has.")
    return Source(name, model.range_code(name), view), view.shape(model.spec(name).shape)


def _meant(model: OpenedModel, name: str, shape: Sequence[int]) -> tuple[bool, bool, bool]:
    """Whether a tensor is stored (in, out), is a table, is a stack; of a part of one what still holds."""
    if not model.has(name):
        return False, False, False
    same = len(model.spec(name).shape) == len(shape)
    return model.transposed(name), model.table(name), model.stacked(name) and same


def _input(model: OpenedModel, ref: ModelLike) -> Input:
    return Input(ref, model.name, model.commit, model.files)


def _require_one_dtype(models: Models, matched: Matched) -> None:
    """mergekit writes the widest dtype of the inputs where the recipe names none; here that is the base's."""
    for name in matched.merged:
        if len(found := sorted({model.spec(name).name for model in models.inputs})) > 1:
            raise RecipeError(
                f"The models have different dtypes ({', '.join(found)} for {name!r}), and the recipe says not which is "
                "written. Add "
                "dtype: to it."
            )


def _warn_of_no_blocks(base: OpenedModel) -> None:
    warnings.warn(
        f"LiNeS finds no stack of two or more blocks in {base.name}, so that every tensor is scaled by a alone. Look "
        "at "
        "the names of its tensors, or leave lines out.",
        stacklevel=5,
    )
