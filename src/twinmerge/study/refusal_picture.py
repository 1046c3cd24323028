"""The picture of refusal: how many known inputs are refused, and how many of the others are routed right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmerge.errors import UsageError
from twinmerge.store.output import OutputFile
from twinmerge.study.heatmap import DPI, FORMATS, check_picture
from twinmerge.twin.routers.kit.calibration import RouterReport

LINE, CHOSEN = "#0d9488", "#d97706"


def draw_refusal(report: RouterReport | Mapping[str, Any], file: str | Path) -> Path:
    """Draw for values of `refuse` the share of the held-out rows that is refused, and of the rest that is routed right.

    Only rows that the router was not fitted on are counted, and each is judged by limits that the others set
    (`RouterReport.refusal`). Inputs of no expert's kind are not among them.

    Args:
        report: of `Twin.fit_router`, or `twin.info().router`.
        file: .png, .svg or .pdf, in a folder that is there; written over.

    Returns:
        The file.

    Raises:
        TwinmergeError: as `check_picture`; a report without such a curve.

    Source: El-Yaniv and Wiener 2010, "On the foundations of noise-free selective classification", JMLR 11 (the
    risk-coverage curve).
    """
    check_picture(file)
    found = report._asdict() if isinstance(report, RouterReport) else dict(report)
    curve, chosen = found.get("refusal") or [], found.get("refuse", 0.0)
    if not any(refused for _, refused, _ in curve):
        raise UsageError(
            "There is no refusal to draw: the router refuses nothing, or its report is of an earlier release. Fit it "
            "with refuse=0.02 on a few hundred inputs of each expert."
        )
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = Path(file)
    points = [(100 * refused, 100 * right, refuse) for refuse, refused, right in curve]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=LINE, marker="o", markersize=4, linewidth=1.6)
    last = None
    for x, y, refuse in points:
        if last is None or abs(x - last) >= 1.5:  # those too near to the last one would be written over it
            axes.annotate(f"{refuse:g}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
            last = x
    at = [(x, y) for x, y, refuse in points if refuse == chosen and chosen]
    if at:
        axes.plot(*at[0], "o", color=CHOSEN, markersize=8, label=f"this router, refuse={chosen:g}")
        axes.legend(frameon=False, fontsize=8.5, loc="best")
    axes.set_xlabel("% of the held-out rows that are refused (at each point: refuse)", fontsize=9)
    axes.set_ylabel("% of the others that are routed right", fontsize=9)
    axes.set_title(f"{found['rows']} held-out rows of {len(found['right_by_expert'])} experts", loc="left", fontsize=10)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    with rc_context({"svg.hashsalt": "twinmerge", "svg.fonttype": "path"}), OutputFile(file, replace=True) as new:
        figure.savefig(new, dpi=DPI, metadata=FORMATS[file.suffix.lower()])
    return file
