"""What TALL-masks, Consensus and EMR share: which weights matter to which task, how many matter to how many, and the
bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from twinmerge.maths.fused import Masked
from twinmerge.maths.rule import Mark, Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    Pass,
    PerExpert,
    Place,
    Scope,
    Tile,
    moved,
    per_expert,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.methods.ties import Ties

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)  # of λt, searched by the paper


def important(delta: Tensor, vector: Tensor, threshold: float) -> Tensor:
    """mt = 1{|τt| > λt |τ − τt|}, element by element: the weights that task t needs.

    No division, so that 0 against 0 is not marked and nothing is NaN. λ = 1 minimises ‖m ⊙ τ − τt‖₁; a smaller λ
    marks more.

    Args:
        delta: τt.
        vector: τ, of the same shape.
        threshold: λt.

    Returns:
        bool, of that shape.

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", arXiv
    2405.07813.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([1.0, 0.2, -0.5, 0.0]), torch.tensor([0.9, -1.0, 0.1, 0.0])
        >>> important(one, one + two, 0.4).int().tolist()
        [1, 0, 1, 0]
    """
    return beyond(*sizes(delta, vector), threshold)


def sizes(delta: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """|τt| and |τ − τt|, in the dtype of `vector`."""
    own = delta.to(vector.dtype)
    return own.abs(), (vector - own).abs_()


def beyond(size: Tensor, distance: Tensor, threshold: float) -> Tensor:
    """size > λ · distance."""
    return size > distance * threshold


class Marks(NamedTuple):
    """How many weights how many tasks marked, counted where τ is not 0: elsewhere a mark changes nothing.

    by_count: (tasks + 1,) weights that exactly 0, 1, … all tasks marked; by_task: (tasks,) weights that each task
    marked; trained: weights that at least one expert changed.
    """

    by_count: tuple[int, ...]
    by_task: tuple[int, ...]
    trained: int

    @classmethod
    def of(cls, x: Tensor, vector: Tensor, masks: Tensor) -> Marks:
        """The marks of one tile.

        Args:
            x: (experts, *tile) deltas.
            vector: (*tile).
            masks: (experts, *tile) bool.

        Example:
            >>> import torch
            >>> x = torch.tensor([[1.0, 0.2, -0.5, 0.0], [0.9, -1.0, 0.1, 0.0]])
            >>> Marks.of(x, x.sum(0), torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]).bool())
            Marks(by_count=(0, 2, 1), by_task=(2, 2), trained=3)
        """
        import numpy as np

        counted = (masks & vector.ne(0)).flatten(1).cpu().numpy()
        times = counted.view(np.uint8).sum(0, dtype=np.min_scalar_type(len(x)))
        by_count = np.bincount(times, minlength=len(x) + 1)
        by_count[0] -= int(vector.eq(0).sum())
        by_task = [int(np.count_nonzero(row)) for row in counted]
        trained = int((x.amax(0).ne(0) | x.amin(0).ne(0)).sum())
        return cls(tuple(by_count.tolist()), tuple(by_task), trained)

    @classmethod
    def counted(cls, found: Masked) -> Marks:
        """The marks of what the compiled library counted."""
        return cls(found.by_count, found.by_task, found.trained)

    @classmethod
    def none(cls, tasks: int) -> Marks:
        """No weights at all."""
        return cls((0,) * (tasks + 1), (0,) * tasks, 0)

    def plus(self, other: Marks) -> Marks:
        """The marks of both."""
        by_count = tuple(a + b for a, b in zip(self.by_count, other.by_count, strict=True))
        by_task = tuple(a + b for a, b in zip(self.by_task, other.by_task, strict=True))
        return Marks(by_count, by_task, self.trained + other.trained)

    @property
    def moved(self) -> int:
        """Weights where τ is not 0, which all shares are of."""
        return sum(self.by_count)

    def shares(self) -> dict[str, float]:
        """catastrophic: share of the weights that no task marked; selfish: one; all: every task.

        Example:
            >>> Marks((1, 2, 1), (2, 2), 4).shares()
            {'catastrophic': 0.25, 'selfish': 0.5, 'all': 0.25}
        """
        whole = max(self.moved, 1)
        none, one, every = self.by_count[0], self.by_count[1], self.by_count[-1]
        return {"catastrophic": none / whole, "selfish": one / whole, "all": every / whole}

    def densities(self) -> tuple[float, ...]:
        """Of each task: the share of the weights that it marked."""
        return tuple(count / max(self.moved, 1) for count in self.by_task)


class MaskMethod(Method):
    """One vector τ and a mask mt for each expert: θt ≈ θ0 + st · mt ⊙ τ.

    `apply` gives the paper's multi-task model θ0 + τ.
    """

    outputs: ClassVar[Literal["model", "masks"]] = "masks"

    @abstractmethod
    def one_vector(self, tile: Tile, known: Known) -> Tensor:
        """τ, (*tile) in `tile.work`."""

    @abstractmethod
    def masks(self, tile: Tile, vector: Tensor) -> Tensor:
        """mt of every expert, (experts, *tile) bool."""

    def vector_and_masks(self, tile: Tile, known: Known) -> tuple[Tensor, Tensor]:
        """τ, (*tile) in the dtype of `tile.x`, and mt, (experts, *tile) bool."""
        vector = self.one_vector(tile, known)
        return vector.to(tile.x.dtype), self.masks(tile, vector)

    def masses(self, tile: Tile, vector: Tensor, masks: Tensor) -> Tensor | None:
        """What the scales are made of, (2, experts, blocks) float64; None where all scales are 1."""
        return None

    def scales(
        self, masses: Mapping[str, Sequence[Sequence[float]]], sizes: Mapping[str, int], count: int
    ) -> list[float]:
        """st of every expert.

        Args:
            masses: tensor -> (2, experts), the sums of `masses` over its blocks.
            sizes: tensor -> how many elements it has.
            count: of the experts.
        """
        return [1.0] * count

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, self.one_vector(tile, known), 1.0)

    def mask_rule(self, at: Place, known: Known) -> Rule | None:
        """The vector and the masks as data, which `fused.masks` makes to the same bits; None where there is no such
        rule."""
        return None

    @classmethod
    def has_mask_rule(cls) -> bool:
        """Whether `mask_rule` says what this class does: a class that is derived from the rule's and does something
        else has none."""
        own = [_definer(cls, name) for name in ("one_vector", "masks", "masses")]
        return cls.mask_rule is not MaskMethod.mask_rule and all(
            issubclass(_definer(cls, "mask_rule"), each) for each in own
        )

    @classmethod
    def has_masses(cls) -> bool:
        """Whether scales are made of the masses of `fused.masks`."""
        return cls.masses is not MaskMethod.masses


def _definer(cls: type, name: str) -> type:
    """The class that a method is from."""
    return next(each for each in cls.__mro__ if name in vars(each))


class Marking(Method):
    """The fields of TALL-masks and Consensus: how task vectors add up to τ, and from which λt on a weight is a
    task's."""

    threshold: PerExpert = Field(
        default=0.4, description="λt: a weight is task t's where |τt| > λt |τ − τt|; 0.2 to 0.6 are searched"
    )
    vector: Literal["sum", "ties"] = Field(default="sum", description="how the task vectors make up τ")
    density: PerExpert = Field(default=0.2, description="share of the entries kept by the trim of ties, 0 to 1")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")

    @field_validator("threshold")
    @classmethod
    def _within(cls, value: PerExpert) -> PerExpert:
        if not all(0 < number <= 1 for number in per_expert(value, 1)):
            raise PydanticCustomError("threshold", "a threshold is above 0 and at most 1, such as 0.4")
        return value

    @property
    def ties(self) -> Ties:
        """TIES whose agreeing entries are added, as the authors merge task vectors for masks."""
        from twinmerge.methods.ties import Ties

        return Ties(density=self.density, scope=self.scope, merge="sum", scale=1.0)

    def passes(self) -> Sequence[Pass[Any]]:
        return self.ties.passes() if self.vector == "ties" else ()

    def one_vector(self, tile: Tile, known: Known) -> Tensor:
        """τ: Σt τt, or the sum of the entries that TIES elects, (*tile) in `tile.work`."""
        if self.vector == "sum":
            return weighted_sum(1.0, tile.x, tile.work)
        return self.ties.change(tile, known)

    def vector_rule(self, at: Place, known: Known) -> Rule | None:
        """`one_vector` as data."""
        if self.vector == "ties":
            return self.ties.rule(at, known)
        return Rule((1.0,) * len(at.experts), deltas=True)

    def mark(self, at: Place, least: int = 0) -> Mark:
        """`masks` as data."""
        return Mark(per_expert(self.threshold, len(at.experts)), least)

    def masks(self, tile: Tile, vector: Tensor) -> Tensor:
        """mt of every expert, (experts, *tile) bool."""
        import torch

        out = torch.empty(tile.x.shape, dtype=torch.bool, device=tile.x.device)
        for row, to, threshold in zip(tile.x, out, per_expert(self.threshold, len(out)), strict=True):
            to.copy_(important(row, vector, threshold))
        return out


