"""DARE-TIES: random drop and rescale instead of the trim, then the sign election of TIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from twinmerge.maths.fused import Rule
from twinmerge.methods.dare import L1_OR_NONE, Dare, L1Norms, Rescale, check_rescale, drop, drop_rule, factors
from twinmerge.methods.kit.base import Known, Pass, PerExpert, Place, Tile, column, seed_field
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.ties import MEAN_OR_SUM, Ties

if TYPE_CHECKING:
    from torch import Tensor


class DareTies(Ties):
    """TIES on τ′ = m ⊙ τ / density, m ~ Bernoulli(density).

    The drop takes the place of the trim; a `trim_density` below 1 then also trims what the drop left, as TIES does.
    Election and disjoint mean as in `ties`; masks as in `dare`.

    Source: Yu et al. 2024, arXiv 2311.03099, section 4.3 (DARE before TIES-Merging).

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place
        >>> deltas, base = torch.tensor([[0.5], [0.4], [-0.6]]), torch.zeros(1)
        >>> at = Place("w", (1,), 0, ("a", "b", "c"))
        >>> DareTies(density=1.0).apply(Tile(deltas, base, at), Known())
        tensor([0.4500])
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Yu et al. 2024, arXiv 2311.03099"
    spellings: ClassVar[Mapping[str, Number | Switch]] = {**Ties.spellings, **Dare.spellings}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "dare_ties": Dialect(
            {"weight": Number("weights"), "density": Number("density", 1.0)},
            {"normalize": MEAN_OR_SUM, "rescale": L1_OR_NONE, "lambda": Number("scale", 1.0)},
        )
    }

    density: PerExpert = Field(default=0.5, description="share of the entries that the random drop keeps, 0 to 1")
    trim_density: PerExpert = Field(default=1.0, description="share that TIES then trims to, 0 to 1")
    rescale: Rescale = Field(default="inverse_keep", description="how the kept entries are rescaled")
    seed: int = seed_field()

    @model_validator(mode="after")
    def _check_rescale(self) -> DareTies:
        check_rescale(self.compat, self.rescale)
        return self

    @property
    def share_kept(self) -> PerExpert:
        return self.trim_density

    def passes(self) -> Sequence[Pass[Any]]:
        first = [L1Norms(self.density, self.seed)] if self.rescale == "l1" else []
        return [*first, *super().passes()]

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        x = drop(tile.x, self.density, self.seed, tile.at)
        by = factors(self.density, self.rescale, len(x), known)
        return x.mul_(column(by, x)) if tile.work == x.dtype else (x * column(by, x.double())).to(x.dtype)

    def rule(self, at: Place, known: Known) -> Rule | None:
        by, rule = factors(self.density, self.rescale, len(at.experts), known), super().rule(at, known)
        return None if rule is None else rule._replace(drop=drop_rule(self.density, self.seed, at, by))
