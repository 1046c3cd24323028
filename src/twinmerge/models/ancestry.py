"""Whether an expert comes from its base: judged by all of it, so that one layer that was trained anew is no stranger."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel
from twinmerge.results import some
from twinmerge.store.values import decoded

SAMPLE = 1 << 20  # entries that are looked at
MATRICES = 8  # of the largest of them, and the output layers
UNRELATED_BELOW = 0.2  # cosine of base and expert; a fine-tune stays above 0.9, two trainings from scratch are near 0


def check_ancestry(base: OpenedModel, experts: Mapping[str, OpenedModel], merged: Sequence[str]) -> None:
    """Refuse an expert whose weights have nothing in common with the base's; tell of matrices of one that have not.

    Compared are the beginnings of its largest matrices, without embeddings where there are others, and of its output
    layers.

    Args:
        base: what the experts are said to come from.
        experts: label -> model.
        merged: canonical names of the tensors that are merged.

    Raises:
        ModelError: the mean of the matrices' cosines of base and expert is below 0.2.
    """
    matrices = [n for n in merged if len(base.spec(n).shape) >= 2 and base.spec(n).numel >= 64]
    inner = [n for n in matrices if not base.table(n)] or matrices
    largest = sorted(inner, key=lambda n: -base.spec(n).numel)
    known = base.architecture
    heads = [n for n in inner if known is not None and not known.is_body(n)]
    names = list(dict.fromkeys([*largest[:MATRICES], *heads]))
    count = SAMPLE // max(len(names), 1)
    own = {n: x for n in names if (x := _direction(base, n, count)).any()}
    for expert in experts.values():
        cosines = {n: float(x @ _direction(expert, n, count)) for n, x in own.items()}
        strange = [n for n, cosine in cosines.items() if cosine < UNRELATED_BELOW]
        if not strange:
            continue
        body = [cosine for n, cosine in cosines.items() if n not in heads] or [*cosines.values()]
        if (mean := sum(body) / len(body)) < UNRELATED_BELOW:
            raise ModelError(
                f"{expert.name} does not come from the base {base.name}: their weights, such as {strange[0]!r}, have "
                f"cosine {mean:.2f} (a fine-tune is close to 1). Name the base that it was tuned from; layers under "
                "slices are merged without this look."
            )
        apart = next((n for n in strange if n in heads), None)
        advice = (
            f"To keep {apart!r} apart, name it under heads (--head {apart})."
            if apart
            else "Look whether it is an expert of this base."
        )
        warnings.warn(
            f"{expert.name} has {some(map(repr, strange))} in common with {base.name} by name alone (cosine "
            f"{cosines[strange[0]]:.2f}), as after a new start: it is merged as any other. {advice}",
            stacklevel=3,
        )


def _direction(model: OpenedModel, name: str, count: int) -> NDArray[np.float32]:
    """The first `count` numbers of a tensor, scaled to length one; zeros stay zeros."""
    x = decoded(*model.stored_beginning(name, min(count, model.spec(name).numel)))
    with np.errstate(all="ignore"):  # numbers that are not finite are refused later, with their place
        length = np.sqrt(np.vdot(x, x))
        return x / length if length else x
