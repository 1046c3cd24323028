"""Exclusive parts made to do as their experts do: the factors, small as they are, fitted to the experts' own last
states.

A cut leaves out what matters least by its size. What is left can do better than its share of the whole: gradient
descent on the factors alone, towards the last states of the expert on a few hundred inputs of its kind. No label is
read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from twinmerge.errors import ModelError, UsageError
from twinmerge.maths.codec import projected
from twinmerge.maths.lowrank import Factors
from twinmerge.models.headed import HeadedModel
from twinmerge.models.opened import ModelLike, OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.progress import bar as progress_bar
from twinmerge.recipes.recipe import is_reference
from twinmerge.twin.compress import balanced, projected_factors
from twinmerge.twin.core import Core
from twinmerge.twin.experts import models_of
from twinmerge.twin.mixing.converted import Converted
from twinmerge.twin.mixing.mixture import index_of
from twinmerge.twin.package import Package
from twinmerge.twin.reading import Given, read_batches
from twinmerge.twin.split import Exclusive, refuse_masks

WARM = 0.1  # share of the steps in which the rate grows
CLIP = 1.0  # of the gradient's norm
KEPT = 1 << 28  # bytes of an expert's states that are kept for the next time


def refined(
    core: Core,
    inputs: Mapping[str, Given],
    experts: Mapping[str, ModelLike],
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Package:
    """The twin's package with refined exclusive parts (see `Twin.refine`)."""
    if steps < 1:
        raise UsageError(f"steps={steps} is out of range. Give at least 1.")
    if not 0 < rate < float("inf"):
        raise UsageError(f"rate={rate} is out of range. Give a number above 0, such as 0.001.")
    for name in inputs:
        index_of(name, core.experts)
    if core.own_module:
        raise UsageError(
            f"{type(core.model.body).__name__} is none of transformers' models, and gives no hidden states to refine "
            "on. Build the twin at a higher rank."
        )
    package = core.package_now()
    refuse_masks(package.exclusive.values(), "refined")
    models = {**models_of(package), **core.sources, **experts}
    parts = dict(package.exclusive)
    for name, given in inputs.items():
        batches = list(read_batches(core, given, name, batch_size, progress))
        if not batches:
            raise UsageError(f"There are no inputs for the expert {name!r}. Give a few hundred.")
        model = models.get(name)
        if model is None or (isinstance(model, str) and not is_reference(model)):
            raise UsageError(f"The twin does not say where the expert {name!r} is. Say it with experts.")
        opened = (
            model if isinstance(model, OpenedModel) else open_model(model, None if isinstance(model, str) else name)
        )
        with core.lock:
            parts[name] = fitted_part(core, name, opened, batches, steps, rate, seed, progress)
    record = {"experts": list(inputs), "steps": steps, "rate": rate}
    provenance = {**package.provenance, "twin": {**package.provenance.get("twin", {}), "refined": record}}
    return package._replace(exclusive=parts, provenance=provenance)


