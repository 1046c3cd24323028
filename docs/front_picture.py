"""Draws pictures/front.png and pictures/front-dark.png out of the tables of quality.md: what each way keeps of eight text experts, and
how many megabytes it takes.

    python docs/front_picture.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
MODELS = 8
COLOURS = {
    "front": {"paper": "#ffffff", "ink": "#1f2328", "quiet": "#59636e", "bar": "#8fb3d9", "twin": "#1f6feb", "line": "#d1d9e0"},
    "front-dark": {"paper": "#0d1117", "ink": "#f0f6fc", "quiet": "#9198a1", "bar": "#3d5a80", "twin": "#4493f8", "line": "#3d444d"},
}  # fmt: skip


class Way(NamedTuple):
    """One line: its name, per cent of the experts that it keeps, megabytes on the disk, and whether it mixes per input."""

    name: str
    kept: float
    megabytes: float
    twin: bool = False


def row_of(page: str, first: str, column: str) -> dict[str, str]:
    """Column -> text, of the row that begins with this cell, in the first table of methods with this column."""
    columns: list[str] = []
    for line in page.splitlines():
        texts = [text.strip() for text in line.strip("|").split("|")]
        if texts[0] == "method":
            columns = texts
        elif texts[0] == first and column in columns:
            return dict(zip(columns, texts, strict=True))
    raise SystemExit(f"quality.md has no row {first} with the column {column}.")


def number(text: str) -> float:
    """The number that a text begins with: 96.0 of "96.0 [95.4, 96.6]"."""
    found = re.match(r"[\d.]+", text)
    assert found is not None, text
    return float(found[0])


def ways(page: str) -> list[Way]:
    """What the tables say, from the least that is kept to the most."""
    static = {"average": "average", "ties": "TIES", "tsv": "TSV-Merge", "wudi": "WUDI-Merging"}
    rows = {said: row_of(page, name, "8 experts") for name, said in static.items()}
    found = [Way(said, number(row["8 experts"]), number(row["MB"])) for said, row in rows.items()]
    masks, base = row_of(page, "tall_masks (ties)", "8 experts"), row_of(page, "base", "bytes extra")
    twin = row_of(page, "twin over task_arithmetic, rank 8", "bytes extra")
    body = found[0].megabytes - number(base["bytes extra"])  # every merged model has all heads
    found.append(Way("Twin-Merging, rank 8", number(twin["head given"]), body + number(twin["bytes extra"]), True))
    found.append(Way("TALL-masks, task given", number(masks["8 experts"]), number(masks["MB"])))
    whole = re.search(r"\((\d+) MB for eight models\)", page)
    assert whole is not None
    return [*found, Way("eight models", 100.0, float(whole[1]))]


def draw(page: str, name: str) -> None:
    """One picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    look, shown = COLOURS[name], ways(page)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1, 2.4), facecolor=look["paper"])
    for axes in (left, right):
        axes.set_facecolor(look["paper"])
        axes.set_axis_off()
    left.set_xlim(0, 10)
    left.set_ylim(0, 10)
    for i in range(MODELS):
        at = 0.3 + 1.25 * (i % 2), 1.2 + 2.0 * (i // 2)
        left.add_patch(FancyBboxPatch(at, 0.9, 1.4, boxstyle="round,pad=0.08", fc=look["bar"], ec=look["line"]))
    left.add_patch(FancyArrowPatch((3.1, 5), (6.0, 5), arrowstyle="-|>", mutation_scale=22, lw=2, color=look["quiet"]))
    left.add_patch(FancyBboxPatch((6.6, 3.6), 2.2, 2.8, boxstyle="round,pad=0.1", fc=look["twin"], ec=look["line"]))
    left.text(1.4, 9.5, "8 experts", ha="center", color=look["ink"], fontsize=12)
    left.text(7.7, 9.5, "1 folder", ha="center", color=look["ink"], fontsize=12)
    right.set_xlim(-42, 128)
    right.set_ylim(len(shown) - 0.4, -1.3)
    right.text(50, -0.9, "% of the experts' scores kept", ha="center", color=look["quiet"], fontsize=11)
    right.text(127, -0.9, "MB", ha="right", color=look["quiet"], fontsize=11)
    for i, way in enumerate(shown):
        start = 50  # per cent, where the bars begin: said below
        right.barh(
            i, 100 * (way.kept - start) / (100 - start), color=look["twin"] if way.twin else look["bar"], height=0.62
        )
        right.text(-2, i, way.name, ha="right", va="center", color=look["ink"], fontsize=11)
        inside = 100 * (way.kept - start) / (100 - start) - 2
        right.text(inside, i, f"{way.kept:.1f}", ha="right", va="center", fontsize=11,
                   color="#ffffff" if way.twin or name != "front" else look["ink"])  # fmt: skip
        right.text(127, i, f"{way.megabytes:.0f}", ha="right", va="center", color=look["ink"], fontsize=11)
    right.text(50, len(shown) - 0.4, "bars begin at 50 %", ha="center", va="top", color=look["quiet"], fontsize=8.5)
    figure.tight_layout()
    figure.savefig(DOCS / "pictures" / f"{name}.png", dpi=160, facecolor=look["paper"])
    plt.close(figure)


if __name__ == "__main__":
    text = (DOCS / "quality.md").read_text(encoding="utf-8")
    for each in COLOURS:
        draw(text, each)
