"""Methods as people call them: in any case, with hyphens, and by the names of mergekit and PEFT."""

from __future__ import annotations

from twinmerge.cli.lines import said


def meant(method: str) -> str:
    """The name here of a method that a command is given; a line says so where that is another word.

    Example:
        >>> meant("dare-ties"), meant("TIES")
        ('dare_ties', 'ties')
    """
    from twinmerge.methods.kit.registry import by_any_name, method_class

    name, plain = by_any_name(method), method.lower().replace("-", "_")
    if name not in (method, plain):
        said(f"Note: {'PEFT' if plain in method_class(name).peft else 'mergekit'}'s {method} is {name} here.")
    return name
