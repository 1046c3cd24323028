"""Opened models in the place of others whose tokenizers differ: all with the tables of one vocabulary."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from twinmerge.engine.plan import BASE
from twinmerge.engine.tokens.ids import renumbered
from twinmerge.engine.tokens.order import Held, Order, ordered
from twinmerge.engine.tokens.read import read_tokens
from twinmerge.engine.tokens.rows import Filling, Rows
from twinmerge.engine.tokens.table import Table
from twinmerge.errors import ModelError
from twinmerge.models.by_token import by_token, resized
from twinmerge.models.opened import Changed, OpenedModel
from twinmerge.models.tokens import Tokens
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.slices import end_sources
from twinmerge.recipes.tokenizer import UNION
from twinmerge.store.checkpoint import Spec
from twinmerge.store.locate import locate

if TYPE_CHECKING:
    from twinmerge.models.architecture import Architecture

CODES = ("BF16", "F16", "F32", "F64")
SHOWN = 5  # tokens that a message names


@dataclass(frozen=True)
class Unified:
    """Models of one vocabulary.

    Attributes:
        models: label -> model; the base is "base".
        order: the tokens of the output.
        tokens: label -> tokenizer that the model had.
        rows: label -> how many rows its tables had.
        zeros: tokens that no input has a row of.
    """

    models: Mapping[str, OpenedModel]
    order: Order
    tokens: Mapping[str, Tokens]
    rows: Mapping[str, int]
    zeros: Sequence[str] = field(default=())

    def to_dict(self) -> dict[str, object]:
        """Plain data: how many tokens and rows the output has, and how many of its tokens each model had; tokens whose
        rows are zeros."""
        ids, had = self.order.tokens.ids, {id(each.ids): each.ids for each in self.tokens.values()}
        count = {number: sum(token in ids for token in of) for number, of in had.items()}
        return {
            "tokens": len(ids),
            "rows": self.order.size,
            "of": {label: count[id(each.ids)] for label, each in self.tokens.items()},
            "zeros": list(self.zeros),
        }


def unified(recipe: Recipe, models: Mapping[str, OpenedModel]) -> Unified:
    """The models with the tables that the recipe's tokenizer gives them; nothing of a table is read yet.

    Args:
        recipe: with a tokenizer.
        models: label -> opened model, the base as "base" first.

    Raises:
        TwinmergeError: a model without a tokenizer where one is needed, or of which it is not known what has a row for
            each token; tables of other widths; what `ordered` and `Filling` refuse.
    """
    choice = recipe.tokenizer
    assert choice is not None
    tables = {label: by_token(model) for label, model in models.items()}
    rows = {label: max(found.values()) for label, found in tables.items()}
    tokens = _tokenizers(models, recipe.semantics == "mergekit")
    held = {label: Held(tokens[label], rows[label]) for label in models}
    donor = _donor(recipe, models, held)
    order = ordered(choice, donor, held, rows[BASE])
    _warn_of_rowless(held)
    _warn_of_whole(order)
    filling = Filling(order, held, choice.tokens, choice.keep_padding)
    found = {label: dict[str, Changed]() for label in models}
    specs = {label: dict[str, Spec]() for label in models}
    numbers = list(models.values())
    known: dict[tuple[str, ...], dict[str, Rows]] = {}
    for name in sorted({name for each in tables.values() for name in each}):
        having = {label: model for label, model in models.items() if model.has(name)}
        inputs = [label for label in _inputs(recipe, models, name) if label in having]
        if not inputs:
            continue
        _check(name, having, rows)
        key = (*inputs, "", *having)
        if key not in known:
            base = next((label for label in inputs if _is_base(recipe, label)), None)
            known[key] = filling.rows(inputs, base)
        for number, (label, model) in enumerate(models.items()):
            if label not in having or (name not in model.specs and name not in models[BASE].specs):
                continue  # what is tied to another tensor is read as that one
            own, spec = known[key][label], model.spec(name)
            axis = spec.shape.index(rows[label])
            specs[label][name] = Spec(spec.code, (*spec.shape[:axis], order.size, *spec.shape[axis + 1 :]))
            if not own.same_as(number, rows[label]):
                found[label][name] = Table(name, own, numbers, spec.numel // rows[label], model.range_code(name))
    if filling.zeros:
        warnings.warn(
            f"No input has a row of {_some(list(filling.zeros))}: zeros are merged for it. Say in tokenizer, under "
            "tokens, which row it is to have.",
            stacklevel=2,
        )
    made = {}
    for label, model in models.items():
        files = dict.fromkeys((*tokens[label].read, *donor.tokens.read, *model.files)) if model.files else ()
        changes = {
            **{name: change for name, change in model.changes.items() if name not in found[label]},
            **found[label],
        }
        stored = {**model.stored, **{name: model.stored.get(model.own(name), name) for name in specs[label]}}
        made[label] = replace(
            model, specs={**model.specs, **specs[label]}, stored=stored, changes=changes, files=tuple(files)
        )
        made[label].architecture = _architecture(model, order.size, renumbering(tokens[label], order.tokens))
    return Unified(made, order, tokens, rows, tuple(filling.zeros))


def renumbering(tokens: Tokens, order: Tokens) -> dict[int, int | None] | None:
    """Id in a tokenizer -> the id that its token has in another, None where it has none; None where all have the same.

    Args:
        tokens: of the one.
        order: of the other.
    """
    if tokens.ids is order.ids:
        return None
    found = {number: order.ids.get(token) for token, number in tokens.ids.items()}
    return None if all(number == other for number, other in found.items()) else found


def _architecture(model: OpenedModel, size: int, ids: Mapping[int, int | None] | None) -> Architecture | None:
    """The same class with as many tokens as the output has, and its special ones by their numbers there."""
    known = model.architecture
    if known is None or known.config is None:
        return known
    config = known.config.to_dict()
    changed = {**config, **resized(config, size)}
    changed |= renumbered(changed, ids)[0]
    if changed == config:
        return known
    made = known.with_config(changed)
    made.aliases, made.torn = known.aliases, known.torn  # as the checkpoint's values settled them
    return made


def _tokenizers(models: Mapping[str, OpenedModel], mergekit: bool) -> dict[str, Tokens]:
    """The tokenizer of every model; the base's where one has none.

    Args:
        models: label -> opened model.
        mergekit: the recipe means what mergekit means.

    Raises:
        ModelError: the base has none.
    """
    seen: dict[bytes, Tokens] = {}
    found = {label: tokens_of(model, seen) for label, model in models.items()}
    base = found[BASE]
    if base is None:
        raise ModelError(
            f"{models[BASE].name} has no tokenizer that can be read (tokenizer.json, vocab.txt, …). Add its files, or "
            "leave tokenizer out of the recipe."
        )
    if lacking := [models[label].name for label, tokens in found.items() if tokens is None]:
        warnings.warn(
            f"{_some(lacking)} has no tokenizer, so it counts as having the base's: row by row, its tables are taken "
            "for the base's tokens. Add its tokenizer's files where that is not so.",
            stacklevel=3,
        )
    for model in models.values() if mergekit else ():
        if (
            model.adapter is not None
            and model.folder is not None
            and (own := read_tokens(model.adapter, seen)) is not None
        ):
            under = read_tokens(model.folder, seen)
            if under is None or under.ids.keys() != own.ids.keys():
                warnings.warn(
                    f"The adapter {model.adapter} has a tokenizer of its own, with other tokens than the model that "
                    "it is on, and they count, which mergekit passes over. Take the tokenizer out of its folder "
                    "where that is not meant.",
                    stacklevel=3,
                )
    return {label: base if tokens is None else tokens for label, tokens in found.items()}


def tokens_of(model: OpenedModel, seen: dict[bytes, Tokens] | None = None) -> Tokens | None:
    """The tokenizer of an opened model: that of an adapter, where it brings one along; None where it has none.

    Args:
        model: the opened one.
        seen: what was read before.
    """
    if model.sides is not None and model.sides.tokens is not None:
        return model.sides.tokens
    folders = [folder for folder in (model.adapter, model.folder) if folder is not None]
    return next((tokens for folder in folders if (tokens := read_tokens(folder, seen)) is not None), None)


def _donor(recipe: Recipe, models: Mapping[str, OpenedModel], held: Mapping[str, Held]) -> Held:
    """Whose tokens come first, with their ids.

    Raises:
        ModelError: a source without a tokenizer.
    """
    assert recipe.tokenizer is not None
    source = recipe.tokenizer.source
    if source in (UNION, BASE):
        return held[BASE]
    refs = {label: recipe.base if label == BASE else recipe.experts[label] for label in models}
    label = source if source in held else next((label for label, ref in refs.items() if str(ref) == source), None)
    if label is not None:
        return held[label]
    found = read_tokens(locate(source).folder)
    if found is None:
        raise ModelError(f"{source}, the tokenizer's source, has no tokenizer that can be read. Name another model.")
    return Held(found, max(found.ids.values()) + 1)


def _inputs(recipe: Recipe, models: Mapping[str, OpenedModel], name: str) -> list[str]:
    """The labels of the models that a tensor is merged of, in the order of all."""
    base = models[BASE]
    if recipe.slices:
        after = not base.table(name) if base.has(name) else True
        mergekit = recipe.semantics == "mergekit"
        spans = end_sources(recipe.slices, mergekit) if after else recipe.slices[0].sources
        return [span.model for span in spans]
    reads_base = recipe.base is not None and (recipe.on_changes or recipe.lines is not None)
    return [label for label in models if label != BASE or reads_base]


def _is_base(recipe: Recipe, label: str) -> bool:
    return recipe.base is not None and (label == BASE or recipe.experts[label] == recipe.base)


def _check(name: str, models: Mapping[str, OpenedModel], rows: Mapping[str, int]) -> None:
    """Refuse tables that do not go together.

    Raises:
        ModelError: other widths; numbers that are no plain floats.
    """
    shapes = {}
    for label, model in models.items():
        spec = model.spec(name)
        if model.range_code(name) not in CODES or rows[label] not in spec.shape:
            raise ModelError(
                f"Tensor {name!r} of {model.name} is {list(spec.shape)} of {spec.name}, which has no rows of "
                f"{rows[label]} tokens in 16 bits or more. Restore it, or merge models of one tokenizer."
            )
        axis = spec.shape.index(rows[label])
        shapes[label] = (*spec.shape[:axis], *spec.shape[axis + 1 :])
    first = next(iter(shapes))
    if odd := next((label for label, shape in shapes.items() if shape != shapes[first]), None):
        raise ModelError(
            f"A row of {name!r} has {math.prod(shapes[odd])} numbers in {models[odd].name} and "
            f"{math.prod(shapes[first])} in {models[first].name}. Merge models of one size."
        )


def _warn_of_rowless(held: Mapping[str, Held]) -> None:
    for label, each in held.items():
        beyond = [token for token, number in each.tokens.ids.items() if number >= each.rows]
        if beyond:
            warnings.warn(
                f"{len(beyond)} tokens of {label!r}, such as {beyond[0]!r}, have ids from {each.rows} on, which its "
                "tables have no rows for, and are passed over.",
                stacklevel=4,
            )


def _warn_of_whole(order: Order) -> None:
    for label, count in order.whole.items():
        warnings.warn(
            f"{count} ordinary tokens of {label!r} are added to the base's tokenizer as whole texts, and are cut out "
            "of words before it sees them: texts get other tokens than in either model. Name one model as the "
            "tokenizer's source where that is not meant.",
            stacklevel=4,
        )
    if order.settings:
        warnings.warn(
            f"The models add {_some(order.settings)} with different settings; those of the first are taken.",
            stacklevel=4,
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
