"""From the inputs to the output's files: tensors of the base copied as bytes, all others merged range by range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twinmerge.engine.combine import combine
from twinmerge.engine.inputs import Inputs
from twinmerge.engine.plan import Entry, Plan
from twinmerge.engine.ranges import Range, ranges
from twinmerge.engine.rounding import Rounding, narrowed
from twinmerge.engine.run import Run
from twinmerge.engine.seen import Digests
from twinmerge.methods.kit.base import Known
from twinmerge.models.opened import as_tensor
from twinmerge.progress import note
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checkpoint_writer import PYTORCH, CheckpointWriter
from twinmerge.store.checksum import block_digests, joined
from twinmerge.store.header import SIZES, torch_dtype
from twinmerge.store.manifest import OUTPUT
from twinmerge.store.output import OutputFile, OutputFolder
from twinmerge.store.ranges import bytes_of

Line = dict[str, Any]
"""What the journal keeps of one group of ranges: tensor -> input or "output" -> checksums; changed and erased
entries."""


class Journal:
    """Which groups are done, in the output's `.partial`, so that a killed merge goes on where it stopped.

    Args:
        output: that is written.
        kept: the files of earlier runs are there.
        part: which of several merges of the output it is.
    """

    def __init__(self, output: OutputFolder | OutputFile, kept: bool, part: str = "") -> None:
        self.output, self.part = output, {"part": part} if part else {}
        own = [line for line in output.done if line.get("part", "") == part]
        lines = own if kept else []  # without the files, what was said of them is void
        self.done: dict[int, Line] = {int(line["group"]): line for line in lines}

    def keep(self, intact: Callable[[int, Line], bool]) -> None:
        """Forget the groups whose values are not what was said: after a power loss the disk may have less than the
        journal."""
        self.done = {group: line for group, line in self.done.items() if intact(group, line)}

    def record(self, group: int, line: Line) -> None:
        if self.output.key is not None:
            self.output.record({"group": group, **self.part, **line})


@dataclass
class Report:
    """checksums: "output" or an input -> tensor -> its checksum; changed, erased: entries, see `erased`; require:
    looks at each tensor's blocks, refuses a tensor that is not what it was when it was written, and says whether they
    are kept."""

    require: Callable[[str, str, Sequence[str]], bool]
    checksums: dict[str, dict[str, str]] = field(default_factory=dict)
    changed: int = 0
    erased: int = 0
    _open: dict[str, Digests] = field(default_factory=dict)  # tensor -> what is known of it so far

    def __getstate__(self) -> dict[str, Any]:
        """What was found; a copy has nothing more to look at."""
        return {**self.__dict__, "require": _no_more}

    def add(self, line: Line) -> None:
        self.changed += line["changed"]
        self.erased += line["erased"]
        for tensor, digests in line["tensors"].items():
            self.extend(tensor, digests)

    def extend(self, tensor: str, digests: Mapping[str, list[str]]) -> None:
        known = self._open.setdefault(tensor, {})
        for source, blocks in digests.items():
            known.setdefault(source, []).extend(blocks)

    def close(self, tensor: str) -> None:
        """All blocks of the tensor are in."""
        for source, blocks in self._open.pop(tensor).items():
            if self.require(source, tensor, blocks):
                self.checksums.setdefault(source, {})[tensor] = joined(blocks)

    def rounding(self, seed: int | None) -> dict[str, Any]:
        return {
            "mode": "nearest" if seed is None else f"stochastic, seed {seed}",
            "changed_entries": self.changed,
            "erased_entries": self.erased,
        }


def _no_more(source: str, tensor: str, blocks: Sequence[str]) -> bool:
    raise AssertionError("a report that was copied is finished")


class _Written(NamedTuple):
    """What is said of a range once it is in its place."""

    digests: Digests
    changed: int
    erased: int


@dataclass(frozen=True)
class _Writing:
    """What a worker does with a range: merge it, and put it in its place. Pickled, both ends are opened where it
    arrives."""

    inputs: Inputs
    writer: CheckpointWriter
    stochastic: int | None

    def __call__(self, each: Range, known: Known) -> _Written:
        digests, rounding = Digests(), Rounding(self.inputs.entries[each.name].spec.code, self.stochastic)
        got = combine(each, known, self.inputs, rounding, digests)
        self.writer.write(each.name, each.start, got.values)
        digests[OUTPUT] = block_digests(got.values, rounding.itemsize)
        return _Written(digests, got.changed, got.erased)


def write_files(
    run: Run,
    inputs: Inputs,
    folder: Path,
    files: Mapping[str, Mapping[str, Spec]],
    output: OutputFolder | OutputFile,
    part: str = "",
    metadata: Mapping[str, str] = PYTORCH,
) -> Report:
    """Write the merged tensors into files of an output that is open.

    Args:
        run: of the merge, surveyed.
        inputs: with their rules settled.
        folder: where the files are.
        files: as `layout` gives them.
        output: that has the journal.
        part: which of several merges of this output it is.
        metadata: of each file.

    Raises:
        TwinmergeError: as `write`.
    """
    assert inputs.plan is not None
    writer = CheckpointWriter(folder, files, metadata, summed=False)
    try:
        report = write(inputs.plan, inputs, run, writer, Journal(output, writer.kept, part))
        writer.finish()
    finally:
        writer.close()
    return report


def write(plan: Plan, inputs: Inputs, run: Run, writer: CheckpointWriter, journal: Journal) -> Report:
    """Fill the output's files.

    Args:
        plan: what is written.
        inputs: its opened models.
        run: of its merged tensors, surveyed.
        writer: of the output's files.
        journal: what is written already.

    Raises:
        TwinmergeError: as `combine` says; an input that is not what it was.
    """
    report = Report(inputs.require)
    for entry in plan.copied.values():
        _copy(plan, inputs, entry, writer, report)
    groups = run.groups()
    journal.keep(lambda i, line: _is_there(groups[i], line, writer, plan))
    if journal.done:
        there = sum(e.size * plan.rounding(e.name).itemsize for i in journal.done for e in groups[i])
        note(
            f"Goes on where it stopped: {_megabytes(there)} of {_megabytes(plan.output_bytes)} MB were written.",
            "engine",
        )
    left = [i for i in range(len(groups)) if i not in journal.done]
    fresh = run.merge([groups[i] for i in left], _Writing(inputs, writer, plan.recipe.stochastic))
    for i, group in enumerate(groups):
        if i in journal.done:
            line = journal.done.pop(i)
        else:
            line = _line(group, next(fresh))
            journal.record(i, line)
        report.add(line)
        for each in group:
            if each.stop == plan.merged[each.name].size:
                report.close(each.name)
    for _ in fresh:  # lets the progress bar end
        pass
    return report


def _megabytes(count: int) -> str:
    """
    Example:
        >>> _megabytes(22_400_000), _megabytes(91_600)
        ('22', '0.092')
    """
    return f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.2g}"


def _is_there(group: list[Range], line: Line, writer: CheckpointWriter, plan: Plan) -> bool:
    """Whether the output has the values whose checksums the line tells."""
    found: Digests = {}
    for each in group:
        size = plan.rounding(each.name).itemsize
        values = np.empty(each.size * size, np.uint8)
        writer.read_into(each.name, each.start, values)
        found.setdefault(each.name, []).extend(block_digests(values, size))
    return found == {name: digests[OUTPUT] for name, digests in line["tensors"].items()}


def _line(group: list[Range], written: list[_Written]) -> Line:
    tensors: dict[str, Digests] = {}
    for each, one in zip(group, written, strict=True):
        for source, blocks in one.digests.items():
            tensors.setdefault(each.name, {}).setdefault(source, []).extend(blocks)
    return {"changed": sum(t.changed for t in written), "erased": sum(t.erased for t in written), "tensors": tensors}


def _copy(plan: Plan, inputs: Inputs, entry: Entry, writer: CheckpointWriter, report: Report) -> None:
    """A tensor of the base, or of the model that stands for it, byte for byte where the dtype stays."""
    assert entry.base is not None
    code, wanted, base = entry.base.code, entry.spec.code, inputs.models.labelled(entry.base_label)
    for each in ranges([entry.name], {entry.name: entry.place.shape}, plan.tile):
        stored = np.empty(each.size * SIZES[code], np.uint8)
        base.read_range(entry.base.tensor, each.start, stored)
        out = stored
        if code != wanted:
            out = np.frombuffer(bytes_of(narrowed(as_tensor(stored, torch_dtype(code)), wanted, entry.name)), np.uint8)
        writer.write(entry.name, each.start, out)
        digests = {entry.base_label: block_digests(stored, SIZES[code]), OUTPUT: block_digests(out, SIZES[wanted])}
        report.extend(entry.name, digests)
    report.close(entry.name)
