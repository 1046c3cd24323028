"""The methods that take experts one by one."""

from __future__ import annotations

from typing import Any

from twinmerge.errors import RecipeError
from twinmerge.methods.kit.fold import Fold
from twinmerge.methods.kit.registry import METHODS, MethodLike, make_method, method_class, short_name


def fold_of(method: MethodLike, parameters: dict[str, Any]) -> Any:
    """A method that takes experts one by one.

    Raises:
        TwinmergeError: it needs all experts at once, or has no such parameter.

    Example:
        >>> fold_of("tsv", {})
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: tsv needs all experts at once. Choose from average, continual_ties, iso_c, magmax, \
null_space, opcm, task_arithmetic, wudi.
    """
    if not issubclass(method_class(method), Fold):
        raise RecipeError(f"{short_name(method)} needs all experts at once. Choose from {', '.join(fold_names())}.")
    made: Any = make_method(method, ("expert",), parameters)
    for name, field in type(made).model_fields.items():
        if name in made.all_at_once and getattr(made, name) != field.default:
            raise RecipeError(f"A state knows its experts as a whole, so {name} has no place in it. Leave it out.")
    return made


def fold_names() -> list[str]:
    """The methods that take experts one by one."""
    return [name for name, cls in METHODS.all().items() if issubclass(cls, Fold)]
