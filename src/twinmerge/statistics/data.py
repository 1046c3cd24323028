"""A data file as batches of one model's inputs, streamed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twinmerge.errors import DataError, ModelError, UsageError
from twinmerge.maths.keyed_random import uniform
from twinmerge.statistics.model import Measured
from twinmerge.tasks.encode import TextEncoder, padded_tokens
from twinmerge.tasks.images import ImageEncoder, ImageFile
from twinmerge.tasks.rows import DataRow, Rows, Tokens

WINDOW = 16  # batches whose rows are sorted by length together, so that little is padded
IGNORED = -100  # a padded place of targets, as transformers has it


class Batch(NamedTuple):
    """inputs: what the module's forward takes; rows: each row's number in the file, which random draws are keyed by;
    mask: (rows, positions) bool, where an input is no padding, None for images; targets: (rows, positions) of an
    encoder-decoder, -100 where padded, None where the data have none. Padding is on the right."""

    inputs: dict[str, Tensor]
    rows: list[int]
    mask: Tensor | None
    targets: Tensor | None

    def to(self, device: str) -> Batch:
        mask, targets = (None if t is None else t.to(device) for t in (self.mask, self.targets))
        return Batch({n: t.to(device) for n, t in self.inputs.items()}, self.rows, mask, targets)

    @property
    def tokens(self) -> int:
        """Positions that are no padding, of targets too; images have none."""
        if self.mask is None:
            return 0
        return int(self.mask.sum()) + (0 if self.targets is None else int((self.targets != IGNORED).sum()))


class Data:
    """Rows of a file in batches; iterating reads the file anew and holds a few batches at a time.

    Args:
        rows: (start, stop) of the file's rows, blank lines not counted; a stop beyond the end is the end.
        limit: at most so many of them, drawn at random: those with the smallest keyed random numbers, so that a
            larger limit only adds rows.
        max_tokens: of a row; None for what tokenizer and model allow. Longer ones are cut, and counted.
        batch: rows at once; changes memory and speed, no result.
        seed: of `limit`.
        targets: every row must have one (encoder-decoders only).

    Attributes:
        about: what a statistics file says of its data.
        examples: how many rows a pass gives.
        max_tokens: the one in force.

    Raises:
        TwinmergeError: as `Rows`; no rows in the range; a model without tokenizer or image processor; targets that
            are missing; an image that cannot be read.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        model: Measured,
        *,
        rows: tuple[int, int] | None = None,
        limit: int | None = None,
        max_tokens: int | None = None,
        batch: int = 8,
        seed: int = 0,
        targets: bool = False,
    ) -> None:
        for name, value in (("limit", limit), ("max_tokens", max_tokens), ("batch", batch)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}. Give 1 or more.")
        self.model, self.batch, self._needs_targets = model, batch, targets
        self.rows = Rows(Path(file), model.vocabulary)
        self.field = self.rows.field
        if (model.vocabulary is None) != (self.field == "image"):
            raise DataError(
                f"{file} has rows of {self.field!r}, which {type(model.module).__name__} does not read. Give it "
                f"{'images' if model.vocabulary is None else 'texts'}."
            )
        start, stop = (0, self.rows.count) if rows is None else (rows[0], min(rows[1], self.rows.count))
        if not 0 <= start < stop:
            raise UsageError(
                f"There are no rows {start}:{rows[1] if rows else stop} in {file}: it has {self.rows.count}, counted "
                "from 0. Choose others."
            )
        self._range = start, stop
        self._chosen = _chosen(start, stop, limit, seed)
        self.examples = int(self._chosen.sum())
        self.about: dict[str, Any] = {"file": Path(file).name, "sha256": self.rows.sha256, "rows": [start, stop]}
        if self.examples < stop - start:
            self.about |= {"limit": limit, "seed": seed}
        self._encoder = self._open_encoder(max_tokens) if self.field == "text" else None
        self._processor = _open_images(model) if self.field == "image" else None
        self.max_tokens = self._encoder.max_tokens if self._encoder else None
        if self.field == "input_ids":
            self.max_tokens = min((n for n in (max_tokens, model.positions) if n), default=None)
        self._cut = self._seen = 0

    def __iter__(self) -> Iterator[Batch]:
        start, stop = self._range
        rows = (row for row in self.rows.between(start, stop) if self._chosen[row.number - start])
        images = self.field == "image"
        while window := list(islice(rows, self.batch if images else self.batch * WINDOW)):
            yield from [self._images(window)] if images else self._texts(window)

    def warn_truncated(self) -> None:
        """Warn once if texts were cut."""
        cut, seen = self._cut, self._seen
        if self._encoder is not None:
            cut, seen = cut + self._encoder.truncated, seen + self._encoder.seen
        if cut:
            warnings.warn(
                f"{cut} of {seen} texts were longer than the {self.max_tokens} tokens that the model takes and were "
                "cut.",
                stacklevel=2,
            )

    def _texts(self, window: Sequence[DataRow]) -> Iterator[Batch]:
        """Batches of rows of similar length."""
        inputs, lengths = self._encoded(window)
        targets = self._targets(window)
        order = sorted(range(len(window)), key=lambda i: -lengths[i])
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            longest = max(lengths[i] for i in some)
            own = {n: t[some, :longest] for n, t in inputs.items()}
            mask = own["attention_mask"].bool()
            answers = None
            if self.model.kind == "seq2seq":
                answers = None if targets is None else _padded([targets[i] for i in some], longest)
                own["decoder_input_ids"] = self.model.decoder_inputs(answers, len(some))
            own = {n: t for n, t in own.items() if n in self.model.takes}
            yield Batch(own, [window[i].number for i in some], mask, answers)

    def _encoded(self, window: Sequence[DataRow]) -> tuple[dict[str, Tensor], list[int]]:
        """(rows, longest) tensors, and how many positions each row has."""
        if self._encoder is not None:
            found = self._encoder.encode([row.input for row in window])
            return found, found["attention_mask"].sum(1).tolist()
        rows = [row.input for row in window if isinstance(row.input, Tokens)]
        lengths = [len(row.ids[: self.max_tokens]) for row in rows]
        self._seen += len(rows)
        self._cut += sum(len(row.ids) > length for row, length in zip(rows, lengths, strict=True))
        return padded_tokens(rows, self.max_tokens), lengths

    def _targets(self, window: Sequence[DataRow]) -> list[list[int]] | None:
        """Token ids of each row's target; None where the rows have none, or the model is no encoder-decoder."""
        given = [row.target for row in window]
        some = [text for text in given if text is not None]
        if self.model.kind != "seq2seq" or not (some or self._needs_targets):
            return None
        if len(some) < len(given):
            without = window[given.index(None)]
            raise DataError(f"{without.where} has no field 'target', which {self._class} is to predict. Add it.")
        encoder = self._encoder or self._open_encoder(self.max_tokens)
        options: dict[str, Any] = {"padding": False, "verbose": False}
        found: list[list[int]] = encoder.tokenizer(text_target=some, **options)["input_ids"]
        self._seen += len(found)
        for i, ids in enumerate(found):
            if encoder.max_tokens is not None and len(ids) > encoder.max_tokens:
                self._cut += 1
                cut = encoder.tokenizer(text_target=some[i], truncation=True, max_length=encoder.max_tokens, **options)
                found[i] = cut["input_ids"]
            if not ids:
                raise DataError(f"{window[i].where}: field 'target' has no token. Give some text.")
        return found

    @property
    def _class(self) -> str:
        return type(self.model.module).__name__

    def _images(self, window: Sequence[DataRow]) -> Batch:
        assert self._processor is not None
        rows = [row.input for row in window if isinstance(row.input, ImageFile)]
        found = self._processor.encode(rows)
        inputs = {n: t for n, t in found.items() if n in self.model.takes}
        return Batch(inputs, [row.number for row in window], None, None)

    def _open_encoder(self, max_tokens: int | None) -> TextEncoder:
        if self.model.folder is None:
            raise ModelError(
                f"{self.model.name} is in memory and has no tokenizer. Save it with its tokenizer and name the folder, "
                "or give rows of input_ids."
            )
        encoder = TextEncoder(self.model.folder, max_tokens, self.model.positions)
        encoder.tokenizer.padding_side = "right"
        if "attention_mask" not in encoder.tokenizer.model_input_names:
            encoder.tokenizer.model_input_names = [*encoder.tokenizer.model_input_names, "attention_mask"]
        return encoder


def _chosen(start: int, stop: int, limit: int | None, seed: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(stop - start) which rows are taken."""
    if limit is None or limit >= stop - start:
        return np.ones(stop - start, np.bool_)
    chosen = np.zeros(stop - start, np.bool_)
    keys = uniform(seed, "measure", "limit", start, stop - start).numpy()
    chosen[np.argsort(keys, kind="stable")[:limit]] = True
    return chosen


def _padded(lists: Sequence[Sequence[int]], other: int) -> Tensor:
    """(rows, positions), of another length than the input's: so a tensor's shape tells whose positions it has."""
    longest = max(map(len, lists))
    out = torch.full((len(lists), longest + (longest == other)), IGNORED)
    for row, ids in zip(out, lists, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return out


def _open_images(model: Measured) -> ImageEncoder:
    if model.folder is None:
        raise ModelError(
            f"{model.name} is in memory and has no image processor. Save it with its image processor and name the "
            "folder."
        )
    return ImageEncoder(model.folder)
