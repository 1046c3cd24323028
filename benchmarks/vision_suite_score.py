"""The `score` half of vision_suite.py: base, experts, static methods and Twin-Merging on six tasks of images."""

from __future__ import annotations

import json
import platform
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ViTForImageClassification
from vision_suite import BASE, BASE_RECIPE, MODEL, RECIPE, TASKS, Labels, fixed_rows, read_images

import twinmerge as tm
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.metrics import Scored
from twinmerge.twin.routing import routed

VALIDATION_ROWS = 500  # per task; scales and densities are chosen on these and on nothing else
ROUTER_ROWS = 500  # per task, of the images that the experts were trained on
RANKS = (4, 8, 16)
BATCH_ROWS = 250
SEEDS = {"train": 1, "validation": 2, "test": 3}  # of the turns, the corruptions and the choice of rows
GRIDS: dict[str, dict[str, list[float]]] = {
    "average": {},
    "task_arithmetic": {"scale": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "ties": {"density": [0.1, 0.2, 0.4], "scale": [0.5, 1.0, 1.5]},
    "tsv": {"scale": [0.4, 0.7, 1.0, 1.3]},
}
SETTINGS = ["task given", "head given", "nothing given, strict", "nothing given, lenient"]


class Rows(NamedTuple):
    """One task's rows of a split: pixel values and the numbers of their labels."""

    pixels: Tensor
    labels: Labels


Split = dict[str, Rows]
"""Task -> its rows."""


def score(data: Path, models: Path, out: Path, names: list[str], limit: int | None = None) -> None:
    """Write scores.json, table.md and vision.png to `out`; `limit`: test rows of each task, all without it."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    images = read_images(data, models)
    limits = {"train": ROUTER_ROWS, "validation": VALIDATION_ROWS, "test": limit}
    splits = {s: {n: Rows(*fixed_rows(TASKS[n], *images[s], SEEDS[s], limits[s])) for n in names} for s in limits}
    base, experts = str(models / "base"), {name: str(models / name) for name in names}
    reference = {split: _experts(experts, splits[split]) for split in ("validation", "test")}
    print("experts", reference["test"].scores, flush=True)
    rows: list[dict[str, Any]] = []

    def add(method: str, found: Evaluation, **more: Any) -> None:
        interval = found.interval(reference["test"])
        setting = found.setting + (f", {found.reading}" if found.reading else "")
        ends = {"normalised": interval.value, "interval": [interval.low, interval.high]}
        rows.append({"method": method, "setting": setting, **ends, "per_task": found.scores, **more})
        print(
            f"  {method:28s} {setting:24s} {interval.value:6.2f} [{interval.low:.2f}, {interval.high:.2f}]", flush=True
        )

    add("base", _static("task_arithmetic", base, experts, {"scale": 0.0}, splits["test"]))
    chosen: dict[str, dict[str, float]] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    for method, grid in GRIDS.items():
        points = [dict(zip(grid, point, strict=True)) for point in product(*grid.values())]
        found = [_static(method, base, experts, p, splits["validation"]) for p in points] if grid else []
        scores = [f.normalised(reference["validation"]) for f in found] or [0.0]
        tried[method] = [{**p, "normalised": s} for p, s in zip(points, scores, strict=True)] if grid else []
        chosen[method] = points[int(np.argmax(scores))]
        print(f"{method}: {chosen[method]}", flush=True)
        add(method, _static(method, base, experts, chosen[method], splits["test"]), parameters=chosen[method])
    routers: dict[str, dict[str, Any]] = {}
    for shared in ("task_arithmetic", "tsv"):
        highest = tm.Twin.build(base, experts, max(RANKS), shared=shared, progress=False, **chosen[shared])
        inputs = {name: {"pixel_values": part.pixels} for name, part in splits["train"].items()}
        report = highest.fit_router(inputs, progress=False)
        assert report is not None
        routes = _route(highest, splits["test"])
        routers[shared] = {"held_out": report._asdict(), **_told(routes, splits["test"])}
        for rank in RANKS:
            twin = highest if rank == max(RANKS) else highest.at_rank(rank)
            numbers = sum(map(_numbers, twin.package.exclusive.values()))
            for answer in _twin(twin, splits["test"], routes):
                add(f"twin over {shared}, rank {rank}", answer, rank=rank, shared=shared, numbers=numbers)
    result = {
        "tasks": names,
        "experts": reference["test"].scores,
        "base_on_ten_classes": _base_score(base, fixed_rows(BASE, *images["test"], SEEDS["test"], limit)),
        "rows": {split: {n: len(part.labels) for n, part in found.items()} for split, found in splits.items()},
        "chosen_on_validation": chosen,
        "tried_on_validation": tried,
        "routers": routers,
        "scores": rows,
        "recipe": {"model": MODEL, "base": BASE_RECIPE, "experts": RECIPE},
        "train_seconds": {n: json.loads((models / f"{n}.seconds.json").read_text()) for n in ["base", *names]},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "seconds": time.perf_counter() - start,
    }
    (out / "scores.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(result), encoding="utf-8")
    picture(result, out / "vision.png")
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{result['seconds']:.0f} s; scores.json, table.md and vision.png are in {out}")


# ------------------------------------------------------------------------------------------ measuring


def _experts(experts: dict[str, str], split: Split) -> Evaluation:
    """Every expert on its own task."""
    answers = {}
    for name, folder in experts.items():
        model = ViTForImageClassification.from_pretrained(folder).eval()
        answers[name] = _classify(model, split[name])
    return Evaluation.of(answers, "task given")


def _classify(model: ViTForImageClassification, rows: Rows) -> Scored:
    with torch.inference_mode():
        found = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in rows.pixels.split(BATCH_ROWS)])
    return Scored("classes", "accuracy", rows.labels, found.numpy())


def _base_score(base: str, rows: tuple[Tensor, Labels]) -> float:
    """The base's own accuracy on its ten classes."""
    return _classify(ViTForImageClassification.from_pretrained(base).eval(), Rows(*rows)).score


def _static(method: str, base: str, experts: dict[str, str], parameters: dict[str, float], split: Split) -> Evaluation:
    """A static merge with the experts' own heads, told which head answers."""
    model = tm.merge(method, base=base, experts=experts, progress=False, **parameters).load()
    answers = {}
    for name, rows in split.items():
        batches = rows.pixels.split(BATCH_ROWS)
        with torch.inference_mode():
            found = [model({"pixel_values": b}, [name] * len(b))["logits"].argmax(-1) for b in batches]
        answers[name] = Scored(name, "accuracy", rows.labels, torch.cat(found).numpy())
    return Evaluation.of(answers, "head given")


class Routes(NamedTuple):
    """mixtures: (rows, experts), zeros for rows that are left to the shared model; nearest: the number of each row's expert,
    whose head answers."""

    mixtures: Tensor
    nearest: Labels


def _route(twin: tm.Twin, split: Split) -> dict[str, Routes]:
    """Where each task's rows go. The rank does not matter: the shared model is read."""
    found = {}
    for name, rows in split.items():
        parts = [routed(twin, {"pixel_values": batch}, twin.experts_per_row) for batch in rows.pixels.split(BATCH_ROWS)]
        nearest = torch.cat([p.nearest for p in parts if p.nearest is not None])
        found[name] = Routes(torch.cat([p.weights for p in parts]), nearest.numpy())
    return found


def _told(routes: dict[str, Routes], split: Split) -> dict[str, Any]:
    """How the test rows were routed: right of all, by task, by label; how many rows of a task went to each expert; and the
    share that was left to the shared model."""
    names = list(split)
    right = {name: routes[name].nearest == k for k, name in enumerate(names)}
    by_label = {
        name: {text: float(right[name][rows.labels == i].mean()) for i, text in enumerate(TASKS[name].labels)}
        for name, rows in split.items()
    }
    return {
        "right": float(np.concatenate(list(right.values())).mean()),
        "right_mean_of_tasks": float(np.mean([r.mean() for r in right.values()])),
        "right_by_task": {name: float(r.mean()) for name, r in right.items()},
        "right_by_label": by_label,
        "confusion": [np.bincount(routes[name].nearest, minlength=len(names)).tolist() for name in names],
        "refused": float(np.concatenate([~r.mixtures.any(1).numpy() for r in routes.values()]).mean()),
    }


def _twin(twin: tm.Twin, split: Split, routes: dict[str, Routes]) -> list[Evaluation]:
    """The four readings. A row that was routed right is asked once; the three others differ on the other rows alone."""
    names = list(split)
    answers: dict[str, dict[str, Scored]] = {setting: {} for setting in SETTINGS}
    right = float(np.concatenate([routes[name].nearest == k for k, name in enumerate(names)]).mean())
    for k, (name, rows) in enumerate(split.items()):
        labels, given = TASKS[name].labels, torch.eye(len(names))[k].expand(len(rows.labels), -1)
        own = _answers(twin, rows.pixels, given, [name] * len(given))
        by_head, strict, lenient = own.copy(), own.copy(), own.copy()
        other = np.flatnonzero((routes[name].mixtures != given).any(1).numpy())
        if len(other):
            mixtures, pixels = routes[name].mixtures[other], rows.pixels[torch.from_numpy(other)]
            chosen = [names[i] for i in routes[name].nearest[other]]
            by_head[other] = _answers(twin, pixels, mixtures, [name] * len(other))
            for row, head, said in zip(other, chosen, _answers(twin, pixels, mixtures, chosen), strict=True):
                text = TASKS[head].labels[said]
                strict[row] = said if head == name else -1
                lenient[row] = labels.index(text) if text in labels else -1
        for setting, found in zip(SETTINGS, (own, by_head, strict, lenient), strict=True):
            answers[setting][name] = Scored(name, "accuracy", rows.labels, found)
    return [
        Evaluation.of(answers["task given"], "task given"),
        Evaluation.of(answers["head given"], "head given", None, right),
        Evaluation.of(answers["nothing given, strict"], "nothing given", "strict", right),
        Evaluation.of(answers["nothing given, lenient"], "nothing given", "lenient", right),
    ]


def _numbers(part: Any) -> int:
    """How many numbers an exclusive part holds."""
    return sum(f.a.numel() + f.b.numel() for f in part.low.values()) + sum(t.numel() for t in part.dense.values())


def _answers(twin: tm.Twin, pixels: Tensor, mixtures: Tensor, heads: list[str]) -> Labels:
    """What the twin says of each row with this mixture (rows, experts) and head."""
    found = []
    with torch.inference_mode():
        for at in range(0, len(pixels), BATCH_ROWS):
            cut = slice(at, at + BATCH_ROWS)
            out = twin(pixel_values=pixels[cut], mixture=mixtures[cut], head=heads[cut])
            assert out.logits is not None
            found.append(out.logits.argmax(-1))
    return torch.cat(found).numpy()


# -------------------------------------------------------------------------------------------- writing


def table(data: dict[str, Any]) -> str:
    """Markdown: a line per method, the settings side by side with their 95 % intervals; then experts and routers."""
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["scores"]:
        by_method.setdefault(row["method"], {})[row["setting"]] = row
    lines = ["| method | " + " | ".join(SETTINGS) + " |", "| --- |" + " ---: |" * len(SETTINGS)]
    for method, found in by_method.items():
        cells = []
        for setting in SETTINGS:
            r = found.get(setting)
            cells.append(f"{r['normalised']:.1f} [{r['interval'][0]:.1f}, {r['interval'][1]:.1f}]" if r else "–")
        parameters = ", ".join(f"{k} {v}" for k, v in next(iter(found.values())).get("parameters", {}).items())
        lines.append(f"| {method}{f' ({parameters})' if parameters else ''} | {' | '.join(cells)} |")
    lines += ["", f"The base on its ten classes: {100 * data['base_on_ten_classes']:.1f} % right."]
    lines += ["", "Head given, accuracy in per cent by task:", ""]
    lines += ["| method | " + " | ".join(data["tasks"]) + " |", "| --- |" + " ---: |" * len(data["tasks"])]
    for method, scores in [("experts", data["experts"])] + [
        (method, found["head given"]["per_task"]) for method, found in by_method.items()
    ]:
        lines.append(f"| {method} | " + " | ".join(f"{100 * scores[task]:.1f}" for task in data["tasks"]) + " |")
    for shared, router in data["routers"].items():
        own = ", ".join(f"{task} {100 * value:.1f}" for task, value in router["right_by_task"].items())
        lines += [
            "",
            f"Router over {shared}: {100 * router['right']:.1f} % of the test rows right ({own}); {100 * router['refused']:.1f} % left to the shared model.",
        ]
        lines += [
            "",
            "| rows of / go to | " + " | ".join(data["tasks"]) + " |",
            "| --- |" + " ---: |" * len(data["tasks"]),
        ]
        for name, counts in zip(data["tasks"], router["confusion"], strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{100 * n / sum(counts):.1f}" for n in counts) + " |")
    return "\n".join(lines) + "\n"


def picture(data: dict[str, Any], file: Path) -> None:
    """Bars of every method with its head given, the twins' other settings beside; and where the router sent the rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=[1.35, 1])
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
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
