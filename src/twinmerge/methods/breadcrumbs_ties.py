"""Breadcrumbs, then the sign election of TIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from twinmerge.methods.breadcrumbs import OWN, RESCALE, Band
from twinmerge.methods.kit.base import Pass
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.election import MEAN_OR_SUM, Elects


class BreadcrumbsTies(Band, Elects):
    """TIES on the band of magnitudes that Breadcrumbs leaves of each task vector, in the place of the trim.

    Band as in `breadcrumbs`; election and disjoint merge as in `ties`. mergekit made this of the two; its `normalize`
    is merge="mean", and by default it adds what agrees.

    Source: Davari & Belilovsky 2024, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV,
    arXiv 2312.06795, for the band; Yadav et al. 2023, arXiv 2306.01708, for the election.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Known, Place, Tile
        >>> method = BreadcrumbsTies(density=0.4, gamma=0.2, scope="row")
        >>> rows = torch.tensor([[[1.0, -5, 3, 2, 4]], [[5.0, 0, -1, 2, 2]]])
        >>> method.apply(Tile(rows, torch.zeros(1, 5), Place("w", (1, 5), 0, ("a", "b"))), Known()).tolist()
        [[0.0, 0.0, 3.0, 2.0, 3.0]]
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Davari & Belilovsky 2024, arXiv 2312.06795; Yadav et al. 2023, arXiv 2306.01708"
    group = "trim, drop, elect"
    cost = "two reads"
    strong = "the same, where signs conflict"
    scales_last = True
    spellings: ClassVar[Mapping[str, Number | Switch]] = {"normalize": MEAN_OR_SUM}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "breadcrumbs_ties": Dialect(OWN, {"normalize": MEAN_OR_SUM, "rescale": RESCALE, "lambda": Number("scale", 1.0)})
    }

    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Pass[Any]]:
        return [*self.band_passes(), *super().passes()]
