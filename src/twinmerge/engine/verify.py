"""Is a folder or file still what was written, and are the inputs of a merge still what was read?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from twinmerge.arguments import strict
from twinmerge.engine.beside import PROVENANCE
from twinmerge.engine.merge_parts import MergeOfParts, merge_of, within
from twinmerge.engine.models import Models
from twinmerge.engine.plan import BASE, Plan
from twinmerge.engine.plan_file import planned_as
from twinmerge.errors import DataError, TwinmergeError
from twinmerge.maths.threads import parallel
from twinmerge.models.opened import OpenedModel
from twinmerge.models.opening import open_model, open_tensors
from twinmerge.progress import meter as progress_meter
from twinmerge.recipes.recipe import is_reference
from twinmerge.recipes.schema import from_description
from twinmerge.results import Table
from twinmerge.store.artefact import ArtefactFile, head_of_state
from twinmerge.store.checkpoint import Checkpoint, only_pickles
from twinmerge.store.checksum import of_file, streamed
from twinmerge.store.foreign import read_json, shown_path
from twinmerge.store.header import SIZES
from twinmerge.store.manifest import CHECKSUMS, MOST, OUTPUT, SEAL, Manifest, files_in, header_in

STATE, HEADS = "state.safetensors", "heads"
Job = tuple[str, str, Callable[[], str]]
"""Source, tensor, and what computes its checksum."""


class _Verified(NamedTuple):
    tensors: int
    changed: dict[str, list[str]]
    missing: dict[str, list[str]]
    unreadable: dict[str, str]
    files: Mapping[str, str] = MappingProxyType({})
    uncompared: Mapping[str, str] = MappingProxyType({})


class Verified(Table, _Verified):
    """What `verify` found. As a table: a row for each thing that is not as it was; none where all is well.

    Attributes:
        tensors: how many were compared.
        changed: "output", a file of its own checksums or an input -> tensors that are no longer the same.
        missing: the same for tensors that are gone or new.
        unreadable: inputs that cannot be opened, with the reason.
        files: those that are not what was written, with what is wrong.
        uncompared: inputs that cannot be compared, with the reason; that is no finding.
    """

    @property
    def ok(self) -> bool:
        """Whether all is what was written and read."""
        return not (self.changed or self.missing or self.unreadable or self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge verify --json` prints."""
        return {"ok": self.ok, **super().to_dict()}

    def _summary(self) -> str:
        found = f"{self.tensors} tensors, {'all as they were' if self.ok else f'{len(self._table()[1])} things differ'}"
        return found + (f"; not compared: {', '.join(self.uncompared)}" if self.uncompared else "")

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        rows = [(of, name, "changed") for of, names in self.changed.items() for name in names]
        rows += [(of, name, "missing or new") for of, names in self.missing.items() for name in names]
        rows += [("inputs", name, why) for name, why in self.unreadable.items()]
        return ("of", "name", "what"), [*rows, *(("files", name, what) for name, what in self.files.items())]


@strict
def verify(folder: str | Path, inputs: bool = True, progress: bool = True) -> Verified:
    """Read everything that was written, and the inputs where they still are, and compare it with the checksums of
    when it was.

    Args:
        folder: any folder that was written here, a state, or a single artefact such as a file of statistics.
        inputs: of a merge, the base and the experts as well.

    Raises:
        TwinmergeError: nothing that carries checksums, or damaged ones.
    """
    folder = Path(folder)
    found = _Found()
    if os.path.isfile(folder):
        found.add_artefact(folder, folder.name)
        return found.compared(progress)
    if not os.path.isdir(folder):
        what = "is no folder and no file" if os.path.lexists(folder) else "is not there"
        raise DataError(f"{shown_path(folder)} {what}. Name a folder or a file that twinmerge wrote.")
    if (folder / CHECKSUMS).is_file():
        manifest = Manifest.of(folder)
        wanted: Mapping[str, Mapping[str, str]] = _read(folder / CHECKSUMS) if manifest is None else manifest.sums
        if manifest is not None:
            found.add_files(manifest)
        else:  # of before the first release: tensors only
            _read(folder / PROVENANCE)
            found.add_weights(Checkpoint.open(folder), wanted[OUTPUT])
        if inputs and wanted.keys() - {OUTPUT} and PROVENANCE not in found.files:
            found.add_inputs(folder, wanted)
        return found.compared(progress)
    if os.path.isfile(folder / STATE):
        return _state(folder, progress)
    raise DataError(f"{folder / CHECKSUMS} is missing. Name a folder that twinmerge wrote, whole.")


