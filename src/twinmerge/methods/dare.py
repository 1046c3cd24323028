"""DARE: drop entries of each task vector at random, rescale the rest, add them up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from twinmerge.maths.fused import norms
from twinmerge.maths.keyed_random import kept_bits, philox_key
from twinmerge.maths.rule import Drop, Rule
from twinmerge.methods.kit.base import Known, PerExpert, Place, Stored, Tile, per_expert, seed_field
from twinmerge.methods.kit.dialect import COIN, Dialect, Number, Switch
from twinmerge.methods.kit.sparse import L1Norms, SparseSum, Sums, l1_factors

if TYPE_CHECKING:
    from torch import Tensor

Rescale = Literal["inverse_keep", "l1", "none"]
L1_OR_NONE = Switch("rescale", "l1", "none", default=True)  # as mergekit has it


def check_rescale(compat: str, rescale: Rescale) -> None:
    """Refuse to call mergekit's what it does not do."""
    if compat == "mergekit" and rescale == "inverse_keep":
        raise ValueError(
            "mergekit restores the L1 norm, or nothing. Add rescale=l1 or rescale=none to compat=mergekit."
        )


def drop(x: Tensor, density: PerExpert, seed: int, at: Place) -> Tensor:
    """The stack (experts, *tile) with dropped entries at zero; each entry's draw is keyed by seed, expert, tensor and
    index."""
    import torch

    out = torch.empty_like(x)
    shares = per_expert(density, len(x))
    for row, to, expert, share in zip(x, out, at.experts, shares, strict=True):
        if share >= 1:
            to.copy_(row)
            continue
        bits = torch.int64 if x.dtype == torch.float64 else torch.int32
        mask = kept_bits(seed, expert, at.name, at.offset, row.numel(), share).to(x.device, bits)
        torch.bitwise_and(row.contiguous().view(bits), mask.view(row.shape), out=to.view(bits))
    return out


def drop_rule(density: PerExpert, seed: int, at: Place, factors: tuple[float, ...]) -> Drop:
    """`drop`, and the kept entries times `factors`, as data."""
    keys = tuple(philox_key(seed, expert, at.name) for expert in at.experts)
    return Drop(keys, per_expert(density, len(keys)), factors)


class DropNorms(L1Norms):
    """Σ|τ| and Σ|kept τ| of every expert over the whole tensor: drawn while a block is in the cache."""

    def __init__(self, density: PerExpert, seed: int) -> None:
        self.density, self.seed = density, seed

    def left(self, tile: Tile, known: Known) -> Tensor:
        return drop(tile.x, self.density, self.seed, tile.at)

    def compiled(self, stored: Stored, at: Place, known: Known) -> Sums | None:
        each = zip(stored.experts, at.experts, per_expert(self.density, len(at.experts)), strict=True)
        keys = ((values, philox_key(self.seed, expert, at.name), share) for values, expert, share in each)
        sums = [norms(values, stored.base, key, share, at.offset) for values, key, share in keys]
        finite = all(math.isfinite(value) for of in sums for blocks in of for value in blocks)
        return sums if finite else None  # else the tile says whose numbers are none


def factors(density: PerExpert, rescale: Rescale, count: int, known: Known) -> tuple[float, ...]:
    """What the kept entries of each expert are multiplied with."""
    if rescale == "inverse_keep":
        return tuple(1 / max(p, 2.0**-24) for p in per_expert(density, count))  # below 2^-24 only a draw of 0 is kept
    if rescale == "l1":
        return l1_factors(known)
    return (1.0,) * count


class Dare(SparseSum):
    """θ = θ0 + λ Σt wt τ′t with τ′ = m ⊙ τ / density, m ~ Bernoulli(density) for every entry.

    The expectation of τ′ is τ. `density` is the share of entries that are kept (1 − p of the paper): 1 keeps all, 0
    keeps none. `rescale` says what the kept entries are multiplied by: "inverse_keep" divides them by the density (the
    paper), "l1" restores the L1 norm of each tensor, "none" leaves them as they are. Which entries are kept depends on
    seed, expert, tensor and index alone. With `normalize` the sum is divided by Σt wt, unless that is below 1e-8.

    compat="mergekit" is the same formula with `rescale` "l1" or "none"; "inverse_keep" is refused with it.

    Source: Yu et al. 2024, "Language models are super Mario", arXiv 2311.03099, equation 2.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> deltas, base = torch.ones(1, 10_000), torch.zeros(10_000)
        >>> out = Dare(density=0.5, scale=1.0).apply(Tile(deltas, base, Place("w", (10_000,), 0, ("a",))), Known())
        >>> sorted(set(out.tolist())), abs(out.mean().item() - 1) < 0.05
        ([0.0, 2.0], True)
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Yu et al. 2024, arXiv 2311.03099"
    group = "trim, drop, elect"
    cost = "one read"
    strong = "LLMs whose changes are small"
    peft: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dare_linear": {"scale": 1.0}, "dare_linear_svd": {"scale": 1.0}}
    scales_last = True
    aliases = ("dare_linear",)
    spellings: ClassVar[Mapping[str, Number | Switch]] = {"rescale": Switch("rescale", "inverse_keep", "none")}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "dare_linear": Dialect(
            {"weight": Number("weights"), "density": COIN},
            {"normalize": Switch("normalize"), "rescale": L1_OR_NONE, "lambda": Number("scale", 1.0)},
        )
    }

    density: PerExpert = Field(default=0.5, description="share of the entries kept, 0 to 1")
    rescale: Rescale = Field(default="inverse_keep", description="how the kept entries are rescaled")
    seed: int = seed_field()
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    @model_validator(mode="after")
    def _check_rescale(self) -> Dare:
        check_rescale(self.compat, self.rescale)
        return self

    def passes(self) -> Sequence[L1Norms]:
        return (DropNorms(self.density, self.seed),) if self.rescale == "l1" else ()

    def left(self, tile: Tile, known: Known) -> Tensor:
        return drop(tile.x, self.density, self.seed, tile.at)

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        return factors(self.density, self.rescale, count, known)

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule:
        return rule._replace(drop=drop_rule(self.density, self.seed, at, (1.0,) * len(at.experts)))
