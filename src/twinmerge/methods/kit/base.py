"""The rule of a method: what a paper's combining rule sees, and what it returns.

A method is pure. The engine hands it one tile of one output tensor, as a stack over the experts, and
takes one tile back. What must be known about whole tensors, or the whole model, before that is declared
as *passes*: exact reductions whose partial results add in any order to the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from twinmerge.maths.fused import Rule, Values

if TYPE_CHECKING:  # the compiled library does without torch, whose import takes longer than many a merge
    import torch
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors

T_co = TypeVar("T_co", covariant=True)  # what a pass finds
Found = TypeVar("Found")

Partial = dict[str, Any]
"""A pass's result for one tile. Unless the pass says otherwise, integer values of equal keys add, and floating values
have a key of their own."""

Scope = Literal["model", "tensor"]
"""What a count or a reduction is over."""

Grain = Literal["element", "rows", "matrix"]
"""Which tiles of a tensor a method can work on: any, whole rows, the tensor in one piece."""

Need = Literal["fisher", "gram"]
"""Statistics that `twinmerge measure` takes of every expert."""

PerExpert = float | tuple[float, ...]
"""One number for all experts, or one for each, in the experts' order."""


TABLES = "tables"
"""Among the patterns of `elementwise`: all that is looked up and multiplies nothing, as the model's class says."""


class Place(NamedTuple):
    """Where a tile lies.

    name: canonical name of the output tensor; shape: of the whole tensor; offset: flat index of the tile's first
    element; experts: names in the order of the stack; turned: the matrix is stored (in, out), as GPT-2's Conv1D does, and not as
    Linear does; known where the model's class is; table: it is looked up and multiplies nothing, as `OpenedModel.table` says;
    stack: it holds matrices along its first axis, as `OpenedModel.stacked` says.
    """

    name: str
    shape: tuple[int, ...]
    offset: int = 0
    experts: tuple[str, ...] = ()
    turned: bool = False
    table: bool = False
    stack: bool = False

    @property
    def parts(self) -> list[Place]:
        """Where each of a stack's matrices lies; the tensor itself where it is no stack."""
        if not self.stack:
            return [self]
        shape = self.shape[1:]
        return [self._replace(shape=shape, offset=i * math.prod(shape), stack=False) for i in range(self.shape[0])]

    @property
    def is_matrix(self) -> bool:
        """True for tensors that act as a matrix (convolution kernels as (out, rest)) with both sides above 1, or are a stack of such."""
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
    (blocks, size, size), the last one padded with zeros, float64; turned: the matrix is stored (in, out)."""

    second: Tensor
    turned: bool = False


class Tile:
    """One tile of one output tensor; methods read it and leave it as it is.

    Args:
        x: (experts, *tile) float32: deltas or parameters, as the method's `space` says.
        base: (*tile) float32 or None.
        at: where it lies.
        work: the dtype that sums over the experts are taken in, 13 bits wider than the inputs at least: float32 for
            checkpoints of 16 bits, else float64 (None).
        fisher: (experts, *tile) float32, for methods that need it: the diagonal Fisher information, summed over `examples`.
        grams: for methods that need them, what gives each expert's Gram matrix of this tensor, or None where none was measured.
        factors: of every expert's delta where all are low-rank adapters of this base, rank 0 where one does not change the
            tensor; else None.
        examples: how many each expert's `fisher` is summed over, which is not the same for all; 1 each where none are given.

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
        return self._make()

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
        """The base's tile, for methods whose formula needs it."""
        if self.base is None:
            raise AssertionError("the engine gives every method that works on deltas its base")
        return self.base


class Pass(ABC, Generic[T_co]):
    """One exact reduction over tiles before the last read; `Pass[T]` finds a T, which `Known.of` gives to what comes later.

    name: by which `Known` has it, one of its own in each method.
    scope: "tensor" starts afresh for each tensor, "model" runs over all merged tensors first.
    sampled: the tiles are a thin sample of the model (at most a million entries), for passes that only guess.
    rare: it is left out most of the time (see `wanted`).
    grain: only tensors of which the method says that (see `Method.grain_of`); None for all.
    """

    name: str
    scope: Scope
    sampled: ClassVar[bool] = False
    rare: bool = False
    grain: ClassVar[Grain | None] = None

    def wanted(self, known: Known) -> Collection[str] | None:
        """The tensors that the pass must see; None for all. With none at all the pass is left out."""
        return None

    @abstractmethod
    def observe(self, tile: Tile, known: Known) -> Partial:
        """What one tile adds."""

    def add(self, total: Partial, part: Partial) -> None:
        """Put a tile's result into the total; the order of the tiles does not matter."""
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value

    @abstractmethod
    def finish(self, total: Partial, known: Known) -> T_co:
        """What later passes and `apply` find in `known`."""


