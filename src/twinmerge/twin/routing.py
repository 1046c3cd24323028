"""Which mixture each row of a batch gets: the one that is named, or the router's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from twinmerge.arguments import at_least_one, fits, shown
from twinmerge.errors import TwinmergeError, nearest
from twinmerge.models.headed import batch_size
from twinmerge.models.layers import Early, called_before, layer_count
from twinmerge.twin.mixing.converted import Converted
from twinmerge.twin.mixing.mixture import MixtureLike, index_of, mixture_weights, on_simplex, one_hot
from twinmerge.twin.reading import Given, input_directions, nothing_much, read_batches
from twinmerge.twin.routers.entropy import EntropyRouter, unsureness
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.calibration import RouterReport
from twinmerge.twin.routers.kit.features import default_layers, read_states
from twinmerge.twin.routers.kit.fit import calibrated, fit_router, router_kind
from twinmerge.twin.routers.projection import ProjectionRouter

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

CHOICE = ("mixture", "expert", "experts_per_row", "normalize", "free")
"""What a caller may say of mixtures."""

PerRow = int | Literal["own"] | None
"""How many experts the router gives a row at most: the twin's own number, or all where None."""

TOP_K = "top_k is an argument of transformers' sampling, for generate alone. How many experts the router mixes is experts_per_row."
WANTS_ALL_LAYERS = ("output_hidden_states", "output_attentions", "labels")


class Routed(NamedTuple):
    """weights: the mixtures (rows, experts), zeros for rows that are nobody's; nearest: (rows,) the likeliest expert, also of such
    rows, None where mixtures were named; early: the first layers' states, where routing read them and the pass may go on there."""

    weights: Tensor
    nearest: Tensor | None = None
    early: Early | None = None


def mixtures(
    twin: Twin,
    batch: Mapping[str, Any],
    mixture: MixtureLike | None = None,
    expert: str | Sequence[str] | None = None,
    experts_per_row: PerRow = "own",
    normalize: bool = False,
    free: bool = False,
) -> Routed:
    """What a call with these choices uses (see `Twin.forward`); one row where the batch is empty."""
    per_row_most = twin.experts_per_row if experts_per_row == "own" else experts_per_row
    if per_row_most is not None:
        at_least_one("experts_per_row", per_row_most)
    if mixture is None and expert is None:
        return routed(twin, batch, per_row_most)
    if mixture is not None and expert is not None:
        raise TwinmergeError("Both mixture and expert are given. Give one of them.")
    size = batch_size(batch) if batch else 1
    if expert is not None:
        return Routed(one_hot(per_row(expert, size, "expert"), twin.experts).to(twin.planner.device))
    assert mixture is not None
    weights = mixture_weights(mixture, twin.experts, size).to(twin.planner.device)
    return Routed(weights if free else on_simplex(weights, normalize))


def check_choice(choice: Mapping[str, Any], known: Sequence[str] = CHOICE) -> None:
    """Refuse what is no choice of a mixture.

    Errors:
        TwinmergeError: a name that is not known.
    """
    for name in choice:
        if name == "top_k":
            raise TwinmergeError(TOP_K)
        if name not in known:
            raise TwinmergeError(
                f"There is no choice {name!r} here.{nearest(name, known)} There are: {', '.join(known)}."
            )


def check_names(twin: Twin, batch: Mapping[str, Any]) -> None:
    """Refuse what is neither a choice nor an input of the model: its class may take any name, and a typing error would pass.

    Errors:
        TwinmergeError: such a name (with the nearest that is known).
    """
    taken = twin.takes
    for name, value in batch.items():
        if name not in taken and not isinstance(value, Tensor):
            raise TwinmergeError(
                f"There is no argument {name!r} of {type(twin.model.body).__name__}.{nearest(name, {*CHOICE, 'head', 'strategy', *taken})} "
                "Leave it out."
            )


def routed(twin: Twin, batch: Mapping[str, Any], experts_per_row: int | None) -> Routed:
    """The router's mixtures.

    Errors:
        TwinmergeError: no router is fitted, or a batch that continues a cache.
    """
    if twin.router is None:
        raise TwinmergeError("This twin has no router. Fit one with fit_router, or name the mixture or the expert.")
    if batch.get("past_key_values") is not None:
        raise TwinmergeError(
            "The batch goes on from a cache, so it holds no prompt to route on. Name the mixture that the cache was made under."
        )
    with torch.no_grad(), twin.lock:
        found, early = _read(twin, twin.router, twin.layers, batch)
        weights = twin.router.weights(found, experts_per_row)
        nearest = weights.argmax(1)
        weights = torch.where(twin.router.far(found)[:, None], 0, weights)
        return Routed(weights, nearest, early if early is not None and _goes_on(twin, batch) else None)


def under_autocast(twin: Twin, strategy: str) -> str:
    """The strategy that may be used: within torch.autocast only whole weights are exact, since the parts of experts would be added to
    answers of another dtype.

    Errors:
        TwinmergeError: a way that adds parts to answers is asked for.
    """
    if not torch.is_autocast_enabled(twin.planner.device.type) or strategy in ("folded", "rebuild"):
        return strategy
    if strategy != "auto":
        raise TwinmergeError(
            f"Within torch.autocast strategy={strategy!r} would add parts in one dtype to answers in another. Leave it out, say "
            'strategy="rebuild", or convert the twin: twin.to(torch.bfloat16).'
        )
    return "rebuild"


