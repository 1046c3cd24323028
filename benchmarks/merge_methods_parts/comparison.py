"""The plan for one number of experts: choose on validation rows, score on test rows, keep."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit.texts import order_of
from merge_methods_parts.points import calibrated_candidates, candidates, consensus_candidates, lines_candidates
from twinmerge.engine.merge import Merge
from twinmerge.recipes.lines import Lines
from twinmerge.recipes.recipe import Recipe
from twinmerge.study.evaluate import evaluate
from twinmerge.study.scores import Evaluation
from twinmerge.study.search import search
from twinmerge.study.thresholds import choose_thresholds
from twinmerge.tasks.bootstrap import Scored
from twinmerge.tasks.suite import Task, open_suite
from twinmerge.twin.masks.build import write_masks
from twinmerge.twin.masks.extract import extract_masked

VALIDATION_ROWS = 200  # per task, of the largest merge; half as many of the smaller ones

TEST_ROWS = 500  # per task, of the smaller merges; all of the largest one

COUNTS = (2, 4, 6, 8)

MASKS = {"tall_masks (sum)": ("tall_masks", "sum"), "tall_masks (ties)": ("tall_masks", "ties"), "emr": ("emr", None)}


STATISTICS = {"fisher": "fisher", "fisher_deltas": "fisher", "regmean": "gram"}

NEWER = (
    "swudi",
    "tact",
    "pcb",
    "localize_and_stitch",
    "fisher_deltas",
    "magnitude",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della_linear",
    "della",
    "sce",
    "ram",
    "ram_plus",
)


class Comparison:
    """The plan for one number of experts."""

    def __init__(self, options: argparse.Namespace, count: int) -> None:
        self.options, self.count = options, count
        self.names = order_of(options.tasks)[:count]
        self.suite: dict[str, Task] = open_suite(options.suite, self.names)
        self.experts = {name: str(options.experts / name) for name in self.names}
        self.file = options.out / f"scores-{count}.json"
        self.rows: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.work = options.out / f"work-{count}"
        whole = count == max(COUNTS) and not options.fewer_rows
        self.rows_chosen_on = VALIDATION_ROWS if whole else VALIDATION_ROWS // 2
        self.rows_tested = None if whole else TEST_ROWS
        limits = (("validation", self.rows_chosen_on), ("test", self.rows_tested))
        self.reference = {split: self.own(split, limit) for split, limit in limits}

    def own(self, split: str, limit: int | None) -> Evaluation:
        """Every expert on its own task; told once for all counts."""
        found: dict[str, Scored] = {}
        for name, folder in self.experts.items():
            file = self.options.out / "experts" / f"{name}-{split}{'' if limit is None else f'-{limit}'}.json"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                scored = evaluate(folder, {name: self.suite[name]}, split, limit, progress=False)[0]
                file.write_text(scored.to_json())
            found |= Evaluation.from_json(file.read_text()).predictions
        return Evaluation.of(found, "task given")

    def run(self) -> None:
        if self.options.spectral:
            self.spectral()
        if self.options.newer:
            self.newer()
        if "only" in (self.options.spectral, self.options.newer):
            return
        for method in ("average", "task_arithmetic", "ties", "dare", "dare_ties", "tsv"):
            self.static(method, lambda m=method: candidates(m, self.names))
        for label, (method, vector) in MASKS.items():
            self.masked(label, method, vector)
        for vector in ("sum", "ties"):
            thresholds = self.rows[f"tall_masks ({vector})"]["thresholds"]
            self.static(f"consensus ({vector})", lambda v=vector, t=thresholds: consensus_candidates(v, self.names, t))
        for method in ("fisher", "regmean"):
            self.static(method, lambda m=method: candidates(m, self.names))

    def spectral(self) -> None:
        """The baselines, the methods on singular values, and what goes on top of them."""
        for method in ("average", "task_arithmetic", "tsv", "iso_c", "wudi", "iso_cts"):
            self.static(method, lambda m=method: candidates(m, self.names))
        for method in ("tsv", "iso_c", "wudi"):
            self.static(f"{method} + LiNeS", lambda m=method: lines_candidates(m))
        for method in ("svc", "opcm", "magmax"):
            self.static(method, lambda m=method: candidates(m, self.names))
        for method in ("tsv", "iso_c"):
            self.static(f"{method} + calibration", lambda m=method: calibrated_candidates(m))
        self.static("task_arithmetic + LiNeS", lambda: lines_candidates("task_arithmetic"))
        for method in ("knots", "null_space"):
            self.static(method, lambda m=method: candidates(m, self.names))

    def newer(self) -> None:
        """The baselines, and the methods of 2024 to 2026 that are no part of the tables above."""
        for method in ("average", "task_arithmetic", "tsv", *NEWER):
            self.static(method, lambda m=method: candidates(m, self.names))

    def recipe(self, method: str, **parameters: Any) -> Recipe:
        statistics = {}
        if what := STATISTICS.get(method):
            statistics = {n: str(self.options.out / "statistics" / f"{n}.{what}.safetensors") for n in self.names}
        return Recipe(method, self.options.base, self.experts, parameters, heads=("pooler",), statistics=statistics)

    def static(self, label: str, points: Any) -> None:
        if self.left_out(label):
            return
        method = label.partition(" ")[0]
        recipe = self.recipe(method)
        if "LiNeS" in label:
            recipe = replace(recipe, lines=Lines(a=1.0, b=0.0))
        merge = Merge(recipe, progress=False, architecture=True)
        found = search(
            merge,
            self.suite,
            points(),
            limit=self.rows_chosen_on,
            experts=self.reference["validation"],
            progress=False,
        )
        best = merge.varied(**found.best.parameters)
        shutil.rmtree(self.work, ignore_errors=True)
        start = time.perf_counter()
        Merge(best.recipe, progress=False).save(self.work)
        seconds = time.perf_counter() - start
        scored = evaluate(self.work, self.suite, limit=self.rows_tested, progress=False)[0]
        size = bytes_of(self.work)
        shutil.rmtree(self.work)
        spent = len(found.trials) + (5 if method == "consensus" else 0)
        trials = json.loads(found.to_json())["trials"]
        self.keep(label, scored, found.best.parameters, seconds, spent, size, trials=trials)

    def left_out(self, label: str) -> bool:
        """Whether it is done, or not asked for."""
        return label in self.rows or bool(self.options.only and label not in self.options.only.split(","))

    def masked(self, label: str, method: str, vector: str | None) -> None:
        if self.left_out(label):
            return
        recipe, spent, thresholds = self.recipe(method, **({"vector": vector} if vector else {})), 0, {}
        if vector:
            chosen = choose_thresholds(recipe, self.suite, limit=self.rows_chosen_on, progress=False)
            thresholds, spent = chosen.thresholds, 5
            own = {f"{name}.threshold": value for name, value in thresholds.items()}
            recipe = replace(recipe, parameters={**recipe.parameters, **own})
        shutil.rmtree(self.work, ignore_errors=True)
        start = time.perf_counter()
        found = write_masks(recipe, self.work / "masks", progress=False)
        seconds = time.perf_counter() - start
        predictions: dict[str, Scored] = {}
        for name in self.names:
            extract_masked(self.work / "masks", name, self.work / name)
            one = {name: self.suite[name]}
            predictions |= evaluate(self.work / name, one, limit=self.rows_tested, progress=False)[0].predictions
        scored, size = Evaluation.of(predictions, "task given"), bytes_of(self.work / "masks")
        without_heads = sum(f.stat().st_size for f in (self.work / "masks").glob("*.safetensors"))
        told = {
            **found.record(),
            "bytes_without_heads": without_heads,
            "over_formula": without_heads / found.formula("masks"),
        }
        shutil.rmtree(self.work)
        self.keep(label, scored, dict(recipe.parameters), seconds, spent, size, thresholds=thresholds, told=told)

    def keep(
        self,
        label: str,
        scored: Evaluation,
        parameters: dict[str, Any],
        seconds: float,
        spent: int,
        size: int,
        **more: Any,
    ) -> None:
        interval = scored.interval(self.reference["test"])
        self.rows[label] = {
            "normalised": interval.value,
            "interval": [interval.low, interval.high],
            "setting": scored.setting,
            "parameters": parameters,
            "evaluations": spent,
            "seconds": seconds,
            "bytes": size,
            "evaluation": json.loads(scored.to_json()),
            **more,
        }
        self.file.write_text(json.dumps(self.rows))
        print(
            f"{self.count} {label:20s} {interval.value:6.2f} [{interval.low:.2f}, {interval.high:.2f}] {parameters}",
            flush=True,
        )


def bytes_of(folder: Path) -> int:
    """Of all weights in it, heads included."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
