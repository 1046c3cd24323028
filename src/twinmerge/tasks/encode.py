"""Texts to tensors: one tokenizer, one maximum, padded to the longest of the batch, and an honest count of cuts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from twinmerge.arguments import at_least_one, fits, shown
from twinmerge.errors import ModelError, UsageError
from twinmerge.maths.keyed_random import uniform
from twinmerge.store.foreign import check_settings, reason
from twinmerge.tasks.images import ImageFile, Picture
from twinmerge.tasks.rows import Tokens
from twinmerge.tasks.suite import Row

Input: TypeAlias = str | tuple[str, str] | Row | Tokens | ImageFile
"""A text, a pair of texts, a row of a task, token ids, or an image."""

AnyInput = TypeVar("AnyInput", bound=Input)

UNSTATED = 1_000_000  # a tokenizer without a maximum states some huge number
VOCABULARIES = ("tokenizer.json", "*.model", "*.model.v*", "vocab.*", "*.tiktoken", "tekken.json")


class TextEncoder:
    """A tokenizer with a maximum.

    Args:
        tokenizer: a tokenizer, or the folder of one.
        max_tokens: of a row, special tokens included; None: the smaller of what the tokenizer states and `positions`;
            nothing is cut where neither says.
        positions: how many tokens the model takes, where it has position embeddings
            (`config.max_position_embeddings`; RoBERTa's less its offset of 2).

    Raises:
        TwinmergeError: no tokenizer there, a maximum that the model or the special tokens do not allow, neither pad
            nor end token.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "fine": 3, "film": 4}, "[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        >>> encoder = TextEncoder(tokenizer, max_tokens=3)
        >>> encoder.encode(["a fine fine film", "film"])["input_ids"]
        tensor([[2, 3, 3],
                [4, 0, 0]])
        >>> encoder.truncated, encoder.seen
        (1, 2)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
        max_tokens: int | None = None,
        positions: int | None = None,
    ) -> None:
        self.tokenizer: Any = open_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
        special = int(self.tokenizer.num_special_tokens_to_add(pair=True))
        if max_tokens is not None and max_tokens <= special:
            raise UsageError(
                f"max_tokens is {max_tokens}, but the special tokens of a pair take {special}. Give {special + 1} or "
                "more."
            )
        if max_tokens is not None and positions is not None and max_tokens > positions:
            raise UsageError(f"max_tokens is {max_tokens}, but the model takes {positions}. Give {positions} or less.")
        stated = [n for n in (self.tokenizer.model_max_length, positions) if n is not None and special < n < UNSTATED]
        self.max_tokens: int | None = max_tokens if max_tokens is not None else min(stated, default=None)
        pad = self.tokenizer.pad_token_id
        self._pad = pad if pad is not None else self.tokenizer.eos_token_id  # the tokenizer itself stays as it is
        if self._pad is None:
            raise ModelError("The tokenizer has neither a pad token nor an end token. Set its pad_token.")
        self._truncated = self._seen = 0

    @property
    def truncated(self) -> int:
        """Rows that were cut since the start, or since the last `warn_truncated`."""
        return self._truncated

    @property
    def seen(self) -> int:
        """Rows that were encoded since the start, or since the last `warn_truncated`."""
        return self._seen

    def encode(self, rows: Sequence[Input]) -> dict[str, Tensor]:
        """Encode one batch; rows with and without a second text may stand side by side.

        Args:
            rows: texts, pairs of texts or rows, or token ids for all; at least one.

        Returns:
            What the model takes, by name (`input_ids`, `attention_mask`, ...): (rows, longest) int64, padded on the
            tokenizer's own side. A row is cut from the end of its longer text. A text without any token becomes one
            end (or pad) token.

        Raises:
            TwinmergeError: a single string in place of a list, no rows, or a row that is neither a text nor a pair of
                texts.
        """
        if isinstance(rows, (str, Mapping)) or not fits(rows, Sequence[Any]) or not len(rows):
            raise UsageError("Give a list of at least one text to encode.")
        if (tokens := all_tokens(rows)) is not None:
            self._seen += len(rows)
            self._truncated += sum(self.max_tokens is not None and len(row.ids) > self.max_tokens for row in tokens)
            return padded_tokens(tokens, self.max_tokens, self._pad, self.tokenizer.padding_side)
        pairs = [_texts(row) for row in rows]
        columns: dict[str, list[list[int]]] = {}
        for paired in (False, True):
            at = [i for i, (_, second) in enumerate(pairs) if (second is not None) == paired]
            if at:
                found = self._tokenise([pairs[i][0] for i in at], [pairs[i][1] for i in at] if paired else None)
                for name, lists in found.items():
                    column = columns.setdefault(name, [[] for _ in rows])
                    for i, ids in zip(at, lists, strict=True):
                        column[i] = ids
        self._seen += len(rows)
        fill = {"input_ids": self._pad, "token_type_ids": self.tokenizer.pad_token_type_id, "attention_mask": 0}
        return {name: self._padded(lists, fill.get(name, 0)) for name, lists in columns.items()}

    def warn_truncated(self) -> None:
        """Warn once, at the end of a run, if rows were cut; then count anew.

        The warning: "N of M texts were longer than the K tokens that the model takes and were cut."
        """
        if self._truncated:
            warnings.warn(
                f"{self._truncated} of {self._seen} texts were longer than the {self.max_tokens} tokens that the model "
                "takes and were cut.",
                stacklevel=2,
            )
        self._truncated = self._seen = 0

    def _tokenise(self, first: list[str], second: list[str | None] | None) -> dict[str, list[list[int]]]:
        """(rows) lists of ids by name, none longer than the maximum."""

        def lists(at: Sequence[int], **options: Any) -> dict[str, list[list[int]]]:
            pair = None if second is None else [second[i] for i in at]
            found = self.tokenizer([first[i] for i in at], pair, padding=False, verbose=False, **options)
            return {name: list(found[name]) for name in self.tokenizer.model_input_names if name in found}

        out = lists(range(len(first)), truncation=False)
        if self.max_tokens is not None:
            long = [i for i, ids in enumerate(out["input_ids"]) if len(ids) > self.max_tokens]
            self._truncated += len(long)
            if long:
                for name, cut in lists(long, truncation=True, max_length=self.max_tokens).items():
                    for i, ids in zip(long, cut, strict=True):
                        out[name][i] = ids
        for i, ids in enumerate(out["input_ids"]):
            if not ids:
                end = self.tokenizer.eos_token_id
                one = {"input_ids": self._pad if end is None else end, "attention_mask": 1}
                for name in out:
                    out[name][i] = [one.get(name, 0)]
        return out

    def _padded(self, lists: list[list[int]], fill: int) -> Tensor:
        longest = max(map(len, lists))
        out = torch.full((len(lists), longest), fill, dtype=torch.int64)
        for row, ids in zip(out, lists, strict=True):
            place = row[longest - len(ids) :] if self.tokenizer.padding_side == "left" else row[: len(ids)]
            place.copy_(torch.tensor(ids, dtype=torch.int64))
        return out