class Known(dict[str, Any]):
    """What the earlier passes found, by the name of the pass; `of` gives it with its type.

    Example:
        >>> class Entries(Pass[int]):
        ...     name, scope = "entries", "tensor"
        ...     def observe(self, tile, known):
        ...         return {"entries": tile.x[0].numel()}
        ...     def finish(self, total, known):
        ...         return total["entries"]
        >>> Known(entries=3).of(Entries), Known().maybe(Entries), Known(entries=3)["entries"]
        (3, None, 3)
    """

    def of(self, step: type[Pass[Found]] | Pass[Found]) -> Found:
        """What a pass found, or what the pass of that name did, whose class is derived from this one.

        Raises:
            KeyError: it has not run.
        """
        found: Found = self[step.name]
        return found

    def maybe(self, step: type[Pass[Found]] | Pass[Found]) -> Found | None:
        """The same; None where it has not run."""
        return self.get(step.name)


class Method(BaseModel, ABC):
    """Base of all methods; the fields of a subclass are its parameters, everywhere (command, recipe, docs).

    Class attributes
        space: "deltas" (τt = θt − θ0) or "parameters" (θt).
        grain: "element" (any tile) or "matrix" (the whole tensor as one tile, or what `grain_of` says).
        experts_min, experts_max: how many experts the formula is defined for.
        laws: which algebraic laws the conformance test holds the method to, out of "idempotent" (equal experts give
            that expert, at scale 1), "symmetric" (the experts' order is irrelevant), "odd" (negated deltas give the
            negated change) and "homogeneous" (deltas times c give the change times c).
        needs: statistics of every expert that the formula reads besides the weights.
        outputs: "model", or "masks": one vector and a mask for each expert, which `twinmerge compress` writes.
        paper: the source, as printed by `twinmerge methods`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    space: ClassVar[Literal["deltas", "parameters"]] = "deltas"
    grain: ClassVar[Grain] = "element"
    experts_min: ClassVar[int] = 1
    experts_max: ClassVar[int | None] = None
    laws: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[Need, ...]] = ()
    outputs: ClassVar[Literal["model", "masks"]] = "model"
    paper: ClassVar[str] = ""

    def passes(self) -> Sequence[Pass[Any]]:
        """The reductions to run first, in order; each sees in `known` what the earlier ones found."""
        return ()

    def grain_of(self, at: Place) -> Grain:
        """Which tiles of one tensor the method can work on. Blocks of rows have the tensor's shape but for their number."""
        return self.grain

    @abstractmethod
    def apply(self, tile: Tile, known: Known) -> Tensor:
        """The merged tile (*tile) in float32."""

    def rule(self, at: Place, known: Known) -> Rule | None:
        """The same as data, which the compiled library runs in one pass to the same bits; None where it has no such rule."""
        return None


def column(value: PerExpert, x: Tensor) -> Tensor:
    """One number per expert, shaped (experts, 1, ..., 1) to multiply the stack `x`."""
    import torch

    return torch.tensor(per_expert(value, len(x)), dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))


def per_expert(value: PerExpert, count: int) -> tuple[float, ...]:
    """One number for each of `count` experts."""
    return value if isinstance(value, tuple) else (value,) * count


def weighted_sum(weights: PerExpert, x: Tensor, work: torch.dtype) -> Tensor:
    """Σt wt xt in `work`, expert by expert: the same bits whatever the tile or the number of threads.

    Example:
        >>> import torch
        >>> weighted_sum((0.5, 2.0), torch.tensor([[1.0], [3.0]]), torch.float64).tolist()
        [6.5]
    """
    by = per_expert(weights, len(x))
    if len(x) > 1 and by[0] == 1:  # one pass over the tile less
        out, done = x[0].to(work).add(x[1].to(work), alpha=by[1]), 2
    else:
        out, done = x[0].to(work) * by[0], 1
    for weight, row in zip(by[done:], x[done:], strict=True):
        out.add_(row.to(work), alpha=weight)
    return out


NEGATIVE_ZERO = -(1 << 31)  # the bits of -0.0: the least integer


def moved(tile: Tile, change: Tensor, scale: float) -> Tensor:
    """θ0 + λ·change, rounded once to float32; the base's own bits (-0.0 too) where nothing changes.

    Example:
        >>> import torch
        >>> tile = Tile(torch.ones(1, 2), torch.tensor([-0.0, 1.0]), Place("w", (2,)))
        >>> moved(tile, torch.tensor([0.0, 0.5], dtype=torch.float64), 0.5).tolist()
        [-0.0, 1.25]
    """
    import torch

    base = tile.require_base()
    if scale == 0:
        return base.clone()
    out = torch.add(base.to(change.dtype), change, alpha=scale).to(base.dtype)
    if base.numel() and base.view(torch.int32).amin().item() == NEGATIVE_ZERO:  # -0.0 + 0.0 is 0.0
        return torch.where(change.eq(0), base, out)
    return out


def over_weights(scale: float, weights: tuple[float, ...], normalize: bool) -> float:
    """λ, or λ / Σt wt where a sum over the experts is to be their weighted mean; λ where the weights cancel.

    Example:
        >>> over_weights(1.0, (1.0, 3.0), True), over_weights(1.0, (1.0, -1.0), True)
        (0.25, 1.0)
    """
    total = math.fsum(weights)
    return scale / total if normalize and abs(total) >= 1e-8 else scale


def weights_field() -> Any:
    return Field(default=1.0, description="one number per expert")


def scale_field(default: float) -> Any:
    return Field(default=default, description="λ: multiplies the merged delta")


def seed_field() -> Any:
    return Field(default=0, ge=0, description="keys the random numbers, with expert, tensor and index")
