"""What the rows of a new vocabulary are made of: those that a model has, and sums of them in the place of new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twinmerge.engine.transplant.rows import MEAN, SUM, Composition, rows_of
from twinmerge.engine.transplant.shared import Shared
from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel
from twinmerge.progress import meter as progress_meter

Method = Literal["copy", "subtokens", "nearest", "omp"]
BY_DONOR = ("nearest", "omp")
"""Methods that look at the donor's own embeddings."""

Ids = NDArray[np.int64]
Term = tuple[NDArray[np.int32], NDArray[np.float64]]
"""Rows of the model, and what each counts in a sum."""


@dataclass(frozen=True)
class DonorTable:
    """The donor's table that tells how its tokens are related.

    Attributes:
        model: the donor.
        name: of the table, canonical.
        rows: of the table.
        width: elements of a row.
    """

    model: OpenedModel
    name: str
    rows: int
    width: int

    def read(self, ids: Ids) -> NDArray[np.float32]:
        """Some of its rows.

        Raises:
            ModelError: NaN or infinity.
        """
        found = rows_of(self.model, self.name, ids, self.width, np.float32)
        if not np.isfinite(found).all():
            raise ModelError(
                f"Tensor {self.name!r} of {self.model.name} holds NaN or infinity, so its tokens cannot be compared. "
                "Take a sound checkpoint of it."
            )
        return found


class Filling:
    """Fills the rows of tokens that a model lacks.

    Args:
        method: how.
        shared: the tokens that both have.
        size: rows of the new tables.
        split: gives the model's own tokens of each of some new ones.
        k: terms of a sum, at most, of "omp".
        device: where "omp" and "nearest" compute.
        progress: show how far they are.

    Attributes:
        how: what was done -> how many of the new tokens.
    """

    def __init__(
        self,
        method: Method,
        shared: Shared,
        size: int,
        split: Callable[[Ids], list[list[int]]],
        k: int,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        self.method, self.shared, self.size, self.split = method, shared, size, split
        self.k, self.device, self.progress = k, device, progress
        self.how: dict[str, int] = {}

    def anchors(self, rows: int) -> Ids:
        """Ids of the shared tokens that have a row in a table of the donor; those that only do the same work are
        none."""
        ids = np.flatnonzero(self.shared.kept)
        return ids[ids < rows]

    def memory(self, table: DonorTable) -> int:
        """Bytes of the donor's rows that are held at once."""
        return 4 * len(self.anchors(table.rows)) * table.width

    def composition(self, new: Ids, table: DonorTable | None) -> Composition:
        """What each row of a table of the model is made of.

        Args:
            new: ids of the donor's tokens that the model lacks.
            table: the donor's of the same use, where the method looks at one.
        """
        row = np.full(self.size, MEAN, np.int32)
        row[: len(self.shared.rows)] = np.where(self.shared.rows >= 0, self.shared.rows, MEAN)
        terms: dict[int, Term] = {}
        left, how = new, dict[str, int]()
        if table is not None:
            anchors, there = self.anchors(table.rows), new[new < table.rows]
            atoms = table.read(anchors)
            some = atoms.any(1)  # a row of zeros is near nothing
            atoms, own = atoms[some], self.shared.rows[anchors[some]]
            done = []
            for ids, index, weight in self._matched(atoms, there, table):
                done.append(ids[weight.any(1)])
                if self.method == "nearest":
                    row[ids] = own[index[:, 0]]
                    continue
                for number, at, by in zip(ids.tolist(), index, weight, strict=True):
                    if by.any():
                        terms[number] = (own[at[by != 0]], by[by != 0])
            matched = np.concatenate(done) if done else new[:0]
            left = np.setdiff1d(new, matched)
            how[self.method] = len(matched)
        if self.method != "copy" and len(left):
            split = self.split(left)
            for number, own_ids in zip(left.tolist(), split, strict=True):
                if own_ids:
                    terms[number] = np.array(own_ids, np.int32), np.full(len(own_ids), 1 / len(own_ids))
            how["subtokens"] = sum(map(bool, split))
        for number, (rows, by) in terms.items():
            row[number] = rows[0] if by.tolist() == [1.0] else SUM
        how["mean"] = int((row[new] == MEAN).sum())
        self.how = {key: count for key, count in how.items() if count}
        return _composition(row, terms, self.shared.rows[self.shared.kept])

    def _matched(
        self, atoms: NDArray[np.float32], ids: Ids, table: DonorTable
    ) -> Iterator[tuple[Ids, NDArray[np.int64], NDArray[np.float64]]]:
        """Ids of tokens whose row in the donor is not zero, the anchors that each is made of, and their coefficients."""
        import torch

        from twinmerge.maths.pursuit import batches, matching_pursuit, nearest

        if not len(atoms) or not len(ids):
            return
        held = torch.from_numpy(atoms).to(self.device)
        shown = progress_meter("matching tokens", self.progress, len(ids))
        with shown:
            for part in batches(len(ids), len(atoms), table.width, self.k if self.method == "omp" else 1):
                values = table.read(ids[part])
                some = values.any(1)
                targets = torch.from_numpy(values[some]).to(self.device)
                if self.method == "omp":
                    index, weight = matching_pursuit(held, targets, self.k)
                else:
                    index = nearest(held, targets)[:, None]
                    weight = torch.ones_like(index, dtype=torch.float64)
                yield ids[part][some], index.cpu().numpy(), weight.cpu().numpy()
                shown.update(len(values))


def _composition(row: NDArray[np.int32], terms: Mapping[int, Term], kept: NDArray[np.int32]) -> Composition:
    listed = sorted(number for number in terms if row[number] == SUM)
    count = np.zeros(len(row), np.int64)
    count[listed] = [len(terms[number][0]) for number in listed]
    index = [terms[number][0] for number in listed]
    weight = [terms[number][1] for number in listed]
    return Composition(
        row,
        np.concatenate([[0], np.cumsum(count)]),
        np.concatenate(index) if index else np.empty(0, np.int32),
        np.concatenate(weight) if weight else np.empty(0),
        kept,
    )