def batches(
    rows: Sequence[AnyInput], size: int, order: Literal["file", "length", "shuffled"] = "length", seed: int = 0
) -> Iterator[tuple[list[int], list[AnyInput]]]:
    """Cut rows into batches.

    Args:
        rows: of one task, or of many.
        size: rows in a batch; the last one may be smaller.
        order: "file": as they are; "length": longest first (characters; ties by index), so that little is padded and
            memory is short at once or never; "shuffled": by keyed random numbers, so that tasks mix in a batch.
        seed: of "shuffled".

    Yields:
        The indices into `rows`, and those rows; every row once.

    Raises:
        TwinmergeError: a size below one, an unknown order.

    Example:
        >>> list(batches(["a", "bbb", "cc"], size=2))
        [([1, 2], ['bbb', 'cc']), ([0], ['a'])]
    """
    at_least_one("The batch size", size)
    if order == "file":
        places = list(range(len(rows)))
    elif order == "length":
        places = sorted(range(len(rows)), key=lambda i: -_length(rows[i]))
    elif order == "shuffled":
        places = torch.sort(uniform(seed, "batches", "order", 0, len(rows)), stable=True).indices.tolist()
    else:
        raise UsageError(f"The order is {order!r}: give file, length or shuffled.")
    return ((at, [rows[i] for i in at]) for start in range(0, len(rows), size) if (at := places[start : start + size]))


