"""The method of each tensor: a recipe's parameters may differ by filters, by depth and by slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twinmerge.errors import RecipeError
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.dialect import theirs
from twinmerge.methods.kit.registry import make_method, method_class, short_name
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.setting import Setting


class Rules:
    """Gives tensors of equal parameters one and the same method.

    Args:
        recipe: whose parameters they are.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.method = recipe, recipe.typical_method()
        self._made: dict[tuple[Any, ...], Method] = {}

    def of(
        self,
        out: str,
        experts: Sequence[str],
        names: Mapping[str, str],
        depth: float,
        parameters: Mapping[str, Any] | None = None,
    ) -> Method:
        """The method of one tensor.

        Args:
            out: its name in the output, which filters of what all experts share look at.
            experts: those that are merged into it, in the order in which the method sees them.
            names: expert -> its own name of the tensor, which filters of what is set for it look at.
            depth: of its layer, from 0 to 1.
            parameters: of its slice; the recipe's where None.

        Raises:
            RecipeError: no value for a parameter that must have one; a value that is out of range.
        """
        if parameters is None and not self.recipe.varies:
            return self.method
        found: dict[str, Any] = {}
        for key, value in (self.recipe.parameters if parameters is None else parameters).items():
            expert, _, field = key.rpartition(".")
            if expert and expert not in experts:
                continue
            if isinstance(value, Setting):
                value = value.at(names[expert] if expert else out, depth)
                if value is None and self._needed(field):
                    method = short_name(self.recipe.method)
                    if self.recipe.semantics == "mergekit":
                        method, field = theirs(method_class(self.recipe.method).mergekit, method, field)
                    raise RecipeError(
                        f"{method} needs a {field} for every tensor, and no filter of "
                        f"{expert or 'the recipe'!r} fits {names.get(expert, out)!r}. Add a value without a filter."
                    )
            if value is not None:
                found[key] = value
        of = (tuple(experts), tuple(sorted(found.items())))
        if of not in self._made:
            self._made[of] = make_method(self.recipe.method, tuple(experts), found)
        return self._made[of]

    def _needed(self, field: str) -> bool:
        """Whether a parameter has no default, or the recipe is mergekit's, which says its defaults itself."""
        return self.recipe.semantics == "mergekit" or method_class(self.recipe.method).model_fields[field].is_required()
