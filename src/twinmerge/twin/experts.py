"""Experts come and go: one more is split from the shared part as it is, one less takes its part along; nothing else
changes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import DataError, ModelError, TwinmergeError, UsageError
from twinmerge.maths.codec import projected
from twinmerge.models.ancestry import check_ancestry
from twinmerge.models.buffers import recorded, shared_buffers
from twinmerge.models.heads import heads_of
from twinmerge.models.matching import match
from twinmerge.models.opened import ModelLike
from twinmerge.models.opening import open_model
from twinmerge.models.torch_module import ModuleArchitecture, TorchModel
from twinmerge.recipes.names import EXPERT_NAME
from twinmerge.recipes.recipe import Recipe, is_reference, reference
from twinmerge.recipes.schema import from_description
from twinmerge.store.locate import locate
from twinmerge.twin.compress import projected_factors
from twinmerge.twin.core import Core
from twinmerge.twin.masked import record_without
from twinmerge.twin.mixing.mixture import index_of
from twinmerge.twin.package import Package
from twinmerge.twin.reading import Given, read_features
from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import held_out_split
from twinmerge.twin.routers.kit.fit import FEWEST, inputs_for, warn_unlimited
from twinmerge.twin.routers.kit.novelty import Novelty, limit_of, limits_of
from twinmerge.twin.split import Exclusive, refuse_masks, split

OWN = 0.75  # of the inputs of a new expert, that the router should send to it


def added(
    core: Core, name: str, model: ModelLike, inputs: Given | None, rank: int | None, batch_size: int, progress: bool
) -> Package:
    """A twin's package with one more expert, which its router knows (see `Twin.add`)."""
    from_experts = core.router is not None and not core.router.needs_inputs
    if core.router is not None and inputs is None and not from_experts:
        raise UsageError(f"The router must learn what inputs {name!r} is for. Give inputs of its kind.")
    own = core.package.provenance.get("twin", {}).get("rank")
    ranks = [f.rank for part in core.package.exclusive.values() for f in part.low.values()]
    package = with_expert(core.package_now(), name, model, rank or own or max([1, *ranks]), progress)
    if inputs is not None and core.router is not None and not from_experts:
        found = read_features(core, inputs, core.layers, name, batch_size, progress)
        if not found:
            raise UsageError(f"There are no inputs for the expert {name!r}. Give a few hundred.")
        package = routed_to(package, name, torch.cat(found))
    return package


def with_expert(package: Package, name: str, model: ModelLike, rank: int, progress: bool = True) -> Package:
    """The package with one more expert, v = θ − θs, and its head; the router is left as it is.

    Args:
        model: tuned from the base that the others were tuned from.
        rank: of each matrix, at least 1.

    Raises:
        TwinmergeError: a name that is taken, a model of another kind, one that has a head where the others have none,
            or experts that are masks, whose vector is made from all of them.
    """
    refuse_masks(package.exclusive.values(), "joined by one more expert")
    if name in package.exclusive:
        raise UsageError(f"The twin has an expert {name!r} already. Give the new one another name, or remove that one.")
    if not EXPERT_NAME.fullmatch(name):
        raise UsageError(f"The expert name {name!r:.80} is not usable. Use letters, digits, '_', '-' and '.'.")
    opened = {name: open_model(model, name if not isinstance(model, str) else None)}
    shared = package.shared
    patterns = package.provenance.get("recipe", {}).get("heads", ())
    matched = match(shared, opened, patterns)
    check_ancestry(shared, opened, matched.merged)
    matched.warn()
    heads = heads_of(opened, matched, [name])
    if bool(heads) != bool(package.heads):
        has, have = ("a head", "none") if heads else ("no head", "one each")
        raise ModelError(f"The expert {name!r} has {has}, the twin's experts have {have}. Build a twin of their kind.")
    names = [n for n in matched.merged if not shared.is_buffer(n)]
    part = split({n: shared.read(n) for n in names}, opened, names, rank, None, progress)[name]
    buffers = [n for n in matched.merged if shared.is_buffer(n)]
    other = shared_buffers({n: shared.read(n) for n in buffers}, opened, buffers)
    if package.codec != "none":
        part = _coded(part, package.codec)
        heads = {
            e: head._replace(
                tensors={n: projected(t, package.codec, 0 if t.dim() == 2 else None) for n, t in head.tensors.items()}
            )
            for e, head in heads.items()
        }
    twin: dict[str, Any] = dict(package.provenance.get("twin", {}))
    twin["added"] = [*twin.get("added", ()), {"name": name, "model": reference(model), "rank": rank}]
    return package._replace(
        exclusive={**package.exclusive, name: part},
        heads={**package.heads, **heads},
        provenance=recorded({**package.provenance, "twin": twin}, other),
    )


