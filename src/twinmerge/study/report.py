"""What the demo leaves behind: its folder (models, results.json, report.html) and the tables in the terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from transformers import PreTrainedModel

from twinmerge.engine.merge import Merge
from twinmerge.errors import ResourceError, TwinmergeError, UsageError
from twinmerge.progress import off
from twinmerge.store.foreign import read_json
from twinmerge.store.manifest import CHECKSUMS
from twinmerge.study import pictures
from twinmerge.study.digits import NAMES, TASKS, Rows
from twinmerge.study.pictures import TASK_COLOURS, samples
from twinmerge.twin.twin import Twin

KIND = "twinmerge demo"
OWN_FILES = {"report.html", "results.json", "mixed.safetensors", "models", CHECKSUMS}
TWIN = "twin"
LABELS = {
    "average": "Average",
    "task_arithmetic": "Task arithmetic",
    "ties": "TIES",
    "tsv": "TSV-Merge",
    TWIN: "Twin-Merging",
}
EIGHTHS = " ▏▎▍▌▋▊▉█"
Tick = Callable[[str, int], object]
"""Called with what is under way ("" for the same as before) and how many steps were done."""


# ------------------------------------------------------------------------------------------- the folder


def require_extras() -> None:
    """Say now what would fail later.

    Raises:
        ResourceError: a package of the extra `demo` is not there.
    """
    lacking = [name for name in ("jinja2", "matplotlib", "sklearn") if find_spec(name) is None]
    if lacking:
        raise ResourceError(f"The demo needs {', '.join(lacking)}. Install it: pip install 'twinmerge[demo]'")


def check_output(out: Path) -> None:
    """Refuse a folder with anything in it that the demo did not make.

    Raises:
        TwinmergeError: a file, or a folder with other things.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UsageError(f"The output {out} is a file. Name a folder.")
    try:
        ours = read_json(out / "results.json").get("kind") == KIND
    except TwinmergeError:
        ours = False
    others = sorted(path.name for path in out.iterdir() if not ours or path.name not in OWN_FILES)
    if others:
        raise UsageError(
            f"The folder {out} holds {others[0]!r}, which the demo did not make. Name another folder with --out."
        )


def clear(out: Path) -> None:
    """Remove an earlier demo, after `check_output` once more."""
    check_output(out)
    for path in out.iterdir() if out.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_models(
    folder: Path, base: PreTrainedModel, experts: Mapping[str, PreTrainedModel], merges: Mapping[str, Merge], twin: Twin
) -> None:
    """Ordinary model folders: base, experts/, merged/ and twin, so that the commands can be tried on them."""
    base.save_pretrained(folder / "base")
    for name, expert in experts.items():
        expert.save_pretrained(folder / "experts" / name)
    about = {task.name: {"task": f"{task.digits[0]} or {task.digits[1]}, {task.says}"} for task in TASKS}
    for method, merged in merges.items():
        merged.save(folder / "merged" / method, about)
    twin.save_pretrained(folder / "twin", about)


def mixed_inputs(folder: Path, test: Rows, seed: int) -> list[dict[str, Any]]:
    """Two test images of every task in one shuffled batch, answered by the twin as it was saved, told nothing."""
    draws = np.random.default_rng(seed)
    picked = [int(i) for n in NAMES for i in draws.choice([j for j, t in enumerate(test.tasks) if t == n], 2, False)]
    rows = test.take([int(i) for i in draws.permutation(picked)])
    save_file({"pixel_values": rows.pixels.contiguous()}, folder / "mixed.safetensors")
    twin = Twin.from_pretrained(folder / "models" / "twin")
    output = twin(pixel_values=rows.pixels)
    soft = twin.route({"pixel_values": rows.pixels}, experts_per_row=None)
    assert output.logits is not None and output.head is not None
    found = []
    for i, task in enumerate(rows.tasks):
        label = int(output.logits[i].argmax())
        found.append(
            {
                "image": [[round(v, 3) for v in line] for line in rows.pixels[i, 0].tolist()],
                "task": task,
                "digit": str(int(rows.digits[i])),
                "answer": twin.model.labels(output.head[i])[label],
                "confidence": float(output.logits[i].softmax(-1)[label]),
                "expert": output.expert[i],
                "mixture": dict(zip(twin.experts, soft[i].tolist(), strict=True)),
            }
        )
    return found


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json and report.html, of the same numbers."""
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(html(results), encoding="utf-8")


# ----------------------------------------------------------------------------------------- the numbers


def summary(found: Sequence[Mapping[str, Any]], design: Mapping[str, Any]) -> dict[str, Any]:
    """Means and ranges of what the seeds found, and how it was made, as plain data."""
    experts = [{"normalised": 100.0, "scores": one["experts"]} for one in found]
    table = [_row("experts", "The five experts", "task given", experts)]
    for key in found[0]["methods"]:
        measured = [one["methods"][key] for one in found]
        table.append(_row(key, LABELS[key.partition(", ")[0]], measured[0]["setting"], measured))
    best = max((row for row in table if row["key"] in design["grids"]), key=lambda row: row["mean"])
    twin = next(row for row in table if row["key"] == f"{TWIN}, nothing given")
    margins = [a - b for a, b in zip(twin["by_seed"], best["by_seed"], strict=True)]
    packages = ("torch", "transformers", "scikit-learn", "numpy")
    return {
        "kind": KIND,
        "versions": {"twinmerge": version("twinmerge"), **{name: version(name) for name in packages}},
        "design": dict(design),
        "tasks": [task._asdict() | {"samples": samples(task)} for task in TASKS],
        "table": table,
        "best_static": best["key"],
        "margin": {"mean": float(np.mean(margins)), "by_seed": margins},
        "confusion": np.sum([one["confusion"] for one in found], 0).tolist(),
        "routed_right": float(np.mean([one["routed_right"] for one in found])),
        "parameters": dict(found[0]["parameters"]),
        "seeds": list(found),
    }


def _row(key: str, label: str, setting: str, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [float(one["normalised"]) for one in measured]
    return {
        "key": key,
        "label": label,
        "setting": setting,
        "mean": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
        "by_seed": values,
        "scores": {name: float(np.mean([one["scores"][name] for one in measured])) for name in NAMES},
        "parameters": [one["parameters"] for one in measured if "parameters" in one],
    }


def row_of(results: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A row of the table by its key."""
    found: dict[str, Any] = next(row for row in results["table"] if row["key"] == key)
    return found


