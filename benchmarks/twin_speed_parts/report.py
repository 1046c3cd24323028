"""The tables."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from kit.table import shown
from kit.table import table as table_of
from kit.tally import spread

told = partial(shown, digits=2)


def by_size(cells: list[dict[str, Any]]) -> list[str]:
    """Markdown: all batches of one model, number of experts and rank in a line. What PEFT takes over the static model
    bounds what can be won of it: no mixture is faster than the static model."""
    if not cells:
        return []
    rows = []
    for size in dict.fromkeys((c["model"], c["experts"], c["rank"]) for c in cells):
        own = [c for c in cells if (c["model"], c["experts"], c["rank"]) == size]
        few, largest = [c for c in own if c["rows"] * c["tokens"] <= 4], own[-1]
        columns = [
            [c["planned_over_peft"][0] for c in own],
            [1 / c["planned_over_peft"][0] for c in few],
            [c["over_static"]["PEFT mixed batch"][0] for c in few],
            [c["arrow_over_top1"][0] for c in own if c.get("arrow_over_top1")],
        ]
        over = largest["over_static"]
        ends = [spread(x) if x else None for x in columns]
        rows.append([*size, f"{over['stacked'][0]:.2f}", f"{over['top-1'][0]:.2f}", *map(told, ends)])
    heads = ["model", "K", "r", "at the largest batch: stacked / static", "top-1 / static"]
    heads += [
        "all batches: planned / PEFT mixed batch",
        "4 tokens or fewer: PEFT / planned",
        "PEFT / static",
        "Arrow / top-1",
    ]
    lines = ["", *table_of(heads, "lr", rows)]
    against = [c["planned_over_peft"][0] for c in cells]
    at_few = [1 / c["planned_over_peft"][0] for c in cells if c["rows"] * c["tokens"] <= 4]
    lines += ["", f"Planned / PEFT's mixed batch: median {statistics.median(against):.2f}, highest {max(against):.2f}"]
    if at_few:
        lines[-1] += (
            f"; at 4 tokens or fewer PEFT / planned: median {statistics.median(at_few):.2f}, lowest {min(at_few):.2f}"
        )
    lines[-1] += "."
    return lines


def table(cells: list[dict[str, Any]], routed: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["model", "K", "r", "rows × tokens", "static ms", "stacked / static", "top-1 / static", "planned / static"]
    heads += ["way chosen", "planned / PEFT mixed batch", "Arrow / top-1", "rebuild / stacked"]
    lines = table_of(heads, "lrrrrrrrlr", map(_cell, cells))
    lines += by_size([c for c in cells if "planned_over_peft" in c])
    for c in [c for c in cells if "extra_memory_mb" in c]:
        extra = c["extra_memory_mb"]
        lines.append(
            f"{c['model']}, K = {c['experts']}, r = {c['rank']}, {c['rows']} × {c['tokens']}: beyond the static "
            f"model's pass Arrow holds {extra['PEFT Arrow']:.0f} MB, top-1 {extra['top-1']:.1f} MB."
        )
    if routed:
        heads = ["routing, K = 8, r = 16", "rows × tokens", "single pass adds", "two passes add"]
        lines += ["", *table_of([*heads, "single pass / static", "two passes / static"], "lr", map(_routed, routed))]
    return "\n".join(lines) + "\n"


def _cell(c: dict[str, Any]) -> list[Any]:
    over = c["over_static"]
    return [
        *(c["model"], c["experts"], c["rank"], f"{c['rows']} × {c['tokens']}", f"{c['median_ms']['static']:.1f}"),
        *(told(over[way]) for way in ("stacked", "top-1", "planned")),
        c["chosen"],
        *(told(c.get(key)) for key in ("planned_over_peft", "arrow_over_top1", "rebuild_over_stacked")),
    ]


def _routed(r: dict[str, Any]) -> list[str]:
    keys = ("single_pass_adds", "two_passes_add", "single_pass_over_static", "two_passes_over_static")
    return [f"{r['model']}, from layer {r['layer']}", f"{r['rows']} × {r['tokens']}", *(told(r[key]) for key in keys)]