def without_expert(package: Package, name: str) -> Package:
    """The package without an expert, its head and its place in the router.

    The shared part stays what it is: it was made with the expert if that was there when the twin was built. `rebuild`
    makes it anew.

    Raises:
        TwinmergeError: no such expert, or the last one; a router that keeps no statistics.
    """
    which = index_of(name, list(package.exclusive))
    if len(package.exclusive) == 1:
        raise UsageError(f"{name!r} is the twin's only expert. Use the shared model alone, or add another first.")
    router, layers, report = package.router, package.layers, package.report
    if router is not None:
        if len(package.exclusive) == 2:
            router, layers, report = None, (), None  # nothing to choose between
        else:
            before, statistics = _with_statistics(package)
            router, report = _routed(before, statistics.without(name))
    twin: dict[str, Any] = dict(package.provenance.get("twin", {}))
    added = [entry for entry in twin.pop("added", ()) if entry["name"] != name]
    if len(added) == len(package.provenance.get("twin", {}).get("added", ())):
        twin["removed"] = [*twin.get("removed", ()), name]
    if added:
        twin["added"] = added
    return package._replace(
        exclusive={e: part for e, part in package.exclusive.items() if e != name},
        heads={e: head for e, head in package.heads.items() if e != name},
        router=router,
        layers=layers,
        report=report,
        provenance={**package.provenance, "twin": twin},
        masks=record_without(package.masks, which, len(package.exclusive)),
    )


def routed_to(package: Package, name: str, features: Tensor) -> Package:
    """The package whose router knows one more expert by the features of its inputs (rows, width)."""
    if len(features) < FEWEST:
        raise DataError(
            f"There {'is 1 input' if len(features) == 1 else f'are {len(features)} inputs'} of {name!r}. Give at least "
            f"{FEWEST}, better a few hundred."
        )
    before, statistics = _with_statistics(package)
    train, held = torch.arange(len(features)), torch.arange(0)
    if statistics.novel and len(features) >= inputs_for(statistics.refuse):
        train, held = held_out_split(torch.zeros(len(features), dtype=torch.int64), seed=0)
    statistics = statistics.with_expert(name, features[train])
    if len(held):  # its limit is that of its own rows that nothing else is made from
        novelty = Novelty.of(statistics, statistics.novel)
        own = novelty.distances(features[held])[:, -1]
        novelty.limits[-1] = limit_of(own, statistics.refuse)
        statistics = statistics._replace(limits=limits_of(novelty, statistics.experts))
    elif statistics.novel:
        warn_unlimited([name], len(statistics.experts), statistics.refuse, stacklevel=7)
    router, report = _routed(before, statistics)
    _warn_of_others(name, router.logits(features[held if len(held) else train]), statistics.experts)
    return package._replace(router=router, report=report)


