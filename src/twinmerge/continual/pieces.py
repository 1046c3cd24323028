"""The pieces that a state is worked through in, side by side: whole matrices where the method must see them, ranges
of all else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from twinmerge.continual.state import StateFile
from twinmerge.engine.ranges import TILE, Range, ranges
from twinmerge.errors import DamagedFile, ModelError
from twinmerge.maths.threads import parallel
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.fold import State
from twinmerge.models.opened import OpenedModel, as_tensor
from twinmerge.progress import meter as progress_meter
from twinmerge.store.checksum import block_digests, joined
from twinmerge.store.header import SIZES, torch_dtype

Answer = TypeVar("Answer")


class Read(NamedTuple):
    """values: float64, flat; digests: of the bytes as they are stored."""

    values: Tensor
    digests: list[str]


def places_of(base: OpenedModel, names: Iterable[str]) -> dict[str, Place]:
    """Canonical name -> where the tensor lies, under the name that a merged folder has and patterns are of."""
    return {
        name: Place(
            base.stored[name],
            base.spec(name).shape,
            transposed=base.transposed(name),
            table=base.table(name),
            stack=base.stacked(name),
            wide=base.spec(name).code == "F64",
        )
        for name in names
    }


def pieces(places: Mapping[str, Place], whole: Callable[[Place], bool]) -> Iterator[Range]:
    """The tensors (canonical name -> place) in their order, as one piece or in tiles."""
    for name, place in places.items():
        yield from ranges([name], {name: place.shape}, TILE, {name: "matrix" if whole(place) else "element"})


def worked(
    work: Sequence[Range], function: Callable[[Range], Answer], title: str, progress: bool
) -> Iterator[tuple[Range, Answer]]:
    """`function` of every piece, in order, one BLAS thread each, behind a progress bar."""
    total = sum(each.size for each in work)
    with progress_meter(title, progress, total, unit_scale=True) as bar:
        for each, answer in zip(work, parallel(function, work), strict=True):
            yield each, answer
            bar.update(each.size)


def of_model(model: OpenedModel, each: Range, label: str) -> Read:
    """A range of a model's tensor.

    Raises:
        ModelError: NaN or infinity in it.
    """
    code = model.range_code(each.name)
    out = np.empty(each.size * SIZES[code], np.uint8)
    model.read_range(each.name, each.start, out)
    values = as_tensor(out, torch_dtype(code)).double()
    if not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
        raise ModelError(
            f"Tensor {each.name!r} of {label} holds NaN or infinity. Take a sound checkpoint of it, or leave it out."
        )
    return Read(values, block_digests(out, SIZES[code]))


def of_state(state: StateFile, key: str, start: int, size: int) -> Read:
    """A range of a part of the state."""
    spec = state.specs[key]
    out = np.empty(size * spec.itemsize, np.uint8)
    state.read_range(key, start, out)
    return Read(as_tensor(out, spec.dtype).double(), block_digests(out, spec.itemsize))


def kept_of(state: StateFile, shapes: Mapping[str, tuple[int, ...]], each: Range, place: Place) -> dict[str, Read]:
    """What a state keeps of a piece, part by part; nothing before the first expert.

    Args:
        shapes: part -> shape, of the piece's tensor.
    """
    if not state.specs:
        return {}
    if not is_whole(each, place):
        return {part: of_state(state, f"{part}/{each.name}", each.start, each.size) for part in shapes}
    return {part: of_state(state, f"{part}/{each.name}", 0, math.prod(shape)) for part, shape in shapes.items()}


def in_shape(state: State, shapes: Mapping[str, tuple[int, ...]], each: Range, place: Place) -> State:
    """Flat parts in the shapes that the method knows them by, where the piece is the whole tensor."""
    return {part: x.reshape(shapes[part]) for part, x in state.items()} if is_whole(each, place) else state


def is_whole(each: Range, place: Place) -> bool:
    return each.size == math.prod(place.shape)


class Sums:
    """The checksums of tensors whose blocks come in order, each checked against what is expected as soon as it is
    whole."""

    def __init__(self, expected: Mapping[str, str] | None = None, what: str = "") -> None:
        self.expected, self.what = expected, what
        self.blocks: dict[str, list[str]] = {}

    def add(self, key: str, digests: list[str]) -> None:
        self.blocks.setdefault(key, []).extend(digests)

    def found(self) -> dict[str, str]:
        return {key: joined(blocks) for key, blocks in self.blocks.items()}

    def check(self) -> None:
        """Refuse a state that is not what was written.

        Raises:
            DamagedFile: a part with another checksum.
        """
        found = self.found()
        for key, wanted in (self.expected or {}).items():
            if found.get(key, wanted) != wanted:
                raise DamagedFile(
                    f"{key!r} of {self.what} is not what was written: the file is damaged. Restore a copy of it."
                )

    def of_all(self) -> str:
        """One checksum of all tensors."""
        found = self.found()
        return hashlib.sha256("".join(f"{key}\0{found[key]}\n" for key in sorted(found)).encode()).hexdigest()[:32]


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Once, and refused where it does not fit.

    Raises:
        ModelError: NaN or infinity.
    """
    out = values.to(dtype)
    if not math.isfinite(out.sum().item()) and not bool(out.isfinite().all()):
        raise ModelError(f"Tensor {name!r} does not fit {dtype}. Choose a wider --dtype, such as bfloat16 or float32.")
    return out
