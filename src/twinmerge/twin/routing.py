"""Which mixture each row of a batch gets: the one that is named, or the router's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from twinmerge.arguments import at_least_one, fits, shown
from twinmerge.errors import UsageError, nearest
from twinmerge.models.layers import Early, called_before, depth, layer_count
from twinmerge.models.rows import for_each_row
from twinmerge.results import some
from twinmerge.twin.answer import planned
from twinmerge.twin.core import Core
from twinmerge.twin.mixing.converted import Converted
from twinmerge.twin.mixing.mixture import MixtureLike, index_of, mixture_weights, on_simplex, one_hot
from twinmerge.twin.package import Package
from twinmerge.twin.reading import Given, check_batch, input_directions, probe, read_batches
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import RouterReport
from twinmerge.twin.routers.kit.features import read_states
from twinmerge.twin.routers.kit.fit import fit_router, make_of_experts, read_of
from twinmerge.twin.routers.kit.novelty import check_refuse
from twinmerge.twin.split import without_parameters

CHOICE = ("mixture", "expert", "experts_per_row", "normalize", "unconstrained")
"""What a caller may say of mixtures."""

PerRow = int | Literal["own"] | None
"""How many experts the router gives a row at most: the twin's own number, or all where None."""

TOP_K = (
    "top_k is an argument of transformers' sampling, for generate alone. How many experts the router mixes is "
    "experts_per_row."
)
WANTS_ALL_LAYERS = ("output_hidden_states", "output_attentions", "labels")


class Routed(NamedTuple):
    """weights: the mixtures (rows, experts), zeros for rows that are nobody's; nearest: (rows,) the likeliest expert,
    also of such rows, None where mixtures were named; early: the first layers' states, where routing read them and
    the pass may go on there; soft: the router's probabilities (rows, experts), of which the weights are the largest."""

    weights: Tensor
    nearest: Tensor | None = None
    early: Early | None = None
    soft: Tensor | None = None


def mixtures(
    core: Core,
    batch: Mapping[str, Any],
    mixture: MixtureLike | None = None,
    expert: str | Sequence[str] | None = None,
    experts_per_row: PerRow = "own",
    normalize: bool = False,
    unconstrained: bool = False,
) -> Routed:
    """What a call with these choices uses (see `Twin.forward`); one row where the batch is empty."""
    per_row_most = core.experts_per_row if experts_per_row == "own" else experts_per_row
    if per_row_most is not None:
        at_least_one("experts_per_row", per_row_most)
        if experts_per_row != "own" and per_row_most > len(core.experts):
            raise UsageError(
                f"experts_per_row is {per_row_most}, and the twin has {len(core.experts)} experts "
                f"({some(core.experts)}). Give that many at most, or None for all."
            )
    if mixture is None and expert is None:
        return routed(core, batch, per_row_most)
    if mixture is not None and expert is not None:
        raise UsageError("Both mixture and expert are given. Give one of them.")
    size = core.rows(batch) if batch else 1
    if expert is not None:
        return Routed(one_hot(per_row(expert, size, "expert"), core.experts).to(core.device))
    assert mixture is not None
    weights = mixture_weights(mixture, core.experts, size).to(core.device)
    return Routed(weights if unconstrained else on_simplex(weights, normalize))


def mixtures_for(core: Core, batch: Any, choice: Mapping[str, Any]) -> Tensor:
    """The mixtures (rows, experts) that a call with the same choice would use; one row where the batch is empty."""
    check_batch(batch, core.own_module)
    check_choice(choice)
    return mixtures(core, batch, **choice).weights


def check_choice(choice: Mapping[str, Any], known: Sequence[str] = CHOICE) -> None:
    """Refuse what is no choice of a mixture.

    Raises:
        UsageError: a name that is not known.
    """
    for name in choice:
        if name == "top_k":
            raise UsageError(TOP_K)
        if name not in known:
            raise UsageError(f"There is no choice {name!r} here.{nearest(name, known)} There are: {', '.join(known)}.")


