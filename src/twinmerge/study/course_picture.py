"""Accuracy over arrivals: one line for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinmerge.errors import UsageError
from twinmerge.store.output import OutputFile
from twinmerge.study.heatmap import DPI, FORMATS, check_picture
from twinmerge.study.over_time import Course, mean_and_sd

COLOURS = (
    "#0d9488",
    "#6366f1",
    "#d97706",
    "#db2777",
    "#0284c7",
    "#65a30d",
    "#7c3aed",
    "#94a3b8",
    "#b91c1c",
    "#111827",
    "#a16207",
    "#be185d",
)
LINES_APART = 24  # labels that fit one above the other


def draw_courses(
    courses: Mapping[str, Sequence[Course]], title: str, file: str | Path, bottom: float | None = None
) -> Path:
    """Draw the mean over the tasks so far against the number of arrivals: the mean of the orders, and a band of one sd.

    Args:
        courses: method -> its courses, all of one length.
        file: .png, .svg or .pdf, in a folder that is there; written over;
        bottom: of the scale; what falls below it leaves the picture, and its name says how far it falls.

    Returns:
        The file.

    Raises:
        TwinmergeError: as `check_picture`; there is nothing to draw.
    """
    check_picture(file)
    if not courses:
        raise UsageError("There is no course to draw. Score a method first.")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = Path(file)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    ends: list[tuple[float, str, str]] = []
    count = 0
    for i, (method, runs) in enumerate(courses.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [mean_and_sd(values) for values in zip(*(run.after for run in runs), strict=True)]
        count = max(count, len(points))
        x = range(1, len(points) + 1)
        axes.plot(x, [m for m, _ in points], color=colour, marker="o", markersize=3, linewidth=1.6)
        axes.fill_between(
            x, [m - s for m, s in points], [m + s for m, s in points], color=colour, alpha=0.12, linewidth=0
        )
        ends.append((points[-1][0], method, colour))
    axes.set_ylim(bottom=bottom)
    _name(axes, ends, count)
    axes.set_xlabel("experts that have arrived")
    axes.set_ylabel("mean over the tasks so far, % of their experts")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xticks(range(1, count + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    with rc_context({"svg.hashsalt": title}), OutputFile(file, replace=True) as new:
        figure.savefig(new, dpi=DPI, metadata=FORMATS[file.suffix.lower()])
    return file


def _name(axes: Any, ends: list[tuple[float, str, str]], at: int) -> None:
    """The methods' names at the ends of their lines, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    step, last = (high - low) / LINES_APART, math.inf
    for value, method, colour in sorted(ends, reverse=True):
        last = min(max(value, low + step), last - step)
        axes.text(at + 0.12, last, f"{method}  {value:.1f}", color=colour, va="center", fontsize=9, parse_math=False)
    axes.set_xlim(0.8, at + 0.32 * at)
