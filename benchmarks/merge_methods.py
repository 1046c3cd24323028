"""Compare every static method and every mask method on one suite: the same rows, the same number of evaluations for each.

    python benchmarks/merge_methods.py measure --suite DIR --experts DIR --out DIR
    python benchmarks/merge_methods.py score --suite DIR --experts DIR --out DIR [--counts 8,6,4,2]
    python benchmarks/merge_methods.py report --out DIR

`measure` takes the Fisher information and the Gram matrices of every expert on its own training rows, without labels. `score`
merges 2, 4, 6 and 8 experts, chooses the parameters of each method on validation rows, and scores the choice on the full test
splits; what is done is kept in OUT, and the same command goes on from there. `report` writes the table and the picture.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from text_suite import default_base

from twinmerge.engine.merge import Merge
from twinmerge.recipes.lines import Lines
from twinmerge.recipes.recipe import Recipe
from twinmerge.study.evaluate import evaluate
from twinmerge.study.scores import Evaluation
from twinmerge.study.search import grid, search, weightings
from twinmerge.study.thresholds import choose_thresholds
from twinmerge.tasks.suite import Task, open_suite
from twinmerge.twin.masks.build import compress
from twinmerge.twin.masks.extract import extract

EVALUATIONS = 12  # of each method that has parameters to choose
VALIDATION_ROWS = 200  # per task, of the largest merge; half as many of the smaller ones
TEST_ROWS = 500  # per task, of the smaller merges; all of the largest one
MEASURED_ROWS = 1000  # per expert
COUNTS = (2, 4, 6, 8)
MASKS = {"tall_masks (sum)": ("tall_masks", "sum"), "tall_masks (ties)": ("tall_masks", "ties"), "emr": ("emr", None)}
DATA = {
    "fisher": f"{MEASURED_ROWS} texts per expert, {VALIDATION_ROWS} labelled rows",
    "regmean": f"{MEASURED_ROWS} texts per expert, {VALIDATION_ROWS} labelled rows",
    "emr": "none",
}


def order_of(tasks: list[str], seed: int = 0) -> list[str]:
    """The order in which tasks join: the first two, four, six, eight are merged."""
    at = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    return [tasks[i] for i in at]


def candidates(method: str, experts: list[str]) -> list[dict[str, Any]]:
    """At most EVALUATIONS points for each method; the span of the scales is that of sums of so many task vectors."""
    sums = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0]
    means = [0.7, 1.0, 1.3, 1.6]
    uniform = {f"{name}.weights": 1.0 for name in experts}
    match method:
        case "average" | "fisher":
            return (
                [uniform, *list(weightings(experts, EVALUATIONS + 1))[1:-1]]
                if len(experts) == 2
                else [
                    uniform,
                    *weightings(experts, EVALUATIONS - 1),
                ]
            )
        case "task_arithmetic":
            return list(grid(scale=sums))
        case "ties":
            return list(grid(density=[0.1, 0.2, 0.4], scale=means))
        case "dare":
            return list(grid(density=[0.5, 0.7, 0.9], scale=[0.15, 0.25, 0.4, 0.6]))
        case "dare_ties":
            return list(grid(density=[0.5, 0.7, 0.9], scale=means))
        case "tsv":
            return list(grid(scale=[0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8]))
        case "wudi":
            return list(grid(ridge=[1e-2, 1e-1, 1.0], scale=[0.65, 0.8, 1.0, 1.3]))
        case "iso_cts":
            return list(grid(scale=[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.3]))
        case "iso_c":
            return list(grid(scale=[0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.1]))
        case "svc":
            return list(grid(calibration=[0.05, 0.1, 0.3], scale=[0.8, 1.2, 1.6, 2.0]))
        case "knots":
            return list(grid(density=[0.1, 0.2, 0.4], scale=means))
        case "magmax":
            return list(grid(scale=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6]))
        case "opcm":
            return list(grid(form=["fixed", "released", "paper"], alpha=[0.2, 0.4, 0.5, 0.6]))
        case "null_space":
            return list(grid(rank=[32, 128], scale=[0.4, 0.6, 0.7, 0.85, 1.0, 1.3]))
        case "regmean":
            return list(grid(alpha=[0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0]))
    raise AssertionError(method)


def calibrated_candidates(method: str) -> list[dict[str, Any]]:
    # a direction of one expert alone is made T / (1 + (T − 1) α) times as strong
    scales = {"tsv": [0.15, 0.25, 0.35, 0.5], "iso_c": [0.4, 0.7, 1.0, 1.4]}
    return list(grid(calibration=[0.05, 0.1, 0.3], scale=scales[method]))


def lines_candidates(method: str) -> list[dict[str, Any]]:
    """LiNeS: a for the lowest block, a + b for the highest, times a scale of 1; WUDI with the ridge that it chose alone."""
    low, rise = {
        "task_arithmetic": ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]),
        "wudi": ([0.5, 0.65, 0.8], [0.1, 0.25, 0.4, 0.6]),
    }.get(method, ([0.4, 0.7, 1.0], [0.2, 0.5, 0.8, 1.1]))
    own = {"ridge": 0.1} if method == "wudi" else {}
    return [{**own, "scale": 1.0, "lines.a": a, "lines.b": b} for a in low for b in rise]


def consensus_candidates(vector: str, experts: list[str], thresholds: dict[str, float]) -> list[dict[str, Any]]:
    """Five evaluations went into the thresholds; these are the other seven."""
    one = min(1.0, 2.4 / len(experts)) if vector == "sum" else 1.0
    own = {f"{name}.threshold": value for name, value in thresholds.items()}
    points = [(1, 0.7), (1, 1.0), (2, 0.7), (2, 1.0), (2, 1.4), (3, 1.0), (3, 1.6)]
    return [{"vector": vector, "k": k, "scale": round(one * factor, 3), **own} for k, factor in points]


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
        self.rows_chosen_on, self.rows_tested = (VALIDATION_ROWS, None) if whole else (VALIDATION_ROWS // 2, TEST_ROWS)
        limits = (("validation", self.rows_chosen_on), ("test", self.rows_tested))
        self.reference = {split: self.own(split, limit) for split, limit in limits}

    def own(self, split: str, limit: int | None) -> Evaluation:
        """Every expert on its own task; told once for all counts."""
        found = {}
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
        if self.options.spectral == "only":
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

    def recipe(self, method: str, **parameters: Any) -> Recipe:
        statistics = {}
        if method in ("fisher", "regmean"):
            what = {"fisher": "fisher", "regmean": "gram"}[method]
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
        found = compress(recipe, self.work / "masks", progress=False)
        seconds, predictions = time.perf_counter() - start, {}
        for name in self.names:
            extract(self.work / "masks", name, self.work / name)
            one = {name: self.suite[name]}
            predictions |= evaluate(self.work / name, one, limit=self.rows_tested, progress=False)[0].predictions
        scored, size = Evaluation.of(predictions, "task given"), bytes_of(self.work / "masks")
        without_heads = sum(f.stat().st_size for f in (self.work / "masks").glob("*.safetensors"))
        told = {
            **found.told(),
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


def take(options: argparse.Namespace) -> None:
    """The statistics of all experts."""
    from twinmerge.statistics.measure import measure

    folder = options.out / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        for what in ("fisher", "gram"):
            file = folder / f"{name}.{what}.safetensors"
            if not file.is_file():
                start = time.perf_counter()
                data = options.suite / name / "train.jsonl"
                measure(what, str(options.experts / name), data, file, limit=MEASURED_ROWS)
                print(
                    f"{name} {what}: {time.perf_counter() - start:.0f} s, {file.stat().st_size / 1e6:.0f} MB",
                    flush=True,
                )


def rows_of(out: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for count in COUNTS:
        if (file := out / f"scores-{count}.json").is_file():
            yield count, json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "score", "report"])
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--experts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--counts", default="8,6,4,2")
    parser.add_argument("--fewer-rows", action="store_true", help="of the largest merge as of the smaller ones")
    parser.add_argument(
        "--spectral",
        choices=["too", "only"],
        help="methods on singular values, LiNeS and MagMax; alone: without masks and statistics",
    )
    parser.add_argument("--only", help="labels to score, such as wudi,iso_c + LiNeS; all where none is named")
    parser.add_argument("--tasks", default="sst2,cr,mpqa,trec,agnews,emotion,sick,banking77")
    options = parser.parse_args()
    options.tasks = options.tasks.split(",")
    options.base = options.base or default_base()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step == "measure":
        take(options)
    elif options.step == "score":
        for count in map(int, options.counts.split(",")):
            Comparison(options, count).run()
    else:
        from merge_methods_report import report

        report(options.out, dict(rows_of(options.out)), DATA)


if __name__ == "__main__":
    main()
