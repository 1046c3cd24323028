"""DARE-TIES: random drop and rescale instead of the trim, then the sign election of TIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from twinmerge.maths.rule import Rule
from twinmerge.methods.dare import L1_OR_NONE, Dare, DropNorms, Rescale, check_rescale, drop, drop_rule, factors
from twinmerge.methods.kit.base import Known, Pass, PerExpert, Place, Tile, seed_field
from twinmerge.methods.kit.dialect import COIN, Dialect, Number, Switch
from twinmerge.methods.kit.election import MEAN_OR_SUM
from twinmerge.methods.kit.sparse import times
from twinmerge.methods.ties import Ties

if TYPE_CHECKING:
    from torch import Tensor


class DareTies(Ties):
    """TIES on τ′ = m ⊙ τ / density, m ~ Bernoulli(density).

    The drop takes the place of the trim; a `trim_density` below 1 then also trims what the drop left, as TIES does.
    Election and disjoint mean as in `ties`; masks as in `dare`.

    Source: Yu et al. 2024, "Language models are super Mario", arXiv 2311.03099, section 4.3 (DARE before TIES-Merging).

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
    group = "trim, drop, elect"
    cost = "one read"
    strong = "small changes, signs in conflict"
    peft: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dare_ties_svd": {}}
    spellings: ClassVar[Mapping[str, Number | Switch]] = {**Ties.spellings, **Dare.spellings}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "dare_ties": Dialect(
            {"weight": Number("weights"), "density": COIN},
            {"normalize": MEAN_OR_SUM, "rescale": L1_OR_NONE, "lambda": Number("scale", 1.0)},
        )
    }

    density: PerExpert = Field(default=0.5, description="share of the entries that the random drop keeps, 0 to 1")
    trim_density: PerExpert = Field(default=1.0, description="share that TIES then trims to, 0 to 1")
    rescale: Rescale = Field(  # type: ignore[assignment]  # a drop can be made up for by its share, a trim cannot
        default="inverse_keep", description="how the kept entries are rescaled, before the trim"
    )
    seed: int = seed_field()

    @model_validator(mode="after")
    def _check_rescale(self) -> DareTies:
        check_rescale(self.compat, self.rescale)
        return self

    @property
    def share_kept(self) -> PerExpert:
        return self.trim_density

    def norm_passes(self) -> list[Pass[Any]]:
        return []  # of what the trim leaves

    def passes(self) -> Sequence[Pass[Any]]:
        first = [DropNorms(self.density, self.seed)] if self.rescale == "l1" else []
        return [*first, *super().passes()]

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        x = drop(tile.x, self.density, self.seed, tile.at)
        return times(x, factors(self.density, self.rescale, len(x), known), tile.work)

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule | None:
        by, found = factors(self.density, self.rescale, len(at.experts), known), super().staged(rule, at, known)
        return None if found is None else found._replace(drop=drop_rule(self.density, self.seed, at, by))
