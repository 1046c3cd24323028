"""How many recipes may stand inside each other, as models of which no folder is written."""

from __future__ import annotations

from twinmerge.errors import RecipeError
from twinmerge.recipes.recipe import Recipe

DEEP = 14  # recipes inside each other: each takes four of the 64 brackets that what is written of them may have
MANY = 10_000  # recipes, each counted as often as it is named: as often is it written down beside the weights


def require_few(recipe: Recipe) -> None:
    """Refuse a recipe that has too many others inside it.

    Args:
        recipe: whose models may be recipes.

    Raises:
        RecipeError: more than 14 inside each other, or more than 10,000 where each counts as often as it is named.

    Example:
        >>> chain = Recipe("average", None, {"x": "model"})
        >>> for _ in range(14):
        ...     chain = Recipe("average", None, {"x": chain})
        >>> require_few(chain)
        >>> require_few(Recipe("average", None, {"x": chain}))
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: More than 14 recipes stand inside each other. Write the models on the way to \
folders, with --intermediate-dir DIR.
    """
    _, count = _measured(recipe, 0, {})
    if count > MANY:
        raise RecipeError(
            f"The recipes inside the recipe are {count:,}, counted as often as each is named, and at most {MANY:,} may "
            "be. Write the models on the way to folders, with --intermediate-dir DIR."
        )


def _measured(recipe: Recipe, depth: int, found: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many recipes stand inside each other in a recipe, and how many in all; each is looked into once."""
    own = found.get(id(recipe))
    if depth + (0 if own is None else own[0]) > DEEP:
        raise RecipeError(
            f"More than {DEEP} recipes stand inside each other. Write the models on the way to folders, with "
            "--intermediate-dir DIR."
        )
    if own is None:
        models = [getattr(model, "recipe", model) for model in (recipe.base, *recipe.experts.values())]
        inner = [_measured(model, depth + 1, found) for model in models if isinstance(model, Recipe)]
        own = max((1 + height for height, _ in inner), default=0), sum(1 + count for _, count in inner)
        found[id(recipe)] = own
    return own
