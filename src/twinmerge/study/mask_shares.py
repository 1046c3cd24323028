"""The paper's picture of masks: how many of the weights exactly so many tasks marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from twinmerge.errors import UsageError
from twinmerge.methods.kit.masks import Marks
from twinmerge.store.output import OutputFile
from twinmerge.study.heatmap import DPI, FORMATS, check_picture

UNUSED, ONE, SHARED = "#94a3b8", "#d97706", "#0d9488"
WIDEST = 16  # inches of the picture, about


def draw_shares(found: Mapping[str, Marks], title: str, file: str | Path) -> Path:
    """Draw for each set of masks a row of bars: the share of the weights that exactly 0, 1, … all tasks marked.

    The first bar is of weights that no task needs ("catastrophic" where they are merged all the same), the second of
    those that one task needs ("selfish"). Weights where τ is 0 are not counted.

    Args:
        found: what the masks are called -> their marks.
        file: .png, .svg or .pdf, in a folder that is there; written over.

    Returns:
        The file.

    Raises:
        TwinmergeError: as `check_picture`; there is nothing to draw.

    Source: Wang et al. 2024, arXiv 2405.07813, the figures of weights by how many tasks mark them.
    """
    check_picture(file)
    if not any(marks.moved for marks in found.values()):
        raise UsageError("There is no mark to draw: τ is 0 everywhere. Leave the picture out.")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = Path(file)
    most = max(len(marks.by_count) for marks in found.values())
    figure = Figure(figsize=(min(WIDEST, 1.6 + 0.45 * most), 0.5 + 2.1 * len(found)), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    for axes, (name, marks) in zip(figure.subplots(len(found), 1, squeeze=False).flat, found.items(), strict=True):
        percent = [100 * count / max(marks.moved, 1) for count in marks.by_count]
        colours = [UNUSED, ONE, *[SHARED] * (len(percent) - 2)][: len(percent)]
        axes.bar(range(len(percent)), percent, color=colours, width=0.8)
        for j, height in enumerate(percent):
            axes.text(j, height, f"{height:.1f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(percent)))
        axes.set_xlim(-0.6, len(percent) - 0.4)
        axes.set_ylim(0, 1.12 * max(max(percent), 1.0))
        axes.set_title(name, fontsize=8.5, parse_math=False)
        axes.set_xlabel("tasks that mark a weight (0: catastrophic, 1: selfish)", fontsize=8)
        axes.set_ylabel("% of the weights", fontsize=8)
        axes.tick_params(length=0, labelsize=7.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    with rc_context({"svg.hashsalt": "twinmerge", "svg.fonttype": "path"}), OutputFile(file, replace=True) as new:
        figure.savefig(new, dpi=DPI, metadata=FORMATS[file.suffix.lower()])
    return file
