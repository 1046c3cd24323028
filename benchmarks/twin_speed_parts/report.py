"""The tables."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from kit.table import shown

told = partial(shown, digits=2)


def by_size(cells: list[dict[str, Any]]) -> list[str]:
    """Markdown: all batches of one model, number of experts and rank in a line. What PEFT takes over the static model bounds what can be
    won of it: no mixture is faster than the static model."""
    if not cells:
        return []
    lines = [
        "",
        "| model | K | r | at the largest batch: stacked / static | top-1 / static | all batches: planned / PEFT mixed batch | "
        "4 tokens or fewer: PEFT / planned | PEFT / static | Arrow / top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
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
        ends = [[statistics.median(x), min(x), max(x)] if x else None for x in columns]
        lines.append(
            f"| {' | '.join(map(str, size))} | {over['stacked'][0]:.2f} | {over['top-1'][0]:.2f} | "
            f"{' | '.join(map(told, ends))} |"
        )
    against = [c["planned_over_peft"][0] for c in cells]
    few = [1 / c["planned_over_peft"][0] for c in cells if c["rows"] * c["tokens"] <= 4]
    lines += ["", f"Planned / PEFT's mixed batch: median {statistics.median(against):.2f}, highest {max(against):.2f}"]
    if few:
        lines[-1] += (
            f"; at 4 tokens or fewer PEFT / planned: median {statistics.median(few):.2f}, lowest {min(few):.2f}"
        )
    lines[-1] += "."
    return lines


def table(cells: list[dict[str, Any]], routed: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | K | r | rows × tokens | static ms | stacked / static | top-1 / static | planned / static | way chosen | planned / PEFT mixed batch | Arrow / top-1 | rebuild / stacked |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for c in cells:
        over = c["over_static"]
        lines.append(
            f"| {c['model']} | {c['experts']} | {c['rank']} | {c['rows']} × {c['tokens']} | {c['median_ms']['static']:.1f} | "
            f"{told(over['stacked'])} | {told(over['top-1'])} | {told(over['planned'])} | {c['chosen']} | "
            f"{told(c.get('planned_over_peft'))} | {told(c.get('arrow_over_top1'))} | {told(c.get('rebuild_over_stacked'))} |"
        )
    lines += by_size([c for c in cells if "planned_over_peft" in c])
    for c in [c for c in cells if "extra_memory_mb" in c]:
        extra = c["extra_memory_mb"]
        lines.append(
            f"{c['model']}, K = {c['experts']}, r = {c['rank']}, {c['rows']} × {c['tokens']}: beyond the static model's pass Arrow holds "
            f"{extra['PEFT Arrow']:.0f} MB, top-1 {extra['top-1']:.1f} MB."
        )
    if routed:
        lines += [
            "",
            "| routing, K = 8, r = 16 | rows × tokens | single pass adds | two passes add | single pass / static | two passes / static |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in routed:
            lines.append(
                f"| {r['model']}, from layer {r['layer']} | {r['rows']} × {r['tokens']} | {told(r['single_pass_adds'])} | "
                f"{told(r['two_passes_add'])} | {told(r['single_pass_over_static'])} | {told(r['two_passes_over_static'])} |"
            )
    return "\n".join(lines) + "\n"
