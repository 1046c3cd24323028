"""Dense weights of one mixture after the other, each for its rows: the way that every model allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from twinmerge.errors import UsageError
from twinmerge.models.headed import HeadedModel, check_alike
from twinmerge.models.layers import Early, resumed
from twinmerge.models.rows import PLACES, batch_size, joined, rows_of, rows_of_batch
from twinmerge.twin.mixing.runtime import Runtime

CACHES = ("past_key_values", "cache_params", "mems", "state", "past_buckets_states")
"""What a pass goes on from, of all rows."""

Groups = Sequence[tuple[Tensor, Tensor]]
"""(mixture (experts,), the numbers of its rows)."""


class Answered(NamedTuple):
    """output: the model class's own; logits: (rows, labels or ...) or None."""

    output: Any
    logits: Tensor | None


def one_pass(
    model: HeadedModel, batch: Mapping[str, Any], heads: Sequence[str] | None, early: Early | None, rows: Tensor | None
) -> Answered:
    """One pass over some rows, in an order; None for all as they are."""
    if rows is not None:
        batch = rows_of_batch(batch, rows, batch_size(batch))
        heads = None if heads is None else [heads[i] for i in rows.tolist()]
    with nullcontext() if early is None else resumed(model, early, rows):
        found = model(batch, heads)
    if heads:
        return Answered(found["output"], found["logits"])
    return Answered(found, getattr(found, "logits", None))


def rebuilt(
    model: HeadedModel,
    runtime: Runtime,
    batch: Mapping[str, Any],
    heads: Sequence[str] | None,
    groups: Groups,
    early: Early | None = None,
) -> Answered:
    """Answer each group of rows by the model that its mixture makes.

    Where the inputs are rows of all tensors alike, a group runs alone; else (pictures that stand anywhere, two
    towers) the whole batch runs for each mixture, and each row is taken from the run of its own. Models of two towers
    score the rows that all the mixtures gave against each other, each row by the parameters that no module holds (a
    scale) of its own mixture.

    Raises:
        TwinmergeError: labels or a cache beside several mixtures.
    """
    if len(groups) == 1:
        with runtime.folded(groups[0][0]):
            return one_pass(model, batch, heads, early, None)
    refuse_whole(batch)
    size = batch_size(batch)
    if runtime.coupled:
        return _towers(model, runtime, batch, groups, size)
    found = []
    apart = heads is not None or separable(model, batch)
    for mixture, rows in groups:
        with runtime.folded(mixture):
            found.append(one_pass(model, batch, heads, early, rows if apart else None))
    if not apart:
        output = _chosen([f.output for f in found], groups, size)
        return Answered(output, getattr(output, "logits", None))
    check_alike([f.logits for f in found], dict.fromkeys(heads or ()))
    logits = None if found[0].logits is None else joined([f.logits for f in found])
    back = torch.argsort(torch.cat([rows for _, rows in groups]))
    output = rows_of(joined([f.output for f in found]), back)
    return Answered(output, None if logits is None else logits.index_select(0, back))


def separable(model: HeadedModel, batch: Mapping[str, Any]) -> bool:
    """Whether a row's inputs are that row of every tensor, or one for all."""
    size = batch_size(batch)
    tensors = [v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and k not in PLACES]
    config = model.architecture.config
    several = hasattr(config, "vision_config") or hasattr(config, "audio_config")
    words = all(
        k in ("input_ids", "attention_mask", "token_type_ids") for k, v in batch.items() if isinstance(v, Tensor)
    )
    return all(len(v) in (1, size) for v in tensors) and (words or not several)


def refuse_whole(batch: Mapping[str, Any]) -> None:
    """Refuse what belongs to a whole batch."""
    if batch.get("labels") is not None:
        raise UsageError(
            "A loss is the mean of a whole batch, and the rows of different mixtures are answered apart. Leave the "
            "labels out and "
            "take it from the logits."
        )
    if any(batch.get(name) is not None for name in CACHES):
        raise UsageError(
            "A cache holds the rows of a whole batch, and the rows of different mixtures are answered apart. Give one "
            "mixture."
        )


def _chosen(outputs: Sequence[Any], groups: Groups, size: int) -> Any:
    """Each row out of the output of its group; what has no axis of rows is left out."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if not first.dim() or any(o.shape != first.shape for o in outputs) or len(first) % size:
            return None
        each, whole = len(first) // size, first.clone()
        for output, (_, rows) in zip(outputs, groups, strict=True):
            at = (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()
            whole[at] = output[at]
        return whole
    if isinstance(first, ModelOutput):
        kept = {k: _chosen([o[k] for o in outputs], groups, size) for k in first if k != "past_key_values"}
        return type(first)(**{k: v for k, v in kept.items() if v is not None})
    if isinstance(first, (tuple, list)):
        return type(first)(_chosen(parts, groups, size) for parts in zip(*outputs, strict=True))
    return None if hasattr(first, "update") else first


def _towers(model: HeadedModel, runtime: Runtime, batch: Mapping[str, Any], groups: Groups, size: int) -> Answered:
    body = model.body
    children = list(body.named_children())
    found: list[dict[str, list[Any]]] = []
    for mixture, _ in groups:
        calls: dict[str, list[Any]] = {}
        hooks = [
            child.register_forward_hook(lambda m, a, y, name=name, calls=calls: calls.setdefault(name, []).append(y))
            for name, child in children
        ]
        try:
            with runtime.folded(mixture):
                one_pass(model, batch, None, None, None)
        finally:
            for hook in hooks:
                hook.remove()
        found.append(calls)
    given = {name: _chosen([f[name] for f in found], groups, size) for name in found[0]}
    if any(_lacks(whole, found[0][name]) for name, whole in given.items()):
        raise UsageError(
            "This model scores rows of one kind against rows of another, and there are not as many of both, so it is "
            "not known whose mixtures the others have. Give one mixture."
        )
    outputs = []
    for mixture, _ in groups:
        with runtime.folded(mixture), _giving({child: given[name] for name, child in children if name in given}):
            outputs.append(one_pass(model, batch, None, None, None).output)
    output = _chosen(outputs, groups, size)
    return Answered(output, getattr(output, "logits", None))


def _lacks(whole: Any, first: Any) -> bool:
    """A tensor was left out."""
    if isinstance(first, (tuple, list)):
        return len(whole) != len(first) or any(_lacks(a, b) for a, b in zip(whole, first, strict=True))
    if isinstance(first, ModelOutput):
        return any(isinstance(v, Tensor) and whole.get(k) is None for k, v in first.items())
    return isinstance(first, Tensor) and whole is None


@contextmanager
def _giving(answers: Mapping[nn.Module, list[Any]]) -> Iterator[None]:
    """Within the context modules give these answers, call by call."""
    before = {module: module.__dict__.get("forward") for module in answers}
    try:
        for module, own in answers.items():
            calls = iter(own)
            module.__dict__["forward"] = lambda *args, calls=calls, **kwargs: next(calls)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
