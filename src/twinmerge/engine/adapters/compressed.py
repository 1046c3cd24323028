"""Compress, then merge: adapters are brought into directions that they share, where a method merges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from twinmerge.engine.adapters.folder import Limit, compress
from twinmerge.engine.ranges import Range
from twinmerge.engine.run import Run
from twinmerge.engine.seen import Digests
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.shared_space import SharedSpace
from twinmerge.maths.threads import parallel
from twinmerge.methods.kit.base import Known, Method, Place, Tile, per_expert
from twinmerge.methods.kit.given import factors_of, merged_tile
from twinmerge.methods.kit.spectral import as_precise


def merges_cores(rule: Method) -> bool:
    """Whether a method merges changes of the weights by weights alone, so that it can merge cores.

    Example:
        >>> from twinmerge.methods.ties import Ties
        >>> from twinmerge.methods.regmean import Regmean
        >>> merges_cores(Ties()), merges_cores(Regmean())
        (True, False)
    """
    return rule.space == "deltas" and not rule.needs and rule.outputs == "model"


class _Matrix(Place):
    """The place of a core, which is as much of a matrix as what it is the core of, of one row too."""

    @property
    def is_matrix(self) -> bool:
        return True


class Compressed:
    """The matrices of adapters in the spaces that they share, as a run's tiles.

    Args:
        rule: that merges them.
        parts: name -> the factors of every expert.
        places: name -> where that matrix lies.
        rank: of the spaces.
        by_norm: as of `SharedSpace.of`.
    """

    def __init__(
        self,
        rule: Method,
        parts: Mapping[str, Sequence[Factors]],
        places: Mapping[str, Place],
        rank: int,
        by_norm: float,
    ) -> None:
        self.rule, self.parts, self.rank = rule, parts, rank
        weights = per_expert(dict(rule).get("weights", 1.0), len(next(iter(places.values())).experts))
        share = [bool(weight) for weight in weights]
        names = list(parts)
        found = parallel(lambda name: SharedSpace.of(parts[name], rank, by_norm, share), names)
        self.spaces = dict(zip(names, found, strict=True))
        self.places = {name: self._place(name, places[name]) for name in names}
        self.grains = {name: "matrix" if self.whole(name) else rule.grain_of(at) for name, at in self.places.items()}
        self.shapes = {name: at.shape for name, at in self.places.items()}

    def whole(self, name: str) -> bool:
        """Whether a matrix is merged as if there were no rank: the adapters have no more directions together."""
        return self.rule.core_space and not self.spaces[name].is_cut

    def _place(self, name: str, at: Place) -> Place:
        if self.whole(name):
            return at
        own = as_precise(self.parts[name], at)._replace(shape=tuple(self.spaces[name].cores.shape[1:]))
        return _Matrix(*own) if at.is_matrix else own

    def load(self, each: Range, digests: Digests) -> Tile:
        at = self.places[each.name]._replace(offset=each.start)
        if self.whole(each.name):
            own = self.parts[each.name]
            return Tile.of(lambda: (torch.stack([p.dense() for p in own]), None, torch.float64), at, None, factors=own)
        x = self.spaces[each.name].cores
        if self.grains[each.name] == "element":
            x = x.flatten(1)[:, each.start : each.stop].contiguous()
        return Tile(x, torch.zeros_like(x[0]), at, torch.float64)

    def merged(self, progress: bool) -> Iterator[tuple[str, Factors, float]]:
        """Name, merged factors of at most this rank, and the share of the adapters' squared norms that the space
        holds."""
        cores = {
            name: torch.zeros(self.shapes[name], dtype=torch.float64) for name in self.parts if not self.whole(name)
        }

        def work(each: Range, known: Known) -> tuple[str, Factors | None]:
            tile = self.load(each, Digests())
            if self.whole(each.name):
                found = self.rule.merge_factors(self.parts[each.name], tile.at, known)
                return each.name, factors_of(found, tile.at.shape, each.name, self.rule)
            core = merged_tile(self.rule.apply(tile, known), tile, self.rule)
            cores[each.name].view(-1)[each.start : each.stop] = core.reshape(-1)
            return each.name, None

        run = Run(self.rule, list(self.parts), self.shapes, self.load, self.grains, progress=progress)
        run.survey()
        answers = {name: found for group in run.merge(run.groups(), work) for name, found in group}
        for name, found in answers.items():
            space = self.spaces[name]
            factors = space.factors(cores[name]) if found is None else found
            yield name, compress(factors, Limit(self.rank), name)[0], space.kept