def check_names(core: Core, batch: Mapping[str, Any]) -> None:
    """Refuse what is neither a choice nor an input of the model: its class may take any name, and a typing error
    would pass.

    Raises:
        UsageError: such a name (with the nearest that is known).
    """
    taken = core.takes
    for name, value in batch.items():
        if name not in taken and not isinstance(value, Tensor):
            raise UsageError(
                f"There is no argument {name!r} of "
                f"{type(core.model.body).__name__}.{nearest(name, {*CHOICE, 'head', 'strategy', *taken})} "
                "Leave it out."
            )


def routed(core: Core, batch: Mapping[str, Any], experts_per_row: int | None) -> Routed:
    """The router's mixtures.

    Raises:
        TwinmergeError: no router is fitted, or a batch that continues a cache.
    """
    if core.router is None:
        raise UsageError("This twin has no router. Fit one with fit_router, or name the mixture or the expert.")
    if batch.get("past_key_values") is not None and not core.own_module:
        raise UsageError(
            "The batch goes on from a cache, so it holds no prompt to route on. Name the mixture that the cache was "
            "made under."
        )
    with torch.no_grad(), core.lock:
        found, early = _read(core, core.router, core.layers, batch)
        weights, far, soft = core.router.mixtures(found, len(core.experts), experts_per_row)
        nearest = weights.argmax(1)
        weights = torch.where(far[:, None], 0, weights)
        return Routed(weights, nearest, early if early is not None and _goes_on(core, batch) else None, soft)


def _read(core: Core, router: Router, layers: Sequence[int], batch: Mapping[str, Any]) -> tuple[Tensor, Early | None]:
    """What a router reads of a batch, and what the first layers gave where it reads no more."""
    if router.reads == "answers":
        return answers(core, batch, router), None
    wanted = {name: value for name, value in batch.items() if name not in WANTS_ALL_LAYERS}  # of the answer alone
    return read_states(core.model, wanted, layers, router.spreads)


def _goes_on(core: Core, batch: Mapping[str, Any]) -> bool:
    """True where a pass may go on from the states that the router read: no expert changes what made them, and the
    caller wants nothing of the layers below (a cache holds every layer)."""
    if any(batch.get(name) is not None and batch.get(name) is not False for name in WANTS_ALL_LAYERS):
        return False
    caches = hasattr(core.model.body, "generate") and not core.model.head_specs
    return not (caches and batch.get("use_cache") is not False) and acts_above(core, max(core.layers))


def single_pass(core: Core, layer: int | None) -> Package:
    """A package whose experts act from a layer on (see `Twin.single_pass`)."""
    count = depth(core.model)
    if not count:
        raise UsageError(
            f"{type(core.model.body).__name__} is not one stack of layers, so it cannot be routed on the way. "
            "Route in a pass of its own."
        )
    layer = max(1, round(count / 6)) if layer is None else layer
    if not 0 <= layer < count:
        raise UsageError(f"Layer {layer} is out of range: the model has {count}. Give 0 to {count - 1}.")
    below = changed_before(core, layer)
    package = core.package_now()
    exclusive = {e: without_parameters(part, below) for e, part in package.exclusive.items()}
    if core.layers and max(core.layers) > layer:
        package = package._replace(router=None, layers=(), report=None)
    record = {**package.provenance.get("twin", {}), "single_pass": layer}
    return package._replace(exclusive=exclusive, provenance={**package.provenance, "twin": record})


def acts_above(core: Core, layer: int) -> bool:
    """True where no expert changes anything that a pass does before it reaches a layer."""
    if layer not in core.acting_above:
        core.acting_above[layer] = not changed_before(core, layer)
    return core.acting_above[layer]


def changed_before(core: Core, layer: int) -> set[str]:
    """Names of the parameters that experts change and that a pass uses before it reaches a layer."""
    before = called_before(core.model, probe(core), layer)
    parts = [part for place, part in core.runtime.places if place.path in before]
    return {name for part in parts for name in (part.names if isinstance(part, Converted) else [part.name])}


