"""Methods as people call them: in any case, with hyphens, and by mergekit's names."""

from __future__ import annotations

from twinmerge.cli.lines import said


def meant(method: str) -> str:
    """The name here of a method that a command is given; a line says so where that is another word.

    Example:
        >>> meant("dare-ties"), meant("TIES")
        ('dare_ties', 'ties')
    """
    from twinmerge.recipes.spelling import by_any_name

    name = by_any_name(method)
    if name != method and name != method.lower().replace("-", "_"):
        said(f"Note: mergekit's {method} is {name} here.")
    return name