def _state(folder: Path, progress: bool) -> Verified:
    """Of a state, which another process may replace meanwhile: then the new one is looked at."""
    while True:
        state, found = ArtefactFile(folder / STATE), _Found()
        with contextlib.suppress(OSError), state.held() as (fd,):  # one that was replaced before it was held
            found.add_state(folder, state)
            compared = found.compared(progress)
            if compared.ok or os.path.samestat(os.fstat(fd), os.stat(folder / STATE)):
                return compared


class _Found:
    """What there is to compare, and what was found."""

    def __init__(self) -> None:
        self.wanted: dict[str, Mapping[str, str]] = {}
        self.jobs: list[Job] = []
        self.files: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.uncompared: dict[str, str] = {}
        self.opened: list[Checkpoint] = []

    def add_artefact(self, file: Path, name: str) -> None:
        """A file with checksums of its own."""
        opened = ArtefactFile(file)
        self.opened.append(opened)
        self._add_sums_of(opened, name)

    def add_weights(self, opened: Checkpoint, wanted: Mapping[str, str], within: str = "") -> None:
        """The weights of a folder, or of a part of it, whose tensors have its path before their names."""
        self.opened.append(opened)
        self._add(opened, OUTPUT, wanted, within)

    def add_files(self, manifest: Manifest) -> None:
        """All that a manifest names, and what it does not name."""
        folder, weights = manifest.folder, dict[str, list[Path]]()
        for name, entry in manifest.files.items():
            if (said := manifest.differs(name)) is not None:
                self.files[name] = said
            if "header" not in entry or (said is not None and said.startswith("is missing")):
                continue
            try:
                if SEAL in header_in(folder / name).metadata:
                    self.add_artefact(folder / name, name)
                else:
                    within = f"{name.rpartition('/')[0]}/" if "/" in name else ""
                    weights.setdefault(within, []).append(folder / name)
            except TwinmergeError:
                self.files[name] = said or "is damaged"
        self.files |= dict.fromkeys(manifest.strange(), "was not written here")
        for within, files in weights.items():
            try:
                self.add_weights(Checkpoint(files), manifest.sums.get(OUTPUT, {}), within)
            except TwinmergeError as error:
                self.files[f"{within}{files[0].name}"] = str(error)

    def add_state(self, folder: Path, state: ArtefactFile) -> None:
        """A state of experts that came over time, held open, and their heads beside it."""
        self._add_sums_of(state, STATE)
        known = {STATE, f"{STATE}.partial", "lock"}  # of an add that is under way, or was killed, as are heads below
        for expert in state.artefact.header.get("experts", []):
            if (checksum := expert.get("head")) is None:
                continue
            name = head_of_state(expert["name"], checksum)
            known.add(name)
            try:
                if of_file(folder / name) != checksum:
                    self.files[name] = "is not what was written"
            except FileNotFoundError:
                self.files[name] = "is missing"
            except (OSError, TwinmergeError) as error:
                self.files[name] = f"cannot be read ({error})"
        strange = (name for name in files_in(folder) if name not in known and not _is_left(folder / name))
        self.files |= dict.fromkeys(strange, "was not written here")

    def add_inputs(self, folder: Path, wanted: Mapping[str, Mapping[str, str]]) -> None:
        """The base and the experts of a merge."""
        try:
            described = _read(folder / PROVENANCE)
            places = _places(described["recipe"])
            if "parts" not in described and not all(
                is_reference(place) and not os.path.isfile(place) and not only_pickles(Path(place))
                for place in places.values()
            ):
                self.add_alone(places, wanted)
                return
            merge = merge_of(from_description(described["recipe"]), progress=False)
            if isinstance(merge, MergeOfParts):
                for path, part in merge.parts.items():
                    self.jobs += _of_inputs(part.plan, part.models, wanted, within(path))
            else:
                plan = merge.plan
                if "copied" in described:  # an edited plan was merged
                    plan = planned_as(described, plan, merge.models, str(folder / PROVENANCE))
                self.jobs += _of_inputs(plan, merge.models, wanted)
            self.wanted |= {source: sums for source, sums in wanted.items() if source != OUTPUT}
        except (TwinmergeError, KeyError, TypeError) as error:
            self.unreadable["inputs"] = str(error)

    def add_alone(self, places: Mapping[str, str], wanted: Mapping[str, Mapping[str, str]]) -> None:
        """Each input by itself, since some were in memory, or are pickles or files of a module that is not here.

        Args:
            places: label -> what the provenance calls the model.
        """
        for label in sorted(wanted.keys() - {OUTPUT}):
            if not is_reference(place := places.get(label, "")):
                self.uncompared[label] = "it was in memory"
                continue
            if only_pickles(Path(place)):
                self.uncompared[label] = "its weights are pickles, which are read by a merge alone"
                continue
            try:
                model = open_tensors(Path(place), label) if os.path.isfile(place) else open_model(place)
            except TwinmergeError as error:
                self.unreadable[label] = str(error)
                continue
            names = {name: found for name in wanted[label] if (found := _known_as(model, name)) is not None}
            if len(names) < len(wanted[label]):
                self.uncompared[label] = "its tensors cannot be told without the models that were in memory"
                continue
            self.wanted[label] = wanted[label]
            for name, own in names.items():
                size, count = SIZES[model.range_code(own)], model.spec(own).numel
                self.jobs.append((label, name, partial(streamed, partial(model.read_range, own), size, count)))

    def compared(self, progress: bool) -> Verified:
        """Read all of it."""
        found: dict[str, dict[str, str]] = {source: {} for source in self.wanted}
        bar = progress_meter("verifying", progress, len(self.jobs))
        with bar:
            for source, name, checksum in parallel(lambda each: (each[0], each[1], each[2]()), self.jobs):
                found.setdefault(source, {})[name] = checksum
                bar.update()
        for opened in self.opened:
            opened.close()
        changed, missing = {}, {}
        for source, sums in self.wanted.items():
            got = found[source]
            if differ := sorted(n for n, s in sums.items() if n in got and got[n] != s):
                changed[source] = differ
            if gone := sorted(sums.keys() ^ got.keys()):
                missing[source] = gone
        return Verified(len(self.jobs), changed, missing, self.unreadable, self.files, self.uncompared)

    def _add_sums_of(self, opened: ArtefactFile, name: str) -> None:
        if not opened.sealed and not opened.expected:
            raise DataError(f"{opened.file} has no checksums: an older release wrote it. Write it again.")
        self._add(opened, name, opened.expected)

    def _add(self, opened: Checkpoint, source: str, wanted: Mapping[str, str], within: str = "") -> None:
        self.wanted[source] = wanted
        self.jobs += [(source, f"{within}{name}", partial(opened.sum_of, name)) for name in opened.specs]


