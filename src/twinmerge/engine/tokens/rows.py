"""Where each model's rows of the output's tokens come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.engine.tokens.order import Held, Order
from twinmerge.errors import ModelError
from twinmerge.recipes.tokenizer import TokenRule

Ids = NDArray[np.int32]

ZEROS, MEAN, PADDING = -1, -2, -3
"""What a row is where it is not one of a model's: zeros, the mean over the inputs that have the token, the mean over
all rows that tokens have."""


@dataclass(frozen=True)
class Rows:
    """The rows of one model in the output's order.

    Attributes:
        source: (size,) the number of a model among all, or ZEROS, MEAN or PADDING.
        row: (size,) its row there.
        token: (size,) whether a token has the row.
        held: (inputs, size) each input's own row of the token, −1 where it has none; for MEAN.
        inputs: (inputs,) the numbers of these models.
    """

    source: Ids
    row: Ids
    token: NDArray[np.bool_]
    held: Ids
    inputs: tuple[int, ...]

    def same_as(self, number: int, rows: int) -> bool:
        """Whether these are all rows of a model, in their order."""
        return len(self.row) == rows and bool((self.source == number).all() and (self.row == np.arange(rows)).all())


@dataclass
class Filling:
    """Fills the rows that models lack, by the rules that the recipe and mergekit have for it.

    A model that has a token gives its own row. Where it has none: the rule of the recipe; the row of the only input
    that has it; zeros where none has it; the base's row, where the base is an input and has it; else the mean over the
    inputs that have it. Rows of no token are the mean over all others, or with `keep_padding` the model's own.

    Args:
        order: the tokens of the output.
        models: label -> tokenizer and rows of every model.
        rules: token -> what the recipe says of it.
        keep_padding: a model's own rows of no token stay.

    Attributes:
        zeros: tokens that no input has, whose rows are zeros.
    """

    order: Order
    models: Mapping[str, Held]
    rules: Mapping[str, TokenRule]
    keep_padding: bool = False
    zeros: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size, ids = self.order.size, self.order.tokens.ids
        self._labels = list(self.models)
        self._tokens = np.fromiter(ids.values(), np.int32, len(ids))
        own: dict[Any, Ids] = {}
        for held in self.models.values():
            key = id(held.tokens.ids), held.rows
            if key not in own:
                found = np.full(size, -1, np.int32)
                get = held.tokens.ids.get
                found[self._tokens] = np.fromiter(map(get, ids, repeat(-1)), np.int32, len(ids))
                own[key] = np.where(found < held.rows, found, -1)
        self._own = {label: own[id(held.tokens.ids), held.rows] for label, held in self.models.items()}
        self._ruled = {token: self._row_of(token, rule) for token, rule in self.rules.items()}

    def rows(self, inputs: Sequence[str], base: str | None) -> dict[str, Rows]:
        """Label -> rows, of every model.

        Args:
            inputs: the labels of those that are merged, whose tokens count.
            base: that of the base, where it is one of them.
        """
        at = {label: number for number, label in enumerate(self._labels)}
        held = np.stack([self._own[label] for label in inputs])
        has = held >= 0
        count, first = has.sum(0), has.argmax(0)
        numbers = np.array([at[label] for label in inputs])
        every = np.arange(held.shape[1])
        only = count == 1
        source = np.where(only, numbers[first], np.where(count == 0, ZEROS, MEAN))
        row = np.where(only, held[first, every], 0)
        if base is not None:
            by_base = (count > 1) & (self._own[base] >= 0)
            source, row = np.where(by_base, at[base], source), np.where(by_base, self._own[base], row)
        token = np.zeros(held.shape[1], bool)
        token[self._tokens] = True
        source[~token] = PADDING
        forced = np.zeros(held.shape[1], bool)
        ids = self.order.tokens.ids
        for name, (model, number) in self._ruled.items():
            source[ids[name]], row[ids[name]] = ZEROS if model is None else at[model], number
            forced[ids[name]] = self.rules[name].force
        ruled = {ids[name] for name in self._ruled}
        by_id = self.order.tokens.by_id
        self.zeros |= {by_id[i]: None for i in np.flatnonzero((count == 0) & token).tolist() if i not in ruled}
        found = {}
        for label, own in self._own.items():
            mine = (own >= 0) & ~forced
            if self.keep_padding:
                kept = self._padding(label) & ~token
                mine, own = mine | kept, np.where(kept, every, own)
            found[label] = Rows(
                np.where(mine, at[label], source), np.where(mine, own, row), token, held, tuple(numbers.tolist())
            )
        return found

    def _padding(self, label: str) -> NDArray[np.bool_]:
        """Rows of a model that no token of its own tokenizer has."""
        held = self.models[label]
        free = np.arange(self.order.size) < held.rows
        taken = np.fromiter(held.tokens.ids.values(), np.int32, len(held.tokens.ids))
        free[taken[taken < self.order.size]] = False
        return free

    def _row_of(self, token: str, rule: TokenRule) -> tuple[str | None, int]:
        """The model of a rule, and the row there.

        Raises:
            ModelError: the model does not have the token.
        """
        if rule.model is None:
            return None, 0
        held = self.models[rule.model]
        wanted = token if rule.token is None else rule.token
        number = held.tokens.ids.get(wanted, -1) if isinstance(wanted, str) else wanted
        if not 0 <= number < held.rows:
            raise ModelError(
                f"The row of the token {token!r} is to be that of {wanted!r} in {rule.model!r}, which has no such row. "
                "Name a token that it has."
            )
        return rule.model, number
