"""Train one small vision base and six experts on CIFAR-10, then score every way of merging them.

    python benchmarks/vision_suite.py train --data cifar10.zip --models DIR
    python benchmarks/vision_suite.py score --data cifar10.zip --models DIR --out DIR

The base learns the ten classes from half of the training images. Each expert is the base, fine-tuned as a whole by one
fixed recipe (RECIPE below, nothing tuned for a task) on other images, as its task shows them (TASKS). `score` is in
`vision_suite_score.py`. The zip holds `train/<class>/*.jpg` and `test/<class>/*.jpg`.

Not every input tells which task it belongs to, and no router can do better than that. Rows of `rotation` that are
turned by 0 degrees (a quarter) and rows of `corruption` with nothing done to them (a fifth) are plain photographs, as all
rows of `vehicles` and `animals` are; and photographs of vehicles and of animals are told apart only as well as the model
knows what they show.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

Images = NDArray[np.uint8]
"""(rows, 32, 32, 3)."""
Labels = NDArray[np.int64]

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
VEHICLES = ["airplane", "automobile", "ship", "truck"]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
CORRUPTIONS = ["none", "noise", "blur", "contrast", "pixelate"]
SPLITS = {"base": (0, 2500), "train": (2500, 4500), "validation": (4500, 5000)}  # numbers in each class's train folder
MEAN, SPREAD = 127.5, 64.0  # pixels are shifted and divided by these

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BASE_RECIPE = {
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


# ---------------------------------------------------------------------------------------------- tasks


def as_they_are(images: Images, rng: np.random.Generator) -> tuple[Images, Labels | None]:
    """The photographs."""
    return images, None


def turned(images: Images, rng: np.random.Generator) -> tuple[Images, Labels | None]:
    """Each image turned by 0, 90, 180 or 270 degrees; the label is the number of quarter turns."""
    turns = rng.integers(4, size=len(images))
    out = np.stack([np.rot90(image, k) for image, k in zip(images, turns, strict=True)])
    return out, turns.astype(np.int64)


def corrupted(images: Images, rng: np.random.Generator) -> tuple[Images, Labels | None]:
    """One of CORRUPTIONS done to each image, of a strength that varies; the label says which."""
    kinds = rng.integers(len(CORRUPTIONS), size=len(images))
    strength = rng.uniform(0.5, 1.0, size=(len(images), 1, 1, 1))
    x = images.astype(np.float64)
    done = [x, x + rng.normal(0, 30, x.shape) * strength]
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    smooth = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    done.append(x + strength * (smooth - x))
    mean = x.mean((1, 2), keepdims=True)
    done.append(mean + (x - mean) * (1 - 0.7 * strength))
    blocks = x.reshape(len(x), 16, 2, 16, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    done.append(x + strength * (blocks - x))
    out = np.stack(done)[kinds, np.arange(len(x))]
    return np.clip(np.rint(out), 0, 255).astype(np.uint8), kinds.astype(np.int64)


def negative(images: Images, rng: np.random.Generator) -> tuple[Images, Labels | None]:
    """Photographic negatives."""
    return 255 - images, None


def outlines(images: Images, rng: np.random.Generator) -> tuple[Images, Labels | None]:
    """How steeply the grey value changes at each pixel, white on black."""
    grey = np.pad(images.astype(np.float64).mean(-1), ((0, 0), (1, 1), (1, 1)), mode="edge")
    down, right = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1], grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    steep = np.clip(np.rint(1.5 * np.hypot(down, right)), 0, 255).astype(np.uint8)
    return steep[..., None].repeat(3, -1), None


class Task(NamedTuple):
    """What an expert is for.

    classes: of the photographs it is shown; labels: of its answers; view: images and random numbers -> images as the task
    shows them, and their labels where those are not the classes.
    """

    classes: list[str]
    labels: list[str]
    view: Callable[[Images, np.random.Generator], tuple[Images, Labels | None]]


TASKS = {
    "vehicles": Task(VEHICLES, VEHICLES, as_they_are),
    "animals": Task(ANIMALS, ANIMALS, as_they_are),
    "rotation": Task(CLASSES, ["0 degrees", "90 degrees", "180 degrees", "270 degrees"], turned),
    "corruption": Task(CLASSES, CORRUPTIONS, corrupted),
    "negative": Task(CLASSES, CLASSES, negative),
    "outlines": Task(CLASSES, CLASSES, outlines),
}
BASE = Task(CLASSES, CLASSES, as_they_are)


# ----------------------------------------------------------------------------------------------- data


def read_images(data: Path, models: Path) -> dict[str, tuple[Images, Labels]]:
    """The zip's images and class numbers by split: base, train, validation, test. Decoded once, kept in `models`."""
    from PIL import Image

    cache = models / "cifar10.npz"
    if not cache.exists():
        models.mkdir(parents=True, exist_ok=True)
        files: dict[str, list[str]] = {}
        with zipfile.ZipFile(data) as archive:
            for file in sorted(archive.namelist()):
                if file.endswith(".jpg"):
                    files.setdefault("/".join(file.split("/")[-3:-1]), []).append(file)
            arrays = {
                kind: np.stack(
                    [np.asarray(Image.open(io.BytesIO(archive.read(f))).convert("RGB")) for f in files[kind]]
                )
                for kind in sorted(files)
            }
        np.savez(cache, **arrays)
    with np.load(cache) as kept:
        arrays = {name: kept[name] for name in kept.files}
    found = {}
    for split in (*SPLITS, "test"):
        part, cut = ("test", slice(None)) if split == "test" else ("train", slice(*SPLITS[split]))
        images = [arrays[f"{part}/{name}"][cut] for name in CLASSES]
        numbers = np.repeat(np.arange(len(CLASSES)), [len(i) for i in images])
        found[split] = (np.concatenate(images), numbers)
    return found