# --------------------------------------------------------------------------------------------- the page


def html(results: Mapping[str, Any]) -> str:
    """The report as one page that loads nothing from elsewhere; every value is escaped but our own pictures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("twinmerge.study", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        results,
        best=row_of(results, results["best_static"]),
        twin=row_of(results, f"{TWIN}, nothing given"),
        labels=LABELS,
        names=NAMES,
        colours=dict(zip(NAMES, TASK_COLOURS, strict=True)),
        chart=Markup(pictures.results_chart(results["table"], results["best_static"])),
        confusion_chart=Markup(pictures.confusion_chart(results["confusion"], NAMES)),
        uri=pictures.pixels_uri,
    )


# ----------------------------------------------------------------------------------------- the terminal


def terminal(results: Mapping[str, Any], out: Path) -> RenderableType:
    """The tables and bars that the command prints, and at the end where the report is."""
    best, twin = row_of(results, results["best_static"]), row_of(results, f"{TWIN}, nothing given")
    last = Text.assemble(
        "Twin-Merging, told nothing, keeps ",
        (f"{twin['mean']:.1f} %", "bold cyan"),
        f" of the experts; the best static method ({best['label']}) keeps ",
        (f"{best['mean']:.1f} %", "bold"),
        f": {results['margin']['mean']:+.1f} points.\n",
        f"\nReport: {out / 'report.html'}   (open it in a browser; {results['seconds']:.0f} s)\n",
        f"Next:   twinmerge diff {out / 'models' / 'base'} {out / 'models' / 'merged' / 'ties'}",
    )
    return Group(_scores_table(results), "", _mixed_table(results), "", last)


def _scores_table(results: Mapping[str, Any]) -> Table:
    seeds = len(results["seeds"])
    table = Table(
        title=f"Score in % of the experts, on test rows: mean of {seeds} seed{'s' if seeds > 1 else ''} (lowest to highest)",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for header, side in (("", "left"), ("told", "left"), ("", "left"), ("mean", "right"), ("range", "right")):
        table.add_column(header, justify=side, no_wrap=True, min_width=14 if header == "range" else None)  # type: ignore[arg-type]
    for row in results["table"]:
        of_twin = row["key"].startswith(TWIN)
        style = "cyan" if of_twin else "magenta" if row["key"] == "experts" else "white"
        weight = " bold" if row["key"] in (results["best_static"], f"{TWIN}, nothing given") else ""
        table.add_row(
            Text(row["label"], style + weight),
            Text(row["setting"], "dim"),
            Text(bar(row["mean"] / 100, 22), style),
            Text(f"{row['mean']:.1f}", style + weight),
            Text(f"{row['low']:.1f} – {row['high']:.1f}", "dim"),
        )
    return table


def _mixed_table(results: Mapping[str, Any]) -> Table:
    table = Table(title="Ten inputs of all tasks in one batch, told nothing", title_justify="left", box=None)
    table.pad_edge, table.header_style = False, "dim"
    for header in ("shows", "answer", "", "mixture that the router chose", ""):
        table.add_column(header, no_wrap=True)
    for row in results["mixed"]:
        expert, weight = max(row["mixture"].items(), key=lambda item: item[1])
        right = row["answer"] == row["digit"] and row["expert"] == row["task"]
        table.add_row(
            f"{row['digit']}, {row['task']}",
            row["answer"],
            Text("✓", "green") if right else Text("✗", "red"),
            Text(bar(weight, 20), TASK_COLOURS[NAMES.index(expert)]),
            f"{weight:.2f} {expert}",
        )
    return table


def bar(share: float, width: int) -> str:
    """A bar of block characters, to an eighth of a character.

    Example:
        >>> bar(0.5, 5) + "|"
        '██▌  |'
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[rest] if rest else "")).ljust(width)


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Tick]:
    """A bar on stderr that goes away at the end."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=bool(off(shown))) as progress:
        task = progress.add_task("starting", total=total)

        def tick(says: str, done: int) -> None:
            progress.update(task, advance=done, description=says or None)

        yield tick
