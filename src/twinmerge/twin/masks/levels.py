"""All masks of a grid of thresholds at once, three bits for each weight and expert, while λt is being chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.engine.merge import Merge
from twinmerge.engine.ranges import Range
from twinmerge.errors import RecipeError, UsageError
from twinmerge.maths.bits import byte_count, pack, plane_at, planes
from twinmerge.methods.kit.base import Known
from twinmerge.methods.kit.given import vector_of
from twinmerge.methods.kit.masks import GRID, Marking, beyond, sizes
from twinmerge.methods.kit.registry import short_name
from twinmerge.recipes.recipe import Recipe
from twinmerge.twin.masks.build import changed_tensors, in_given_order, mask_merge, walk


class MaskLevels(NamedTuple):
    """The masks at every threshold of a grid.

    merge: what they are of; grid: rising thresholds; vectors: canonical name -> τ in the base's dtype; planes:
    canonical name -> (experts, 3, bytes) uint8, as `bits.planes`, experts as given.
    """

    merge: Merge
    grid: tuple[float, ...]
    vectors: dict[str, Tensor]
    planes: dict[str, Tensor]

    def at(self, chosen: Sequence[int]) -> Iterator[tuple[str, list[Tensor]]]:
        """Canonical name -> the packed mask of every expert, bit for bit that of the threshold.

        Args:
            chosen: for each expert the index of its threshold in the grid.
        """
        for name, levels in self.planes.items():
            yield name, [plane_at(own, k + 1) for own, k in zip(levels, chosen, strict=True)]


def levels(
    recipe: Recipe, grid: Sequence[float] = GRID, *, progress: bool = True, tile: int | None = None
) -> MaskLevels:
    """Read base and experts once for all thresholds; the recipe's own threshold is not used.

    In memory, as is the model that the masks are tried on: τ, and three bits for each weight and expert.

    Args:
        grid: 1 to 7 thresholds, rising, above 0 and at most 1.

    Raises:
        TwinmergeError: another grid, a method without a threshold, and as `build_masks` says.
    """
    if not grid or list(grid) != sorted(set(grid)) or not 0 < grid[0] <= grid[-1] <= 1 or len(grid) > 7:
        raise UsageError(f"The thresholds {list(grid)} are no grid. Give 1 to 7 rising ones, above 0 and at most 1.")
    merge = mask_merge(recipe, progress, tile)
    if not isinstance(merge.method, Marking):
        raise RecipeError(
            f"{short_name(recipe.method)} has no threshold, so there is none to choose. Build masks with it as it is."
        )
    changed = changed_tensors(merge)
    canonical = merge.plan.canonical
    vectors, found = {}, {}
    for out_name in changed:
        spec, name = merge.plan.specs[out_name], canonical[out_name]
        vectors[name] = torch.empty(spec.shape, dtype=spec.dtype)
        found[name] = torch.zeros(len(merge.experts), 3, byte_count(spec.numel), dtype=torch.uint8)
    for _ in walk(merge, changed, partial(_fill, merge, tuple(grid), vectors, found)):
        pass
    return MaskLevels(merge, tuple(grid), vectors, found)


def _fill(
    merge: Merge,
    grid: tuple[float, ...],
    vectors: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    each: Range,
    known: Known,
) -> None:
    method, name = merge.method, merge.plan.canonical[each.name]
    assert isinstance(method, Marking)
    for tile in merge.inputs.pieces(each, merge.inputs.stored(each)):
        vector = vector_of(method.one_vector(tile, known), tile, method)
        start, count = tile.at.offset, vector.numel()
        vectors[name].view(-1)[start : start + count] = merge.plan.rounding(each.name).of(vector, tile, merge.method)
        at = slice(start // 8, start // 8 + byte_count(count))
        own = in_given_order(merge, list(tile.x))
        for row, to in zip(own, found[name], strict=True):
            size, distance = sizes(row, vector)
            to[:, at] = planes([pack(beyond(size, distance, threshold)) for threshold in grid])


def choose(count: int, grid: Sequence[float], score: Callable[[int, float], float]) -> list[float]:
    """The threshold of each expert at which its own task scores best, the smallest of equals.

    Args:
        count: of the experts.
        score: expert's number, threshold -> the score of its task under its own mask, on validation rows.

    Example:
        >>> choose(2, (0.2, 0.4, 0.6), lambda expert, threshold: [0.9, 1 - abs(threshold - 0.4)][expert])
        [0.2, 0.4]

    Source: Wang et al. 2024, arXiv 2405.07813: task by task, out of five.
    """
    return [max(sorted(grid), key=partial(score, expert)) for expert in range(count)]