def all_tokens(rows: Sequence[Input]) -> list[Tokens] | None:
    """The rows where they are token ids; None where they are texts.

    Raises:
        TwinmergeError: some are the one, some the other.
    """
    found = [row for row in rows if isinstance(row, Tokens)]
    if found and len(found) < len(rows):
        raise UsageError("Some inputs are token ids, and some are texts. Give all as token ids, or all as texts.")
    return found or None


def padded_tokens(
    rows: Sequence[Tokens], most: int | None = None, pad: int = 0, side: str = "right"
) -> dict[str, Tensor]:
    """Token ids as a batch.

    Args:
        rows: at least one.
        most: tokens that the model takes; longer rows are cut at their end.
        pad: the id that fills.
        side: where it fills, "left" or "right".

    Returns:
        `input_ids` and `attention_mask`, (rows, longest) int64.

    Raises:
        TwinmergeError: a row without ids, numbers that are none.

    Example:
        >>> padded_tokens([Tokens([5, 6, 7]), Tokens([8])], most=2)["input_ids"].tolist()
        [[5, 6], [8, 0]]
    """
    for row in rows:
        if not len(row.ids) or any(type(i) is not int or i < 0 for i in row.ids):
            raise UsageError(f"{list(row.ids)!r:.80} are no token ids. Give at least one whole number from 0 on.")
        if row.attended is not None and len(row.attended) != len(row.ids):
            raise UsageError(
                f"{len(row.ids)} token ids have {len(row.attended)} marks of attention. Give one for each."
            )
    longest = max(len(row.ids[:most]) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own, attended in zip(rows, ids, mask, strict=True):
        count = len(row.ids[:most])
        place = slice(longest - count, longest) if side == "left" else slice(0, count)
        own[place] = torch.tensor(list(row.ids[:most]), dtype=torch.int64)
        attended[place] = torch.tensor(list((row.attended or [1] * count)[:count]), dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask}


def _length(row: Input) -> int:
    """For the order of rows; 1 of an image in any form."""
    if isinstance(row, (ImageFile, Picture)) or not isinstance(row, (str, tuple, list)):
        return 1
    return len(row.ids) if isinstance(row, Tokens) else sum(len(text or "") for text in _texts(row))


def _texts(row: str | tuple[str, str] | Row | Any) -> tuple[str, str | None]:
    """The text of a row, and its second one.

    Raises:
        UsageError: neither a text nor a pair of texts nor a row of a suite.
    """
    if isinstance(row, str):
        return row, None
    pair: Any = row[:2] if isinstance(row, Row) else row  # a row's third is its label
    if (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], str | None)
    ):
        return pair[0], pair[1]
    raise UsageError(f"{shown(row)} is no text to read. Give a text, a pair (text, text_pair) or a row of a suite.")


def open_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    path = Path(os.path.expanduser(folder))
    advice = "Copy the tokenizer's files from the base model into it, or name a folder that has them."
    if not os.path.isdir(path):
        raise ModelError(f"No tokenizer at {os.fspath(folder)!r}: it is no folder. Check the path.")
    check_settings(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError and others for files that are not right
        raise ModelError(f"{path} has no tokenizer that can be read ({reason(error)}). {advice}") from error
    # Without a vocabulary file transformers makes a tokenizer that knows no word, and says nothing.
    wanted = {*tokenizer.vocab_files_names.values()}
    if wanted and not any(any(path.glob(pattern)) for pattern in {*wanted, *VOCABULARIES}):
        raise ModelError(f"{path} has no tokenizer: {' or '.join(sorted(wanted))} is missing. {advice}")
    return tokenizer
