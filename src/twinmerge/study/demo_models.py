"""The models of the demo: how they are trained, merged in every way, and measured.

One small vision transformer learns the ten digits. Five copies of it then learn a pair of digits each, seen through one
transformation each. What static merging and Twin-Merging keep of them is measured on rows that nothing was fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.study.digits import NAMES, TASKS, Rows, load_splits, rows_of_tasks
from twinmerge.study.report import TWIN, Tick
from twinmerge.study.scores import Evaluation, Setting
from twinmerge.tasks.bootstrap import Scored
from twinmerge.twin.twin import Twin

MERGE_COST = 40  # training steps that take about as long as one merge with its evaluation
SETTINGS: tuple[Setting, ...] = ("task given", "head given", "nothing given")


@dataclass(frozen=True)
class Design:
    """All numbers of the demo; `grids` are what a static method's parameters are chosen from, on validation rows."""

    train_rows: int = 900
    validation_rows: int = 300
    hidden: int = 64
    layers: int = 4
    base_steps: int = 100
    base_rate: float = 1e-3
    expert_steps: int = 300
    expert_rate: float = 3e-3
    batch: int = 32
    rank: int = 8
    shared: str = "tsv"
    grids: Mapping[str, Mapping[str, Sequence[float]]] = field(
        default_factory=lambda: {
            "average": {},
            "task_arithmetic": {"scale": (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)},
            "ties": {"density": (0.1, 0.2, 0.5, 1.0), "scale": (0.3, 0.5, 0.7, 1.0)},
            "tsv": {"scale": (0.2, 0.4, 0.6, 0.8, 1.0)},
        }
    )

    def measuring(self) -> int:
        """The length of merging and measuring the models of one seed, in training steps."""
        return MERGE_COST * (sum(len(_choices(grid)) for grid in self.grids.values()) + len(SETTINGS) + 1)

    def work(self) -> int:
        """The length of one seed, in training steps."""
        return self.base_steps + len(TASKS) * self.expert_steps + self.measuring()


QUICK = Design(
    train_rows=600,
    layers=2,
    base_steps=60,
    expert_steps=60,
    grids={
        "average": {},
        "task_arithmetic": {"scale": (0.2, 0.4)},
        "ties": {"density": (0.2,), "scale": (0.5, 1.0)},
        "tsv": {"scale": (0.4, 0.8)},
    },
)


