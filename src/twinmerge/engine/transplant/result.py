"""What a transplant gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.results import Result, bytes_of


class _Transplanted(NamedTuple):
    folder: Path | None
    method: str
    tokens: int
    rows: int
    shared: int
    overlap: float
    special: dict[str, str]
    made: dict[str, dict[str, int]]
    memory: int


class Transplanted(Result, _Transplanted):
    """What `transplant` made.

    Attributes:
        folder: of the model; None where nothing was to be written.
        method: how the rows of new tokens are made.
        tokens: of the new vocabulary.
        rows: of its tables.
        shared: tokens that the model had too, whose rows stay as they are.
        overlap: their share of the tokens.
        special: token of the donor -> the model's token that did the same work, whose row it has.
        made: table -> how the rows of its new tokens were made -> how many: "omp", "nearest", "subtokens", or "mean",
            that of all shared tokens. Empty where nothing was to be written.
        memory: bytes of the donor's rows that are held for "omp" and "nearest".
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge transplant --json` prints."""
        found = super().to_dict()
        size = None if self.folder is None else bytes_of(self.folder)
        return {"output": found.pop("folder"), "bytes": size, **found}

    def _summary(self) -> str:
        where = "not written" if self.folder is None else f"in {self.folder}"
        return f"{self.shared} of {self.tokens} tokens shared, {self.method}, {where}"