def _is_left(file: Path) -> bool:
    """Whether it is a head that no state names yet, or any more: whole, by the checksum in its name, or only begun."""
    if file.parent.name != HEADS or file.name.endswith(".partial"):
        return file.parent.name == HEADS
    expert, _, checksum = file.stem.rpartition(".")
    try:
        return (
            bool(expert) and file.parent.parent / head_of_state(expert, of_file(file)) == file and len(checksum) == 16
        )
    except FileNotFoundError:  # it is gone now
        return True
    except (OSError, TwinmergeError):
        return False


def _places(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Label of an input -> what the provenance calls it."""
    base = {} if recipe["base_model"] is None else {BASE: str(recipe["base_model"])}
    return base | {str(entry["name"]): str(entry["model"]) for entry in recipe["models"]}


def _known_as(model: OpenedModel, name: str) -> str | None:
    """The canonical name of a tensor by its name in the output; None where it is not known."""
    by_stored = {stored: own for own, stored in model.stored.items()}
    known = model.architecture.canonical(name) if model.architecture is not None else name
    return next((own for own in (by_stored.get(name), known, name) if own is not None and model.has(own)), None)


def _of_inputs(plan: Plan, models: Models, wanted: Mapping[str, Mapping[str, str]], part: str = "") -> list[Job]:
    """One job for every tensor of every input that the merge read.

    Args:
        plan: of the merge, or of one part.
        models: its opened models.
        wanted: input -> tensor -> its checksum.
        part: what stands before the names of the part's tensors.
    """
    found: list[Job] = []
    for name, entry in plan.entries.items():
        for label, source in entry.sources.items():
            if source.view.whole and f"{part}{name}" in wanted.get(label, {}):
                model = models.of_source(entry, label)
                read = partial(model.read_range, source.tensor)
                job = partial(streamed, read, SIZES[source.code], model.spec(source.tensor).numel)
                found.append((label, f"{part}{name}", job))
    return found


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, MOST, "Name a folder that twinmerge wrote, whole.", finite=False)