Spread = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Gives a function of each item, in order."""


class Trained(NamedTuple):
    """The models of one seed."""

    base: ViTForImageClassification
    experts: dict[str, ViTForImageClassification]


class Measured(NamedTuple):
    """What was made of the models of one seed, and measured."""

    merges: dict[str, Merge]
    twin: Twin
    found: dict[str, Any]


def train(numbers: Sequence[int], design: Design, spread: Spread, tick: Tick) -> dict[int, Trained]:
    """The base and the experts of each seed, which decides splits, initial weights and the order of the batches."""
    tick("training the bases", 0)
    found: dict[int, Trained] = {}
    for number, (base, experts) in zip(numbers, spread(partial(_base, design=design), numbers), strict=True):
        found[number] = Trained(base, experts)
        tick("", design.base_steps)
    tick("training the experts", 0)
    wanted = [(number, name, found[number].experts[name]) for number in numbers for name in NAMES]
    for (number, name, _), expert in zip(wanted, spread(partial(_expert, design=design), wanted), strict=True):
        found[number].experts[name] = expert
        tick("", design.expert_steps)
    return found


def _base(seed: int, design: Design) -> tuple[ViTForImageClassification, dict[str, ViTForImageClassification]]:
    """The trained base of a seed, and what its experts begin with: its body under heads of their own."""
    torch.manual_seed(seed)
    images, digits, splits = load_splits(seed, design.train_rows, design.validation_rows)
    base = ViTForImageClassification(vit_config(design, [str(d) for d in range(10)]))
    own = splits[0]
    fit(base, images[own][:, None], digits[own], design.base_steps, design.base_rate, design.batch * 2, seed)
    experts = {}
    for task in TASKS:
        experts[task.name] = ViTForImageClassification(vit_config(design, [str(d) for d in task.digits]))
        experts[task.name].vit.load_state_dict(base.vit.state_dict())
    return base, experts


def _expert(wanted: tuple[int, str, ViTForImageClassification], design: Design) -> ViTForImageClassification:
    """An expert after its training on the rows of its task."""
    seed, name, expert = wanted
    rows = rows_of(seed, design)[0].of(name)
    fit(expert, rows.pixels, rows.labels, design.expert_steps, design.expert_rate, design.batch, seed)
    return expert


def rows_of(seed: int, design: Design) -> tuple[Rows, Rows, Rows]:
    """Rows of all tasks: for training, for validation, and for the test."""
    images, digits, splits = load_splits(seed, design.train_rows, design.validation_rows)
    train, validation, test = (rows_of_tasks(images[at], digits[at]) for at in splits)
    return train, validation, test


def measure(seed: int, models: Trained, design: Design) -> Measured:
    """Merge the models of a seed in every way, build their twin, and score all of them on the test rows."""
    base, experts = models
    train, validation, test = rows_of(seed, design)
    images, digits, splits = load_splits(seed, design.train_rows, design.validation_rows)
    unseen = splits[2]
    reference = evaluate_experts(experts, test)
    found: dict[str, Any] = {
        "seed": seed,
        "base_accuracy": _accuracy(base(images[unseen][:, None]).logits, digits[unseen]),
        "experts": reference.scores,
        "methods": {},
    }
    merges = {}
    for method, grid in design.grids.items():
        chosen, merges[method], validated = choose(method, grid, base, experts, validation)
        answers = evaluate_merge(merges[method], test)
        found["methods"][method] = _measured(answers, reference) | {"parameters": chosen, "validation": validated}

    twin = Twin.build(base, experts, design.rank, shared=design.shared, progress=False)
    pixels = {name: {"pixel_values": train.of(name).pixels} for name in NAMES}
    twin.fit_router(pixels, refuse=0, progress=False)  # too few images of a task for a limit
    for setting in SETTINGS:
        answers, routed = evaluate_twin(twin, test, setting)
        found["methods"][f"{TWIN}, {setting}"] = _measured(answers, reference)
        if setting == "nothing given":
            found["routed_right"], found["confusion"] = answers.routed_right, routed
    found["parameters"] = sizes(base, twin)
    found["rows"] = {"train": len(train.tasks), "validation": len(validation.tasks), "test": len(test.tasks)}
    return Measured(merges, twin, found)


def vit_config(design: Design, labels: Sequence[str]) -> ViTConfig:
    """A vision transformer for 8×8 pixels in patches of 2×2."""
    return ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=design.hidden,
        num_hidden_layers=design.layers,
        num_attention_heads=4,
        intermediate_size=2 * design.hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


def fit(
    model: ViTForImageClassification,
    pixels: Tensor,
    labels: Tensor,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
) -> None:
    """AdamW on all weights, gradients clipped to norm 1, the rate rising to `rate` and falling to zero once."""
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(pixels), (batch,), generator=draws)
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def choose(
    method: str,
    grid: Mapping[str, Sequence[float]],
    base: ViTForImageClassification,
    experts: Mapping[str, ViTForImageClassification],
    validation: Rows,
) -> tuple[dict[str, float], Merge, float]:
    """The parameters of the best mean accuracy over tasks on the validation rows; the first of equals."""
    best: tuple[dict[str, float], Merge, float] | None = None
    for parameters in _choices(grid):
        merged = merge(method, base=base, experts=experts, progress=False, **parameters)
        score = float(np.mean(list(evaluate_merge(merged, validation).scores.values())))
        if best is None or score > best[2]:
            best = (parameters, merged, score)
    assert best is not None
    return best


def _choices(grid: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """All combinations of a grid; an empty one is the single choice of nothing."""
    found: list[dict[str, Any]] = [{}]
    for name, values in grid.items():
        found = [{**one, name: value} for one in found for value in values]
    return found


# ----------------------------------------------------------------------------------------- measuring


def evaluate_experts(experts: Mapping[str, ViTForImageClassification], rows: Rows) -> Evaluation:
    """Every expert on its own task."""
    parts = {name: rows.of(name) for name in NAMES}
    answers = {n: _scored(n, part, experts[n](part.pixels).logits.argmax(-1)) for n, part in parts.items()}
    return Evaluation.of(answers, "task given")


def evaluate_merge(merged: Merge, rows: Rows) -> Evaluation:
    """A static model; it has no router, so it is told which head answers."""
    answers = merged.load()(pixel_values=rows.pixels, head=rows.tasks).logits.argmax(-1)
    return _evaluation(rows, answers, "head given")


def evaluate_twin(twin: Twin, rows: Rows, setting: Setting) -> tuple[Evaluation, list[list[int]]]:
    """The twin on one mixed batch of all tasks, and how many rows of each task it gave to each expert.

    With nothing given, an answer of another task's head is wrong, whatever its label.
    """
    sent = {"task given": {"expert": rows.tasks}, "head given": {"head": rows.tasks}, "nothing given": {}}[setting]
    output = twin(pixel_values=rows.pixels, **sent)
    answers = output.logits.argmax(-1)
    right_head = torch.tensor([head == task for head, task in zip(output.head, rows.tasks, strict=True)])
    went = [[0] * len(NAMES) for _ in NAMES]
    for task, expert in zip(rows.tasks, output.expert, strict=True):
        went[NAMES.index(task)][NAMES.index(expert)] += 1
    routed = sum(went[i][i] for i in range(len(NAMES))) / len(rows.tasks)
    return _evaluation(rows, torch.where(right_head, answers, -1), setting, routed), went


def _evaluation(rows: Rows, answers: Tensor, setting: Setting, routed: float | None = None) -> Evaluation:
    scored = {}
    for name in NAMES:
        at = [i for i, task in enumerate(rows.tasks) if task == name]
        scored[name] = _scored(name, rows.take(at), answers[at])
    return Evaluation.of(scored, setting, "strict" if setting == "nothing given" else None, routed)


def _scored(task: str, rows: Rows, answers: Tensor) -> Scored:
    return Scored(task, "accuracy", rows.labels.numpy(), answers.numpy())


def _measured(answers: Evaluation, experts: Evaluation) -> dict[str, Any]:
    return {"setting": answers.setting, "scores": answers.scores, "normalised": answers.normalised(experts)}


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def sizes(base: ViTForImageClassification, twin: Twin) -> dict[str, int]:
    """How many numbers each way keeps (heads apart): one model, all experts, the twin with its router."""
    body = sum(p.numel() for p in base.vit.parameters())
    assert twin.router is not None
    router = sum(t.numel() for t in twin.router.state_dict().values())
    exclusive = sum(part.numel() for part in twin.package.exclusive.values())
    return {"one model": body, "experts": len(TASKS) * body, "twin": body + exclusive + router}
