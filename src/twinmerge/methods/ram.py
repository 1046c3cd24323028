"""RAM: what one expert alone changed stays as it is, what several changed is averaged over those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule, Trim
from twinmerge.methods.kit.base import Known, Method, Place, Tile, moved, scale_field, weighted_sum
from twinmerge.methods.kit.dialect import Dialect, Number

if TYPE_CHECKING:
    from torch import Tensor


class Ram(Method):
    """θ = θ0 + λ · the mean of τt over the experts that changed an entry, |τt| > ε.

    So what one expert alone changed is taken as it is, which a mean over all experts would make smaller. Made for
    experts trained by reinforcement learning, whose task vectors are sparse. ε is compared in float32, absolutely: in
    bfloat16 a step of a weight of size 0.02 is 6e-5. mergekit's semantics are this very formula.

    Source: Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv 2601.13572, and its code.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place
        >>> deltas = torch.tensor([[1.0, 3.0, 0.0], [0.0, -1.0, 1e-6]])
        >>> Ram().apply(Tile(deltas, torch.zeros(3), Place("w", (3,), 0, ("a", "b"))), Known()).tolist()
        [1.0, 1.0, 0.0]
    """

    laws = frozenset({"symmetric", "odd"})
    paper = "Yuan et al. 2026, arXiv 2601.13572"
    group = "sums of changes"
    cost = "one read"
    strong = "RL experts, with sparse changes"
    scales_last = True
    mergekit: ClassVar[Mapping[str, Dialect]] = {"ram": Dialect({}, {"epsilon": Number("epsilon", 1e-5)})}

    epsilon: float = Field(default=1e-5, ge=0, description="ε: an entry counts as changed above it")
    scale: float = scale_field(1.0)
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def changed(self, tile: Tile) -> Tensor:
        """The stack with all but the changed entries at zero."""
        import torch

        return torch.nn.functional.hardshrink(tile.x, float(np.float32(self.epsilon)))

    def kept(self, count: int) -> Rule:
        """The same as data: the task vectors, of which what is above ε is left."""
        bits = int(np.float32(self.epsilon).view(np.uint32))
        return Rule((1.0,) * count, deltas=True, trim=Trim((bits,) * count, (0,) * count))

    def alone(self, count: int, known: Known) -> tuple[float, ...]:
        """What is multiplied with what each expert alone changed."""
        return (1.0,) * count

    def apply(self, tile: Tile, known: Known) -> Tensor:
        x = self.changed(tile)
        times = (x != 0).sum(0).to(tile.work)
        mean = weighted_sum(1.0, x, tile.work) / times.clamp_min(1)
        own = weighted_sum(self.alone(len(x), known), x, tile.work)
        return moved(tile, mean.where(times > 1, own), self.scale)

    def rule(self, at: Place, known: Known) -> Rule:
        count = len(at.experts)
        return self.kept(count)._replace(weights=self.alone(count, known), scale=self.scale, combine="overlap")
