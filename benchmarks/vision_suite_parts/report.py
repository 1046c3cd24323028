"""The table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kit.picture import panels, save
from kit.scores import SETTINGS, by_method, score
from kit.table import settings
from kit.table import table as table_of


def table(data: dict[str, Any]) -> str:
    """Markdown: a line per method, the settings side by side with their 95 % intervals; then experts and routers."""
    methods = by_method(data["scores"])
    rows = []
    for method, found in methods.items():
        chosen = settings(next(iter(found.values())).get("parameters"))
        rows.append([method + (f" ({chosen})" if chosen else ""), *(score(found.get(s)) for s in SETTINGS)])
    lines = table_of(["method", *SETTINGS], "lr", rows)
    lines += ["", f"The base on its ten classes: {100 * data['base_on_ten_classes']:.1f} % right."]
    lines += ["", "Head given, accuracy in per cent by task:", ""]
    of_tasks = [("experts", data["experts"]), *((m, found["head given"]["per_task"]) for m, found in methods.items())]
    accuracies = [[method, *(f"{100 * scores[t]:.1f}" for t in data["tasks"])] for method, scores in of_tasks]
    lines += table_of(["method", *data["tasks"]], "lr", accuracies)
    for shared, router in data["routers"].items():
        own = ", ".join(f"{task} {100 * value:.1f}" for task, value in router["right_by_task"].items())
        lines += [
            "",
            f"Router over {shared}: {100 * router['right']:.1f} % of the test rows right ({own}); "
            f"{100 * router['refused']:.1f} % left to the shared model.",
        ]
        went = zip(data["tasks"], router["confusion"], strict=True)
        shares = [[name, *(f"{100 * n / sum(counts):.1f}" for n in counts)] for name, counts in went]
        lines += ["", *table_of(["rows of / go to", *data["tasks"]], "lr", shares)]
    return "\n".join(lines) + "\n"


def picture(data: dict[str, Any], file: Path) -> None:
    """Bars of every method with its head given, the twins' other settings beside; and where the router sent the
    rows."""
    figure, (left, right) = panels(1, 2, (13, 5.2), width_ratios=[1.35, 1])
    rows = [r for r in data["scores"] if r["setting"] == "head given"][::-1]
    for i, row in enumerate(rows):
        value, (low, high) = row["normalised"], row["interval"]
        colour = "#2a9d8f" if "rank" in row else "#8d99a6"
        left.barh(i, value, color=colour, xerr=[[value - low], [high - value]], ecolor="black", capsize=2)
        left.text(2, i, f"{value:.1f}", va="center", color="white", fontsize=9, weight="bold")
    for setting, mark, colour in (("task given", "D", "#1b6ca8"), ("nothing given, strict", "o", "#e76f51")):
        found = {r["method"]: r["normalised"] for r in data["scores"] if r["setting"] == setting}
        places = [(found[row["method"]], i) for i, row in enumerate(rows) if row["method"] in found]
        left.scatter(
            *zip(*places, strict=True), marker=mark, color=colour, s=34, zorder=3, edgecolor="white", label=setting
        )
    left.axvline(100, color="black", lw=0.8)
    left.text(100.6, len(rows) - 0.45, "the experts", fontsize=8, va="bottom")
    left.set_yticks(range(len(rows)), [r["method"] for r in rows], fontsize=9)
    left.set_xlim(0, 116)
    left.set_ylim(-0.7, len(rows) + 0.1)
    left.set_xlabel("per cent of the experts (mean of the tasks)")
    left.set_title("Bars: head given, with 95 % intervals", fontsize=10)
    left.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=2, fontsize=9, frameon=False)

    names, shared = data["tasks"], list(data["routers"])[-1]
    counts = np.array(data["routers"][shared]["confusion"], dtype=float)
    shares = 100 * counts / counts.sum(1, keepdims=True)
    right.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, line in enumerate(shares):
        for j, value in enumerate(line):
            right.text(
                j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black", fontsize=9
            )
    right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    right.set_yticks(range(len(names)), names, fontsize=9)
    right.set_ylabel("rows of")
    right.set_xlabel("go to the expert")
    right.set_title(f"Router over {shared}: per cent of a task's test rows", fontsize=10)
    save(figure, file)
