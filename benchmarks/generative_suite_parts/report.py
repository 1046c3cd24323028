"""The tables and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from generative_suite_parts.data import KINDS
from generative_suite_parts.plan import GRIDS, HIGHEST, RANKS, SETTINGS
from kit.picture import panels, save
from kit.table import bounded, settings
from kit.table import table as table_of


def table(data: dict[str, Any]) -> str:
    """Markdown: the losses, the share of each expert's gain that is kept, the routers, and the check of generation."""
    lines = [
        "Nats per token (perplexity); gap and share are means over the kinds, with 95 % intervals. Energy: what the "
        "factors hold of the squared norm of the exclusive parts, mean over matrices.",
        "",
    ]
    heads = ["method", "setting", *KINDS, "mean gap to the expert", "share of the gain kept, %"]
    heads += [f"points above {data['best_static_on_validation']}", "energy", "MB extra"]
    lines += table_of(heads, "llr", map(_losses, data["rows"]))
    lines += ["", "Share of the expert's gain over the base that is kept, %, by kind, with 95 % intervals.", ""]
    lines += [*table_of(["method", "setting", *KINDS], "llr", map(_shares, data["rows"])), ""]
    for shared, router in data["routers"].items():
        found = router["test"]
        lines += [
            f"Router over {shared}, contexts of {data['windows']['context']} tokens of the test windows: "
            f"{100 * found['right']:.1f} % of {found['rows']} right, expected calibration error "
            f"{found['calibration_error']:.3f}, temperature {router['held_out']['temperature']:.2f}; "
            f"{100 * found['refused']:.1f} % were left to the shared model.",
            "",
        ]
        went = [[kind, *counts] for kind, counts in zip(found["experts"], found["confusion"], strict=True)]
        lines += [*table_of(["kind, and the expert chosen", *found["experts"]], "lr", went), ""]
    heads = ["greedy continuation, mixed batches of 4 prompts", "setting", "rows equal", "tokens equal"]
    return "\n".join(lines + table_of(heads, "llr", map(_equal, data["generation"]))) + "\n"


def _label(row: dict[str, Any]) -> str:
    if row.get("parameters"):
        return f"{row['method']} ({settings(row['parameters'])})"
    return f"{row['method']}" + (f" (router over {row['shared']})" if row["method"] == "the expert itself" else "")


def _per_cent(interval: list[float]) -> str:
    return bounded([100 * value for value in interval])


def _losses(row: dict[str, Any]) -> list[str]:
    losses = [f"{row['per_kind'][k]['loss'][0]:.3f} ({row['per_kind'][k]['perplexity']:.1f})" for k in KINDS]
    above = _per_cent(row["above_best_static"]) if "above_best_static" in row else "–"
    size = ["–", "–"]
    if "rank" in row:
        size = [f"{100 * row['energy_retained']:.0f} %", f"{row['bytes_extra'] / 1e6:.2f}"]
    return [_label(row), row["setting"], *losses, bounded(row["gap"], 3), _per_cent(row["kept"]), above, *size]


def _shares(row: dict[str, Any]) -> list[str]:
    return [_label(row), row["setting"], *(_per_cent(row["per_kind"][k]["kept"]) for k in KINDS)]


def _equal(check: dict[str, Any]) -> list[str]:
    counts = f"{check['rows_equal']} of {check['rows']}", f"{check['tokens_equal']} of {check['tokens']}"
    return [f"{check['twin']}, against its rebuilt dense models", check["setting"], *counts]


def picture(data: dict[str, Any], file: Path) -> None:
    """Left: the share of the gain kept by each method, mean and kinds; right: the same over the rank of the twins."""
    colours = dict(zip(KINDS, ("#8e5ea2", "#1b6ca8", "#e9a03b", "#c0392b"), strict=True))
    of_setting = dict(zip(SETTINGS, ("#1b6ca8", "#e76f51", "#2a9d8f"), strict=True))
    figure, (left, right) = panels(1, 2, (13, 5.6), width_ratios=(1.5, 1))
    middle = f"rank {RANKS[-1]}"
    rows = [r for r in data["rows"] if r["method"] in GRIDS or r["method"].endswith(middle)]
    for y, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        value, low, high = (100 * v for v in row["kept"])
        left.barh(y, value, height=0.62, color="#2a9d8f" if "twin" in row["method"] else "#7b8794", alpha=0.45)
        left.errorbar(value, y, xerr=[[value - low], [high - value]], color="black", capsize=3, lw=1.2, zorder=5)
        for kind, colour in colours.items():
            found = 100 * row["per_kind"][kind]["kept"][0]
            left.plot(found, y, "o", color=colour, ms=5, mec="white", mew=0.5, label=kind if y == 0 else None)
        left.annotate(f"{value:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    labels = [r["method"] + ("" if r["setting"] == "–" else f", {r['setting']}") for r in rows]
    left.set_yticks(range(len(rows) - 1, -1, -1), [x.replace("task_arithmetic", "task arithmetic") for x in labels])
    left.axvline(0, color="black", lw=0.8)
    left.axvline(100, color="black", lw=0.8, ls=":")
    left.set_xlabel("share of the expert's gain over the base that is kept, % (bar: mean, 95 % interval)")
    left.set_title("0 = the base, 100 = each kind's own expert")
    left.legend(loc="upper center", bbox_to_anchor=(0.35, -0.12), ncol=4, frameon=False, fontsize=9)
    left.grid(axis="x", alpha=0.3)
    for shared, style in (("task_arithmetic", "--"), ("tsv", "-")):
        for setting, colour in of_setting.items():
            found = [r for r in data["rows"] if r["setting"] == setting and r.get("cut") == "weights"]
            found = [r for r in found if r["shared"] == shared]
            values = 100 * np.array([r["kept"] for r in found])
            error = np.abs(values[:, 1:] - values[:, :1]).T
            label = f"{shared.replace('_', ' ')}, {setting}"
            ranks = [r["rank"] for r in found]
            right.errorbar(ranks, values[:, 0], error, ls=style, marker="o", ms=4, capsize=3, color=colour, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks([*RANKS, HIGHEST], [str(rank) for rank in (*RANKS, HIGHEST)])
    right.set_xlabel("rank of the exclusive parts")
    right.set_ylabel("share of the gain kept, %")
    right.set_title("twins, by shared part and setting")
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, frameon=False)
    right.grid(alpha=0.3)
    save(figure, file)
