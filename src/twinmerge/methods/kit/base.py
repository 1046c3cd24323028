"""The rule of a method: what a paper's combining rule sees, and what it returns.

A method is pure. The engine hands it one tile of one output tensor, as a stack over the experts, and
takes one tile back. What must be known about whole tensors, or the whole model, before that is declared
as *passes*: exact reductions whose partial results add in any order to the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.passes import Known as Known
from twinmerge.methods.kit.passes import Partial as Partial
from twinmerge.methods.kit.passes import Pass as Pass
from twinmerge.methods.kit.passes import Scope as Scope
from twinmerge.methods.kit.passes import T_co as T_co
from twinmerge.methods.kit.tile import NO_BASE as NO_BASE
from twinmerge.methods.kit.tile import TABLES as TABLES
from twinmerge.methods.kit.tile import Grain as Grain
from twinmerge.methods.kit.tile import Gram as Gram
from twinmerge.methods.kit.tile import Place as Place
from twinmerge.methods.kit.tile import Stored as Stored
from twinmerge.methods.kit.tile import Tile as Tile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors

Space = Literal["deltas", "parameters", "either"]
Outputs = Literal["model", "masks"]
Group = Literal[
    "averages",
    "sums of changes",
    "trim, drop, elect",
    "spectral",
    "on the sphere",
    "by statistics of data",
    "masks",
    "over time",
    "picked, layer by layer or entry by entry",
    "of other packages",
]
"""What methods have in common, in the order in which they are listed."""
Law = Literal["idempotent", "symmetric", "odd", "homogeneous"]
Need = Literal["fisher", "gram"]
"""Statistics that `twinmerge measure` takes of every expert."""

PerExpert = float | tuple[float, ...]
"""One number for all experts, or one for each, in the experts' order."""


