"""The method of each tensor: a recipe's parameters may differ by filters, by depth and by slice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.dialect import theirs
from twinmerge.methods.kit.registry import make_method, method_class, short_name
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.setting import Setting
from twinmerge.recipes.slices import within


class Rules:
    """Gives tensors of equal parameters one and the same method.

    Args:
        recipe: whose parameters they are.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.method = recipe, recipe.typical_method()
        self._made: dict[tuple[Any, ...], Method] = {}
        self._here: dict[int, dict[str, Any]] = {}
        self._unfit = _filters(recipe)
        self._components: set[str] = set()

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
            parameters: of its slice; the recipe's hold where they say nothing.

        Raises:
            RecipeError: no value for a parameter that must have one; a value that is out of range.
        """
        if parameters is None and not self.recipe.varies:
            return self.method
        found: dict[str, Any] = {}
        for key, value in self._parameters(parameters).items():
            expert, _, field = key.rpartition(".")
            if expert and expert not in experts:
                continue
            if isinstance(value, Setting):
                name = names[expert] if expert else out
                self._note(field, value, name)
                value = value.at(name, depth)
                if value is None and self._needed(field):
                    raise RecipeError(
                        f"{self._theirs(field, 0)} needs a {self._theirs(field)} for every tensor, and no filter of "
                        f"{expert or 'the recipe'!r} fits {name!r}. Add a value without a filter."
                    )
            if value is not None:
                found[key] = value
        of = (tuple(experts), tuple(sorted(found.items())))
        if of not in self._made:
            self._made[of] = make_method(self.recipe.method, tuple(experts), found, self.recipe.base is not None)
        return self._made[of]

    def warn_of_unfit(self, stacklevel: int) -> None:
        """Warn of the filters that fitted none of the tensors that were asked for: what they are for has another value.

        Args:
            stacklevel: of the warning.
        """
        if not self._unfit:
            return
        told = []
        for (text, substring), places in self._unfit_texts().items():
            near = next((n for part in text.split(".") if (n := self._near(part, substring))), "")
            told.append(f"{text!r} (of {', '.join(places)}{near})")
        one = len(told) == 1
        warnings.warn(
            f"{'A filter fits' if one else 'Filters fit'} no merged tensor, so that {'it does' if one else 'they do'} "
            f"nothing: {'; '.join(told)}. Correct {'it' if one else 'them'}, or leave {'it' if one else 'them'} out.",
            stacklevel=stacklevel + 1,
        )

    def _parameters(self, inner: Mapping[str, Any] | None) -> dict[str, Any]:
        """What holds in a slice, or in the recipe."""
        if id(inner) not in self._here:
            self._here[id(inner)] = self.recipe.by_expert(within(inner or {}, self.recipe.parameters))
        return self._here[id(inner)]

    def _note(self, field: str, value: Setting, name: str) -> None:
        """Take out of the filters without a tensor what fits one."""
        if not self._unfit:
            return
        self._components.update(name.split("."))
        for choice in value.choices:
            if (field, choice.filter, choice.substring) in self._unfit and choice.fits(name):
                del self._unfit[field, choice.filter, choice.substring]

    def _unfit_texts(self) -> dict[tuple[str, bool], list[str]]:
        """Text -> where it stands."""
        found: dict[tuple[str, bool], list[str]] = {}
        for (field, text, substring), experts in self._unfit.items():
            everywhere = not all(experts) or len(experts) == len(self.recipe.experts)
            of = "" if everywhere else f" of {' and '.join(sorted(experts))}"
            found.setdefault((str(text), substring), []).append(f"{self._theirs(field)}{of}")
        return found

    def _near(self, part: str, substring: bool) -> str:
        """What a part of a filter was meant to be, if it is no component of a name: another one, or text in one."""
        if part in self._components or not part or "*" in part:
            return ""
        if any(part in component for component in self._components):
            return "" if substring else f"; write contains: {part} for a part of a component"
        return nearest(part, self._components).replace(" Did", "; did")

    def _theirs(self, field: str, at: int = 1) -> str:
        """What the recipe's file calls the method (at 0) and a parameter of it."""
        method = short_name(self.recipe.method)
        if self.recipe.semantics != "mergekit":
            return (method, field)[at]
        return theirs(method_class(self.recipe.method).mergekit, method, field)[at]

    def _needed(self, field: str) -> bool:
        """Whether a parameter has no default, or the recipe is mergekit's, which says its defaults itself."""
        return self.recipe.semantics == "mergekit" or method_class(self.recipe.method).model_fields[field].is_required()


def _filters(recipe: Recipe) -> dict[tuple[str, str | None, bool], set[str]]:
    """(Field, text, whether it fits anywhere) of every filter of a recipe -> the experts that it is said for, and ""."""
    found: dict[tuple[str, str | None, bool], set[str]] = {}
    for parameters in (recipe.parameters, *(each.parameters for each in recipe.slices)):
        for key, value in parameters.items():
            expert, _, field = key.rpartition(".")
            for choice in value.choices if isinstance(value, Setting) else ():
                if choice.filter is not None:
                    found.setdefault((field, choice.filter, choice.substring), set()).add(expert)
    return found
