"""What a shell offers for a word that is begun: methods, and files of recipes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinmerge.methods.kit.base import Method

RECIPES = (".yaml", ".yml", ".json")


def methods(incomplete: str) -> list[str]:
    """Methods whose names begin so.

    Example:
        >>> methods("tie")
        ['ties']
    """
    from twinmerge.methods.kit.registry import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


def over_time(incomplete: str) -> list[str]:
    """Methods that take experts one by one."""
    from twinmerge.methods.kit.listing import over_time as takes

    return _some(incomplete, lambda cls: takes(cls) is not None)


def of_masks(incomplete: str) -> list[str]:
    """Methods that make masks.

    Example:
        >>> of_masks("t")
        ['tall_masks']
    """
    return _some(incomplete, lambda cls: cls.outputs == "masks")


def _some(incomplete: str, fits: Callable[[type[Method]], bool]) -> list[str]:
    from twinmerge.methods.kit.registry import method_class

    return [name for name in methods(incomplete) if fits(method_class(name))]


def recipes(incomplete: str) -> list[str]:
    """Recipes that begin so; none where a folder does, which the shell itself goes into.

    Example:
        >>> recipes("no/such/folder/")
        []
    """
    where, begun = os.path.split(incomplete)
    try:
        with os.scandir(os.path.expanduser(where) or ".") as found:
            entries = [each for each in found if each.name.startswith(begun) and (begun or each.name[0] != ".")]
            if any(each.is_dir() for each in entries):
                return []
            return sorted(os.path.join(where, each.name) for each in entries if each.name.endswith(RECIPES))
    except OSError:
        return []
