"""Pictures: what the five experts of the demo see, and the charts of its report.

A chart is an inline SVG without text outlines: its text takes the page's font and colour, light or dark.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from twinmerge.study.digits import Task

INK = "#123456"  # stands for the page's text colour while matplotlib draws

TWIN_COLOUR, STATIC_COLOUR, EXPERT_COLOUR = "#0d9488", "#94a3b8", "#6366f1"
TASK_COLOURS = ("#0d9488", "#6366f1", "#d97706", "#db2777", "#0284c7")


def samples(task: Task) -> list[dict[str, Any]]:
    """The first two images of each of the task's digits, as they are and as the task shows them."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    at = [int(i) for digit in task.digits for i in np.flatnonzero(bunch.target == digit)[:2]]
    plain = torch.tensor(bunch.images[at], dtype=torch.float32) / 8 - 1
    seen = task.see(plain)
    return [
        {"digit": int(bunch.target[i]), "plain": p.tolist(), "seen": s.tolist()}
        for i, p, s in zip(at, plain, seen, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ charts


def pixels_uri(image: Sequence[Sequence[float]]) -> str:
    """An image between −1 (paper) and 1 (ink) as the data URI of a small grey PNG, one pixel each.

    Example:
        >>> pixels_uri([[-1.0, 1.0]]).startswith("data:image/png;base64,")
        True
    """
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.asarray(image, np.float64), cmap="gray_r", vmin=-1.0, vmax=1.0, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def results_chart(table: Sequence[Mapping[str, Any]], best_static: str) -> str:
    """One bar for each way: the mean of the seeds, a line from the lowest to the highest, a dot for each."""
    from matplotlib.figure import Figure

    rows = list(table)[::-1]
    figure = Figure(figsize=(8.6, 0.52 * len(rows) + 0.75), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        of_twin, experts = row["key"].startswith("twin"), row["key"] == "experts"
        colour = TWIN_COLOUR if of_twin else EXPERT_COLOUR if experts else STATIC_COLOUR
        faint = of_twin and row["setting"] != "nothing given"
        axes.barh(y, row["mean"], height=0.62, color=colour, alpha=0.5 if faint else 1.0)
        axes.plot([row["low"], row["high"]], [y, y], color=INK, linewidth=1.2)
        axes.plot(row["by_seed"], [y] * len(row["by_seed"]), ".", color=INK, markersize=4)
        weight = "bold" if row["key"] in (best_static, "twin, nothing given") else "normal"
        axes.text(max(row["mean"], row["high"]) + 1.5, y, f"{row['mean']:.1f} %", va="center", color=INK, weight=weight)
    axes.set_yticks(range(len(rows)), [f"{row['label']}, {row['setting']}" for row in rows])
    axes.set_xlim(0, max(118.0, max(row["high"] for row in rows) + 12))
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50\n(about guessing)", "75", "100 %"])
    axes.axvline(100, color=INK, linewidth=0.8, alpha=0.5)
    axes.axvline(50, color=INK, linewidth=0.8, alpha=0.5, linestyle=(0, (3, 3)))
    return _svg(figure, axes, "Normalised score of every way, mean of the seeds")


def confusion_chart(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Rows: the task that an input is of. Columns: the expert that the router chose for it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.7), layout="constrained")
    axes = figure.add_subplot()
    for i, line in enumerate(counts):
        for j, count in enumerate(line):
            share = count / max(1, sum(line))
            colour = TWIN_COLOUR if i == j else "#e11d48"
            axes.barh(i, 0.94, left=j - 0.47, height=0.9, color=colour, alpha=0.07 + 0.78 * share)
            axes.text(j, i, str(count), ha="center", va="center", color="#ffffff" if share > 0.5 else INK)
    axes.set_xticks(range(len(names)), list(names))
    axes.set_yticks(range(len(names)), list(names))
    axes.set_xlabel("expert that the router chose", color=INK)
    axes.set_ylabel("task of the input", color=INK)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return _svg(figure, axes, "How many test inputs of each task went to each expert")


def _svg(figure: Any, axes: Any, title: str) -> str:
    """The figure as an inline <svg> that follows the page's colours and width."""
    from matplotlib import rc_context

    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=INK)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|[xy]tick)_\d+"', "", text)
    text = re.sub(r'font-family: [^;"]*', "font-family: inherit", text)
    return text.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
