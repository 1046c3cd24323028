"""The tokens of a tokenizer, and what else lies beside a model's weights, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple


class Added(NamedTuple):
    """How a token is treated that is cut out of a text before the model of the tokenizer sees it, as
    `tokenizers.AddedToken` says it. Plain ones have nothing said of them."""

    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


PLAIN = Added()


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one tokenizer.

    Attributes:
        folder: where its files are.
        write: gives its tokenizer.json.
        kind: of its model: BPE, Unigram, WordPiece, WordLevel.
        size: how many tokens that model has.
        ids: token -> id, of all of them.
        added: token -> settings, of those that were added, in the order of their ids.
        read: the files that were read.
        fits: loading gives every token the id that is stated.
        made: the text is not that of a file in the folder.
    """

    folder: Path
    write: Callable[[], bytes]
    kind: str
    size: int
    ids: Mapping[str, int]
    added: Mapping[str, Added]
    read: tuple[Path, ...]
    fits: bool = True
    made: bool = False

    @cached_property
    def text(self) -> bytes:
        """Its tokenizer.json."""
        return self.write()

    @cached_property
    def by_id(self) -> dict[int, str]:
        """Id -> token."""
        return {number: token for token, number in self.ids.items()}

    @property
    def next_id(self) -> int:
        """The id that loading gives a token that is added at the end."""
        top = max((self.ids[token] for token in self.added), default=-1)
        return max(self.size, top + 1)


@dataclass(frozen=True)
class Sides:
    """What lies beside a model's weights, where that is not all as in its folder.

    Attributes:
        tokens: its tokenizer, None for the folder's.
        settings: the folder whose tokenizer settings, with special tokens and template, it has; None for that of the
            tokenizer.
        template: of chats, None for that of the settings.
        generation: what generation_config.json says, None for what the folder's says.
    """

    tokens: Tokens | None = None
    settings: Path | None = None
    template: str | None = None
    generation: Mapping[str, Any] | None = None
