"""Names of experts, out of what a recipe says and the paths of the models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from twinmerge.errors import RecipeError

EXPERT_NAME = re.compile(r"^\w[\w.\-]*$")
TAKEN = ("base", "output")  # they stand for something else in checksums and messages


def expert_name(ref: str, parts: int = 1) -> str:
    """The default name of an expert: the last part of its path or hub id.

    Args:
        parts: how many of the last parts of the path are taken.

    Example:
        >>> expert_name("org/a-b.c@main"), expert_name("x/math/final", 2)
        ('a-b.c', 'math_final')
    """
    path = Path(ref.rpartition("+")[2].partition("@")[0])
    last = [re.sub(r"[^\w.\-]", "_", part) for part in path.parts[-parts:] if part != "/"]
    return "_".join(last).lstrip(".-") or "expert"


def expert_names(refs: Sequence[str], given: Sequence[object], where: str) -> list[str]:
    """A name of its own for each model, which depends on the set of them and not on their order.

    Args:
        refs: the models.
        given: the name that the recipe gives each, or None.

    Raises:
        TwinmergeError: a name that is no text, or that is given twice.

    Example:
        >>> expert_names(["x/math/final", "x/code/final", "x/law"], [None, None, None], "it")
        ['math_final', 'code_final', 'law']
    """
    for name in given:
        if name is not None and not isinstance(name, str):
            raise RecipeError(f"{where}: the name {name!r:.80} of a model is no text. Put it in quotes.")
    chosen = [name for name in given if isinstance(name, str)]
    if twice := [name for name, times in Counter(chosen).items() if times > 1]:
        raise RecipeError(f"{where} names the expert {twice[0]!r:.80} twice. Give one of them another 'name:'.")
    free = [i for i, name in enumerate(given) if name is None]
    parts = dict.fromkeys(free, 1)
    while True:
        names = {i: expert_name(refs[i], parts[i]) for i in free}
        times = Counter([*names.values(), *chosen, *TAKEN])
        clash = [i for i in free if times[names[i]] > 1]
        longer = [i for i in clash if expert_name(refs[i], parts[i] + 1) != names[i]]
        if not longer:
            break
        for i in longer:
            parts[i] += 1
    for number, i in enumerate(sorted(clash, key=lambda i: refs[i]), 1):  # paths that differ in other letters alone
        names[i] = f"{names[i]}_{number}"
    if len({*names.values(), *chosen}) < len(refs):
        raise RecipeError(f"{where}: {refs[free[0]]!r} and others get one name. Give each of them a 'name:'.")
    return [names[i] if name is None else str(name) for i, name in enumerate(given)]
