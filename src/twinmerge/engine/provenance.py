"""Where a merged folder comes from: its recipe, versions and inputs, written beside the weights."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from twinmerge.engine.plan import Plan, methods_of
from twinmerge.engine.plan_file import rules_and_copied
from twinmerge.errors import ModelError, unreadable
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import METHODS, is_own
from twinmerge.origin import code_of, package_of
from twinmerge.recipes.lines import unscaled

PACKAGES = ("twinmerge", "torch", "safetensors", "transformers")


def provenance(plan: Plan) -> dict[str, Any]:
    """Recipe, whose semantics it has, resolved parameters, versions and the hub commits that were read; LiNeS' blocks
    where it is asked for; the rules where they are not the recipe's."""
    described = {
        "recipe": plan.recipe.describe(),
        "semantics": plan.recipe.semantics,
        "parameters": plan.parameters,
        "commits": {label: model.commit for label, model in plan.inputs.items() if model.commit},
        "versions": versions(*classes_of(plan)),
        "tensors": {
            "merged": len(plan.merged),
            "from_base": sorted(plan.copied),
            "heads": plan.heads,
        },
    }
    if plan.recipe.lines is not None:
        described["blocks"] = plan.blocks
    return described | (rules_and_copied(plan) if plan.edited else {})


def versions(*methods: type[Method]) -> dict[str, str]:
    """Package -> release of what decides an output's numbers, with the packages that offer its methods."""
    own = {package: version(package) for package in PACKAGES}
    for method in methods:
        own |= package_of(method, METHODS)
    return own


def classes_of(plan: Plan) -> list[type[Method]]:
    """The classes of the methods of a plan, in a fixed order."""
    found = {type(unscaled(method)) for method in (plan.method, *methods_of(plan.merged))}
    return sorted(found, key=lambda each: (each.__module__, each.__qualname__))


def plan_key(plan: Plan) -> str | None:
    """What identifies a merge that may be resumed: the same recipe, versions and input files (by size and times of
    change), and the same code of its methods (by what their files hold).

    None for models in memory, which cannot be told apart from one process to the next, and for methods of one's own,
    whose code may change.
    """
    if is_own(plan.recipe.method_name) or not all(model.files for model in plan.inputs.values()):
        return None
    code = [code_of(method, METHODS) for method in classes_of(plan)]
    if None in code:
        return None
    rounding = plan.recipe.stochastic
    key = {**provenance(plan), "rounding": rounding, "files": states_of(plan), "tile": plan.tile, "code": code}
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def states_of(plan: Plan) -> list[list[Any]]:
    """Label, path, size, and times of change of content and entry of every file that is read."""
    files = [(label, file) for label, model in plan.inputs.items() for file in model.files]
    files += [
        (f"statistics {name}", Path(plan.recipe.statistics[name])) for name in plan.experts if plan.recipe.statistics
    ]
    return [state_of(label, file) for label, file in files]


def require_same(before: list[list[Any]], after: list[list[Any]]) -> None:
    """Refuse inputs that changed between two looks: what was read of them may be of two models.

    Raises:
        ModelError: one did.
    """
    for one, two in zip(before, after, strict=True):
        if one[:-1] != two[:-1]:  # rights and links may change; whoever reads looks at the last, the time of that, too
            raise ModelError(f"{one[1]} ({one[0]}) changed while it was read. Run again when nobody writes it.")


def state_of(label: str, file: Path) -> list[Any]:
    """Label, path, size, and times of change of content and entry of a file.

    Raises:
        TwinmergeError: it cannot be read.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise unreadable(error)(
            f"{file} ({label}) cannot be read: {error.strerror}. Put it back and run again."
        ) from error
    return [label, str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