Form = Literal["merged", "fine_tuned", "masks"]


def storage_bits(trained: int, frozen: int, tasks: int, form: Form, number_bits: int = 32) -> int:
    """Bits that hold a model for every task, without heads.

    With P trained and F frozen weights, b bits a number and T tasks: merged b(P + F); fine_tuned b(TP + F); masks
    b(2P + F) + TP, which is θ0, τ and one bit for each trained weight and task. In float32 masks are the smaller from
    three tasks on, and at most 32 times smaller.

    Source: Wang et al. 2024, arXiv 2405.07813, whose tables count gigabits.

    Example:
        >>> [storage_bits(87_849_000, 25_600_000, 20, form) / 1e9 for form in ("merged", "fine_tuned", "masks")]
        [3.630368, 57.04256, 8.198516]
    """
    numbers = {"merged": trained, "fine_tuned": tasks * trained, "masks": 2 * trained}[form] + frozen
    return number_bits * numbers + (tasks * trained if form == "masks" else 0)


def described(method: Method, experts: Sequence[str]) -> dict[str, Any]:
    """What a mask file says of the method: its fields, those per expert as one number for each."""
    from twinmerge.methods.kit.registry import is_per_expert

    fields = method.model_dump()
    return {
        name: list(per_expert(value, len(experts))) if is_per_expert(type(method), name) else value
        for name, value in fields.items()
    }