def _warn_of_others(name: str, logits: Tensor, experts: Sequence[str]) -> None:
    """Tell of a new expert whose own inputs mostly or often go to others: they may be of another task's file."""
    chosen = logits.argmax(1)
    shares = {e: (chosen == k).double().mean().item() for k, e in enumerate(experts)}
    if shares[name] < OWN:
        other = max((e for e in experts if e != name), key=lambda e: shares[e])
        warnings.warn(
            f"The router sends {100 * shares[name]:.0f} % of the inputs of {name!r} to it, and {100 * shares[other]:.0f} "
            f"% to {other!r}. Check that they are of its kind, or build the twin again with inputs of all.",
            stacklevel=7,
        )


def recipe_of(
    package: Package, base: ModelLike | None = None, experts: Mapping[str, ModelLike] | None = None
) -> Recipe:
    """What the shared part would be made from now: the recipe of the build, with the experts that came and without
    those that went.

    Args:
        package: of the twin.
        base, experts: what is to be read in place of what the provenance names.

    Raises:
        TwinmergeError: a twin without provenance, or a model that is not where it was.
    """
    if "recipe" not in package.provenance:
        raise DataError("The twin does not say what it was made from. Build it again from its base and experts.")
    recipe = from_description(package.provenance["recipe"])
    models = models_of(package) | dict(experts or {})
    whole = {
        "base": _placed(package, recipe.base) if base is None else base,
        **{f"expert {name!r}": m for name, m in models.items()},
    }
    for label, model in whole.items():
        place = model.weights if isinstance(model, TorchModel) else model
        if not isinstance(place, (str, os.PathLike)):
            continue
        if not is_reference(os.fspath(place)):
            raise ModelError(
                f"The shared part is made from the base and every expert, and the {label} was in memory. Give it to "
                "rebuild (base=…, experts={…})."
            )
        try:
            if not os.path.isfile(place):
                locate(place)
        except TwinmergeError as error:
            raise type(error)(
                f"The shared part is made from the base and every expert, and the {label} is not at {place!r} any "
                "more. Say where it is."
            ) from error
    parameters = {k: v for k, v in recipe.parameters.items() if "." not in k or k.rpartition(".")[0] in models}
    return replace(recipe, base=whole["base"], experts=models, parameters=parameters)


def models_of(package: Package) -> dict[str, ModelLike]:
    """Where the experts of now were read from, by name; empty where the provenance does not say."""
    provenance = package.provenance
    if "recipe" not in provenance:
        return {}
    record = provenance.get("twin", {})
    models = dict(from_description(provenance["recipe"]).experts)
    models |= {entry["name"]: entry["model"] for entry in record.get("added", ())}
    return {name: _placed(package, m) for name, m in models.items() if name not in record.get("removed", ())}


def _placed(package: Package, model: Any) -> Any:
    """A recorded path, with what makes its module where the twin is of a module of one's own."""
    own = package.shared.architecture
    if isinstance(own, ModuleArchitecture) and isinstance(model, str) and is_reference(model):
        return TorchModel(own.build, model)
    return model


def _with_statistics(package: Package) -> tuple[Router, Statistics]:
    """The router, and the aggregates that it was made of."""
    router = package.router
    if router is None or router.statistics is None:
        raise UsageError(
            "The twin's router keeps no statistics, so it cannot take experts in or out. Fit it again with the inputs "
            "of every expert (kind gaussian), or put router.statistics.safetensors back into the folder."
        )
    return router, router.statistics


def _routed(router: Router, statistics: Statistics) -> tuple[Router, dict[str, Any] | None]:
    """A router of other statistics, and the report of the first fit where its experts are the first ones again."""
    same = tuple(statistics.experts) == statistics.first
    report = dict(statistics.report) if same and statistics.report else None
    return router.changed(statistics), report


def _coded(part: Exclusive, codec: str) -> Exclusive:
    low = {n: projected_factors(f, f.rank, codec) for n, f in part.low.items()}
    return Exclusive(low, {n: projected(t, codec) for n, t in part.dense.items()}, part.energy)
