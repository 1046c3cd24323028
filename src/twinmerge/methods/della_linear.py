"""DELLA without its election: entries are dropped at random by their rank, and the rest is added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from twinmerge.maths.keyed_random import draws24, philox_key
from twinmerge.maths.ranks import Ranks, kept_by_rank, rising
from twinmerge.maths.rule import Ranked, Rule
from twinmerge.methods.dare import L1_OR_NONE, Rescale, check_rescale
from twinmerge.methods.kit.base import Grain, Known, Pass, PerExpert, Place, Tile, per_expert, seed_field
from twinmerge.methods.kit.dialect import SHARE, Dialect, Number, Switch
from twinmerge.methods.kit.sparse import L1Norms, Sparse, SparseSum, l1_factors

if TYPE_CHECKING:
    from torch import Tensor

OWN = {"weight": Number("weights"), "density": SHARE, "epsilon": Number("epsilon", 0.15)}
"""The parameters of mergekit that each model may have."""


class MagPrune(Sparse):
    """What DELLA leaves of each task vector: entries of large rank in their row with a larger chance.

    Row by row of the last axis (a vector is one row), the entry of rank r = 1 … L from the least |τ| on is kept with
    the chance q = density − epsilon + 2 · epsilon · (r − 1) / (L − 1), and divided by it (`rescale` "inverse_keep").
    Of equal magnitudes the first has the lower rank. A row of one entry has no order: q = density. Densities of 0 and
    1 keep nothing and everything. The coins are those of `dare`: keyed by seed, expert, tensor and index.
    """

    density: PerExpert = Field(default=0.7, description="mean share of the entries kept, 0 to 1")
    epsilon: PerExpert = Field(default=0.07, description="half the width of the window of keep chances")
    rescale: Rescale = Field(default="inverse_keep", description="how the kept entries are rescaled")
    seed: int = seed_field()

    @field_validator("epsilon")
    @classmethod
    def _not_negative(cls, value: PerExpert) -> PerExpert:
        if min(per_expert(value, 1)) < 0:
            raise PydanticCustomError("epsilon", "epsilon is half the width of a window, 0 or more")
        return value

    @model_validator(mode="after")
    def _check_rescale(self) -> MagPrune:
        check_rescale(self.semantics, self.rescale)
        return self

    def check(self, experts: Sequence[str]) -> None:
        for expert, (density, epsilon) in zip(experts, self._windows(len(experts)), strict=True):
            highest = density + epsilon
            beyond = density <= epsilon or highest > 1 or (self.semantics == "mergekit" and highest == 1)
            if 0 < density < 1 and beyond:
                raise ValueError(
                    f"keep chances of {expert!r} go from density − epsilon = {density - epsilon:g} to density + epsilon "
                    f"= {highest:g}, and must lie between 0 and 1. Take an epsilon below {min(density, 1 - density):g}."
                )

    @property
    def all_kept(self) -> bool:
        """Whether nothing is dropped of any task vector."""
        return all(share >= 1 for share in per_expert(self.density, 1))

    def grain_of(self, at: Place) -> Grain:
        if self.all_kept:
            return "element"
        return "rows" if len(at.shape) > 1 else "matrix"

    def axis(self, at: Place) -> int:
        """The axis of a tensor along which its rows lie."""
        return 1 if self.semantics == "mergekit" and len(at.shape) > 2 else len(at.shape) - 1

    def ranks(self, at: Place, experts: int) -> tuple[Ranks, ...]:
        """What becomes of each expert's entries by their rank."""
        length, inverse = at.shape[self.axis(at)] if at.shape else 1, self.rescale == "inverse_keep"
        return tuple(rising(length, *window, inverse) for window in self._windows(experts))

    def norm_passes(self) -> list[Pass[Any]]:
        """Those that find what restores the norm."""
        return [L1Norms(self)] if self.rescale == "l1" and not self.all_kept else []

    def left(self, tile: Tile, known: Known) -> Tensor:
        if self.all_kept:
            return tile.x
        import torch

        out = torch.empty_like(tile.x)
        each = zip(tile.x, out, tile.at.experts, self.ranks(tile.at, len(tile.x)), strict=True)
        axis = self.axis(tile.at)
        for row, to, expert, ranks in each:
            draws = None
            if ranks.draws:
                draws = draws24(self.seed, expert, tile.at.name, tile.at.offset, row.numel()).to(row.device)
                draws = draws.reshape(row.shape).movedim(axis, -1) if row.dim() else draws
            kept = kept_by_rank(row.movedim(axis, -1) if row.dim() else row[None], ranks, draws)
            to.copy_(kept.movedim(-1, axis) if row.dim() else kept[0])
        return out

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule | None:
        if self.all_kept:
            return rule
        if self.axis(at) < len(at.shape) - 1:
            return None
        keys = tuple(philox_key(self.seed, expert, at.name) for expert in at.experts)
        return rule._replace(ranked=Ranked(self.ranks(at, len(at.experts)), keys))

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        return l1_factors(known) if self.norm_passes() else (1.0,) * count

    def _windows(self, experts: int) -> list[tuple[float, float]]:
        """density and epsilon of each expert."""
        return list(zip(per_expert(self.density, experts), per_expert(self.epsilon, experts), strict=True))


class DellaLinear(MagPrune, SparseSum):
    """θ = θ0 + λ Σt wt τ′t, τ′t what MagPrune leaves of τt.

    Row by row of the last axis (a vector is one row), the entry of rank r = 1 … L from the least |τ| on is kept with
    the chance q = density − epsilon + 2 · epsilon · (r − 1) / (L − 1) and divided by its own q, so that the expectation
    of τ′ is τ. Of equal magnitudes the first has the lower rank; a row of one entry has no order, q = density.
    `density` is the mean share kept; 0 and 1 keep nothing and everything. `epsilon` is half the window: half of what
    the paper calls ε, and window_size / 2 of the authors' command, whose density and window are the defaults here. A
    draw depends on seed, expert, tensor and index only. With `normalize` the sum is divided by Σt wt, unless that is
    below 1e-8.

    compat="mergekit" restores the L1 norm of each tensor (rescale="l1") or nothing, and ranks tensors of three and more
    axes along their second axis. Rows of one entry, which stop mergekit, are kept with the chance `density`.

    Source: Deep et al. 2024, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    arXiv 2406.11617, section 3, without step 2.

    Example:
        >>> import torch
        >>> x, at = torch.ones(1, 9000, 3), Place("w", (9000, 3), 0, ("a",))
        >>> out = DellaLinear(epsilon=0.2, scale=1.0).apply(Tile(x, torch.zeros(9000, 3), at), Known())
        >>> [round(share, 1) for share in (out != 0).double().mean(0).tolist()], abs(out.mean().item() - 1) < 0.03
        ([0.5, 0.7, 0.9], True)
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Deep et al. 2024, arXiv 2406.11617"
    group = "trim, drop, elect"
    cost = "one sorted read"
    strong = "as della, where signs agree"
    scales_last = True
    spellings: ClassVar[Mapping[str, Number | Switch]] = {"rescale": Switch("rescale", "inverse_keep", "none")}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "della_linear": Dialect(
            OWN, {"normalize": Switch("normalize"), "rescale": L1_OR_NONE, "lambda": Number("scale", 1.0)}
        )
    }

    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Pass[Any]]:
        return self.norm_passes()
