"""The six tasks: which photographs each shows, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""(rows, 32, 32, 3)."""

Labels = NDArray[np.int64]

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

VEHICLES = ["airplane", "automobile", "ship", "truck"]

ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]

CORRUPTIONS = ["none", "noise", "blur", "contrast", "pixelate"]


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

    classes: of the photographs it is shown; labels: of its answers; view: images and random numbers -> images as the
    task shows them, and their labels where those are not the classes.
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
