"""The `score` step: base, experts, static methods and Twin-Merging on one suite, through `evaluate`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import twinmerge as tm
from kit.machine import torch_here
from kit.scores import Tally, setting_of
from kit.texts import experts_on_their_own
from text_suite_parts.plan import GOOD_ENOUGH, GRIDS, RANKS, ROUTER_ROWS, TIMED_ROWS, VALIDATION_ROWS
from text_suite_parts.report import pictures, table
from twinmerge.study.evaluate import evaluate, open_runner
from twinmerge.study.scores import Evaluation
from twinmerge.study.search import grid
from twinmerge.tasks.suite import open_suite


def score(
    base: str, suite_dir: Path, experts_dir: Path, out: Path, names: list[str], heads: tuple[str, ...] = ()
) -> None:
    """Write scores.json, table.md, validation.json and pictures to `out`."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    work = out / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    suite = open_suite(suite_dir, names)
    experts = {name: str(experts_dir / name) for name in names}
    print("experts", flush=True)
    reference = {
        split: experts_on_their_own(experts, suite, split, limit)
        for split, limit in (("validation", VALIDATION_ROWS), ("test", None))
    }
    test = Tally(reference["test"])
    _add(
        test,
        "base",
        evaluate(_merged("task_arithmetic", base, experts, work / "base", {"scale": 0.0}, heads)[0], suite),
        _heads_bytes(work / "base"),
        0.0,
    )
    chosen, tried = {}, {}
    for method, tested in GRIDS.items():
        chosen[method], tried[method] = _choose(
            method, tested, base, experts, suite, reference["validation"], work, heads
        )
        print(f"{method}: {chosen[method]}", flush=True)
        folder, seconds = _merged(method, base, experts, work / method, chosen[method], heads)
        _add(test, method, evaluate(folder, suite), _heads_bytes(folder), seconds, parameters=chosen[method])
    routers = {}
    for shared in ("task_arithmetic", "tsv"):
        routers[shared] = _twins(
            shared, chosen[shared], base, experts, suite, reference["validation"], work, test, heads
        )
        print(f"twin over {shared}: rank {routers[shared]['rank_chosen']}", flush=True)
    _write(out, suite_dir, names, test, chosen, tried, routers, time.perf_counter() - start)
    shutil.rmtree(work)


def _add(test: Tally, method: str, found: list[Evaluation], extra: int, seconds: float, **more: Any) -> None:
    """A row for each setting, with what its bytes and its time are."""
    speed = more.pop("speed", None)
    for e in found:
        each = 1000 * e.seconds / e.rows if speed is None else speed[setting_of(e)]
        test.add(method, e, bytes_extra=extra, seconds_build=seconds, seconds_per_1000=each, **more)


def _merged(
    method: str, base: str, experts: dict[str, str], folder: Path, parameters: dict[str, Any], heads: tuple[str, ...]
) -> tuple[Path, float]:
    start = time.perf_counter()
    tm.merge(method, base=base, experts=experts, heads=heads, **parameters).save(folder)
    return folder, time.perf_counter() - start


def _choose(
    method: str,
    tested: dict[str, list[Any]],
    base: str,
    experts: dict[str, str],
    suite: Any,
    reference: Evaluation,
    work: Path,
    heads: tuple[str, ...],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The point of the grid with the best normalised score on validation rows (the first among equals)."""
    points = list(grid(**tested))
    if len(points) == 1:
        return points[0], []
    tried: list[dict[str, Any]] = []
    for parameters in points:
        folder, _ = _merged(method, base, experts, work / "candidate", parameters, heads)
        found = evaluate(folder, suite, "validation", VALIDATION_ROWS)[0]
        tried.append({"parameters": parameters, "normalised": found.normalised(reference)})
        shutil.rmtree(folder)
    best = max(tried, key=lambda t: float(t["normalised"]))
    return best["parameters"], tried


def _twins(
    shared: str,
    parameters: dict[str, Any],
    base: str,
    experts: dict[str, str],
    suite: Any,
    reference: Evaluation,
    work: Path,
    test: Tally,
    heads: tuple[str, ...],
) -> dict[str, Any]:
    """The ladder of ranks over one shared part; one split at the highest rank, cut for the others."""
    start = time.perf_counter()
    highest = tm.Twin.build(base, experts, max(RANKS), shared=shared, heads=heads, **parameters)
    inputs = {name: task.rows("train", ROUTER_ROWS) for name, task in suite.items()}
    report = highest.fit_router(inputs)
    assert report is not None
    built = time.perf_counter() - start
    validation = {}
    for rank in RANKS:
        folder = work / f"twin-{shared}-{rank}"
        (highest if rank == max(RANKS) else highest.at_rank(rank)).save_pretrained(folder)
        runner = open_runner(folder)
        validation[rank] = evaluate(runner, suite, "validation", VALIDATION_ROWS)[0].normalised(reference)
        speed = _speed(runner, suite)
        extra = sum((folder / f).stat().st_size for f in ("twin.safetensors", "router.safetensors")) + _heads_bytes(
            folder
        )
        _add(
            test,
            f"twin over {shared}, rank {rank}",
            evaluate(runner, suite),
            extra,
            built,
            rank=rank,
            shared=shared,
            speed=speed,
            validation=validation[rank],
        )
        shutil.rmtree(folder)
    good = [rank for rank in RANKS if validation[rank] >= GOOD_ENOUGH] or [max(RANKS)]
    return {"rank_chosen": min(good), "validation": validation, "parameters": parameters, "router": report._asdict()}


def _speed(runner: Any, suite: Any) -> dict[str, float]:
    """Seconds per 1,000 rows of each setting, every setting answered from start to end, encoding included."""
    per_task = max(1, TIMED_ROWS // len(suite))
    rows = [row for task in suite.values() for row in task.rows("test", per_task)]
    heads = [name for name, task in suite.items() for _ in task.rows("test", per_task)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows, heads = [rows[i] for i in order], [heads[i] for i in order]
    encoder, found = runner.encoder, {}
    with torch.inference_mode():
        for setting in ("task given", "head given", "nothing given, strict"):
            start = time.perf_counter()
            for i in range(0, len(rows), 32):
                batch, names = encoder.encode(rows[i : i + 32]), heads[i : i + 32]
                choice = {"task given": {"expert": names}, "head given": {"head": names}}.get(setting, {})
                runner.twin(**batch, **choice)
            found[setting] = 1000 * (time.perf_counter() - start) / len(rows)
    found["nothing given, lenient"] = found["nothing given, strict"]
    return found


def _heads_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in (folder / "heads").rglob("*.safetensors"))


def _write(
    out: Path,
    suite_dir: Path,
    names: list[str],
    test: Tally,
    chosen: Any,
    tried: Any,
    routers: Any,
    seconds: float,
) -> None:
    experts = test.experts
    data = {
        "suite": suite_dir.name,
        "tasks": names,
        "experts": experts.scores,
        "experts_seconds_per_1000": 1000 * experts.seconds / experts.rows,
        "test_rows": {task: s.rows for task, s in experts.per_task.items()},
        "chosen_on_validation": chosen,
        "validation_rows": VALIDATION_ROWS,
        "router_rows": ROUTER_ROWS,
        "twins": routers,
        "rows": test.rows,
        "machine": torch_here(),
        "seconds": seconds,
    }
    (out / "scores.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    (out / "validation.json").write_text(json.dumps(tried, indent=1), encoding="utf-8")
    (out / "table.md").write_text(table(data), encoding="utf-8")
    pictures(data, out)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"{seconds:.0f} s; scores.json, table.md and pictures are in {out}")
