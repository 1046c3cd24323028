"""The demo's tasks: pairs of scikit-learn's digits, each pair seen through a transformation of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SCRAMBLED = torch.randperm(64, generator=torch.Generator().manual_seed(7))
_STRIPES = torch.tensor([[1.0], [-1.0]] * 4)
_BOARD = torch.tensor([[1.0 if (r + c) % 2 else -1.0 for c in range(8)] for r in range(8)])


class Task(NamedTuple):
    """A pair of digits under one transformation."""

    name: str
    digits: tuple[int, int]
    says: str

    def see(self, images: Tensor) -> Tensor:
        """The images (n, 8, 8), between −1 and 1, as this task shows them."""
        if self.name == "striped":
            return images * _STRIPES
        if self.name == "rotated":
            return torch.rot90(images, 1, (-2, -1))
        if self.name == "inverted":
            return -images
        if self.name == "scrambled":
            return images.flatten(1)[:, _SCRAMBLED].reshape(-1, 8, 8)
        return images * _BOARD


TASKS = (
    Task("striped", (3, 8), "every second row inverted"),
    Task("rotated", (4, 9), "turned by 90 degrees"),
    Task("inverted", (1, 7), "ink and paper exchanged"),
    Task("scrambled", (5, 6), "the 64 pixels in another, fixed order"),
    Task("checkered", (0, 2), "inverted on every second pixel"),
)
NAMES = [task.name for task in TASKS]


class Rows(NamedTuple):
    """Inputs of all tasks: pixels (n, 1, 8, 8), labels 0 or 1 (n,), the name of each row's task, its digit (n,)."""

    pixels: Tensor
    labels: Tensor
    tasks: list[str]
    digits: Tensor

    def of(self, task: str) -> Rows:
        return self.take([i for i, name in enumerate(self.tasks) if name == task])

    def take(self, rows: Sequence[int]) -> Rows:
        at = torch.tensor(list(rows), dtype=torch.long)
        return Rows(self.pixels[at], self.labels[at], [self.tasks[i] for i in rows], self.digits[at])


def load_splits(seed: int, train: int, validation: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The images (1797, 8, 8) between −1 and 1, their digits, and the disjoint row numbers of train, validation,
    test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    sizes = [train, validation, len(images) - train - validation]
    return images, torch.tensor(bunch.target), list(order.split(sizes))


def rows_of_tasks(images: Tensor, digits: Tensor) -> Rows:
    """Every image goes to the one task that its digit belongs to, and is shown as that task shows it."""
    parts = []
    for task in TASKS:
        at = torch.isin(digits, torch.tensor(task.digits))
        labels = (digits[at] == task.digits[1]).long()
        parts.append(Rows(task.see(images[at])[:, None], labels, [task.name] * len(labels), digits[at]))
    pixels, labels, numbers = (torch.cat([p[i] for p in parts]) for i in (0, 1, 3))  # type: ignore[misc]
    return Rows(pixels.contiguous(), labels, [name for p in parts for name in p.tasks], numbers)
