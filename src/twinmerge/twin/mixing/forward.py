"""What every module that adds rows' parts shares: the mixture of the pass, the rows of an activation, the biases of
each row."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twinmerge.errors import TwinmergeError, UsageError
from twinmerge.twin.mixing.arguments import alike, arguments, hiding, named, rows_of_value, tensors_of, together
from twinmerge.twin.mixing.converted import Converted
from twinmerge.twin.mixing.glance import Glance
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.parts import Dense, Part


class Layout(NamedTuple):
    """How the leading axis of an input follows from the rows of the batch.

    times: how many entries each row has, side by side; None where lengths decide it, empty where the input is one for
    all. shared: it may come once for all rows (a leading axis of 1, or ids without an axis of rows) and is spread
    over them.
    """

    times: frozenset[int] | None = frozenset({1})
    shared: bool = False


class UnseenError(Exception):
    """A module that no look at the model has seen called (see `twin/mixing/layout.py`)."""


class State:
    """What the modules see.

    mixture: of the pass under way; biases: the one for biases where it differs; copies: how many entries a row may
    stand for side by side (the beams of a generation); entries: of the modules above that were watched, the length of
    the leading axis; layouts: (path, argument) -> its layout, None before a look; spread: path -> axes between rows
    and a vector, of modules whose free parameters can have an axis of rows; glance: a look that is under way;
    refused: path -> why it cannot mix row by row.
    """

    def __init__(self) -> None:
        self.mixture: Mixture | None = None
        self.biases: Mixture | None = None
        self.copies: frozenset[int] = frozenset({1})
        self.entries: dict[str, int] = {}
        self.layouts: dict[tuple[str, str], Layout] | None = None
        self.spread: dict[str, int] = {}
        self.glance: Glance | None = None

    @property
    def work(self) -> Mixture | None:
        """The mixture where it has any work."""
        return self.mixture if self.mixture is not None and self.mixture.blocks else None

    def layout(self, path: str, argument: str = "") -> Layout:
        if self.layouts is None:
            return Layout()
        if (found := self.layouts.get((path, argument))) is None:
            raise UnseenError(path)
        return found

    @contextmanager
    def only(self, mixture: Mixture | None, biases: Mixture | None = None) -> Iterator[None]:
        """Within the context the modules see another mixture, and no look."""
        before = self.mixture, self.biases, self.glance
        self.mixture, self.biases, self.glance = mixture, biases, None
        try:
            yield
        finally:
            self.mixture, self.biases, self.glance = before


class Seen:
    """What adds rows' parts at one place of the model."""

    parts: dict[tuple[nn.Module, str], Part | Converted]

    def __init__(self, state: State, path: str, module: nn.Module) -> None:
        self.state, self.path = state, path
        self.module: Any = module
        self.parts = {}

    def times(self, mixture: Mixture, leading: int, argument: str = "") -> int:
        """How many entries of the leading axis belong to one row, side by side."""
        each, rest = divmod(leading, mixture.rows)
        times = self.state.layout(self.path, argument).times
        if rest or (times is not None and each not in {t * copies for t in times for copies in self.state.copies}):
            raise UsageError(
                f"The module {self.path!r} sees {leading} entries for {mixture.rows} rows, which do not follow the "
                "rows as they "
                'did when it was looked at. Give one mixture for the whole batch, or say strategy="rebuild".'
            )
        return each

    def copies(self, mixture: Mixture) -> int:
        """How many entries of an activation each row has just now, by what the module above was given."""
        leading = self.state.entries.get(self.path.rpartition(".")[0], mixture.rows)
        return leading // mixture.rows

    def dense(self, part: Dense, mixture: Mixture, leading: int) -> Tensor:
        """Σ wt dt for each entry of the activation's leading axis, or one for all."""
        mixed = mixture.dense(part.stack)
        times = 1 if mixture.uniform else self.times(mixture, leading)
        return mixed.repeat_interleave(times, 0) if times > 1 and len(mixed) > 1 else mixed