def rows_of(task: Task, images: Images, numbers: Labels) -> tuple[Images, Labels]:
    """The photographs that the task shows, and their place in its list of classes."""
    place = np.array([task.classes.index(name) if name in task.classes else -1 for name in CLASSES])[numbers]
    return images[place >= 0], place[place >= 0]


def fixed_rows(
    task: Task, images: Images, numbers: Labels, seed: int, limit: int | None = None
) -> tuple[Tensor, Labels]:
    """Pixel values and labels of the rows of a split, at most `limit` of them, drawn by `seed`; always the same."""
    rng = np.random.default_rng(seed)
    images, places = rows_of(task, images, numbers)
    if limit is not None:
        chosen = rng.permutation(len(images))[:limit]
        images, places = images[chosen], places[chosen]
    seen, labels = task.view(images, rng)
    return pixel_values(seen), places if labels is None else labels


def pixel_values(images: Images) -> Tensor:
    """(rows, 3, 32, 32) float32, about −2 to 2."""
    return torch.from_numpy((images.astype(np.float32) - MEAN) / SPREAD).permute(0, 3, 1, 2).contiguous()


def augmented(images: Images, rng: np.random.Generator) -> Images:
    """Half of the images mirrored, all shifted by up to 3 pixels (the border repeats)."""
    wide = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    out = np.empty_like(images)
    for i, (down, right, mirrored) in enumerate(
        zip(*rng.integers([[7], [7], [2]], size=(3, len(images))), strict=True)
    ):
        shifted = wide[i, down : down + 32, right : right + 32]
        out[i] = shifted[:, ::-1] if mirrored else shifted
    return out


# ------------------------------------------------------------------------------------------- training


def train_model(
    task: Task, images: Images, numbers: Labels, recipe: dict[str, object], start: Path | None, out: Path, name: str
) -> None:
    """Train all weights by a recipe, from the folder `start` or from nothing, and save the folder `out`.

    Images are mirrored and shifted before the task shows them, so that the label of a turned image stays true.
    """
    torch.manual_seed(int(recipe["seed"]))
    rng = np.random.default_rng(int(recipe["seed"]))
    names = {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "score"])
    parser.add_argument("--data", type=Path, required=True, help="the zip of CIFAR-10's images, a folder per class")
    parser.add_argument("--models", type=Path, required=True, help="folder of the base and of the experts")
    parser.add_argument("--out", type=Path, help="folder of the scores (score)")
    parser.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}; all without it")
    parser.add_argument("--rows", type=int, help="test rows of each task, drawn at random (score); all without it")
    parser.add_argument("--threads", type=int, default=2, help="of torch; 1 is faster where other jobs use the cores")
    args = parser.parse_args()
    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise SystemExit(f"There is no task {task!r}; there are {', '.join(TASKS)}.")
    torch.set_num_threads(args.threads)
    if args.step == "train":
        train(args.data, args.models, tasks)
    else:
        if args.out is None:
            raise SystemExit("score needs --out DIR for its tables.")
        from vision_suite_score import score

        score(args.data, args.models, args.out, tasks, args.rows)


if __name__ == "__main__":
    main()
