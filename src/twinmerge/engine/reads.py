"""How many bytes a merge asks of its stores: every sweep that runs, and those of merges that are its inputs (at most:
what uses of one share is counted for each)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from twinmerge.engine.inputs import Inputs
from twinmerge.engine.models import Models
from twinmerge.engine.nested import KEPT, Computed
from twinmerge.engine.plan import Entry, Plan
from twinmerge.engine.prepare import new_run
from twinmerge.engine.ranges import Range
from twinmerge.engine.run import Run
from twinmerge.models.opened import OpenedModel
from twinmerge.statistics.file import Statistics
from twinmerge.store.header import SIZES


def read_bytes(plan: Plan, models: Models, run: Run, statistics: Mapping[str, Statistics]) -> int:
    """Of all tensors and statistics that are merged or copied, as often as they are read.

    Args:
        plan: what is done.
        models: its opened models.
        run: of its methods, with what headers say.
        statistics: of each expert, where the method reads them.
    """
    ranges = [*run.looked_at(), *(_whole(entry) for entry in plan.copied.values())]
    total = _of(_asked(plan, models, ranges))
    if "fisher" in plan.method.needs:
        each = {
            name: sum(found.has(entry.tensor) for found in statistics.values()) for name, entry in plan.merged.items()
        }
        return total + sum(each.get(r.name, 0) * r.size * SIZES["F32"] for r in ranges)
    return total + sum(spec.bytes for found in statistics.values() for spec in found.specs.values())


class _Asked(NamedTuple):
    """Elements of a tensor, by the name under which its source has it."""

    model: OpenedModel
    name: str
    at: Range


def _whole(entry: Entry) -> Range:
    return Range(entry.name, 0, entry.size)


def _asked(plan: Plan, models: Models, ranges: Iterable[Range]) -> Iterator[_Asked]:
    """What ranges of the output are made of."""
    for each in ranges:
        entry = plan.entries[each.name]
        for label, source in entry.sources.items():
            model = models.of_source(entry, label)
            yield _Asked(model, model.own(source.tensor), each)


def _of(asked: Iterable[_Asked]) -> int:
    """The bytes of what is asked of files, and of the files behind what is merged on the way."""
    total = 0
    inner: dict[int, tuple[Computed, list[Range]]] = {}
    for model, name, at in asked:
        source = model.source
        if isinstance(source, Computed) and name not in model.changes:
            here = inner.setdefault(id(source), (source, []))[1]
            here.append(at._replace(name=model.stored[name]))
        else:
            total += at.size * model.specs[name].itemsize
    return total + sum(_computed(source, ranges) for source, ranges in inner.values())


def _computed(source: Computed, asked: list[Range]) -> int:
    """What a merge on the way reads for the ranges of its output that are asked."""
    plan, models = source.plan, source.models
    run = new_run(plan, Inputs.of(plan, models), progress=False, spread=map)
    names = dict.fromkeys(each.name for each in asked)
    merged = [name for name in names if name in plan.merged]
    ranges = list(run.surveyed_at()) if merged else []
    for name in merged:
        ranges += run.settled_at([name])
    in_pieces = {name for name in merged if plan.merged[name].grain != "element"}
    fits = sum(plan.merged[name].spec.bytes for name in in_pieces) <= KEPT
    kept: set[Range] = set()
    last = None
    for each in asked:
        for piece in source.pieces(each.name, each.start, each.stop):
            if piece not in kept and piece != last:  # what was computed last is there still, for the next of a sample
                ranges.append(piece)
            if fits and each.name in in_pieces:
                kept.add(piece)
            last = piece
    return _of(_asked(plan, models, ranges))
