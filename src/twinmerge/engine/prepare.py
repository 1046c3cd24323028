"""From a plan and its opened inputs to a run whose rules are settled: what must happen before a tensor is merged."""

from __future__ import annotations

from twinmerge.engine.by_names import checked_by_names
from twinmerge.engine.inputs import Inputs
from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan, grains_of
from twinmerge.engine.planning import planned
from twinmerge.engine.run import Map, Run
from twinmerge.engine.slicing import Sliced, sliced
from twinmerge.models.ancestry import check_ancestry
from twinmerge.models.matching import Matched, match
from twinmerge.recipes.lines import KEY, Automatic
from twinmerge.recipes.recipe import Recipe


def matched_models(recipe: Recipe, models: Models, layers: Sliced | None) -> Matched:
    """Which tensor goes where; headers and the beginning of one matrix are read.

    Args:
        recipe: what is to be merged.
        models: its opened models.
        layers: what its slices give.

    Raises:
        TwinmergeError: as `match` and `check_ancestry`.
    """
    if layers is not None:
        return layers.matched
    found = match(models.base, models.experts, recipe.heads, recipe.semantics == "mergekit")
    if recipe.by_names or models.base.is_file:
        found = found._replace(configs=checked_by_names(models))
    check_ancestry(models.base, models.experts, found.merged)
    return found


def plan_of(recipe: Recipe, models: Models) -> Plan:
    """The plan of a recipe whose models are opened."""
    layers = sliced(recipe, models) if recipe.slices else None
    return planned(recipe, models, matched_models(recipe, models, layers), True, None, layers)


def new_run(plan: Plan, inputs: Inputs, progress: bool, processes: bool = False, spread: Map | None = None) -> Run:  # type: ignore[type-arg]
    """The rules of a plan over all merged tensors, in the order that they lie on the disk; nothing is read yet."""
    methods = {name: entry.rule for name, entry in plan.merged.items()}
    run = Run(
        methods,
        list(plan.merged),
        inputs.shapes,
        inputs.load,
        grains_of(plan.merged),
        plan.tile,
        progress,
        processes,
        inputs.seen,
        spread,
    )
    run.known |= inputs.from_headers()
    if plan.lines is not None and plan.lines.a is None:
        import torch  # noqa: F401  as in `Inputs`

        run.survey_last(Automatic(methods))
    return run


def surveyed(run: Run, inputs: Inputs) -> Inputs:
    """Find all that must be known before the first tensor is merged; the inputs with their rules settled."""
    inputs.check_parts()
    run.survey()
    plan = inputs.plan
    assert plan is not None
    return inputs.with_plan(plan.with_lines(run.known.pop(KEY))) if KEY in run.known else inputs
