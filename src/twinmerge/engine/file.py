"""A merge of single files into a single file: when that can be, and what the file says of where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from twinmerge.engine.inputs import Inputs
from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan
from twinmerge.engine.provenance import provenance, require_same, states_of
from twinmerge.engine.record import recipe_files
from twinmerge.engine.run import Run
from twinmerge.engine.write import Report, write_files
from twinmerge.errors import TwinmergeError, UsageError
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.checkpoint_writer import PYTORCH, layout
from twinmerge.store.manifest import header_in
from twinmerge.store.output import OutputFile

KEY = "twinmerge"
"""Of the metadata of a file that was written here: the provenance, as JSON."""
OF_CONTENT = ("hash", "sshs_", "ss_")
"""In keys of metadata that are of the very numbers of a file, or of how they were trained."""


def save_file(
    plan: Plan, models: Models, survey: Callable[[], tuple[Run, Inputs]], out: Path, overwrite: bool
) -> Report:
    """Write a merged model as one file, whole or not at all.

    Args:
        plan: of the merge.
        models: its opened models.
        survey: gives the run and its inputs, as `surveyed`.
        out: the file to write.
        overwrite: one that is there may be replaced, if it was written here.

    Raises:
        TwinmergeError: as `require_files` and `Merge.save`.
    """
    require_files(plan, models, out, overwrite)
    read = states_of(plan)
    output = OutputFile(out, plan.output_bytes, replace=overwrite)
    with output as file:
        files = {file.name: next(iter(layout(plan.specs, plan.output_bytes + 1).values()))}
        report = write_files(*survey(), file.parent, files, output, metadata=metadata_of(plan, models))
        require_same(read, states_of(plan))
    return report


def require_files(plan: Plan, models: Models, out: Path, overwrite: bool) -> None:
    """Refuse what one file cannot hold.

    Args:
        plan: of the merge.
        models: its opened models.
        out: the file to write.
        overwrite: one that is there may be replaced, if it was written here.

    Raises:
        UsageError: models with something beside their weights, heads that are kept apart, a file of somebody else's.
    """
    for model in models.inputs:
        if not model.is_file:
            raise UsageError(
                f"{model.name} is more than one file of weights, so {out} cannot hold a merge of it. Name a folder to "
                "write."
            )
    if any(plan.heads.values()):
        raise UsageError(f"Heads are kept apart, for which {out} has no place. Name a folder to write.")
    if overwrite and out.is_file():
        try:
            ours = KEY in header_in(out).metadata
        except TwinmergeError:
            ours = False
        if not ours:
            raise UsageError(f"{out} was not written by twinmerge, so it is not overwritten. Move it away.")
        if any(out.samefile(file) for model in models.inputs for file in model.files):
            raise UsageError(f"The output {out} is one of the inputs. Name another one.")


def metadata_of(plan: Plan, models: Models) -> dict[str, str]:
    """What the file says: the base's own metadata, but for what is of its numbers, the provenance, and the recipe as it
    was typed and as it was resolved."""
    source = models.base.source
    own = source.metadata if isinstance(source, Checkpoint) else {}
    kept = {
        key: text
        for key, text in own.items()
        if not key.startswith("twinmerge.") and not any(mark in key for mark in OF_CONTENT)
    }
    recipe = {name: content.decode() for name, content in recipe_files(plan.recipe, models, edited=plan.edited).items()}
    return {**kept, **PYTORCH, KEY: json.dumps(provenance(plan), default=str), **recipe}
