"""Score a model on a suite: an expert, a merged folder with heads, or a twin in its three settings."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from twinmerge.arguments import strict
from twinmerge.engine.merge import Merge
from twinmerge.errors import DataError, UsageError, nearest
from twinmerge.models.rows import rows_of_batch
from twinmerge.progress import bar as progress_bar
from twinmerge.progress import logged
from twinmerge.store.output import replace_text
from twinmerge.study.runners import StaticRunner as StaticRunner
from twinmerge.study.runners import TwinRunner as TwinRunner
from twinmerge.study.runners import open_runner as open_runner
from twinmerge.study.runners import runner_of as runner_of
from twinmerge.study.runners import tokenizer_folder as tokenizer_folder
from twinmerge.study.scored_card import check_card, write_scores
from twinmerge.study.scores import Evaluation, Evaluations, Reading, References, Setting, check_file
from twinmerge.tasks.bootstrap import Scored
from twinmerge.tasks.encode import batches
from twinmerge.tasks.suite import Row, Task, open_suite
from twinmerge.twin.twin import Twin

BATCH_ROWS = 32
WINDOW = 16  # batches whose rows are sorted by length together, so that little is padded


@dataclass(frozen=True)
class Question:
    """One row of the suite: its task and its place there."""

    task: str
    index: int
    row: Row


@strict
def evaluate(
    model: str | Path | Twin | Merge | StaticRunner | TwinRunner,
    suite: str | Path | Mapping[str, Task],
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    oracle_biases: bool = False,
    progress: bool = True,
    *,
    tasks: Sequence[str] | None = None,
    device: str | None = None,
    experts: References | None = None,
    out: str | Path | None = None,
    into_card: bool = False,
) -> Evaluations:
    """Answer every row of the suite, tasks shuffled into common batches.

    A twin is read in its settings: *task given* (the right expert and head), *head given* (the router mixes, the caller
    names the head), *nothing given* (expert and head routed). The last is counted strictly (right task and label) and
    leniently (right label name, whichever head said it). Rows that two settings ask in the same way are answered once.

    Args:
        model: a folder, a twin, a merge, or an opened runner.
        suite: task -> data, or a suite's folder; the tasks' names are those of the heads.
        split: which rows.
        limit: at most so many per task, drawn by `seed`.
        oracle_biases: hand in the labelled task's biases, as the paper's code does; only to reproduce it.
        tasks: of the suite; the model's own where None.
        device: where a model that is read or merged runs; "cpu" where None, or the merge's own.
        experts: their own evaluation on the same rows, or its file, or several, each of other tasks: adds normalised
            scores.
        out: a file to write all answers and scores to, in the place of one that is there.
        into_card: write the scores into README.md of the model's folder too, in the place of earlier ones.

    Raises:
        TwinmergeError: a task without a head, labels that are not the head's.
    """
    reference, file, card = Evaluation.read(experts), check_file(out), check_card(model) if into_card else None
    runner = runner_of(model, oracle_biases, device)
    named = "suite" if isinstance(suite, Mapping) else Path(suite).resolve().name
    if not isinstance(suite, Mapping):
        suite = open_suite(suite, tasks or runner.heads or None)
    elif tasks is not None:
        if strange := [name for name in tasks if name not in suite]:
            raise UsageError(f"The suite has no task {strange[0]!r}.{nearest(strange[0], suite)}")
        suite = {name: suite[name] for name in tasks}
    if reference is not None and set(reference.scores) != set(suite):
        raise UsageError(
            f"The experts' evaluation is of the tasks {', '.join(reference.scores)}, this one of {', '.join(suite)}. "
            "Choose the same with --tasks."
        )
    _check_labels(runner, suite)
    questions = [
        Question(name, i, row) for name, task in suite.items() for i, row in enumerate(task.rows(split, limit, seed))
    ]
    plan = _mixed_batches(questions, seed)
    with torch.inference_mode(), logged(f"answered {len(questions)} rows of {split}", "study"):
        if isinstance(runner, StaticRunner):
            found = _static(runner, suite, plan, len(questions), progress)
        else:
            found = _twin(runner, suite, plan, len(questions), progress)
    runner.encoder.warn_truncated()
    if reference is not None:
        for name, scored in found[0].predictions.items():
            if not np.array_equal(scored.labels, reference.predictions[name].labels):
                raise DataError(
                    f"The experts' evaluation of {name!r} has other rows than this one. Evaluate them with the same "
                    "--split, --limit and --seed."
                )
    evaluations = Evaluations(found, name_of(model), split, oracle_biases, reference)
    if file is not None:
        replace_text(file, evaluations.to_json())
    if card is not None:
        write_scores(card, evaluations, named, limit, seed)
    return evaluations


def name_of(model: str | Path | Twin | Merge | StaticRunner | TwinRunner) -> str:
    """What a model is called in results."""
    if isinstance(model, (str, os.PathLike)):
        return str(model)
    of = model.twin if isinstance(model, TwinRunner) else model
    if isinstance(of, Merge):
        return f"{of.recipe.method_name} of {', '.join(of.recipe.experts)}"
    return (
        f"{'twin' if isinstance(of, Twin) else 'model'} of "
        f"{', '.join(of.experts if isinstance(of, Twin) else of.heads)}"
    )


def _mixed_batches(questions: Sequence[Question], seed: int) -> list[list[Question]]:
    """Batches of rows of all tasks; rows of like length meet within windows of a shuffled order."""
    plan: list[list[Question]] = []
    for at, rows in batches([q.row for q in questions], BATCH_ROWS * WINDOW, "shuffled", seed):
        plan += [[questions[at[j]] for j in chunk] for chunk, _ in batches(rows, BATCH_ROWS, "length")]
    return plan


def _check_labels(runner: StaticRunner | TwinRunner, suite: Mapping[str, Task]) -> None:
    if not suite:
        raise UsageError("The suite has no task. Name at least one.")
    if not runner.heads and len(suite) != 1:
        raise UsageError("A model with one head answers one task. Name it with --tasks.")
    for name, task in suite.items():
        if runner.heads and name not in runner.heads:
            raise UsageError(
                f"The model has no head for the task {name!r}; it has {', '.join(runner.heads)}. Choose with --tasks."
            )
        if (answers := runner.answers(name)) != "one label":
            raise DataError(
                f"The head for {name!r} gives {answers}, and a suite asks for one label of each row. Choose other "
                "tasks with --tasks."
            )
        if len(runner.labels(name)) != len(task.labels):
            raise DataError(
                f"The head for {name!r} has {len(runner.labels(name))} labels, the suite's task {len(task.labels)}. "
                "Use the model tuned on it."
            )
        own = runner.labels(name)
        unnamed = own == [f"LABEL_{i}" for i in range(len(own))]  # as transformers calls what nobody named
        if not unnamed and (strange := [label for label in task.labels if label not in own]):
            raise DataError(
                f"The head for {name!r} has no label {strange[0]!r} of the suite's task; it has {', '.join(own)}. Use "
                "the model tuned on it, or give the suite the head's names."
            )
        if not unnamed and own != list(task.labels):
            raise DataError(
                f"The head for {name!r} has its labels in another order ({', '.join(own)}) than the suite "
                f"({', '.join(task.labels)}). Put the suite's labels and rows into the head's order."
            )


class _Answers:
    """Predicted label number of every row of every task, −1 until answered."""

    def __init__(self, suite: Mapping[str, Task], plan: Sequence[Sequence[Question]]) -> None:
        self.suite = suite
        self.labels = {t: np.full(sum(q.task == t for b in plan for q in b), -1) for t in suite}
        self.found = {t: np.full_like(labels, -1) for t, labels in self.labels.items()}
        for batch in plan:
            for q in batch:
                self.labels[q.task][q.index] = q.row.label

    def scored(self) -> dict[str, Scored]:
        return {t: Scored(t, self.suite[t].metric, self.labels[t], self.found[t]) for t in self.suite}


def _static(
    runner: StaticRunner, suite: Mapping[str, Task], plan: Sequence[list[Question]], rows: int, progress: bool
) -> list[Evaluation]:
    answers = _Answers(suite, plan)
    start = time.perf_counter()
    for batch in progress_bar(plan, "evaluating", progress):
        logits = runner.answer([q.row for q in batch], [q.task for q in batch])
        for q, chosen in zip(batch, logits.argmax(-1).tolist(), strict=True):
            answers.found[q.task][q.index] = chosen
    seconds = time.perf_counter() - start
    return [Evaluation.of(answers.scored(), "head given" if runner.heads else "task given", seconds=seconds)]


def _twin(
    runner: TwinRunner, suite: Mapping[str, Task], plan: Sequence[list[Question]], rows: int, progress: bool
) -> list[Evaluation]:
    experts = runner.heads
    ways: list[tuple[Setting, Reading | None]] = [("task given", None)]
    if "head given" in runner.settings:
        ways += [("head given", None), ("nothing given", "strict"), ("nothing given", "lenient")]
    answers = {way: _Answers(suite, plan) for way in ways}
    right = 0
    spent = dict.fromkeys(ways, 0.0)
    for batch in progress_bar(plan, "evaluating", progress):
        given = torch.nn.functional.one_hot(torch.tensor([experts.index(q.task) for q in batch]), len(experts)).float()
        heads = [q.task for q in batch]
        start = time.perf_counter()
        encoded = runner.encoder.encode([q.row for q in batch])  # once, so that a row that is cut is counted once
        own = _labels(runner, encoded, heads, given, heads)
        answered = time.perf_counter() - start
        _put(answers[ways[0]], batch, own)
        spent[ways[0]] += answered
        if len(ways) == 1:
            continue
        start = time.perf_counter()
        weights, chosen = runner.route(encoded)
        routing = time.perf_counter() - start
        right += sum(c == q.task for c, q in zip(chosen, batch, strict=True))
        other = [i for i in range(len(batch)) if not torch.equal(weights[i], given[i])]
        by_head, by_router = list(own), list(own)
        if other:
            few, mixture = rows_of_batch(encoded, torch.tensor(other), len(batch)), weights[other]
            tasks = [heads[i] for i in other]
            for i, label in zip(other, _labels(runner, few, tasks, mixture, tasks), strict=True):
                by_head[i] = label
            for i, label in zip(other, _labels(runner, few, [chosen[i] for i in other], mixture, tasks), strict=True):
                by_router[i] = label
        _put(answers[ways[1]], batch, by_head)
        strict = [label if c == h else -1 for label, c, h in zip(by_router, chosen, heads, strict=True)]
        _put(answers[ways[2]], batch, strict)
        lenient = [
            _same_name(runner.labels(c)[label], suite[h].labels, label if c == h else None)
            for label, c, h in zip(by_router, chosen, heads, strict=True)
        ]
        _put(answers[ways[3]], batch, lenient)
        for way in ways[1:]:
            spent[way] += routing + answered
    return [
        Evaluation.of(
            answers[way].scored(), way[0], way[1], None if way[0] == "task given" else right / rows, spent[way]
        )
        for way in ways
    ]


def _labels(
    runner: TwinRunner,
    batch: Mapping[str, torch.Tensor],
    heads: Sequence[str],
    mixture: torch.Tensor,
    tasks: Sequence[str],
) -> list[int]:
    found: list[int] = runner.answer(batch, heads, mixture, tasks).argmax(-1).tolist()
    return found


def _put(answers: _Answers, batch: Sequence[Question], found: Sequence[int]) -> None:
    for q, label in zip(batch, found, strict=True):
        answers.found[q.task][q.index] = label


def _same_name(said: str, labels: Sequence[str], own: int | None) -> int:
    """The task's label of that name, or −1; an answer of the task's own head is its own number."""
    if own is not None:
        return own
    return list(labels).index(said) if said in labels else -1
