"""Scores of pretrained, fine-tuned, merged and routed image towers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import twinmerge as tm
from clip_suite_parts.data import Task
from kit.scores import setting_of
from kit.table import table
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.bootstrap import Scored
from twinmerge.tasks.images import ImageEncoder, ImageFile

BATCH_ROWS, ROUTER_ROWS = 64, 512
METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"scale": 0.3},
    "ties": {},
    "consensus": {},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "wudi": {},
}
SIDE_FILES = "preprocessor_config.json"

Answer = Callable[[str, Tensor], Tensor]
"""Task and pixel values -> logits of its classes."""


class Rows:
    """The rows of the table, told as they come.

    Args:
        experts: their own scores.
    """

    def __init__(self, experts: Evaluation) -> None:
        self.experts = experts
        self.rows: list[dict[str, Any]] = []

    def add(self, method: str, found: Evaluation) -> None:
        """A row: accuracies, their mean, and the mean as per cent of the experts' where none of these is 0."""
        share = found.normalised(self.experts) if all(self.experts.scores.values()) else None
        own = {"method": method, "setting": setting_of(found), "mean": found.mean, "normalised": share}
        self.rows.append({**own, "per_task": found.scores, "routed_right": found.routed_right})
        print(f"  {method:20s} {own['setting']:24s} {100 * found.mean:.1f}", flush=True)


def score(
    clip: Path, experts: Path, data: Path, out: Path, tasks: list[str], rows: int | None, rank: int, device: str
) -> None:
    """Score everything, and write `scores.json` and `table.md` into `out`."""
    known = {name: Task.of(data / name) for name in tasks}
    folders = {name: str(_classifier(clip, experts / name, task, out)) for name, task in known.items()}
    base = _base(clip, out)
    images = {name: task.rows("test", rows) for name, task in known.items()}
    encoder = ImageEncoder(clip)

    def answered(setting: str, answer: Answer) -> Evaluation:
        found = {}
        for name, files in images.items():
            chosen = [answer(name, batch.to(device)).argmax(-1).cpu() for batch in _batches(encoder, files)]
            labels = np.array([label for _, label in files])
            found[name] = Scored(name, "accuracy", labels, torch.cat(chosen).numpy())
        return Evaluation.of(found, setting)  # type: ignore[arg-type]

    own = {name: _opened(folder, device) for name, folder in folders.items()}
    reference = answered("task given", lambda name, batch: own[name](pixel_values=batch).logits)
    tally = Rows(reference)
    tally.add("experts", reference)
    zero: dict[str, Any] = {name: tm.zero_shot(str(clip), t.classes, t.templates) for name, t in known.items()}
    for plain in zero.values():
        plain.to(device)
    tally.add("pretrained", answered("task given", lambda name, batch: zero[name](pixel_values=batch).logits))
    for method, parameters in METHODS.items():
        model: Any = tm.merge(method, base=base, experts=folders, progress=False, **parameters).load().to(device)

        def answer(name: str, batch: Tensor, model: Any = model) -> Tensor:
            found: Tensor = model(pixel_values=batch, head=name).logits
            return found

        tally.add(method, answered("head given", answer))
    if all((task.folder / "train").is_dir() for task in known.values()):
        _twin(tally, base, folders, known, images, encoder, rank, device, answered)
    lines = table(
        ["method", "setting", *tasks, "mean", "of the experts"],
        "llr",
        [
            [
                r["method"],
                r["setting"],
                *(f"{100 * r['per_task'][task]:.1f}" for task in tasks),
                f"{100 * r['mean']:.1f}",
                "–" if r["normalised"] is None else f"{r['normalised']:.1f}",
            ]
            for r in tally.rows
        ],
    )
    (out / "scores.json").write_text(json.dumps({"rows": rows, "rank": rank, "scores": tally.rows}, indent=1))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _twin(
    tally: Rows,
    base: str,
    folders: dict[str, str],
    known: dict[str, Task],
    images: dict[str, list[tuple[Path, int]]],
    encoder: ImageEncoder,
    rank: int,
    device: str,
    answered: Callable[[str, Answer], Evaluation],
) -> None:
    """The twin: with the task given, and with nothing given, where expert and head are routed."""
    twin = tm.Twin.build(base, folders, rank, progress=False)
    train = {name: torch.cat([*_batches(encoder, task.rows("train", ROUTER_ROWS))]) for name, task in known.items()}
    twin.fit_router({name: {"pixel_values": values} for name, values in train.items()}, progress=False)
    twin.to(device)
    given = answered("task given", lambda name, batch: _logits(twin(pixel_values=batch, expert=name)))
    tally.add(f"twin, rank {rank}", given)
    found, right = {}, []
    for name, files in images.items():
        chosen = []
        for batch in _batches(encoder, files):
            out = twin(pixel_values=batch.to(device))
            said = _logits(out).argmax(-1).tolist()
            chosen += [label if head == name else -1 for label, head in zip(said, out.head or [], strict=True)]
            right += [head == name for head in out.head or []]
        found[name] = Scored(name, "accuracy", np.array([label for _, label in files]), np.array(chosen))
    tally.add(f"twin, rank {rank}", Evaluation.of(found, "nothing given", "strict", float(np.mean(right))))


def _logits(out: tm.TwinOutput) -> Tensor:
    assert out.logits is not None
    return out.logits


def _batches(encoder: ImageEncoder, files: list[tuple[Path, int]]) -> Any:
    for start in range(0, len(files), BATCH_ROWS):
        part = files[start : start + BATCH_ROWS]
        yield encoder.encode([ImageFile(file, str(file)) for file, _ in part])["pixel_values"]


def _base(clip: Path, out: Path) -> str:
    """The image tower before it was tuned, as a folder."""
    from transformers import CLIPModel

    folder = _emptied(out / "models" / "base")
    CLIPModel.from_pretrained(clip).vision_model.save_pretrained(folder)
    shutil.copy(clip / SIDE_FILES, folder)
    return str(folder)


def _emptied(folder: Path) -> Path:
    """Nothing of an earlier run is taken: it may be of another tower or of other classes, or cut off."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _classifier(clip: Path, tower: Path, task: Task, out: Path) -> Path:
    """An expert: its image tower with the output layer of its classes, as a folder."""
    folder = _emptied(out / "models" / task.name)
    tm.zero_shot(str(clip), task.classes, task.templates, tower=str(tower)).save_pretrained(folder)
    shutil.copy(clip / SIDE_FILES, folder)
    return folder


def _opened(folder: str, device: str) -> Any:
    from twinmerge.models.zero_shot import CLIPZeroShotForImageClassification

    model: Any = CLIPZeroShotForImageClassification.from_pretrained(folder)
    return model.eval().to(device)
