"""From the inputs to the output's files: tensors of the base copied as bytes, all others merged range by range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinmerge.engine.inputs import BASE, Digests
from twinmerge.engine.ranges import Range, ranges
from twinmerge.engine.rounding import Rounding, erased
from twinmerge.methods.base import Tile
from twinmerge.store.checksum import block_digests, joined
from twinmerge.store.output import CheckpointWriter, OutputFolder

if TYPE_CHECKING:
    from twinmerge.engine.merge import Merge

OUTPUT = "output"
Line = dict[str, Any]
"""What the journal keeps of one group of ranges: tensor -> input or "output" -> checksums; changed and erased entries."""


class Journal:
    """Which groups are done, in the output's `.partial`, so that a killed merge goes on where it stopped."""

    def __init__(self, output: OutputFolder, kept: bool) -> None:
        self.output = output
        lines = output.done if kept else []  # without the files, what was said of them is void
        self.done: dict[int, Line] = {int(line["group"]): line for line in lines}

    def record(self, group: int, line: Line) -> None:
        if self.output.key is not None:
            self.output.record({"group": group, **line})


@dataclass
class Report:
    """checksums: "output" or an input -> tensor -> its checksum; changed, erased: entries, see `erased`."""

    checksums: dict[str, dict[str, str]] = field(default_factory=dict)
    changed: int = 0
    erased: int = 0
    _open: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        self.changed += line["changed"]
        self.erased += line["erased"]
        for tensor, digests in line["tensors"].items():
            self.extend(tensor, digests)

    def extend(self, tensor: str, digests: Mapping[str, list[str]]) -> None:
        for source, blocks in digests.items():
            self._open.setdefault((source, tensor), []).extend(blocks)

    def close(self, tensor: str) -> None:
        """All blocks of the tensor are in."""
        for source, name in [key for key in self._open if key[1] == tensor]:
            self.checksums.setdefault(source, {})[name] = joined(self._open.pop((source, name)))

    def rounding(self, seed: int | None) -> dict[str, Any]:
        return {
            "mode": "nearest" if seed is None else f"stochastic, seed {seed}",
            "changed_entries": self.changed,
            "erased_entries": self.erased,
        }


@dataclass
class _Output:
    """A range on its way: its values as they will be written, and what is known of them."""

    rounding: Rounding
    values: Tensor
    digests: Digests
    changed: int = 0
    erased: int = 0


def write(merge: Merge, writer: CheckpointWriter, journal: Journal) -> Report:
    """Fill the output's files."""
    report = Report()
    for name in merge.matched.from_base:
        _copy(merge, name, writer, report)
    run = merge.plan()
    run.survey()
    groups = run.groups()
    under_way: dict[Range, _Output] = {}

    def pieces(each: Range) -> Iterator[Tile]:
        digests = Digests()
        rounding = merge.rounding(each.name)
        under_way[each] = _Output(rounding, torch.empty(each.size, dtype=rounding.dtype), digests)
        return merge.inputs.pieces(each, digests)

    def piece(each: Range, tile: Tile, merged: Tensor) -> None:
        output = under_way[each]
        out = output.rounding.of(merged, tile, merge.method)
        start = tile.at.offset - each.start
        output.values[start : start + out.numel()] = out
        changed, lost = erased(merged, out, tile, output.rounding)
        output.changed += changed
        output.erased += lost

    def done(group: list[Range]) -> Line:
        line: Line = {"changed": 0, "erased": 0, "tensors": {}}
        for each in group:
            output = under_way.pop(each)
            writer.write(each.name, each.start, output.values)
            line["changed"] += output.changed
            line["erased"] += output.erased
            line["tensors"][each.name] = {**output.digests, OUTPUT: block_digests(output.values)}
        return line

    left = [i for i in range(len(groups)) if i not in journal.done]
    fresh = run.merge([groups[i] for i in left], pieces, piece, done)
    for i, group in enumerate(groups):
        if i in journal.done:
            line = journal.done.pop(i)
        else:
            line = next(fresh)
            journal.record(i, line)
        report.add(line)
        for each in group:
            if each.stop == torch.Size(merge.inputs.shapes[each.name]).numel():
                report.close(each.name)
    for _ in fresh:  # lets the progress bar end
        pass
    return report


def _copy(merge: Merge, name: str, writer: CheckpointWriter, report: Report) -> None:
    """A tensor of the base, byte for byte where the dtype stays."""
    base, out_name = merge.base, merge.base.stored[name]
    dtype = merge.out_specs[out_name].dtype
    for each in ranges([out_name], {out_name: base.spec(name).shape}, merge.tile):
        stored = torch.empty(each.size, dtype=base.range_dtype(name))
        base.read_range(name, each.start, stored)
        out = stored.to(dtype)
        writer.write(out_name, each.start, out)
        report.extend(out_name, {BASE: block_digests(stored), OUTPUT: block_digests(out)})
    report.close(out_name)
