"""λt of every task, chosen on validation rows: each task is answered by its own expert under every mask of the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twinmerge.maths.bits import plane_at, unpack
from twinmerge.methods.kit.masks import GRID
from twinmerge.models.heads import headed
from twinmerge.models.transformers_class import position_limit
from twinmerge.progress import meter as progress_meter
from twinmerge.recipes.recipe import Recipe
from twinmerge.study.evaluate import StaticRunner, evaluate, tokenizer_folder
from twinmerge.study.search import check_split
from twinmerge.tasks.encode import TextEncoder
from twinmerge.tasks.suite import Task
from twinmerge.twin.masked import unmasked
from twinmerge.twin.masks.levels import MaskLevels, choose, levels
from twinmerge.twin.masks.results import Chosen


def choose_thresholds(
    recipe: Recipe,
    suite: Mapping[str, Task],
    *,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    grid: Sequence[float] = GRID,
    progress: bool = True,
) -> Chosen:
    """Score every task with its own masked expert at every threshold; the best is taken, the smallest of equals.

    One model is held, into which the weights of one expert after the other are put, and all masks at three bits for
    each weight and expert. What is answered is what `extract_masked` would write.

    Args:
        recipe: base, experts and a method with a threshold.
        suite: task -> data; the tasks' names are those of the experts.
        split, limit, seed: the rows that decide, as in `evaluate`.
        grid: rising thresholds; the paper's where it is not given.

    Raises:
        TwinmergeError: a split for testing, and as `levels` and `evaluate`.

    Source: Wang et al. 2024, arXiv 2405.07813, section 4.
    """
    check_split(split)
    found = levels(recipe, grid, progress=progress)
    merge = found.merge
    experts = list(recipe.experts)
    base = {name: merge.base.read(name) for name in merge.base.specs}
    model = headed(merge.base, merge.experts, {n: t.clone() for n, t in base.items()}, merge.heads())
    encoder = TextEncoder(tokenizer_folder(merge), positions=position_limit(model.architecture.config))
    runner = StaticRunner(model, encoder)
    places = {model.canonical(key): tensor for key, tensor in model.body.state_dict().items()}
    scores: dict[str, dict[float, float]] = {task: {} for task in experts}
    rows: dict[str, int] = {}
    bar = progress_meter("choosing thresholds", progress, len(experts) * len(grid))

    def score(expert: int, threshold: float) -> float:
        task = experts[expert]
        put_on(places, base, found, expert, found.grid.index(threshold))
        answered = evaluate(runner, {task: suite[task]}, split, limit, seed, progress=False)[0]
        scores[task][threshold], rows[task] = answered.scores[task], answered.rows
        bar.update()
        return scores[task][threshold]

    with bar:
        best = choose(len(experts), found.grid, score)
    return Chosen(dict(zip(experts, best, strict=True)), scores, split, sum(rows.values()))


def put_on(places: Mapping[str, Tensor], base: Mapping[str, Tensor], found: MaskLevels, expert: int, at: int) -> None:
    """Fill a model's own tensors, by canonical name, with those of an expert under its mask at one threshold."""
    with torch.no_grad():
        for name, vector in found.vectors.items():
            mask = unpack(plane_at(found.planes[name][expert], at + 1), vector.numel()).reshape(vector.shape)
            places[name].copy_(unmasked(base[name], vector, mask, 1.0))
