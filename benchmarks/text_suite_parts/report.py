"""The table and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.picture import panels, save
from kit.scores import SETTINGS, by_method, score
from kit.table import settings
from kit.table import table as table_of
from text_suite_parts.plan import RANKS


def table(data: dict[str, Any]) -> str:
    """Markdown: a line per method, the settings side by side, each with its 95 % interval."""
    rows = []
    for method, found in by_method(data["rows"]).items():
        last = list(found.values())[-1]
        chosen = settings(last.get("parameters"))
        cost = f"{last['bytes_extra'] / 1e6:.1f} MB", f"{last['seconds_build']:.0f}", f"{last['seconds_per_1000']:.1f}"
        rows.append([method + (f" ({chosen})" if chosen else ""), *(score(found.get(s)) for s in SETTINGS), *cost])
    lines = table_of(["method", *SETTINGS, "bytes extra", "build s", "s per 1,000"], "lr", rows)
    experts = ", ".join(f"{task} {100 * value:.1f}" for task, value in data["experts"].items())
    return "\n".join(lines) + f"\n\nExperts, accuracy on the full test splits: {experts}.\n"


def pictures(data: dict[str, Any], out: Path) -> None:
    """ladder.png: score over rank for both shared parts; methods.png: bars of every method, with intervals."""
    colours = {"task given": "#1b6ca8", "head given": "#2a9d8f", "nothing given, strict": "#e76f51"}
    figure, axes = panels(1, 2, (10, 4), sharey=True)
    for axis, shared in zip(axes, ("task_arithmetic", "tsv"), strict=True):
        for setting, colour in colours.items():
            rows = [r for r in data["rows"] if r.get("shared") == shared and r["setting"] == setting]
            x, y = [r["rank"] for r in rows], [r["normalised"] for r in rows]
            axis.plot(x, y, marker="o", color=colour, label=setting)
            axis.fill_between(
                x, [r["interval"][0] for r in rows], [r["interval"][1] for r in rows], color=colour, alpha=0.15, lw=0
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(RANKS), [str(r) for r in RANKS])
        axis.set_title(f"shared part: {shared}")
        axis.set_xlabel("rank of the exclusive parts")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("per cent of the experts")
    axes[1].legend(loc="lower right")
    save(figure, out / "ladder.png")

    rows = [r for r in data["rows"] if r["setting"] == "head given"]
    figure, axis = panels(1, 1, (8, 0.38 * len(rows) + 1))
    for i, row in enumerate(reversed(rows)):
        value, (low, high) = row["normalised"], row["interval"]
        axis.barh(
            i, value, color="#2a9d8f" if "twin" in row["method"] else "#5f6c7b", xerr=[[value - low], [high - value]]
        )
        axis.text(value / 2, i, f"{value:.1f}", va="center", ha="center", color="white", fontsize=8)
    axis.set_yticks(range(len(rows)), [r["method"] for r in reversed(rows)], fontsize=8)
    axis.axvline(100, color="black", lw=0.8)
    axis.text(100.5, len(rows) - 0.5, "the experts", fontsize=8, va="bottom")
    axis.set_xlim(0, 118)
    axis.set_xlabel("per cent of the experts, head given")
    axis.set_title("One model for all tasks, with 95 % intervals")
    save(figure, out / "methods.png")
