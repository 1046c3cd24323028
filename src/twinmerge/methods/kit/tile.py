"""What a method sees of one output tensor: where a tile lies, and the tile itself, a stack over the experts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from twinmerge.errors import UsageError
from twinmerge.maths.rule import Values

if TYPE_CHECKING:  # the compiled library does without torch, whose import takes longer than many a merge
    import torch
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors

Grain = Literal["element", "rows", "matrix"]
"""Which tiles of a tensor a method can work on: any, whole rows, the tensor in one piece."""

NO_BASE = (
    'Of a method with space = "parameters", tile.x are the models themselves and tile.base is None: write space = '
    '"deltas" to work on changes to a base.'
)
TABLES = "tables"
"""Among the patterns of `elementwise`: all that is looked up and multiplies nothing, as the model's class says."""


class Place(NamedTuple):
    """Where a tile lies.

    name: canonical name of the output tensor; shape: of the whole tensor; offset: flat index of the tile's first
    element; experts: names in the order of the stack; transposed: the matrix is stored (in, out), as GPT-2's Conv1D
    does, and not as Linear does; known where the model's class is; table: it is looked up and multiplies nothing, as
    `OpenedModel.table` says; stack: it holds matrices along its first axis, as `OpenedModel.stacked` says; wide: an
    input is float64, and so is all that is made of it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int = 0
    experts: tuple[str, ...] = ()
    transposed: bool = False
    table: bool = False
    stack: bool = False
    wide: bool = False

    @property
    def rounded(self) -> torch.dtype:
        """What the inputs were rounded to at best, whose eps sets numerical ranks: float32, float64 where `wide`.

        Example:
            >>> Place("w", (2, 2)).rounded, Place("w", (2, 2), wide=True).rounded
            (torch.float32, torch.float64)
        """
        import torch

        return torch.float64 if self.wide else torch.float32

    @property
    def turned(self) -> bool:
        """Until 0.1.0 the name of `transposed`."""
        warnings.warn(
            "Place.turned is Place.transposed now. The old name goes with 0.1.0.", DeprecationWarning, stacklevel=2
        )
        return self.transposed

    @property
    def parts(self) -> list[Place]:
        """Where each of a stack's matrices lies; the tensor itself where it is no stack."""
        if not self.stack:
            return [self]
        shape = self.shape[1:]
        return [self._replace(shape=shape, offset=i * math.prod(shape), stack=False) for i in range(self.shape[0])]

    @property
    def is_matrix(self) -> bool:
        """True for tensors that act as a matrix (convolution kernels as (out, rest)) with both sides above 1, or are
        a stack of such."""
        shape = self.shape[1:] if self.stack else self.shape
        return len(shape) >= 2 and shape[0] > 1 and math.prod(shape[1:]) > 1


_Made = tuple["Tensor", "Tensor | None", "torch.dtype"]


class Stored(NamedTuple):
    """A tile as it lies in the files, for the compiled library. base: None where the method needs none; fisher: of each
    expert, empty where the method needs none."""

    base: Values | None
    experts: tuple[Values, ...]
    fisher: tuple[Values, ...] = ()


class Gram(NamedTuple):
    """What was measured of the inputs x of one matrix: second: E[x xᵀ] over tokens, (in, in) or, block-diagonal,
    (blocks, size, size), the last one padded with zeros, float64; transposed: the matrix is stored (in, out)."""

    second: Tensor
    transposed: bool = False


class Tile:
    """One tile of one output tensor; methods read it and leave it as it is.

    By the method's grain of that tensor, *tile is (n,), any number of its elements, flat ("element"); (some rows, …),
    whole rows in its shape but for their number ("rows"); or its shape ("matrix"). Lengths differ, and may be 0.

    Args:
        x: (experts, *tile): deltas or parameters, as the method's `space` says; float32, or float64 where an input is.
        base: (*tile) of x's dtype, or None.
        at: where it lies.
        work: the dtype that sums over the experts are taken in, 13 bits wider than the inputs at least: float32 for
            checkpoints of 16 bits, else float64 (None), which is no wider than inputs that are float64 themselves.
        fisher: (experts, *tile) float32, for methods that need it: the diagonal Fisher information, summed over
            `examples`.
        grams: for methods that need them, what gives each expert's Gram matrix of this tensor, or None where none was
            measured.
        factors: of every expert's delta where all are low-rank adapters of this base, rank 0 where one does not
            change the tensor; else None.
        examples: how many each expert's `fisher` is summed over, which is not the same for all; 1 each where none are
            given.

    Attributes:
        stored: the tile as it lies in the files, where the compiled library may work on it.
    """

    def __init__(
        self,
        x: Tensor,
        base: Tensor | None,
        at: Place,
        work: torch.dtype | None = None,
        fisher: Tensor | None = None,
        grams: Sequence[Callable[[], Gram | None]] = (),
        factors: Sequence[Factors] | None = None,
        examples: Sequence[int] = (),
    ) -> None:
        self.at, self.grams, self.factors = at, grams, factors
        self.examples = tuple(examples) or (1,) * len(x)
        self.stored: Stored | None = None
        self._make: Callable[[], _Made] = lambda: (x, base, work or x.double().dtype)
        self._make_fisher: Callable[[], Tensor | None] = lambda: fisher

    @classmethod
    def of(
        cls,
        make: Callable[[], _Made],
        at: Place,
        stored: Stored | None,
        fisher: Callable[[], Tensor | None] = lambda: None,
        grams: Sequence[Callable[[], Gram | None]] = (),
        factors: Sequence[Factors] | None = None,
        examples: Sequence[int] = (),
    ) -> Tile:
        """A tile whose x, base, work and Fisher are made when they are first asked for."""
        tile = cls.__new__(cls)
        tile.at, tile.stored, tile._make, tile._make_fisher = at, stored, make, fisher
        tile.grams, tile.factors = grams, factors
        tile.examples = tuple(examples) or (1,) * len(at.experts)
        return tile

    @cached_property
    def _made(self) -> _Made:
        made = self._make()
        self._versions = _versions(made)
        return made

    @property
    def written_to(self) -> str | None:
        """What was changed in place since the tile was made, "x" or "base", by torch's count of such changes."""
        made: _Made | None = self.__dict__.get("_made")
        if made is None or (now := _versions(made)) == self._versions:
            return None
        return "x" if now[0] != self._versions[0] else "base"

    @property
    def x(self) -> Tensor:
        return self._made[0]

    @property
    def base(self) -> Tensor | None:
        return self._made[1]

    @property
    def work(self) -> torch.dtype:
        return self._made[2]

    @cached_property
    def fisher(self) -> Tensor:
        """(experts, *tile) float32, for methods that need it: sums over `examples`."""
        made = self._make_fisher()
        if made is None:
            raise AssertionError("the engine gives every method the statistics that it needs")
        return made

    @property
    def parts(self) -> list[Tile]:
        """The matrices of a stack, which is in one piece."""
        base = self.base
        places = enumerate(self.at.parts)
        return [Tile(self.x[:, i], None if base is None else base[i], at, self.work) for i, at in places]

    def require_base(self) -> Tensor:
        """The base's tile, for methods whose formula needs it.

        Raises:
            UsageError: a method that works on parameters asks for it, and none is there.
        """
        if self.base is None:
            raise UsageError(f"{self.at.name!r} is merged without a base. {NO_BASE}")
        return self.base


def _versions(made: _Made) -> tuple[int, ...]:
    """How often each tensor was changed in place."""
    return tuple(0 if each is None or each.is_inference() else each._version for each in made[:2])
