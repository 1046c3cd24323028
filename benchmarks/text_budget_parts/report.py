"""The tables of the parts that were run."""

from __future__ import annotations

from typing import Any

from kit.scores import SETTINGS, score
from kit.table import bounded
from kit.table import table as table_of


def table(data: dict[str, Any]) -> str:
    """Markdown of the parts that were run."""
    lines: list[str] = []
    if "budgets" in data:
        heads = ["eight experts in", "codec", "pass", "refined", *SETTINGS, "routed right", "refused, held-out"]
        lines += [*table_of(heads, "llllr", map(_budget, data["budgets"]["rows"])), ""]
    if "ranks" in data:
        heads = ["at the bytes of rank", "uniform", "one order", "one order, weighed by inputs", "weighed / uniform"]
        lines += [*table_of(heads, "r", map(_rank, data["ranks"])), ""]
    if "unknown" in data:
        heads = [
            "unknown task",
            "probe on the shared model",
            "probe on the twin",
            "loss, points",
            "fell to the null expert",
        ]
        lines += table_of(heads, "lr", (_probe(name, p) for name, p in data["unknown"]["probes"].items()))
        refused = 100 * data["unknown"]["in_domain_refused"]
        lines += ["", f"In-domain test rows that fell to the null expert: {refused:.1f} %.", ""]
    if "add" in data:
        a = data["add"]
        lines.append(
            f"Adding the eighth expert: {a['add_seconds']:.1f} s, a build of eight {a['build_seconds']:.1f} s: "
            f"{a['share']:.2f}."
        )
    return "\n".join(lines) + "\n"


def _budget(row: dict[str, Any]) -> list[str]:
    mode = "two passes" if row["single_pass"] is None else f"single, from layer {row['single_pass']}"
    right = next(s["routed_right"] for s in row["settings"] if s["routed_right"] is not None)
    what = [f"{100 * row['bytes']:.2f} %", row["codec"], mode, "yes" if row["refined"] else "–"]
    return [*what, *map(score, row["settings"]), f"{100 * right:.1f} %", f"{100 * row['refused']:.1f} %"]


def _rank(row: dict[str, Any]) -> list[str]:
    uniform, one, weighed = row["error"].values()
    return [str(row["rank"]), f"{uniform:.4f}", f"{one:.4f}", f"{weighed:.4f}", f"{weighed / uniform:.2f}"]


def _probe(name: str, found: dict[str, Any]) -> list[str]:
    points = bounded(found["loss_points"])
    return [name, f"{100 * found['shared']:.1f}", f"{100 * found['twin']:.1f}", points, f"{100 * found['null']:.0f} %"]
