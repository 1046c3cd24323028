"""The demo: five small experts on scikit-learn's digits, merged in every way, measured, and written as a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from twinmerge.arguments import strict
from twinmerge.errors import UsageError
from twinmerge.maths.threads import thread_count
from twinmerge.maths.workers import CAN_FORK, forked
from twinmerge.results import Record
from twinmerge.store.output import OutputFolder
from twinmerge.study.demo_models import QUICK, Design, Spread, measure, rows_of, train
from twinmerge.study.report import (
    check_output,
    clear,
    mixed_inputs,
    progress_bar,
    require_extras,
    save_models,
    summary,
    write_results,
)

FIRST_SEED = 30  # the design was settled on seeds below 30


class DemoResults(Record):
    """What results.json holds: a mapping."""

    def _summary(self) -> str:
        return f"{self['command']}, {len(self)} results, {self['seconds']} s"


@strict
def demo(
    out: str | Path,
    seeds: int = 3,
    quick: bool = False,
    progress: bool = True,
    design: Design | None = None,
    processes: bool = False,
) -> DemoResults:
    """Run the demo and write its folder: report.html, results.json, mixed.safetensors and models/.

    Args:
        out: a folder that does not exist, is empty, or was made by the demo (it is replaced then).
        seeds: how many times everything is done anew.
        quick: a few training steps only; shows how it works, not how well.
        progress: show a bar.
        design: other numbers than the demo's own.
        processes: spread the work over forked processes, as the command does, with the same numbers; only where this
            process does nothing else.

    Returns:
        what results.json holds.

    Raises:
        TwinmergeError: an extra is not installed, fewer than one seed, the folder holds something else.
    """
    require_extras()
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}: give at least 1.")
    out, started = Path(out), time.perf_counter()
    check_output(out)
    design = design or (QUICK if quick else Design())
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    spread = _over(thread_count()) if processes and CAN_FORK else map
    with quiet_torch(), progress_bar(seeds * design.work(), progress) as tick:
        trained = train(numbers, design, spread, tick)
        tick("merging and measuring", 0)
        others = []  # of which numbers alone are needed: what is written is the first seed's
        for found in spread(lambda n: measure(n, trained[n], design).found, numbers[1:]):
            others.append(found)
            tick("", design.measuring())
        first = measure(numbers[0], trained[numbers[0]], design)
        tick("writing the report", design.measuring())
        clear(out)
        with OutputFolder(out) as folder:
            command = f"twinmerge demo --seeds {seeds}{' --quick' if quick else ''}"
            save_models(folder / "models", *trained[numbers[0]], first.merges, first.twin)
            results = {
                "command": command,
                "quick": quick,
                **summary([first.found, *others], asdict(design)),
                "mixed": mixed_inputs(folder, rows_of(numbers[0], design)[2], numbers[0]),
                "seconds": round(time.perf_counter() - started, 1),
            }
            write_results(folder, results)
    return DemoResults(results)


def _over(count: int) -> Spread:
    """Over so many forked processes."""

    def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        torch.set_num_threads(count)  # which says how many processes there are
        try:
            yield from forked(function, items)
        finally:
            torch.set_num_threads(1)

    return spread


@contextmanager
def quiet_torch() -> Iterator[None]:
    """One thread (quickest for models this small), no gradients, no bars of others; all as before afterwards."""
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()
