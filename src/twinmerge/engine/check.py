"""What a merge will do and take, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twinmerge.engine.ranges import SEEN, Range, ranges
from twinmerge.maths.threads import thread_count

if TYPE_CHECKING:
    from twinmerge.engine.merge import Merge

RATE = 1e9  # bytes per second that the estimate of the time takes for reading and writing: a plain solid-state disk
COPIES = 3  # of a stack that a method holds at once


def checked(merge: Merge) -> dict[str, Any]:
    """Plain data: which tensors go where, dtypes, ties, vocabularies and keys of the configs that say something else than the base's
    (the expert's value, the base's), and the bytes, memory and time of the merge.

    Reads headers and the beginning of one matrix. Memory is that of the tiles under way (of whole matrices, for methods
    that need them), beside what the libraries themselves take; time is what a disk of 1 GB/s needs for the bytes.
    """
    matched, base = merge.matched, merge.base
    run = merge.plan()
    reads = 1 + sum(not step.sampled and not step.rare and step.name not in run.known for step in run.leading)
    inputs = [*merge.experts.values(), *([base] if merge.inputs.base is not None else [])]
    input_bytes = sum(model.spec(n).bytes for model in inputs for n in matched.merged)
    input_bytes += sum(spec.bytes for found in merge.statistics.values() for spec in found.specs.values())
    output_bytes = sum(spec.bytes for spec in merge.out_specs.values())
    return {
        "method": merge.recipe.method,
        "semantics": merge.recipe.semantics,
        "parameters": merge.recipe.resolved(merge.method),
        "merged_tensors": len(matched.merged),
        "merged_parameters": sum(base.spec(n).numel for n in matched.merged),
        "heads": matched.heads,
        "from_base": matched.from_base,
        "ignored": {e: names for e, names in matched.ignored.items() if names},
        "configs": {e: {k: list(v) for k, v in found.items()} for e, found in matched.configs.items() if found},
        "tied": base.aliases,
        **({} if merge.inputs.tables is None else {"tables": merge.inputs.tables}),
        "other_tokens": merge.other_tokens,
        "dtypes": {label: _dtypes(model) for label, model in {"base": base, **merge.experts}.items()},
        "output_dtypes": sorted({spec.name for spec in merge.out_specs.values()}),
        "read_bytes": reads * input_bytes,
        "output_bytes": output_bytes,
        "memory_bytes": _memory(merge),
        "seconds_at_1_GB_per_s": round((reads * input_bytes + output_bytes) / RATE, 1),
    } | ({} if merge.recipe.lines is None else {"lines": {**merge.recipe.lines.describe(), "blocks": merge.blocks}})


def _memory(merge: Merge) -> int:
    """What all workers read and write at once, and the float32 stacks that methods make of a part of it."""
    shapes, grains = merge.inputs.shapes, merge.inputs.grains
    work = list(ranges(shapes, shapes, merge.tile, grains))
    element = merge.inputs.element_bytes + max(spec.itemsize for spec in merge.out_specs.values())
    stack = COPIES * (len(merge.experts) + 1) * 4

    def taken(each: Range) -> int:
        if grains[each.name] == "element":
            return element * each.size + stack * min(SEEN, each.size)
        return 2 * (element + stack) * each.size

    return thread_count() * max(map(taken, work), default=0)


def _dtypes(model: Any) -> list[str]:
    return sorted({spec.name for spec in model.specs.values()})
