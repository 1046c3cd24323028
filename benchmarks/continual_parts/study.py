"""Courses of experts that arrive: parameters chosen once, then every order scored after every arrival."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from typing import Any

from kit.texts import order_of
from twinmerge.continual.continual import Continual
from twinmerge.study.evaluate import StaticRunner, evaluate
from twinmerge.study.over_time import Course
from twinmerge.study.search import grid as candidates
from twinmerge.tasks.suite import open_suite

CHOOSING_ORDER = 1000  # seed of the order that parameters are chosen in

VALIDATION_ROWS = 60  # per task

SCALES = [0.6, 0.8, 1.0, 1.15, 1.3, 1.45, 1.6, 1.8]

METHODS: dict[str, tuple[str, dict[str, list[Any]]]] = {  # label -> method, grid of at most eight points
    "running mean": ("average", {}),
    "continual TA, λ 0.3": ("task_arithmetic", {"scale": [0.3]}),
    "task arithmetic": ("task_arithmetic", {"scale": [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]}),
    "continual TIES": ("continual_ties", {}),
    "MagMax": ("magmax", {"scale": [0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4]}),
    "OPCM fixed": ("opcm", {"form": ["fixed"], "alpha": [0.5]}),
    "OPCM released": ("opcm", {"form": ["released"], "alpha": [0.5]}),
    "OPCM paper": ("opcm", {"form": ["paper"], "alpha": [0.5]}),
    "null space": ("null_space", {"rank": [128], "scale": SCALES}),
    "Iso-C": ("iso_c", {"scale": SCALES}),
    "WUDI": ("wudi", {"ridge": [1e-2, 1e-1], "scale": [0.85, 1.0, 1.15, 1.3]}),
}


class Study:
    """All courses of one suite."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.suite = open_suite(options.suite, options.tasks)
        self.file = options.out / "courses.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.folder = options.out / "state"
        self.own = {
            split: self.experts(split, rows)
            for split, rows in (("validation", VALIDATION_ROWS), ("test", options.rows))
        }

    def experts(self, split: str, rows: int) -> dict[str, float]:
        """The score of every expert on its own task."""
        file = self.options.out / f"experts-{split}-{rows}.json"
        if not file.is_file():
            found = {}
            for name in self.options.tasks:
                one = evaluate(str(self.options.experts / name), {name: self.suite[name]}, split, rows, progress=False)[
                    0
                ]
                found[name] = one.scores[name]
            file.write_text(json.dumps(found))
        return dict(json.loads(file.read_text()))

    def run(self) -> None:
        for label, (method, grid) in METHODS.items():
            kept = self.found.setdefault(label, {"courses": {}})
            if "parameters" not in kept:
                kept["parameters"] = self.chosen(method, grid)
                self.keep()
            for seed in range(self.options.orders):
                if str(seed) not in kept["courses"]:
                    kept["courses"][str(seed)] = self.course(label, method, kept["parameters"], seed)
                    self.keep()

    def chosen(self, method: str, grid: dict[str, list[Any]]) -> dict[str, Any]:
        """The best point of the grid on validation rows, after the last arrival."""
        points = list(candidates(**grid))
        if len(points) == 1:
            return points[0]
        state = self.made(method, points[0])
        for task in order_of(self.options.tasks, CHOOSING_ORDER):
            state.add(task, str(self.options.experts / task))
        scored = []
        for point in points:  # what is kept does not depend on scale and ridge
            state.method = state.method.model_copy(update=point)
            scored.append(self.mean(state, self.options.tasks, "validation", VALIDATION_ROWS))
            print(f"  {method} {point}: {scored[-1]:.2f}", flush=True)
        return points[scored.index(max(scored))]

    def mean(self, state: Continual, tasks: list[str], split: str, rows: int) -> float:
        scores = self.scores(state, tasks, split, rows)
        return sum(scores) / len(scores)

    def scores(self, state: Continual, tasks: list[str], split: str, rows: int) -> list[float]:
        """Per cent of each task's expert."""
        runner = runner_of(state)
        found = evaluate(runner, {t: self.suite[t] for t in tasks}, split, rows, progress=False)[0]
        return [100 * found.scores[t] / self.own[split][t] for t in tasks]

    def made(self, method: str, parameters: dict[str, Any]) -> Continual:
        shutil.rmtree(self.folder, ignore_errors=True)
        return Continual.init(self.folder, self.options.base, method, heads=("pooler",), progress=False, **parameters)

    def course(self, label: str, method: str, parameters: dict[str, Any], seed: int) -> dict[str, Any]:
        order = order_of(self.options.tasks, seed)
        state = self.made(method, parameters)
        scores, seconds, sizes = [], [], []
        for i, task in enumerate(order, 1):
            start = time.perf_counter()
            state.add(task, str(self.options.experts / task))
            seconds.append(time.perf_counter() - start)
            sizes.append(state.status()["state_bytes"])
            scores.append(self.scores(state, order[:i], "test", self.options.rows))
        course = Course(tuple(order), tuple(map(tuple, scores)))
        print(
            f"{label:20s} order {seed}: {course.accuracy:.2f}, BWT {course.backward_transfer:+.2f}, "
            f"forgetting {course.forgetting:.2f}, {sizes[-1] / 1e6:.1f} MB, {sorted(seconds)[len(seconds) // 2]:.2f} s "
            "an expert",
            flush=True,
        )
        return {"tasks": order, "scores": scores, "seconds": seconds, "bytes": sizes}

    def keep(self) -> None:
        self.file.write_text(json.dumps(self.found))


def runner_of(state: Continual) -> StaticRunner:
    """The merged model of now, with the heads of all experts, in memory."""
    from twinmerge.models.heads import headed
    from twinmerge.models.opening import open_model
    from twinmerge.models.transformers_class import position_limit
    from twinmerge.tasks.encode import TextEncoder

    experts = {e.name: open_model(e.model) for e in state.about.experts}
    model = headed(state.base, experts, state.canonical_state(), state.heads())
    folder = next(iter(experts.values())).folder
    assert folder is not None
    return StaticRunner(model, TextEncoder(folder, positions=position_limit(model.architecture.config)))
