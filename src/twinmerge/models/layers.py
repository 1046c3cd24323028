"""The layers of a model of one stack, and a pass through the first of them alone.

The states that such a pass gives are read for a router; a second pass can go on from there, so that no layer runs
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from twinmerge.errors import ModelError
from twinmerge.models.headed import HeadedModel
from twinmerge.models.rows import rows_of


class Early(NamedTuple):
    """states: the hidden states 0 (the embedding) to the last one read; outputs: what the layers before that one
    gave."""

    states: list[Tensor]
    outputs: list[Any]


class _ReachedError(Exception):
    """The layer that a pass was to stop before."""


def layer_count(config: Any) -> int:
    """How many layers a model has.

    Raises:
        ModelError: its config does not say, or it has none.
    """
    if config is None:
        raise ModelError(
            "A module of your own gives no hidden states to route on. Choose a router that reads answers (entropy), or "
            "name the expert or the mixture in each call."
        )
    if (count := _count(config)) is None:
        raise ModelError(f"{type(config).__name__} does not say how many layers it has. Name the router's layers.")
    return int(count)


def _count(config: Any) -> Any:
    return getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)


def layers_of(model: HeadedModel) -> Sequence[nn.Module]:
    """The layers of a model of one stack, in their order; none of a model of two stacks, or where they cannot be
    told."""
    count = _count(model.architecture.config)
    found = [m for m in model.body.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    stacks = [m for m in found if any(True for _ in m[0].children())]
    return list(stacks[0]) if len(stacks) == 1 else []


def depth(model: HeadedModel) -> int:
    """How many layers a pass can stop between; 0 where it cannot."""
    return len(layers_of(model))


def read_early(model: HeadedModel, batch: Mapping[str, Any], deepest: int) -> Early:
    """Run the embedding and the first `deepest` layers of the body, and stop there."""
    layers = layers_of(model)
    states: list[Tensor] = []
    outputs: list[Any] = []

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
            if index == deepest:
                raise _ReachedError

        return hook

    handles = [layers[i].register_forward_pre_hook(enter(i), with_kwargs=True) for i in range(deepest + 1)]
    handles += [layers[i].register_forward_hook(lambda m, a, y: outputs.append(y)) for i in range(deepest)]
    try:
        model.body(**{k: v for k, v in batch.items() if k != "labels"})
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return Early(states, outputs)


@contextmanager
def resumed(model: HeadedModel, early: Early, order: Tensor | None) -> Iterator[None]:
    """Within the context the layers that were run give what they gave, their rows in another order if one is named."""
    layers = layers_of(model)[: len(early.outputs)]
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, output in zip(layers, early.outputs, strict=True):
            kept = output if order is None else rows_of(output, order)
            layer.__dict__["forward"] = lambda *args, kept=kept, **kwargs: kept
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


def called_before(model: HeadedModel, batch: Mapping[str, Any], deepest: int) -> set[str]:
    """Paths of the modules of the body that a pass calls before it reaches a layer."""
    paths = {module: path for path, module in model.body.named_modules()}
    called: set[str] = set()
    handles = [
        m.register_forward_pre_hook(lambda module, args: called.add(paths[module])) for m in model.body.modules()
    ]
    try:
        read_early(model, batch, deepest)
    finally:
        for handle in handles:
            handle.remove()
    inside = {paths[layer] for layer in layers_of(model)[deepest:]}
    return {p for p in called if p not in inside}
