"""What a merge will do and take, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmerge.engine.by_names import tables_of
from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan, element_bytes, grains_of, shapes_of
from twinmerge.engine.ranges import SEEN, Range, ranges
from twinmerge.engine.reads import read_bytes
from twinmerge.engine.run import Run
from twinmerge.engine.settings import Told
from twinmerge.maths.threads import thread_count
from twinmerge.models.opened import OpenedModel
from twinmerge.results import Record, bytes_of, megabytes, some
from twinmerge.statistics.file import Statistics

RATE = 1e9  # bytes per second that the estimate of the time takes for reading and writing: a plain solid-state disk
COPIES = 3  # of a stack that a method holds at once


class Checked(Record):
    """What a merge will do and take: a mapping, with the keys that `checked` names."""

    def _summary(self) -> str:
        took = f"reads {self['read_bytes'] / 1e6:.1f} MB, writes {self['output_bytes'] / 1e6:.1f} MB"
        return f"{self['method']}, {self['merged_tensors']} tensors of {some(self['heads'], 2)}, {took}"


def checked(plan: Plan, models: Models, run: Run, statistics: Mapping[str, Statistics], told: Told) -> Checked:
    """Plain data: which tensors go where, dtypes, ties, vocabularies and keys of the configs that say something else
    than the base's (the expert's value, the base's), and the bytes, memory and time of the merge.

    Headers and the beginning of one matrix were read for it. Memory is that of the tiles under way (of whole
    matrices, for methods that need them), beside what the libraries themselves take. Bytes are those of every sweep
    that runs, but for passes that rarely do; time is what a disk of 1 GB/s needs for them.

    Args:
        plan: what is to be done.
        models: its opened models.
        run: of its method, with what headers say.
        statistics: of each expert, where the method reads them.
        told: what is told of experts.
    """
    reads = read_bytes(plan, models, run, statistics)
    tables = tables_of(plan, models)
    found: dict[str, Any] = {
        "method": plan.recipe.method_name,
        "semantics": plan.recipe.semantics,
        "parameters": plan.parameters,
        "merged_tensors": len(plan.merged),
        "merged_parameters": sum(entry.size for entry in plan.merged.values()),
        "heads": plan.heads,
        "from_base": sorted(entry.tensor for entry in plan.copied.values()),
        "ignored": {e: names for e, names in plan.ignored.items() if names},
        "configs": {e: {k: list(v) for k, v in found.items()} for e, found in plan.configs.items() if found},
        "tied": models.base.aliases,
        **({} if tables is None else {"tables": tables}),
        **({} if models.unified is None else {"tokens": models.unified.to_dict()}),
        **told.to_dict(),
        "dtypes": {label: _dtypes(model) for label, model in {"base": models.base, **models.experts}.items()},
        "output_dtypes": sorted({spec.name for spec in plan.specs.values()}),
        "read_bytes": reads,
        "output_bytes": plan.output_bytes,
        "memory_bytes": _memory(plan),
        "seconds_at_1_GB_per_s": round((reads + plan.output_bytes) / RATE, 1),
    }
    if plan.recipe.lines is not None:
        found["lines"] = {**plan.recipe.lines.describe(), "blocks": plan.blocks}
    return Checked(found)


def known_size(plan: Plan | None, output: Path | None) -> str:
    """How large an output is, as far as that is known without opening a model.

    Args:
        plan: of the merge, where it was made.
        output: where it was written.
    """
    if output is not None:
        return megabytes(bytes_of(output))
    return "not known yet: check() reads the models' headers" if plan is None else megabytes(plan.output_bytes)


def _memory(plan: Plan) -> int:
    """What all workers read and write at once, and the widened stacks that methods make of a part of it."""
    shapes, grains = shapes_of(plan.merged), grains_of(plan.merged)
    work = list(ranges(shapes, shapes, plan.tile, grains))
    element = element_bytes(plan.merged, plan.specs)

    def taken(each: Range) -> int:
        stack = COPIES * (len(plan.experts) + 1) * (8 if plan.merged[each.name].place.wide else 4)
        if grains[each.name] == "element":
            return element * each.size + stack * min(SEEN, each.size)
        return 2 * (element + stack) * each.size

    return thread_count() * max(map(taken, work), default=0)


def _dtypes(model: OpenedModel) -> list[str]:
    return sorted({spec.name for spec in model.specs.values()})


def added(key: str, before: Any, value: Any, part: str) -> Any:
    """What is said of parts together.

    Args:
        key: of what is said.
        before: of the parts before, None for none.
        value: of this part.
        part: what stands before its names.
    """
    if key in ("method", "semantics", "parameters", "lines"):
        return value if before is None else before
    if isinstance(value, bool) or not isinstance(value, (int, float, list, Mapping)):
        return value
    if isinstance(value, (int, float)):
        return value if before is None else max(before, value) if key == "memory_bytes" else before + value
    if isinstance(value, list):
        named = value if key in ("output_dtypes", "dtypes") else [f"{part}{name}" for name in value]
        return list(dict.fromkeys([*(before or []), *named]))
    if key == "tied":
        return {**(before or {}), **{f"{part}{name}": f"{part}{to}" for name, to in value.items()}}
    found = dict(before or {})
    for label, inner in value.items():
        if isinstance(inner, (list, Mapping)):
            found[label] = added("dtypes" if key == "dtypes" else label, found.get(label), inner, part)
        else:
            found[f"{part}{label}" if key != "other_tokens" else label] = inner
    return found
