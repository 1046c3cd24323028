"""CIFAR-10's images by split, and the rows that a task makes of them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_suite_parts.tasks import CLASSES, Images, Labels, Task

SPLITS = {"base": (0, 2500), "train": (2500, 4500), "validation": (4500, 5000)}  # numbers in each class's train folder

MEAN = 127.5

SPREAD = 64.0  # pixels are shifted by the one and divided by the other


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
            arrays: dict[str, Any] = {
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
