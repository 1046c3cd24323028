"""The recipes of one file, each written to a folder of its own, as mergekit-multi does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinmerge.engine.beside import PROVENANCE
from twinmerge.engine.merge import Merge
from twinmerge.engine.merge_parts import MergeOfParts, merge_of
from twinmerge.engine.provenance import states_of
from twinmerge.errors import OutputError, TwinmergeError
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.documents import Documents, with_models
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.foreign import read_json
from twinmerge.store.manifest import CHECKSUMS


def written(documents: Documents, folder: str | Path, progress: bool = True, **how: Any) -> Recipe | None:
    """Write every named recipe into `folder`/name, and give the last one, which reads them there.

    A folder that is there with the same recipe is taken as it is, if none of its inputs is newer.

    Args:
        documents: of a file.
        folder: where the models on the way go.
        progress: show how far it is.
        how: as of `Merge`.

    Raises:
        OutputError: a folder of another recipe, or of inputs that changed since, has the name.
    """
    made: dict[str, ModelLike] = {}
    for name, recipe in documents.named.items():
        to, whole = Path(folder) / name, with_models(recipe, made)
        if _recipe_in(to) != whole.describe():
            if to.is_dir() and any(to.iterdir()):
                raise OutputError(f"{to} is there already and was made by another recipe. Move it away.")
            to.parent.mkdir(parents=True, exist_ok=True)
            merge_of(whole, progress, **how).save(to)
        elif (newer := _newer(merge_of(whole, progress, **how), to / CHECKSUMS)) is not None:
            raise OutputError(f"{newer} changed after {to} was made of it. Move {to} away, so that it is made anew.")
        made[name] = str(to)
    return None if documents.last is None else with_models(documents.last, made)


def _newer(merge: Merge, made: Path) -> str | None:
    """An input whose content or entry in its folder is newer than what was made of it."""
    parts = merge.parts.values() if isinstance(merge, MergeOfParts) else [merge]
    written = made.stat().st_mtime_ns if made.is_file() else 0
    states = (state for part in parts for state in states_of(part.plan))
    return next((str(file) for _, file, _, *times in states if max(times) > written), None)


def _recipe_in(folder: Path) -> Any:
    try:
        return read_json(folder / PROVENANCE, finite=False).get("recipe")
    except TwinmergeError:
        return None
