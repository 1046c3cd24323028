"""The `report` step: a table and two pictures of what `score` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.picture import panels, save
from kit.scores import score
from kit.table import bounded
from kit.table import table as table_of
from twinmerge.methods.kit.masks import Marks
from twinmerge.study.mask_shares import draw_shares
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.bootstrap import Interval

Rows = dict[int, dict[str, Any]]
MASKED = ("tall_masks", "emr")
COLOURS = {
    "average": "#8d99ae",
    "fisher": "#e9c46a",
    "task_arithmetic": "#5f6c7b",
    "regmean": "#2a9d8f",
    "ties": "#e76f51",
    "dare": "#c9ada7",
    "dare_ties": "#b5838d",
    "tsv": "#1b6ca8",
    "consensus (sum)": "#9b5de5",
    "consensus (ties)": "#f15bb5",
    "tall_masks (sum)": "#264653",
    "tall_masks (ties)": "#588157",
    "emr": "#bc6c25",
    "iso_c": "#0077b6",
    "iso_cts": "#48cae4",
    "wudi": "#03045e",
    "svc": "#80ed99",
    "knots": "#6d597a",
    "magmax": "#adb5bd",
    "opcm": "#b08968",
    "null_space": "#ddb892",
}


def colour_of(label: str) -> str | None:
    """A plug-in has the colour of its method."""
    return COLOURS.get(label) or COLOURS.get(label.partition(" ")[0])


def report(out: Path, rows: Rows, data: dict[str, str]) -> None:
    """Write table.md, merge-methods.png and mask-shares.png to `out`."""
    experts = _experts(out)
    (out / "table.md").write_text(table(rows, experts, data), encoding="utf-8")
    pictures(rows, out)
    most = rows[max(rows)]
    marks = {
        label: Marks(tuple(row["told"]["marked_by"]), (), row["told"]["trained_weights"])
        for label, row in most.items()
        if label.startswith("tall_masks")
    }
    if marks:
        draw_shares(marks, f"Weights of {max(rows)} experts by how many tasks need them", out / "mask-shares.png")
    print((out / "table.md").read_text(encoding="utf-8"))


def _experts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted((out / "experts").glob("*-test*.json")):
        found |= Evaluation.from_json(file.read_text()).predictions
    return found


def _paired(rows: dict[str, Any], label: str, other: str, experts: dict[str, Any]) -> Interval:
    one, two = (Evaluation.from_json(json.dumps(rows[n]["evaluation"])) for n in (label, other))
    own = Evaluation.of({task: experts[task] for task in one.predictions}, "task given")
    return one.difference(two, own)


def _shown(parameters: dict[str, Any], thresholds: bool) -> str:
    plain = {k: v for k, v in parameters.items() if ("." not in k or k.startswith("lines.")) and k != "vector"}
    words = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()]
    weights = [v for k, v in parameters.items() if k.endswith(".weights")]
    if weights:
        words.append("equal weights" if len(set(weights)) == 1 else "weights of a draw")
    if thresholds:
        chosen = [v for k, v in parameters.items() if k.endswith(".threshold")]
        words.append(f"thresholds {min(chosen):g}–{max(chosen):g}")
    return ", ".join(words) or "–"


def table(rows: Rows, experts: dict[str, Any], data: dict[str, str]) -> str:
    """Markdown: a line per method; the largest merge in full, the smaller ones by their scores."""
    most = max(rows)
    counts = sorted(rows)
    lines = []
    for label, row in rows[most].items():
        cells = []
        for count in counts:
            found = rows[count].get(label)
            cells.append(score(found))
        for other in ("average", "task_arithmetic"):
            gap = _paired(rows[most], label, other, experts) if label != other else None
            cells.append("–" if gap is None else bounded([gap.value, gap.low, gap.high], sign="+"))
        method = label.partition(" ")[0]
        needs = data.get(method, "labelled validation rows")
        chosen = _shown(row["parameters"], any(k.endswith(".threshold") for k in row["parameters"]))
        cost = f"{row['bytes'] / 1e6:.0f}", f"{row['seconds']:.1f}", row["evaluations"]
        lines.append([label, chosen, *cells, *cost, needs])
    heads = ["method", "chosen", *(f"{count} experts" for count in counts), "above average", "above task arithmetic"]
    heads += ["MB", "seconds", "evaluations", "data"]
    return "\n".join(table_of(heads, "ll" + "r" * (len(heads) - 3) + "l", lines)) + "\n"


def pictures(rows: Rows, out: Path) -> None:
    most, counts = max(rows), sorted(rows)
    figure, (left, right) = panels(1, 2, (11, 4.6), width_ratios=(1.1, 1))
    for label in rows[most]:
        at = [count for count in counts if label in rows[count]]
        if len(at) < 2 < len(counts):  # a lone point is in the other picture
            continue
        y = [rows[count][label]["normalised"] for count in at]
        style = "--" if label.startswith(MASKED) else "-"
        left.plot(at, y, style, marker="o", ms=4, color=colour_of(label), label=label)
    left.set_xticks(counts)
    left.set_xlabel("experts merged")
    left.set_ylabel("per cent of the experts")
    left.axhline(100, color="black", lw=0.8)
    left.grid(alpha=0.3)
    left.legend(fontsize=7, ncol=2, loc="lower left")
    ordered = sorted(rows[most].items(), key=lambda item: item[1]["normalised"])
    for i, (label, row) in enumerate(ordered):
        low, high = row["interval"]
        value = row["normalised"]
        error = [[value - low], [high - value]]
        right.errorbar(value, i, xerr=error, fmt="o", ms=6, capsize=2, color=colour_of(label))
        right.text(low - 0.3, i, f"{value:.1f}", va="center", ha="right", fontsize=8)
    right.set_yticks(range(len(ordered)), [label for label, _ in ordered], fontsize=8)
    right.axvline(100, color="black", lw=0.8)
    right.margins(x=0.12)
    right.grid(axis="x", alpha=0.3)
    right.set_xlabel(f"per cent of the experts, {most} experts, 95 % intervals")
    save(figure, out / "merge-methods.png")
