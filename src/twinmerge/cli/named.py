"""Methods as people call them: in any case, with hyphens, and by the names of mergekit and PEFT."""

from __future__ import annotations

from twinmerge.cli.lines import said


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
