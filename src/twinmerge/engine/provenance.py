"""Where a merged folder comes from: its recipe, versions and inputs, written beside the weights."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinmerge.errors import TwinmergeError
from twinmerge.models.opened import OpenedModel

if TYPE_CHECKING:
    from twinmerge.engine.merge import Merge

PACKAGES = ("twinmerge", "torch", "safetensors", "transformers")


def provenance(merge: Merge) -> dict[str, Any]:
    """Recipe, whose semantics it has, resolved parameters, versions and the hub commits that were read; LiNeS' blocks where it is asked for."""
    stored, matched = merge.base.stored, merge.matched
    return {
        "recipe": merge.recipe.describe(),
        "semantics": merge.recipe.semantics,
        "parameters": merge.recipe.resolved(merge.method),
        "commits": {label: model.commit for label, model in inputs_of(merge).items() if model.commit},
        "versions": {package: version(package) for package in PACKAGES},
        "tensors": {
            "merged": len(matched.merged),
            "from_base": sorted(stored[name] for name in matched.from_base),
            "heads": matched.heads,
        },
    } | ({} if merge.recipe.lines is None else {"blocks": merge.blocks})


def inputs_of(merge: Merge) -> dict[str, OpenedModel]:
    """The base and the experts by the labels that the provenance gives them."""
    return {"base": merge.base, **{f"expert {name}": model for name, model in merge.experts.items()}}


def plan_key(merge: Merge) -> str | None:
    """What identifies a merge that may be resumed: the same recipe, versions and input files (by size and times of change).

    None for models in memory, which cannot be told apart from one process to the next.
    """
    if not all(model.files for model in inputs_of(merge).values()):
        return None
    plan = {**provenance(merge), "rounding": merge.recipe.stochastic, "files": states_of(merge), "tile": merge.tile}
    return hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()


def states_of(merge: Merge) -> list[list[Any]]:
    """Label, path, size, and times of change of content and entry of every file that is read."""
    files = [(label, file) for label, model in inputs_of(merge).items() for file in model.files]
    files += [(f"statistics {name}", found.file) for name, found in merge.statistics.items()]
    return [_state(label, file) for label, file in files]


def require_same(before: list[list[Any]], after: list[list[Any]]) -> None:
    """Refuse inputs that changed between two looks: what was read of them may be of two models.

    Errors:
        TwinmergeError: one did.
    """
    for one, two in zip(before, after, strict=True):
        if one[:-1] != two[:-1]:  # rights and links may change; whoever reads looks at the last, the time of that, too
            raise TwinmergeError(f"{one[1]} ({one[0]}) changed while it was read. Run again when nobody writes it.")


def _state(label: str, file: Path) -> list[Any]:
    try:
        status = file.stat()
    except OSError as error:
        raise TwinmergeError(
            f"{file} ({label}) cannot be read: {error.strerror}. Put it back and run again."
        ) from error
    return [label, str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