def fitted(
    core: Core,
    inputs: Mapping[str, Given],
    router: Router,
    layers: Sequence[int] | None,
    refuse: float,
    seed: int,
    batch_size: int,
    progress: bool,
) -> tuple[tuple[int, ...], RouterReport | None]:
    """Fit a router; the layers that it reads, and how held-out rows were routed (see `Twin.fit_router`)."""
    check_refuse(refuse)
    for name in inputs:
        index_of(name, core.experts)
    if core.own_module and router.reads != "answers":
        core.model.hidden_states({})  # says that there are none
    if router.reads == "answers":
        if layers is not None:
            raise UsageError(f"The {router.kind} router reads the experts' answers, no layers. Leave layers out.")
        layers = ()
    elif layers is None:
        layers = router.default_layers(layer_count(core.model.architecture.config), core.first_layer)
    layers = tuple(int(layer) for layer in layers)
    rows: list[Tensor] = []
    owners: list[int] = []
    for k, name in enumerate(core.experts):
        if (given := inputs.get(name)) is not None:
            given_batches = read_batches(core, given, name, batch_size, progress)
            with torch.no_grad():
                read = [_read(core, router, layers, batch)[0] for batch in given_batches]
            rows += read
            owners += [k] * sum(len(f) for f in read)
    whose = torch.tensor(owners)
    if not router.needs_inputs:
        found = torch.cat(rows) if rows else None
        return layers, make_of_experts(router, core.experts, layers, partial(input_directions, core), found, whose)
    if not rows:
        raise UsageError("The router has no inputs to fit on. Give a few hundred for each expert.")
    found = torch.cat(rows)
    if bool((found == found[0]).all()):
        raise UsageError(
            "To the model the inputs are all alike, so no router can tell them apart. Give different ones."
        )
    novel = found.shape[1] // (len(layers) * (2 if router.spreads else 1)) if layers else 0
    return layers, fit_router(router, found, whose, core.experts, seed, novel, refuse)


def answers(core: Core, batch: Mapping[str, Any], router: Router) -> Tensor:
    """(rows, experts): what a router reads of each expert's own answer."""
    given, size = batch, core.rows(batch)
    if not core.own_module:
        left_out = (*WANTS_ALL_LAYERS, "past_key_values", "return_dict")
        given = {k: v for k, v in batch.items() if k not in left_out}
        check_names(core, given)
        given = for_each_row(given, size)
    found = []
    for name in core.experts:
        weights = one_hot([name] * size, core.experts).to(core.device)
        own = planned(core, given, heads_of_rows(core, None, [name] * size), weights)[0]
        logits = own.logits if own.logits is not None else getattr(own.output, "logits", None)
        if logits is None:
            raise UsageError(
                f"The {router.kind} router reads answers, and this twin gives none. Choose another router."
            )
        found.append(
            read_of(router, router.read_answer(logits, given.get("input_ids"), given.get("attention_mask")), size)
        )
    return torch.stack(found, 1)


def heads_of_rows(core: Core, head: str | Sequence[str] | None, likely: Sequence[str | None]) -> list[str] | None:
    """The head of each row: the one that is named, or the likeliest expert's; None where the model has none."""
    if not core.model.head_specs:
        return None
    if head is not None:
        names = per_row(head, len(likely), "head")
    elif None in likely:
        raise UsageError("A row has no expert (all its weights are zero) and no head. Name its head.")
    else:
        names = [str(name) for name in likely]
    for name in set(names):
        index_of(name, list(core.model.head_specs))
    return names


def per_row(names: str | Sequence[str], size: int, what: str) -> list[str]:
    """One name for each row."""
    if not isinstance(names, str) and not fits(names, Sequence[str]):
        raise UsageError(f"{what} is {shown(names)}. Give a name for all rows, or a list of names.")
    found = [names] * size if isinstance(names, str) else list(names)
    if len(found) != size:
        raise UsageError(f"{size} rows need one {what} or {size}, got {len(found)}.")
    return found
