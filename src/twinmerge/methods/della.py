"""DELLA: drop by rank at random, then the sign election of TIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from twinmerge.methods.dare import L1_OR_NONE
from twinmerge.methods.della_linear import OWN, DellaLinear, MagPrune
from twinmerge.methods.kit.base import Pass
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.election import MEAN_OR_SUM, Elects


class Della(MagPrune, Elects):
    """θ = θ0 + λ · the mean of what agrees with the elected sign, of what MagPrune leaves of each task vector.

    1. Drop: MagPrune, as in `della_linear`.
    2. Elect: the sign of Σt τ′t, entry by entry, as in `ties`.
    3. Fuse: the mean ("sum", "max") of the entries that have the elected sign, times λ; dropped ones never count.

    compat="mergekit" restores the L1 norm of each tensor in step 1 (rescale="l1") or nothing, weighs before the
    election and sends ties to +1; see `della_linear` for its ranks.

    Source: Deep et al. 2024, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    arXiv 2406.11617, section 3.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Known, Place, Tile
        >>> deltas, base = torch.tensor([[0.5], [0.4], [-0.6]]), torch.zeros(1)
        >>> Della(density=1.0).apply(Tile(deltas, base, Place("w", (1,), 0, ("a", "b", "c"))), Known())
        tensor([0.4500])
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Deep et al. 2024, arXiv 2406.11617"
    group = "trim, drop, elect"
    cost = "one sorted read"
    strong = "13B LLMs: above DARE and TIES"
    scales_last = True
    spellings: ClassVar[Mapping[str, Number | Switch]] = {"normalize": MEAN_OR_SUM, **DellaLinear.spellings}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "della": Dialect(
            OWN,
            {
                "normalize": replace(MEAN_OR_SUM, default=True),
                "rescale": L1_OR_NONE,
                "lambda": Number("scale", 1.0),
            },
        )
    }

    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Pass[Any]]:
        return [*self.norm_passes(), *super().passes()]
