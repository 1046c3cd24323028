"""The one way of mixing the experts of somebody's own module: rebuild, exact by what it is.

Row i of an answer is row i of what a fresh copy of the module, with the dense weights of row i's mixture, gives for the
very whole batch. No argument is cut into rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import UsageError
from twinmerge.models.nested import UnlikeError, mapped
from twinmerge.twin.mixing.arguments import arguments
from twinmerge.twin.mixing.fresh import Batch, Fresh, ran
from twinmerge.twin.mixing.planner import distinct_mixtures
from twinmerge.twin.mixing.rows import batch_tensors, by_rows, followed, no_rows, signature_of

WAYS = (None, "auto", "rebuild")
OPTIONS = (
    "mixture",
    "expert",
    "head",
    "experts_per_row",
    "normalize",
    "unconstrained",
    "oracle_biases",
    "strategy",
    "free",
)
"""What a twin's call takes by name for itself."""


def inputs_of(module: nn.Module, unnamed: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by number or name.

    Raises:
        UsageError: the module's forward does not take them.
    """
    try:
        signature(module.forward).bind(*unnamed, **named)
    except TypeError as error:
        raise UsageError(
            f"{type(module).__name__} does not take this: {error}. Call it as its forward says."
        ) from error
    return dict(arguments(unnamed, named))


def refuse_taken(module: nn.Module, named: Mapping[str, Any]) -> None:
    """Refuse arguments that the twin and the module both know by the same name.

    Raises:
        UsageError: such a name is given.
    """
    own = signature(module.forward).parameters
    for name in OPTIONS:
        if name in named and name in own:
            raise UsageError(
                f"{name} is an argument of the twin and of {type(module).__name__}, so by name it is not known which is "
                "meant. Give the module's by position, and name the mixture by another argument."
            )


def require_rebuild(strategy: str | None, biases: Any) -> None:
    """Refuse what only models of transformers have.

    Raises:
        UsageError: another way of mixing, or biases of their own.
    """
    if strategy not in WAYS:
        raise UsageError(
            f'strategy={strategy!r} is for models of transformers. A module of your own has one way, "rebuild": leave '
            "strategy out."
        )
    if biases is not None:
        raise UsageError(
            "oracle_biases is for models of transformers. Leave it out, and name the mixture or the expert."
        )


def rows_in(batch: Batch) -> int:
    """How many rows a batch has: the first axis of its first tensor.

    Raises:
        UsageError: none.
    """
    tensors = batch_tensors(batch)
    if not tensors:
        raise UsageError("The batch holds no tensor with an axis of rows. Give the module's inputs as tensors.")
    if not len(tensors[0]):
        raise UsageError("The batch holds no rows. Give at least one input.")
    return len(tensors[0])


def some_rows(batch: Batch, rows: Tensor, size: int) -> dict[str, Any]:
    """The chosen rows of every tensor that has as many as the batch."""
    return {
        k: v.index_select(0, rows.to(v.device)) if isinstance(v, Tensor) and v.dim() and len(v) == size else v
        for k, v in batch.items()
    }


def by_copies(fresh: Fresh, batch: Batch, weights: Tensor) -> Any:
    """The answer of the mixtures (rows, experts), in the module's own structure.

    Raises:
        UsageError: several mixtures, and it is not seen that rows stand first in the answer.
    """
    groups = distinct_mixtures(weights)
    if len(groups) == 1:
        return fresh.run(groups[0][0], batch)
    kind = signature_of(batch)
    seen = None
    if kind is None or kind not in fresh.tried:
        module = fresh.of(groups[0][0]).body
        seen = followed(lambda other: ran(module, _copied(other)), batch, len(weights), fresh.name)
    answers = [fresh.run(mixture, _copied(batch)) for mixture, _ in groups]
    parts = [by_rows(answer, len(weights), fresh.name) for answer in answers]
    if seen is not None and seen == parts[0].keys() and kind is not None:
        fresh.tried.add(kind)
    back = torch.argsort(torch.cat([rows for _, rows in groups]))

    def chosen(path: str, found: Sequence[Any]) -> Any:
        first = found[0]
        if not isinstance(first, Tensor):
            if not all(_same(first, other) for other in found):
                raise no_rows(fresh.name, f"{path} is {first!r} for one mixture and not for another")
            return first
        if any(not isinstance(o, Tensor) or o.shape != first.shape or o.dtype != first.dtype for o in found):
            raise no_rows(fresh.name, f"{path} has other shapes for other mixtures")
        if seen is not None and path not in seen and any(not torch.equal(other, first) for other in found):
            raise no_rows(fresh.name, f"no row of {path} was seen to follow that row of the batch")
        own = [value.index_select(0, rows.to(value.device)) for value, (_, rows) in zip(found, groups, strict=True)]
        return torch.cat(own).index_select(0, back.to(first.device))

    try:
        return mapped(answers, chosen, "its answer")
    except UnlikeError as where:
        raise no_rows(fresh.name, f"{where} has other parts for other mixtures") from None


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _copied(batch: Batch) -> Batch:
    """The same arguments for one of several runs: a module may write into them."""

    def copy(path: str, found: Sequence[Any]) -> Any:
        own = found[0]
        return own.clone().requires_grad_(own.requires_grad) if isinstance(own, Tensor) else own

    made: Batch = mapped([dict(batch)], copy)
    return made
