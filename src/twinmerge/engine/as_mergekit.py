"""What mergekit does otherwise with a recipe in its schema, where ours is meant to be the better answer: told, so that
nobody compares two models in vain."""

from __future__ import annotations

from collections.abc import Iterator

from twinmerge.engine.models import Models
from twinmerge.engine.plan import BASE
from twinmerge.models.matching import Matched, strange
from twinmerge.recipes.recipe import Recipe
from twinmerge.results import some

HALF = ("BF16", "F16")


def differences(recipe: Recipe, models: Models, matched: Matched) -> list[str]:
    """One sentence for each kind of difference; none where the recipe means what the papers mean.

    Args:
        recipe: of the merge.
        models: its opened models.
        matched: which tensor goes where.
    """
    if recipe.semantics != "mergekit":
        return []
    copied = [] if recipe.slices else _copied(models, matched)
    return [*_adapters(models), *copied, *_tokens(recipe, models)]


def _adapters(models: Models) -> Iterator[str]:
    rounded = [
        model.name
        for model in models.inputs
        if model.adapter and any(model.specs[name].code in HALF for name in model.changes if name in model.specs)
    ]
    if rounded:
        yield (
            f"{some(rounded)}: the adapter is added in float32. mergekit rounds the sum to the base's 16 bits before it "
            "merges."
        )


def _copied(models: Models, matched: Matched) -> Iterator[str]:
    base = models.base
    alone = [name for name in matched.from_base if base.spec(name).is_float]
    unknown = set(strange(base))
    merged = [name for name in matched.merged if name in unknown]
    if merged:
        yield f"{some(merged)}: no part of the model's class, merged all the same. mergekit leaves such tensors out."
    if alone:
        yield f"Only {base.name} has {some(alone)}, copied as it is. mergekit leaves such tensors out."


def _tokens(recipe: Recipe, models: Models) -> Iterator[str]:
    choice, unified = recipe.tokenizer, models.unified
    if choice is None or unified is None:
        return
    if recipe.base is None and choice.source == BASE:
        yield (
            f"Without a base_model the tokenizer is that of the first model, {models.base.name}. mergekit takes that of "
            "any. Add base_model."
        )
    donor = choice.source if choice.source in unified.tokens else BASE
    own, ids = unified.tokens[donor].ids, unified.order.tokens.ids
    rows = unified.rows[donor]
    lent = [token for token, rule in choice.tokens.items() if not rule.force and token not in own and ids[token] < rows]
    if lent:
        yield (
            f"{some(lent)}: the row is that of its rule. mergekit takes the row of {models.labelled(donor).name} that no "
            "token has at that number. Add force: true, and both do the same."
        )