class Method(BaseModel, ABC):
    """Base of all methods; the fields of a subclass are its parameters, everywhere (command, recipe, docs).

    What a method is and can do is asked of its class; `methods/kit/registry.py` refuses what does not go together,
    and the conformance test holds a class to what it says.

    Class attributes
        space: "deltas" (τt = θt − θ0), "parameters" (θt), or "either": deltas where the recipe names a base, and
            parameters where it names none.
        grain: what a tile is (see `Tile`): "element", "rows" or "matrix"; `grain_of` says it tensor by tensor.
        experts_min, experts_max: how many experts the formula is defined for.
        laws: which algebraic laws tests hold the method to. "idempotent": equal experts give that expert at scale 1,
            to the bit. The others hold to 10⁻⁶ of each number (10⁻⁵ for decompositions). "symmetric": the experts'
            order is irrelevant, and they are seen in the order of their names. From θ0 = 0, "odd": negated deltas give
            the negated change; "homogeneous": deltas times c give the change times c.
        needs: statistics of every expert that the formula reads besides the weights. outputs: "model", or "masks":
        one vector and a mask for each expert, which `twinmerge masks build` writes. linear: what comes out is a sum
        of the experts, by numbers that their values do not change (`coefficients`). core_space: it merges low-rank
        factors into low-rank factors (`merge_factors`), as adapters are merged. scales_last: its field `scale`
        multiplies the merged change and does nothing else, so that a tensor may have another one. paper: the source,
        as printed by `twinmerge methods NAME`. group, cost, strong: what the list of methods says of it: what it has in
        common with others; how often it reads the models, or what it decomposes; where it is strong, by a paper or by
        its formula. aliases: other names of the method in recipes of ours. peft: PEFT's type of combining adapters
        (`add_weighted_adapter`) that it is -> the parameters that it has there, which who names the method so gets.
        spellings: other names, or values, of its parameters there, beside `dialect.SPELLINGS`. mergekit: name of a
        method of mergekit that this is -> how mergekit says it; recipes of mergekit set the field compat to "mergekit".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    space: ClassVar[Space] = "deltas"
    grain: ClassVar[Grain] = "element"
    experts_min: ClassVar[int] = 1
    experts_max: ClassVar[int | None] = None
    laws: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[tuple[Need, ...]] = ()
    outputs: ClassVar[Outputs] = "model"
    linear: ClassVar[bool] = False
    core_space: ClassVar[bool] = False
    scales_last: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    group: ClassVar[Group] = "of other packages"
    cost: ClassVar[str] = ""
    strong: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    peft: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    spellings: ClassVar[Mapping[str, Number | Switch]] = {}
    mergekit: ClassVar[Mapping[str, Dialect]] = {}

    def passes(self) -> Sequence[Pass[Any]]:
        """The reductions to run first, in order; each sees in `known` what the earlier ones found."""
        return ()

    def grain_of(self, at: Place) -> Grain:
        """Which tiles of one tensor the method can work on. Blocks of rows have the tensor's shape but for their
        number."""
        return self.grain

    @abstractmethod
    def apply(self, tile: Tile, known: Known) -> Tensor:
        """The merged tile (*tile), in the dtype of `tile.x`."""

    def rule(self, at: Place, known: Known) -> Rule | None:
        """The same as data, which the compiled library runs in one pass to the same bits; None where it has no such
        rule."""
        return None

    @classmethod
    def has_rule(cls) -> bool:
        """Whether `rule` may give one, so that a merge can do without PyTorch."""
        return cls.rule is not Method.rule

    @property
    def semantics(self) -> str:
        """Whose formula it is: its field `compat` where it has one, "paper" else."""
        return str(dict(self).get("compat", "paper"))

    @property
    def asks_for_tables(self) -> bool:
        """Whether what it does to a tensor depends on which are tables of embeddings, as `Place.table` says."""
        return False

    def check(self, experts: Sequence[str]) -> None:
        """Refuse parameters that do not go with these experts, before anything is read.

        Raises:
            ValueError: they do not; one sentence without the method's name.
        """

    def coefficients(self, experts: int) -> tuple[float, ...]:
        """ct of a `linear` method: the merged change is Σt ct τt, or of space "parameters" the merged model Σt ct
        θt."""
        raise AssertionError(f"{type(self).__name__} is not linear")

    def amounts(self, experts: int) -> tuple[float, ...] | None:
        """What part each expert has in what comes out, as far as parameters say it: its weight over the sum of their
        sizes; None where the experts' values alone decide."""
        given = dict(self).get("weights")
        if given is None:
            return None
        weights = per_expert(given, experts)
        total = math.fsum(map(abs, weights))
        return tuple(weight / total for weight in weights) if total else weights

    def merge_factors(self, parts: Sequence[Factors], at: Place, known: Known) -> Factors:
        """The merged change of low-rank experts as a low-rank product again, of a method with `core_space`.

        Args:
            parts: of every expert, rank 0 where it has none.
            at: of the matrix that they change.
            known: what the passes found.
        """
        raise AssertionError(f"{type(self).__name__} merges no factors")

    def times(self, by: float) -> Method:
        """The same method with its merged change times `by`, where `scales_last`."""
        fields = dict(self)
        return self.model_copy(update={"scale": fields["scale"] * by})


def require_divisor(weights: Sequence[float], negative: bool = False) -> None:
    """Refuse weights whose sum a mean cannot be divided by: none, but for what rounding left of 0, or (unless
    allowed) a negative one.

    Raises:
        ValueError: such weights.

    Example:
        >>> require_divisor((1.0, -1.0))
        Traceback (most recent call last):
        ...
        ValueError: the weights add up to 0, and the average divides by that. Make it positive.
    """
    total = math.fsum(weights)
    some = abs(total) > 1e-9 * math.fsum(map(abs, weights))
    if not some or (total < 0 and not negative):
        raise ValueError(f"the weights add up to {total:g}, and the average divides by that. Make it positive.")


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


