"""The `score` step: base, experts, static methods and Twin-Merging on six tasks of images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import twinmerge as tm
from kit.machine import torch_here
from kit.scores import Tally
from twinmerge.study.search import grid
from twinmerge.twin.split import Exclusive
from vision_suite_parts.answers import (
    Routes,
    Rows,
    Split,
    base_score,
    experts_on_their_own,
    route,
    static,
    twin_answers,
)
from vision_suite_parts.data import fixed_rows, read_images
from vision_suite_parts.plan import GRIDS, RANKS, ROUTER_ROWS, SEEDS, VALIDATION_ROWS
from vision_suite_parts.report import picture, table
from vision_suite_parts.tasks import BASE, TASKS
from vision_suite_parts.train import BASE_RECIPE, MODEL, RECIPE


def score(data: Path, models: Path, out: Path, names: list[str], limit: int | None = None) -> None:
    """Write scores.json, table.md and vision.png to `out`; `limit`: test rows of each task, all without it."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    images = read_images(data, models)
    limits = {"train": ROUTER_ROWS, "validation": VALIDATION_ROWS, "test": limit}
    splits = {s: {n: Rows(*fixed_rows(TASKS[n], *images[s], SEEDS[s], limits[s])) for n in names} for s in limits}
    base, experts = str(models / "base"), {name: str(models / name) for name in names}
    reference = {split: experts_on_their_own(experts, splits[split]) for split in ("validation", "test")}
    print("experts", reference["test"].scores, flush=True)
    test = Tally(reference["test"])
    test.add("base", static("task_arithmetic", base, experts, {"scale": 0.0}, splits["test"]))
    chosen: dict[str, dict[str, Any]] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    for method, tested in GRIDS.items():
        points = list(grid(**tested))
        found = [static(method, base, experts, p, splits["validation"]) for p in points] if tested else []
        scores = [f.normalised(reference["validation"]) for f in found] or [0.0]
        tried[method] = [{**p, "normalised": s} for p, s in zip(points, scores, strict=True)] if tested else []
        chosen[method] = points[int(np.argmax(scores))]
        print(f"{method}: {chosen[method]}", flush=True)
        test.add(method, static(method, base, experts, chosen[method], splits["test"]), parameters=chosen[method])
    routers: dict[str, dict[str, Any]] = {}
    for shared in ("task_arithmetic", "tsv"):
        highest = tm.Twin.build(base, experts, max(RANKS), shared=shared, progress=False, **chosen[shared])
        inputs = {name: {"pixel_values": part.pixels} for name, part in splits["train"].items()}
        report = highest.fit_router(inputs, progress=False)
        assert report is not None
        routes = route(highest, splits["test"])
        routers[shared] = {"held_out": report._asdict(), **_told(routes, splits["test"])}
        for rank in RANKS:
            twin = highest if rank == max(RANKS) else highest.at_rank(rank)
            numbers = sum(map(_numbers, twin.package.exclusive.values()))
            for answer in twin_answers(twin, splits["test"], routes):
                test.add(f"twin over {shared}, rank {rank}", answer, rank=rank, shared=shared, numbers=numbers)
    result = {
        "tasks": names,
        "experts": reference["test"].scores,
        "base_on_ten_classes": base_score(base, fixed_rows(BASE, *images["test"], SEEDS["test"], limit)),
        "rows": {split: {n: len(part.labels) for n, part in found.items()} for split, found in splits.items()},
        "chosen_on_validation": chosen,
        "tried_on_validation": tried,
        "routers": routers,
        "scores": test.rows,
        "recipe": {"model": MODEL, "base": BASE_RECIPE, "experts": RECIPE},
        "train_seconds": {n: json.loads((models / f"{n}.seconds.json").read_text()) for n in ["base", *names]},
        "machine": torch_here(),
        "seconds": time.perf_counter() - start,
    }
    (out / "scores.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(result), encoding="utf-8")
    picture(result, out / "vision.png")
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{result['seconds']:.0f} s; scores.json, table.md and vision.png are in {out}")


def _told(routes: dict[str, Routes], split: Split) -> dict[str, Any]:
    """How the test rows were routed: right of all, by task, by label; how many rows of a task went to each expert;
    and the share that was left to the shared model."""
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


def _numbers(part: Exclusive) -> int:
    """How many numbers an exclusive part holds."""
    return sum(f.a.numel() + f.b.numel() for f in part.low.values()) + sum(t.numel() for t in part.dense.values())
