"""Passes and tiles: run one method over all merged tensors.

Sweeps over all tensors happen only for the passes that a later one, or the first tensor, must wait for; passes of one
tensor that come last are run just before that tensor is merged, so that most methods read every input once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from twinmerge.errors import TwinmergeError
from twinmerge.maths.threads import parallel
from twinmerge.methods.base import Known, Method, Partial, Place, Tile
from twinmerge.models.opened import OpenedModel


def load_tile(method: Method, name: str, base: OpenedModel | None, experts: Mapping[str, OpenedModel]) -> Tile:
    """One output tensor of all inputs, whole, as the method wants it.

    Errors:
        TwinmergeError: NaN or infinity (names tensor and expert).
    """
    shape = next(iter(experts.values())).spec(name).shape
    x = torch.empty((len(experts), *shape), dtype=torch.float32)
    for row, (expert, model) in zip(x, experts.items(), strict=True):
        row.copy_(model.read(name))
        if not bool(row.isfinite().all()):
            raise TwinmergeError(
                f"Tensor {name!r} of the expert {expert!r} holds NaN or infinity. Take a sound checkpoint of it, or leave it out."
            )
    reference = None
    if base is not None and method.space == "deltas":
        reference = base.read(name).float()
        if not bool(reference.isfinite().all()):
            raise TwinmergeError(
                f"Tensor {name!r} of the base {base.name} holds NaN or infinity. Take a sound checkpoint of it."
            )
        x -= reference
    return Tile(x, reference, Place(name, shape, 0, tuple(experts)))


def run(
    method: Method,
    names: Sequence[str],
    load: Callable[[str], Tile],
    order: Iterable[str] | None = None,
    progress: bool = True,
) -> Generator[tuple[str, Tensor], None, None]:
    """Merge tensors one at a time.

    Args:
        names: all tensors that are merged (they are what "the whole model" means for model-scope passes).
        load: name -> its tile.
        order: the order of the output, `names` by default.

    Yields:
        (name, merged tensor in float32), finite. One tensor is held at a time; matrices (grain "matrix") are merged side
        by side, one BLAS thread each, a few at a time.
    """
    passes = list(method.passes())
    last_model = max((i for i, p in enumerate(passes) if p.scope == "model"), default=-1)
    model_known: dict[str, Any] = {}
    tensor_known: dict[str, dict[str, Any]] = {name: {} for name in names}
    for number, step in enumerate(passes[: last_model + 1], 1):
        total: Partial = {}
        for name in tqdm(
            sorted(names), f"pass {number} of {last_model + 1}", delay=1, leave=False, disable=_off(progress)
        ):
            tile = load(name)
            known = {**model_known, **tensor_known[name]}
            part = step.observe(tile, known)
            if step.scope == "tensor":
                tensor_known[name][step.name] = step.finish(part, known)
            else:
                _add(total, part)
        if step.scope == "model":
            model_known[step.name] = step.finish(total, model_known)

    def loaded() -> Iterator[tuple[Tile, Known]]:
        for name in order or names:
            tile = load(name)
            known = {**model_known, **tensor_known[name]}
            for step in passes[last_model + 1 :]:
                known[step.name] = step.finish(step.observe(tile, known), known)
            yield tile, known

    if method.grain == "matrix":
        merged = parallel(lambda work: (work[0].at.name, _merged(method, *work)), loaded())
    else:
        merged = ((tile.at.name, _merged(method, tile, known)) for tile, known in loaded())
    yield from tqdm(merged, "merging", total=len(names), delay=1, leave=False, disable=_off(progress))


def _merged(method: Method, tile: Tile, known: Known) -> Tensor:
    merged = method.apply(tile, known)
    if not bool(merged.isfinite().all()):
        raise TwinmergeError(
            f"{type(method).__name__} gives NaN or infinity in tensor {tile.at.name!r}. Lower its scale, or leave that tensor out as a head."
        )
    return merged


def _add(total: Partial, part: Partial) -> None:
    for key, value in part.items():
        total[key] = total[key] + value if key in total else value


def _off(progress: bool) -> bool | None:
    """None lets tqdm show its bar on a terminal only."""
    return None if progress else True
