"""What every module that adds rows' parts shares: the mixture of the pass, the rows of an activation, the biases of each row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import TwinmergeError
from twinmerge.twin.mixture import Mixture
from twinmerge.twin.parts import Dense, Part


class State:
    """What the modules see: the mixture of the pass under way, the one for biases where it differs, and whether each row may
    stand for several entries side by side (the beams of a generation)."""

    def __init__(self) -> None:
        self.mixture: Mixture | None = None
        self.biases: Mixture | None = None
        self.copies = False

    @property
    def work(self) -> Mixture | None:
        """The mixture where it has any work."""
        return self.mixture if self.mixture is not None and self.mixture.blocks else None


def multiplies(module: nn.Module) -> bool:
    """True for nn.Linear and Conv1D, which stores its matrix turned."""
    return runs(module, nn.Linear) or isinstance(module, Conv1D)


def takes_factors(module: nn.Module) -> bool:
    """True where a weight of any shape is used as factors."""
    plain = runs(module, nn.Conv2d) and getattr(module, "groups", 1) == 1
    return multiplies(module) or runs(module, nn.Embedding) or plain


def runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """The module computes what `kind` computes, also where it is a subclass."""
    return isinstance(module, kind) and type(module).forward is kind.forward


class Seen:
    """What adds rows' parts at one place of the model."""

    def __init__(self, state: State, path: str, module: nn.Module) -> None:
        self.state, self.path = state, path
        self.module: Any = module

    def times(self, mixture: Mixture, leading: int) -> int:
        """How many entries of the leading axis belong to one row (the beams of a generation, side by side)."""
        # A multiple may also be an axis of positions (MPNet's table, Longformer's queries), which no shape can tell apart.
        if leading != mixture.rows and (leading % mixture.rows or not self.state.copies):
            raise TwinmergeError(
                f"The module {self.path!r} sees {leading} entries for {mixture.rows} rows, so rows of different mixtures "
                'cannot share this batch. Give one mixture for the whole batch, or say strategy="rebuild".'
            )
        return leading // mixture.rows

    def dense(self, part: Dense, mixture: Mixture, leading: int) -> Tensor:
        """Σ wt dt for each entry of the activation's leading axis, or one for all."""
        mixed = mixture.dense(part.stack)
        times = 1 if mixture.uniform else self.times(mixture, leading)
        return mixed.repeat_interleave(times, 0) if times > 1 and len(mixed) > 1 else mixed


class Forward(Seen, ABC):
    """The forward of a module whose weight and bias, or one of them, experts change."""

    weight: Any
    bias: Dense | None

    def __init__(
        self, state: State, path: str, module: nn.Module, weight: Part | None, bias: Dense | None = None
    ) -> None:
        super().__init__(state, path, module)
        self.weight, self.bias = weight, bias
        self.own = type(module).forward
        module.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        mixture = self.state.work
        found: Tensor = self.own(self.module, x) if mixture is None else self.mixed(x, mixture)
        return found

    @abstractmethod
    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        """The answer under a mixture that has work."""

    def shift(self, y: Tensor, mixture: Mixture) -> Tensor:
        """w · db, of the biases' own mixture where there is one."""
        assert self.bias is not None
        return self.dense(self.bias, self.state.biases or mixture, len(y)).to(y)


def channels_last(vectors: Tensor, y: Tensor) -> Tensor:
    """(n, channels) shaped to join an activation (n, ..., channels)."""
    return vectors.to(y).reshape(len(vectors), *[1] * (y.dim() - 2), -1)


def rows_with_biases(module: Any, x: Tensor, biases: Tensor | None) -> Tensor:
    """What the rows' products of a Linear or Conv1D are added to: the bias of each row in the answer's shape, or zeros.

    Args:
        x: the module's input (rows, ..., in); biases: w · db (rows or 1, out).
    """
    own: Tensor | None = module.bias
    if own is None:
        return x.new_zeros(*x.shape[:-1], matrix_of(module).shape[1])
    if biases is None:
        return own.repeat(*x.shape[:-1], 1)
    rows = own + channels_last(biases, x)
    return rows.expand(*x.shape[:-1], rows.shape[-1]).contiguous()


def matrix_of(module: Any, weight: Tensor | None = None) -> Tensor:
    """The matrix (in, out) that a Linear or Conv1D multiplies its input by; that of another weight where one is given."""
    found: Tensor = module.weight if weight is None else weight
    return found if isinstance(module, Conv1D) else found.T