def _read(
    twin: Twin, router: Router | type[Router], layers: Sequence[int], batch: Mapping[str, Any]
) -> tuple[Tensor, Early | None]:
    """What a kind of router reads of a batch, and what the first layers gave where it reads no more."""
    if router.reads == "answers":
        return answers(twin, batch), None
    return read_states(twin.model, batch, layers, router.spreads)


def _goes_on(twin: Twin, batch: Mapping[str, Any]) -> bool:
    """True where a pass may go on from the states that the router read: no expert changes what made them, and the caller wants
    nothing of the layers below (a cache holds every layer)."""
    if any(batch.get(name) is not None and batch.get(name) is not False for name in WANTS_ALL_LAYERS):
        return False
    caches = hasattr(twin.model.body, "generate") and not twin.model.head_specs
    return not (caches and batch.get("use_cache") is not False) and acts_above(twin, max(twin.layers))


def acts_above(twin: Twin, layer: int) -> bool:
    """True where no expert changes anything that a pass does before it reaches a layer."""
    if layer not in twin.acting_above:
        twin.acting_above[layer] = not changed_before(twin, layer)
    return twin.acting_above[layer]


def changed_before(twin: Twin, layer: int) -> set[str]:
    """Names of the parameters that experts change and that a pass uses before it reaches a layer."""
    before = called_before(twin.model, nothing_much(twin), layer)
    parts = [part for place, part in twin.runtime.places if place.path in before]
    return {name for part in parts for name in (part.names if isinstance(part, Converted) else [part.name])}


def fitted(
    twin: Twin,
    inputs: Mapping[str, Given],
    kind: str,
    layers: Sequence[int] | None,
    null: bool,
    seed: int,
    batch_rows: int,
    progress: bool,
) -> tuple[Router, tuple[int, ...], RouterReport | None]:
    """A router, the layers that it reads, and how held-out rows were routed (see `Twin.fit_router`)."""
    for name in inputs:
        index_of(name, twin.experts)
    made = router_kind(kind)
    if made.reads == "answers":
        if layers is not None:
            raise TwinmergeError(f"The {kind} router reads the experts' answers, no layers. Leave layers out.")
        layers = ()
    elif layers is None:
        layers = default_layers(layer_count(twin.model.architecture.config), kind, twin.first_layer)
    layers = tuple(int(layer) for layer in layers)
    rows: list[Tensor] = []
    owners: list[int] = []
    for k, name in enumerate(twin.experts):
        if (given := inputs.get(name)) is not None:
            given_batches = read_batches(twin, given, name, batch_rows, progress)
            with torch.no_grad():
                read = [_read(twin, made, layers, batch)[0] for batch in given_batches]
            rows += read
            owners += [k] * sum(len(f) for f in read)
    whose = torch.tensor(owners)
    if not made.needs_inputs:
        from_experts = _of_experts(twin, made, layers)
        report = calibrated(from_experts, torch.cat(rows), whose, twin.experts) if rows else None
        return from_experts, tuple(layers), report
    if not rows:
        raise TwinmergeError("The router has no inputs to fit on. Give a few hundred for each expert.")
    found = torch.cat(rows)
    if bool((found == found[0]).all()):
        raise TwinmergeError(
            "To the model the inputs are all alike, so no router can tell them apart. Give different ones."
        )
    novel = found.shape[1] // (len(layers) * (2 if made.spreads else 1)) if null else 0
    with torch.random.fork_rng(devices=[]):
        router, report = fit_router(kind, found, whose, twin.experts, seed, novel)
    return router, tuple(layers), report


def _of_experts(twin: Twin, kind: type[Router], layers: Sequence[int]) -> Router:
    """A router that is made of the experts alone."""
    if kind is EntropyRouter:
        return EntropyRouter(len(twin.experts))
    if len(layers) != 1:
        raise TwinmergeError("The projection router reads one layer. Give one, or leave layers out.")
    return ProjectionRouter.from_bases(input_directions(twin, layers[0]))


def answers(twin: Twin, batch: Mapping[str, Any]) -> Tensor:
    """(rows, experts): how unsure each expert's own answer is (see `routers/entropy.py`)."""
    given = {k: v for k, v in batch.items() if k not in WANTS_ALL_LAYERS and k != "past_key_values"}
    found = []
    for name in twin.experts:
        out = twin(**given, expert=name)
        logits = out.logits if out.logits is not None else getattr(out.output, "logits", None)
        if logits is None:
            raise TwinmergeError("The entropy router reads answers, and this twin gives none. Choose another router.")
        found.append(unsureness(logits, given.get("input_ids"), given.get("attention_mask")))
    return torch.stack(found, 1)


def heads_of_rows(twin: Twin, head: str | Sequence[str] | None, likely: Sequence[str | None]) -> list[str] | None:
    """The head of each row: the one that is named, or the likeliest expert's; None where the model has none."""
    if not twin.model.head_specs:
        return None
    if head is not None:
        names = per_row(head, len(likely), "head")
    elif None in likely:
        raise TwinmergeError("A row has no expert (all its weights are zero) and no head. Name its head.")
    else:
        names = [str(name) for name in likely]
    for name in set(names):
        index_of(name, list(twin.model.head_specs))
    return names


def per_row(names: str | Sequence[str], size: int, what: str) -> list[str]:
    """One name for each row."""
    if not isinstance(names, str) and not fits(names, Sequence[str]):
        raise TwinmergeError(f"{what} is {shown(names)}. Give a name for all rows, or a list of names.")
    found = [names] * size if isinstance(names, str) else list(names)
    if len(found) != size:
        raise TwinmergeError(f"{size} rows need one {what} or {size}, got {len(found)}.")
    return found
