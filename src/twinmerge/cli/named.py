"""Methods as people call them: in any case, with hyphens, and by the names of mergekit and PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinmerge.cli.lines import said

if TYPE_CHECKING:
    from twinmerge.methods.kit.registry import MethodLike


def meant(method: str) -> str:
    """The name here of a method that a command is given; a line says so where that is another word.

    Example:
        >>> meant("dare-ties"), meant("TIES")
        ('dare_ties', 'ties')
    """
    from twinmerge.methods.kit.registry import by_any_name, implied_by, method_class

    name, plain = by_any_name(method), method.lower().replace("-", "_")
    if name not in (method, plain):
        whose = "PEFT" if plain in method_class(name).peft and plain not in method_class(name).mergekit else "mergekit"
        implied = " ".join(
            f"-p {key}={value:g}" if isinstance(value, float) else f"-p {key}={value}"
            for key, value in implied_by(method).items()
        )
        said(f"Note: {whose}'s {method} is {name} here{f', with {implied}' if implied else ''}.")
    return name


def default_scale(method: MethodLike) -> str:
    """What is said of a `scale` that was not given: its default, where that is not 1.

    Example:
        >>> default_scale("ties"), default_scale("dare")
        ('', ', with its default scale 0.3 (-p scale=1 takes the weights as they are)')
    """
    from twinmerge.methods.kit.registry import method_class

    fields = method_class(method).model_fields
    default = fields["scale"].get_default() if "scale" in fields else 1
    if default == 1 or not isinstance(default, (int, float)):
        return ""
    what = "takes the weights as they are" if "weights" in fields else "takes its change in full"
    return f", with its default scale {default:g} (-p scale=1 {what})"
