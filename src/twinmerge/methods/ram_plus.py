"""RAM+: RAM, and what one expert alone changed is made stronger by how much else of it overlaps with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from twinmerge.maths.fused import staged
from twinmerge.methods.kit.base import Known, Partial, Pass, Scope, Tile, decided
from twinmerge.methods.kit.dialect import Dialect, Number
from twinmerge.methods.ram import Ram

DECIDED = {"mergekit": {"scope": "tensor"}}


class Overlaps(Pass[tuple[float, ...]]):
    """Of every expert: how many entries it changed together with others, for each that it changed alone."""

    name = "ram_overlaps"

    def __init__(self, method: Ram, scope: Scope) -> None:
        self.method, self.scope = method, scope

    def observe(self, tile: Tile, known: Known) -> Partial:
        changed = None
        if tile.stored is not None:
            x, sound = staged(
                self.method.kept(len(tile.stored.experts)), tile.stored.base, tile.stored.experts, tile.at.offset
            )
            changed = x != 0 if sound else None  # else the tile says whose numbers are none
        if changed is None:
            changed = self.method.changed(tile).ne(0).flatten(1).cpu().numpy()
        alone = changed & (changed.sum(0, dtype=np.uint16) == 1)
        return {"alone": alone.sum(1), "all": changed.sum(1)}

    def finish(self, total: Partial, known: Known) -> tuple[float, ...]:
        """0 for an expert that changed nothing together with others."""
        both = zip(total["alone"].tolist(), total["all"].tolist(), strict=True)
        return tuple((every - alone) / max(alone, 1) for alone, every in both)


class RamPlus(Ram):
    """θ = θ0 + λ · the mean of τt over the experts that changed an entry, times 1 + r · min(ρt, α) where that is one.

    As `ram`; ρt is how many entries expert t changed together with others, for each that it changed alone, over the
    whole model (scope "model", as the authors' code counts) or each tensor ("tensor"). The defaults are those of the
    command that the authors give for RAM+: a factor of at most 1.2, reached where ρt is 1.

    compat="mergekit" counts each tensor by itself, which is its ramplus_tl.

    Source: Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv 2601.13572, and its code.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place
        >>> deltas, at = torch.tensor([[1.0, 3.0, 0.0], [0.0, -1.0, 1e-6]]), Place("w", (3,), 0, ("a", "b"))
        >>> RamPlus(r=0.5).apply(Tile(deltas, torch.zeros(3), at), Known(ram_overlaps=(1.0, 0.0))).tolist()
        [1.5, 1.0, 0.0]
    """

    cost = "two reads"
    strong = "RL experts; lifts unshared parts"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "ramplus_tl": Dialect(
            {},
            {"epsilon": Number("epsilon", 1e-5), "r": Number("r", 0.1), "alpha": Number("alpha", 0.2)},
        )
    }

    r: float = Field(default=0.2, description="how much stronger, for each entry that overlaps for one that does not")
    alpha: float = Field(default=1.0, ge=0, description="α: the overlap counts up to this")
    scope: Scope = Field(default="model", description="where the overlap is counted: the whole model, or each tensor")

    @model_validator(mode="before")
    @classmethod
    def _decide(cls, values: Any) -> Any:
        return decided(values, DECIDED)

    def passes(self) -> Sequence[Pass[Any]]:
        return (Overlaps(self, self.scope),)

    def alone(self, count: int, known: Known) -> tuple[float, ...]:
        return tuple(1 + self.r * min(overlap, self.alpha) for overlap in known.of(Overlaps))