class Forward(Seen, ABC):
    """The forward of a module whose parameters experts change."""

    weight: Any
    bias: Dense | None
    lookup = False

    def __init__(
        self, state: State, path: str, module: nn.Module, weight: Part | None, bias: Dense | None = None
    ) -> None:
        super().__init__(state, path, module)
        self.weight, self.bias = weight, bias
        self.parts = {(module, a): p for a, p in (("weight", weight), ("bias", bias)) if p is not None}
        self.own = type(module).forward
        module.forward = self

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward: transformers' generate looks at it."""
        return inspect.signature(self.own.__get__(self.module))

    def detach(self) -> None:
        """Give the module its own forward back."""
        self.module.__dict__.pop("forward", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.glance is not None:
            return self.glanced(self.state.glance, args, kwargs)
        if (mixture := self.state.work) is None:
            return self.own(self.module, *args, **kwargs)
        tensors = dict(named(args, kwargs))
        if len(tensors) == 1 and all(v is None or isinstance(v, Tensor) for v in (*args, *kwargs.values())):
            x = next(iter(tensors.values()))
            return self.mixed(x if mixture.uniform else self.laid_out(x, mixture), mixture)
        return self.apart(args, kwargs, mixture)

    @abstractmethod
    def mixed(self, x: Tensor, mixture: Mixture) -> Any:
        """The answer under a mixture that has work."""

    def laid_out(self, x: Tensor, mixture: Mixture) -> Tensor:
        """An input that all rows share, once for each of them; any other as it is."""
        if not (self.state.layout(self.path).shared and self.is_shared(x)):
            return x
        x = x[None] if self.lookup and x.dim() == 1 else x
        return x.expand(mixture.rows * self.copies(mixture), *x.shape[1:])

    def is_shared(self, x: Tensor) -> bool:
        return len(x) == 1 or (self.lookup and x.dim() == 1)

    def shift(self, y: Tensor, mixture: Mixture) -> Tensor:
        """w · db, of the biases' own mixture where there is one."""
        assert self.bias is not None
        return self.dense(self.bias, self.state.biases or mixture, len(y)).to(y)

    # ------------------------------------------------------------------ any module at all

    def apart(self, args: Sequence[Any], kwargs: Mapping[str, Any], mixture: Mixture) -> Any:
        """The module with the dense weights of each mixture, for the rows that have it: exact whatever it computes,
        as long as rows do not meet in it."""
        biases = self.state.biases
        if mixture.uniform and (biases is None or biases.uniform):
            return self.with_weights(args, kwargs, mixture.weights[0], None if biases is None else biases.weights[0])
        given = {name: self._cut(name, value, mixture) for name, value in arguments(args, kwargs)}
        both = (
            mixture.weights if biases is None else torch.cat([mixture.weights, biases.weights.to(mixture.weights)], 1)
        )
        found = []
        for rows, _ in Mixture.of(both.expand(mixture.rows, -1), grouped=False, reorder=False).stretches:
            own = {name: rows_of_value(value, rows, times) for name, (value, times) in given.items()}
            other = None if biases is None else biases.weights[rows.start]
            found.append(
                self.with_weights(
                    [own[str(i)] for i in range(len(args))],
                    {k: own[k] for k in kwargs},
                    mixture.weights[rows.start],
                    other,
                )
            )
        return together(found)

    def _cut(self, name: str, value: Any, mixture: Mixture) -> tuple[Any, dict[str, int | None]]:
        """An argument, and how many entries of a row each of its tensors has; None where it is one for all."""
        times: dict[str, int | None] = {}
        for inner, tensor in tensors_of(name, value, self.path):
            layout = self.state.layout(self.path, inner)
            fixed = layout.times is not None and not layout.times
            times[inner] = (
                None if fixed or (layout.shared and len(tensor) == 1) else self.times(mixture, len(tensor), inner)
            )
        return value, times

    def with_weights(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Tensor, biases: Tensor | None = None
    ) -> Any:
        """The module's own answer with the dense weights of one mixture, weights (experts,); what lies within mixes
        it too."""
        one = Mixture.of(weights[None])
        values = {
            (m, a): part.mixed(
                getattr(m, a), weights if biases is None or not isinstance(part, Dense) or a != "bias" else biases
            )
            for (m, a), part in self.parts.items()
        }
        other = None if biases is None else Mixture.of(biases[None])
        with self.state.only(one, other), hiding(values):
            return self.own(self.module, *args, **kwargs)

    # ------------------------------------------------------------------ looked at

    def glanced(self, glance: Glance, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The module's own answer while a look is under way (see `twin/mixing/layout.py`)."""
        glance.called.add(self.path)
        tensors = dict(named(args, kwargs))
        with hiding({(m, a): glance.original(m, a) for m, a in self.parts}):
            plain = len(tensors) == 1 and all(v is None or isinstance(v, Tensor) for v in (*args, *kwargs.values()))
            if not plain:
                return self.glanced_apart(glance, args, kwargs)
            x = next(iter(tensors.values()))
            glance.see(self.path, "", x)
            y = self.own(self.module, *args, **kwargs)
            if self.path in glance.spread and self.is_shared(x):
                y = glance.spread_over(y[None] if self.lookup and x.dim() == 1 else y)
            return y

    def glanced_apart(self, glance: Glance, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The same, of a module that answers its rows apart: where the look is for the rows, that is tried."""
        known = True
        for name, value in arguments(args, kwargs):
            try:
                for inner, tensor in tensors_of(name, value, self.path):
                    glance.see(self.path, inner, tensor)
            except TwinmergeError as error:
                glance.wrong.setdefault(self.path, str(error))
                known = False
        whole = self.own(self.module, *args, **kwargs)
        if known and glance.row is not None and self.path not in glance.spread:
            found = []
            with self.state.only(None):
                expected = self.own(self.module, *args, **kwargs)
                for row in range(glance.rows):
                    own = {
                        name: rows_of_value(value, slice(row, row + 1), glance.times_of(self.path, name, value))
                        for name, value in arguments(args, kwargs)
                    }
                    try:
                        one = self.own(
                            self.module, *[own[str(i)] for i in range(len(args))], **{k: own[k] for k in kwargs}
                        )
                    except Exception:  # its rows cannot be told apart
                        one = None
                    found.append(one)
            if any(one is None for one in found) or not alike(together(found), expected):
                glance.wrong.setdefault(self.path, "")
        return whole


class Apart(Forward):
    """A module that has no closed form here: each mixture's rows run through it with their own weights. Free
    parameters that have an axis of rows to spare, or none at all, take one instead, where a look found that this
    computes the same.

    Args:
        parts: (module, attribute) -> the experts' part, of this module or of those within whose parameters it reads.
    """

    def __init__(
        self, state: State, path: str, module: nn.Module, parts: Mapping[tuple[nn.Module, str], Part | Converted]
    ) -> None:
        super().__init__(state, path, module, None)
        self.parts = dict(parts)

    def mixed(self, x: Tensor, mixture: Mixture) -> Any:
        return self.apart([x], {}, mixture)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.glance is not None:
            return self.glanced(self.state.glance, args, kwargs)
        if (mixture := self.state.work) is None:
            return self.own(self.module, *args, **kwargs)
        if not mixture.uniform and (axes := self.state.spread.get(self.path)) is not None:
            entries = self._entries(args, kwargs, mixture)
            with hiding({at: self._of_rows(at, mixture, entries, axes) for at in self.parts}):
                return self.own(self.module, *args, **kwargs)
        return self.apart(args, kwargs, mixture)

    def glanced(self, glance: Glance, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        glance.called.add(self.path)
        values = {(m, a): glance.original(m, a) for m, a in self.parts}
        if (axes := glance.spread.get(self.path)) is not None:
            values = {at: glance.spread_over(with_rows(value, axes)) for at, value in values.items()}
        with hiding(values):
            return self.glanced_apart(glance, args, kwargs)

    @property
    def spreads(self) -> bool:
        """Whether an axis of rows may be tried."""
        own = all(isinstance(p, Dense) for p in self.parts.values())
        return own and all(
            v.dim() == 1 or (v.dim() > 1 and len(v) == 1) for v in (getattr(m, a) for m, a in self.parts)
        )

    def _entries(self, args: Sequence[Any], kwargs: Mapping[str, Any], mixture: Mixture) -> int:
        for _, value in named(args, kwargs):
            each, rest = divmod(len(value), mixture.rows)
            if not rest and each in self.state.copies:
                return len(value)
        return mixture.rows

    def _of_rows(self, at: tuple[nn.Module, str], mixture: Mixture, entries: int, axes: int) -> Tensor:
        module, attribute = at
        part, own = self.parts[at], getattr(module, attribute)
        assert isinstance(part, Dense)
        used = (self.state.biases or mixture) if attribute == "bias" else mixture
        delta = used.dense(part.stack).expand(mixture.rows, *part.stack.shape[1:])
        delta = delta.repeat_interleave(entries // mixture.rows, 0) if entries > mixture.rows else delta
        delta = delta.reshape(len(delta), *[1] * axes, -1) if own.dim() == 1 else delta[:, 0]
        found: Tensor = own + delta
        return found


def with_rows(value: Tensor, axes: int) -> Tensor:
    """A free parameter with a leading axis of 1."""
    return value.reshape(1, *[1] * axes, -1) if value.dim() == 1 else value
