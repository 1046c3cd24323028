"""The base and the experts, by two fixed recipes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from vision_suite_parts.data import MEAN, SPREAD, augmented, pixel_values, read_images, rows_of
from vision_suite_parts.tasks import BASE, TASKS, Images, Labels, Task

MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

BASE_RECIPE: dict[str, Any] = {
    "optimizer": "AdamW",
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup": 0.1,
    "schedule": "linear to zero",
    "batch_rows": 64,
    "steps": 3200,  # 8 epochs of 25,000 images
    "augmentation": "half of the images mirrored; shifted by up to 3 pixels",
    "clip_norm": 1.0,
    "seed": 0,
}

RECIPE = {**BASE_RECIPE, "learning_rate": 3e-4, "weight_decay": 0.0, "steps": 400}


def train_model(
    task: Task, images: Images, numbers: Labels, recipe: dict[str, Any], start: Path | None, out: Path, name: str
) -> None:
    """Train all weights by a recipe, from the folder `start` or from nothing, and save the folder `out`.

    Images are mirrored and shifted before the task shows them, so that the label of a turned image stays true.
    """
    torch.manual_seed(int(recipe["seed"]))
    rng = np.random.default_rng(int(recipe["seed"]))
    names: dict[str, Any] = {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {n: i for i, n in enumerate(task.labels)},
    }
    model = ViTForImageClassification(ViTConfig(**MODEL, **names))
    if start is not None:
        body = ViTForImageClassification.from_pretrained(start).vit
        model.vit.load_state_dict(body.state_dict())
    steps, rows = int(recipe["steps"]), int(recipe["batch_rows"])
    warmup = max(1, int(float(recipe["warmup"]) * steps))
    optimizer = torch.optim.AdamW(
        [
            {"params": model.vit.parameters()},
            {"params": model.classifier.parameters(), "lr": recipe["head_learning_rate"]},
        ],
        lr=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )
    images, places = rows_of(task, images, numbers)
    model.train()
    queue = np.empty(0, dtype=np.int64)
    losses: list[float] = []
    for step in range(1, steps + 1):
        if len(queue) < rows:
            queue = np.concatenate([queue, rng.permutation(len(images))])
        chosen, queue = queue[:rows], queue[rows:]
        seen, labels = task.view(augmented(images[chosen], rng), rng)
        answers = torch.from_numpy(places[chosen] if labels is None else labels)
        loss = model(pixel_values=pixel_values(seen), labels=answers).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"{name}: step {step} of {steps}, mean loss {np.mean(losses[-200:]):.3f}", flush=True)
    model.eval()
    model.save_pretrained(out)


def train(data: Path, models: Path, tasks: list[str]) -> None:
    """The base and the experts of `tasks` under `models`; what is there already is kept."""
    splits = read_images(data, models)
    base = models / "base"
    for name in ["base", *tasks]:
        out = models / name
        if (out / "config.json").exists():
            print(f"{name}: kept, {out} is there already")
            continue
        start = time.perf_counter()
        if name == "base":
            train_model(BASE, *splits["base"], BASE_RECIPE, None, out, name)
        else:
            train_model(TASKS[name], *splits["train"], RECIPE, base, out, name)
        seconds = time.perf_counter() - start
        (models / f"{name}.seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
        print(f"{name}: {seconds:.0f} s -> {out}", flush=True)
    recipe = {"model": MODEL, "base": BASE_RECIPE, "experts": RECIPE, "pixels": {"mean": MEAN, "spread": SPREAD}}
    (models / "recipe.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
