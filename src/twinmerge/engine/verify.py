"""Is a merged folder still what was written, and are its inputs still what was read?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from twinmerge.engine.inputs import BASE
from twinmerge.engine.merge import Merge
from twinmerge.engine.recipe import Recipe
from twinmerge.engine.side_files import CHECKSUMS, PROVENANCE
from twinmerge.engine.write import OUTPUT
from twinmerge.errors import TwinmergeError
from twinmerge.maths.threads import parallel
from twinmerge.models.opened import OpenedModel
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.checksum import streamed
from twinmerge.store.header import SIZES

Job = tuple[str, str, Callable[[], str]]
"""Source, tensor, and what computes its checksum."""


class Verified(NamedTuple):
    """tensors: how many were compared; changed: "output" or an input -> tensors that are no longer the same; missing:
    the same for tensors that are gone or new; unreadable: inputs that cannot be opened, with the reason."""

    tensors: int
    changed: dict[str, list[str]]
    missing: dict[str, list[str]]
    unreadable: dict[str, str]

    @property
    def ok(self) -> bool:
        return not (self.changed or self.missing or self.unreadable)


def verify(folder: str | Path, inputs: bool = True, progress: bool = True) -> Verified:
    """Read the output, and the inputs where they still are, and compare every tensor with the checksum of the merge.

    Args:
        folder: a merged folder.
        inputs: the base and the experts as well.

    Errors:
        TwinmergeError: no provenance in the folder, or a damaged one.
    """
    folder = Path(folder)
    raw, wanted = _read(folder / PROVENANCE), _read(folder / CHECKSUMS)
    found: dict[str, dict[str, str]] = {OUTPUT: {}}
    unreadable: dict[str, str] = {}
    checkpoint = Checkpoint.open(folder)
    work: list[Job] = [
        (OUTPUT, name, partial(streamed, partial(checkpoint.read_into, name), spec.itemsize, spec.numel))
        for name, spec in checkpoint.specs.items()
    ]
    if inputs and wanted.keys() - {OUTPUT}:  # a continual state keeps sums of its inputs itself
        try:
            work += _of_inputs(Merge(Recipe.from_description(raw["recipe"]), progress=False), wanted)
        except (TwinmergeError, KeyError, TypeError) as error:
            unreadable["inputs"] = str(error)
    bar = tqdm(total=len(work), desc="verifying", delay=1, leave=False, disable=None if progress else True)
    with bar:
        for source, name, checksum in parallel(lambda each: (each[0], each[1], each[2]()), work):
            found.setdefault(source, {})[name] = checksum
            bar.update()
    checkpoint.close()
    changed, missing = {}, {}
    for source, sums in wanted.items():
        if source not in found:
            continue
        got = found[source]
        if differ := sorted(n for n, s in sums.items() if n in got and got[n] != s):
            changed[source] = differ
        if gone := sorted(sums.keys() ^ got.keys()):
            missing[source] = gone
    return Verified(len(work), changed, missing, unreadable)


def _of_inputs(merge: Merge, wanted: Mapping[str, Mapping[str, str]]) -> list[Job]:
    """One job for every tensor of every input that the merge read."""
    stored = merge.base.stored
    models: dict[str, OpenedModel] = {BASE: merge.base, **merge.experts}
    found: list[Job] = []
    for source, model in models.items():
        known = wanted.get(source, {})
        names = [*merge.matched.merged, *(merge.matched.from_base if source == BASE else [])]
        for name in names:
            if stored[name] in known:
                read = partial(model.read_range, name)
                size = SIZES[model.range_code(name)]
                found.append((source, stored[name], partial(streamed, read, size, model.spec(name).numel)))
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TwinmergeError(
            f"{file} cannot be read: {error}. Name a folder that `twinmerge merge` wrote, whole."
        ) from error
    if not isinstance(found, dict):
        raise TwinmergeError(f"{file} is no provenance of twinmerge. Name a folder that `twinmerge merge` wrote.")
    return found