def rounded_sum(weights: PerExpert, x: Tensor) -> Tensor:
    """Σt wt xt in the dtype of x as plain code has it: every product is rounded, then every sum, in the experts' order.

    It is what decides whether votes cancel in an implementation that does no more; `weighted_sum` rounds less.

    Example:
        >>> import torch
        >>> rounded_sum((1.0, 0.85), torch.tensor([[17.0], [-20.0]])).tolist()  # with 0.85 as float32: 17 − 17.0000005
        [0.0]
    """
    first, *rest = per_expert(weights, len(x))
    out = x[0] * first
    for weight, row in zip(rest, x[1:], strict=True):
        out.add_(row * weight)
    return out


def summed_factors(weights: Sequence[float], parts: Sequence[Factors]) -> Factors:
    """Σt wt Bt At as one product, exactly, in float64."""
    from twinmerge.maths.lowrank import Factors, truncate_product

    return truncate_product([Factors(part.b.double(), part.a.double()) for part in parts], weights)


def on_base(tile: Tile, total: Tensor) -> Tensor:
    """A sum of what `space = "either"` sees, rounded once to the models' dtype: θ0 + total, or the total where there is
    no base.

    Example:
        >>> import torch
        >>> x, at = torch.ones(1, 2), Place("w", (2,))
        >>> [on_base(Tile(x, base, at), x[0]).tolist() for base in (None, torch.tensor([0.5, 1.0]))]
        [[1.0, 1.0], [1.5, 2.0]]
    """
    return total.to(tile.x.dtype) if tile.base is None else moved(tile, total, 1.0)


def moved(tile: Tile, change: Tensor, scale: float) -> Tensor:
    """θ0 + λ·change, rounded once to the base's dtype; the base's own bits (-0.0 too) where nothing changes.

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
    bits = torch.int64 if base.dtype == torch.float64 else torch.int32
    if base.numel() and base.view(bits).amin().item() == torch.iinfo(bits).min:  # -0.0, and -0.0 + 0.0 is 0.0
        return torch.where(change.eq(0), base, out)
    return out


CANCELLED = 1e-8
"""Weights whose sum is smaller cancel, as in mergekit: 0.1 + 0.2 − 0.3 is 5.6e-17 in float64."""


def over_weights(scale: float, weights: tuple[float, ...], normalize: bool) -> float:
    """λ, or λ / Σt wt where a sum over the experts is to be their weighted mean; λ where the weights cancel.

    Example:
        >>> over_weights(1.0, (1.0, 3.0), True), over_weights(1.0, (1.0, -1.0), True)
        (0.25, 1.0)
    """
    total = math.fsum(weights)
    return scale / total if normalize and abs(total) >= CANCELLED else scale


def decided(values: Any, by: Mapping[str, Mapping[str, str]]) -> Any:
    """Fields that the semantics decide have that value, and no other is taken and then ignored: for a validator that
    runs before all others.

    Args:
        values: the fields as they are given.
        by: of a value of `compat`, what it leaves no choice in.

    Raises:
        ValueError: another value of such a field.

    Example:
        >>> decided({"compat": "mergekit"}, {"mergekit": {"tie": "positive"}})
        {'compat': 'mergekit', 'tie': 'positive'}
    """
    if not isinstance(values, dict) or not isinstance(values.get("compat"), str):
        return values
    own = by.get(values["compat"], {})
    for field, value in own.items():
        if values.get(field, value) != value:
            raise ValueError(
                f"compat={values['compat']} goes with {field}={value}, got {field}={values[field]!r:.80}. Leave one "
                "of them out."
            )
    return {**values, **own}


def weights_field() -> Any:
    return Field(default=1.0, description="one number per expert")


def scale_field(default: float) -> Any:
    return Field(default=default, description="λ: multiplies the merged delta")


def seed_field() -> Any:
    return Field(default=0, ge=0, description="keys the random numbers, with expert, tensor and index")