def fitted_part(
    core: Core,
    name: str,
    expert: OpenedModel,
    batches: Sequence[Mapping[str, Any]],
    steps: int,
    rate: float,
    seed: int = 0,
    progress: bool = True,
) -> Exclusive:
    """The exclusive part of one expert, its factors fitted to the expert's last states.

    Adam on b, a and what is no matrix, from what they are; the loss is `gap`. With a codec, the numbers that count
    are those that it stores (straight through: gradients are taken as if they were not rounded).

    Args:
        expert: the model itself.
        batches: of its kind of inputs.
        steps: of one batch each.
        rate: of Adam, grows over a tenth of the steps and falls to nothing along a cosine.

    Raises:
        UsageError: states that turn to NaN.
    """
    part, codec = core.package.exclusive[name], core.package.codec
    teacher = HeadedModel(_class_of(expert), {n: expert.read(n) for n in expert.specs})
    low = {n: [x.float().clone().requires_grad_() for x in balanced(f)] for n, f in part.low.items()}
    dense = {n: v.float().clone().requires_grad_() for n, v in part.dense.items()}
    optimizer = torch.optim.Adam([*(x for f in low.values() for x in f), *dense.values()], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
    order = _shuffled(len(batches), steps, seed)
    bar = progress_bar(order, f"refining {name}", progress)
    goals: dict[int, Tensor] = {}  # of batches that come again, as many as fit
    for k in bar:
        batch = batches[k]
        goal = goals[k] if k in goals else teacher.hidden_states(batch)[-1]
        if sum(g.nbytes for g in goals.values()) + goal.nbytes <= KEPT:
            goals[k] = goal
        with torch.enable_grad(), _attached(core, low, dense, codec):
            loss = gap(core.model.hidden_states(batch)[-1], goal, batch.get("attention_mask"))
        if not bool(loss.isfinite()):
            raise UsageError(f"The states of {name!r} turned to NaN. Refine at a lower rate.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3g}", refresh=False)
    made = Exclusive({}, {n: projected(v.detach().to(part.dense[n]), codec) for n, v in dense.items()})
    for n, (b, a) in low.items():
        dtype = part.low[n].b.dtype if codec == "none" else torch.float32
        near = projected_factors(Factors(b.detach(), a.detach()), len(a), codec)
        made.low[n] = Factors(near.b.to(dtype), near.a.to(dtype))
    return made


def gap(states: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """‖h − h*‖² / ‖h* − mean h*‖² of last states (rows, positions, width) over the inputs' own positions.

    The answers themselves are not asked for: with their Kullback-Leibler divergence in the loss, as many answers on
    validation rows of text8 were those of the experts as without it.

    Args:
        mask: (rows, positions), 0 where there is padding.

    Example:
        >>> h = torch.tensor([[[1.0], [3.0]]])
        >>> gap(h + 1, h, None)
        tensor(1.)
    """
    own = mask.bool() if mask is not None and mask.shape == wanted.shape[:2] else torch.ones(wanted.shape[:2]).bool()
    found, goal = states[own].float(), wanted[own].float()
    return (found - goal).square().sum() / (goal - goal.mean(0)).square().sum().clamp(min=1e-12)


@contextmanager
def _attached(
    core: Core, low: Mapping[str, Sequence[Tensor]], dense: Mapping[str, Tensor], codec: str
) -> Iterator[None]:
    """Within the context the body is θs + b a and θs + v, and gradients reach b, a and v.

    Linear, Conv1D and embedding add x aᵀ bᵀ to what they answer, so that no gradient of a whole matrix is ever made;
    in all other places the weights themselves take the parameter's place.
    """
    factors = {n: _stored(Factors(*f), codec) for n, f in low.items()}
    handles: list[Any] = []
    before = []
    for place, part in core.runtime.places:
        parameter, module = place.module._parameters[place.attribute], place.module
        assert parameter is not None
        if isinstance(part, Converted):
            before.append((place, parameter))
            module._parameters[place.attribute] = parameter + part.change(  # type: ignore[assignment]
                lambda n: dense[n] if n in dense else factors[n].b @ factors[n].a if n in factors else None, parameter
            )
        elif part.name in factors and place.attribute == "weight" and (adds := _adding(module)) is not None:
            own = Factors(*(x.to(parameter) for x in factors[part.name]))
            handles.append(module.register_forward_hook(lambda m, args, y, f=own, adds=adds: y + adds(args[0], f)))
        elif part.name in factors or part.name in dense:
            change = dense[part.name] if part.name in dense else factors[part.name].b @ factors[part.name].a
            before.append((place, parameter))
            changed = parameter + change.reshape(parameter.shape).to(parameter)
            module._parameters[place.attribute] = changed  # type: ignore[assignment]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for place, parameter in before:
            place.module._parameters[place.attribute] = parameter


def _adding(module: nn.Module) -> Callable[[Tensor, Factors], Tensor] | None:
    """What a module's answer to x grows by where its weight grows by b a; None for kinds that are not linear in a
    simple way."""
    if isinstance(module, nn.Linear):
        return lambda x, f: F.linear(F.linear(x, f.a), f.b)
    if isinstance(module, Conv1D):  # stored (in, out)
        return lambda x, f: x @ f.b @ f.a
    if isinstance(module, nn.Embedding):
        return lambda ids, f: F.embedding(ids, f.b) @ f.a
    return None


def _stored(factors: Factors, codec: str) -> Factors:
    """The factors as they read once they were stored; gradients pass as if nothing was rounded."""
    if codec == "none":
        return factors
    with torch.no_grad():
        near = projected_factors(factors, factors.rank, codec)
    return Factors(*(x + (y.to(x) - x).detach() for x, y in zip(balanced(factors), near, strict=True)))


def _share_of_rate(step: int, steps: int) -> float:
    warm = max(1, round(WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _shuffled(count: int, steps: int, seed: int) -> list[int]:
    """Numbers of batches, each as often as the others."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-steps // count))]
    found: list[int] = torch.cat(rounds)[:steps].tolist()
    return found


def _class_of(expert: OpenedModel) -> Any:
    if expert.architecture is None:
        raise ModelError(f"{expert.name} has no config.json, so it cannot answer. Add its config.json.")
    return expert.architecture
