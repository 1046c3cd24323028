"""Inputs that were written here before must still be what was written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twinmerge.maths.threads import parallel
from twinmerge.models.opened import OpenedModel
from twinmerge.store.checkpoint import Checkpoint


def check_written(models: Iterable[OpenedModel]) -> None:
    """Read what was written here before, and refuse it where it is no longer what was written.

    For work that reads its inputs in ranges and sums nothing; other models are not read.

    Raises:
        TwinmergeError: a tensor that changed.
    """
    for model in models:
        check_tensors(model, list(model.stored))


def check_tensors(model: OpenedModel, names: Sequence[str]) -> None:
    """The same of some tensors of one model.

    Args:
        model: an opened one.
        names: canonical ones.

    Raises:
        TwinmergeError: a tensor that changed.
    """
    if isinstance(model.source, Checkpoint) and model.source.expected:
        for _ in parallel(model.source.check, [model.stored[model.own(name)] for name in names]):
            pass


def require_read(model: OpenedModel, name: str, found: str) -> None:
    """Refuse a tensor whose checksum, taken while it was read, is not the one with which it was written.

    Raises:
        TwinmergeError: another one, where that is known.
    """
    own = model.own(name)
    if isinstance(model.source, Checkpoint) and own not in model.changes:
        model.source.require(model.stored[own], found)
