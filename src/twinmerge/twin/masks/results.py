"""What is said of masks that were written, of thresholds that were chosen, and of an expert that was written out
again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.methods.kit.masks import Form, Marks, storage_bits
from twinmerge.results import Table, Written, bytes_of, plain


class Chosen(NamedTuple):
    """Thresholds that were chosen on validation rows.

    Attributes:
        thresholds: task -> λt.
        scores: task -> threshold -> its score, a fraction.
        split: where the rows are from.
        rows: how many there were.
    """

    thresholds: dict[str, float]
    scores: dict[str, dict[float, float]]
    split: str
    rows: int


class _BuiltMasks(NamedTuple):
    folder: Path
    experts: list[str]
    thresholds: list[float]
    scales: list[float]
    marks: Marks
    trained: int
    frozen: int
    number_bits: int
    chosen: Chosen | None = None


class BuiltMasks(Table, _BuiltMasks):
    """What `build_masks` wrote. As a table: a row for each expert.

    Attributes:
        folder: that was written.
        experts: as named.
        thresholds: λt of each expert; empty for EMR.
        scales: st of each expert.
        marks: how many weights how many tasks marked.
        trained: weights that have a mask.
        frozen: the others.
        number_bits: of a weight.
        chosen: how the thresholds were chosen; None where they were given.
    """

    def formula(self, form: Form) -> float:
        """Bytes by the paper's formula, which counts no heads."""
        return storage_bits(self.trained, self.frozen, len(self.experts), form, self.number_bits) / 8

    def record(self) -> dict[str, Any]:
        """What the provenance says of it, as plain data."""
        return {
            "thresholds": dict(zip(self.experts, self.thresholds, strict=False)),
            "scales": dict(zip(self.experts, self.scales, strict=True)),
            "trained_weights": self.trained,
            "frozen_weights": self.frozen,
            "weights_counted": self.marks.moved,
            "marked_by": list(self.marks.by_count),
            "shares": self.marks.shares(),
            "densities": dict(zip(self.experts, self.marks.densities(), strict=True)),
            "formula_bytes": {form: self.formula(form) for form in ("merged", "fine_tuned", "masks")},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge masks build --json` prints."""
        scores = self.chosen and {t: {f"{c:g}": s for c, s in by.items()} for t, by in self.chosen.scores.items()}
        where = {"output": os.fspath(self.folder), "bytes": bytes_of(self.folder)}
        return {**where, **plain(self.record()), "scores": plain(scores)}

    def _summary(self) -> str:
        return f"{len(self.experts)} experts, {self.trained} weights, in {self.folder}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        thresholds: Sequence[float | None] = self.thresholds or [None] * len(self.experts)
        rows = zip(self.experts, thresholds, self.scales, self.marks.densities(), strict=True)
        return ("expert", "threshold", "scale", "density"), list(rows)


class _ExtractedExpert(NamedTuple):
    folder: Path
    task: str


class ExtractedExpert(Written, _ExtractedExpert):
    """What `extract_masked` wrote; a path itself, for whoever opens it.

    Attributes:
        folder: that was written.
        task: the expert.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge masks extract --json` prints."""
        return {"output": os.fspath(self.folder), "bytes": bytes_of(self.folder)}
