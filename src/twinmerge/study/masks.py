"""Masks of many experts in one call: thresholds as given, or chosen on a suite's validation rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinmerge.arguments import strict
from twinmerge.errors import UsageError
from twinmerge.methods.kit.registry import MethodLike
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.output import OutputFolder
from twinmerge.twin.masks.build import mask_merge, write_masks
from twinmerge.twin.masks.results import BuiltMasks

if TYPE_CHECKING:  # with torch and transformers, which only a suite asks for
    from twinmerge.tasks.suite import Task


@strict
def build_masks(
    method: MethodLike | Recipe,
    base: ModelLike | None = None,
    experts: Mapping[str, ModelLike] | None = None,
    out: str | Path | None = None,
    *,
    heads: str | tuple[str, ...] | list[str] = (),
    suite: str | Path | Mapping[str, Task] | None = None,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    **parameters: Any,
) -> BuiltMasks:
    """Keep many experts in little more than two models: θ0, one vector τ, and a bit for each weight and expert.

    θt ≈ θ0 + st · mt ⊙ τ. The folder is a twin: stock transformers loads θ0 from its folder `shared`,
    `Twin.from_pretrained` runs every expert from it, and `extract_masked` writes one of them as a plain model.

    Args:
        method: "tall_masks", "emr", or a class or object of your own that gives masks; or a recipe, which says all of
            the merge.
        base: the model that the experts were tuned from.
        experts: name -> path, hub id, `base+adapter`, or a model in memory.
        out: a folder that does not exist or is empty; it is whole or not there.
        heads: patterns of tensors to keep per expert besides those found.
        suite: task -> data, or a suite's folder; its tasks are the experts. It chooses the threshold of each.
        split: which rows of the suite decide; never those for testing.
        limit: at most so many rows per task, drawn by `seed`.
        seed: of `limit`.
        about: expert -> more keys of its entry in heads.json.
        progress: show how far it is.
        parameters: of the method; a mapping sets them per expert: threshold={"math": 0.4, "code": 0.5}.

    Raises:
        TwinmergeError: a method of another kind, thresholds that are given and chosen, a split for testing, experts
            that change nothing at all, an output that is there.
    """
    if out is None:
        raise UsageError("build_masks has no out, and masks are made on the disk alone. Name a folder.")
    OutputFolder(out).check()
    recipe = Recipe.of(method, base, experts, heads=heads, parameters=parameters)
    mask_merge(recipe)
    if suite is None:
        return write_masks(recipe, out, about, progress=progress)
    if any(name.rpartition(".")[2] == "threshold" for name in recipe.parameters):
        raise UsageError("Both --suite and -p threshold are given. Leave out one of them.")
    from twinmerge.study.thresholds import choose_thresholds
    from twinmerge.tasks.suite import open_suite

    tasks = suite if isinstance(suite, Mapping) else open_suite(suite, list(recipe.experts))
    chosen = choose_thresholds(recipe, tasks, split=split, limit=limit, seed=seed, progress=progress)
    own = {f"{task}.threshold": threshold for task, threshold in chosen.thresholds.items()}
    kept = {
        name: {"task": name, "metric": tasks[name].metric, **(about or {}).get(name, {})} for name in recipe.experts
    }
    recipe = replace(recipe, parameters={**recipe.parameters, **own})
    return write_masks(recipe, out, kept, progress=progress)._replace(chosen=chosen)
