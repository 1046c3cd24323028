"""The base and the experts of a merge, read range by range into float32 tiles."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from twinmerge.engine.ranges import PIECE, Range
from twinmerge.errors import TwinmergeError
from twinmerge.methods.base import Method, Place, Tile
from twinmerge.models.opened import OpenedModel
from twinmerge.store.checksum import block_digests

BASE = "base"
Digests = dict[str, list[str]]
"""Input -> checksums of the blocks of a range, in order."""


class Inputs:
    """What the method's tiles are made of.

    Args:
        base: None where the method needs none.
        names: canonical name -> name of the tensor in the output, which keys random numbers and orders equal entries, so
            that neither depends on how another input spells its names.
        device: where the arithmetic runs.
    """

    def __init__(
        self,
        method: Method,
        base: OpenedModel | None,
        experts: Mapping[str, OpenedModel],
        names: Mapping[str, str],
        device: torch.device | str = "cpu",
    ) -> None:
        self.whole = method.grain == "matrix"
        self.base = base if method.space == "deltas" else None
        self.experts, self.names, self.device = experts, names, torch.device(device)
        self.canonical = {out: name for name, out in names.items()}
        self.shapes = {out: next(iter(experts.values())).spec(name).shape for name, out in names.items()}
        self._local = threading.local()

    def load(self, each: Range) -> Tile:
        """The tile of a range.

        Errors:
            TwinmergeError: NaN or infinity (names tensor and expert).
        """
        return self._tile(each, self._stored(each), 0, each.size)

    def pieces(self, each: Range, digests: Digests | None = None) -> Iterator[Tile]:
        """The same in pieces that fit a core's cache, with the checksums of what was read for them."""
        stored = self._stored(each, digests)
        step = max(each.size, 1) if self.whole else PIECE
        for at in range(0, max(each.size, 1), step):
            yield self._tile(each, stored, at, min(at + step, each.size))

    def _stored(self, each: Range, digests: Digests | None = None) -> dict[str, Tensor]:
        """The range of every input as it is stored, in memory that the next range of this thread overwrites."""
        name = self.canonical[each.name]
        models = {**self.experts, **({} if self.base is None else {BASE: self.base})}
        stored = {}
        for label, model in models.items():
            stored[label] = self._read(label, model, name, each)
            if digests is not None:  # while the bytes are in the cache
                digests[label] = block_digests(stored[label])
        return stored

    def _tile(self, each: Range, stored: Mapping[str, Tensor], start: int, stop: int) -> Tile:
        x = torch.empty((len(self.experts), stop - start), dtype=torch.float32)
        for row, expert in zip(x, self.experts, strict=True):
            row.copy_(stored[expert][start:stop])
        base = None
        if self.base is not None:
            base = stored[BASE][start:stop].float()
            x -= base
        if not math.isfinite(x.sum().item()):
            self._require_finite(x, base, stored, each, start)
        if self.device.type != "cpu":
            x, base = x.to(self.device), None if base is None else base.to(self.device)
        shape = self.shapes[each.name]
        if self.whole:
            x, base = x.reshape(len(x), *shape), None if base is None else base.reshape(shape)
        work = torch.float32 if all(t.dtype.itemsize <= 2 for t in stored.values()) else torch.float64
        return Tile(x, base, Place(each.name, shape, each.start + start, tuple(self.experts)), work)

    def _read(self, label: str, model: OpenedModel, name: str, each: Range) -> Tensor:
        dtype = model.range_dtype(name)
        buffers: dict[str, Tensor] = self._local.__dict__
        if label not in buffers or buffers[label].numel() < each.size * dtype.itemsize:
            buffers[label] = torch.empty(max(each.size * dtype.itemsize, 1), dtype=torch.uint8)
        out = buffers[label][: each.size * dtype.itemsize].view(dtype)
        model.read_range(name, each.start, out)
        return out

    def _require_finite(
        self, x: Tensor, base: Tensor | None, stored: Mapping[str, Tensor], each: Range, start: int
    ) -> None:
        """A sum that is not finite: say whose tensor it is, unless large numbers only overflowed the sum."""
        if base is not None and not bool(base.isfinite().all()):
            assert self.base is not None
            raise TwinmergeError(
                f"Tensor {each.name!r} of the base {self.base.name} holds NaN or infinity. Take a sound checkpoint of it."
            )
        for expert, row in zip(self.experts, x, strict=True):
            if not bool(stored[expert][start : start + row.numel()].isfinite().all()):
                raise TwinmergeError(
                    f"Tensor {each.name!r} of the expert {expert!r} holds NaN or infinity. Take a sound checkpoint of it, or leave it out."
                )
