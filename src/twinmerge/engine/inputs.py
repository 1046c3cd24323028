"""The base and the experts of a merge, read range by range into float32 tiles."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from twinmerge.engine.ranges import Range
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
        return self.load_with_digests(each, False)[0]

    def load_with_digests(self, each: Range, digest: bool = True) -> tuple[Tile, Digests]:
        """The tile, and the checksums of what was read for it."""
        name = self.canonical[each.name]
        x = torch.empty((len(self.experts), each.size), dtype=torch.float32)
        narrow, digests = True, Digests()
        for row, (expert, model) in zip(x, self.experts.items(), strict=True):
            stored = self._read(model, name, each)
            row.copy_(stored)
            narrow = narrow and stored.dtype.itemsize <= 2
            if digest:
                digests[expert] = block_digests(stored)
        base = None
        if self.base is not None:
            stored = self._read(self.base, name, each)
            base = torch.empty(each.size, dtype=torch.float32).copy_(stored)
            narrow = narrow and stored.dtype.itemsize <= 2
            if digest:
                digests[BASE] = block_digests(stored)
            x -= base
        if not math.isfinite(x.sum().item()):
            self._require_finite(x, base, each)
        if self.device.type != "cpu":
            x, base = x.to(self.device), None if base is None else base.to(self.device)
        shape = self.shapes[each.name]
        if self.whole:
            x, base = x.reshape(len(x), *shape), None if base is None else base.reshape(shape)
        work = torch.float32 if narrow else torch.float64
        return Tile(x, base, Place(each.name, shape, each.start, tuple(self.experts)), work), digests

    def _read(self, model: OpenedModel, name: str, each: Range) -> Tensor:
        """The range as it is stored, in memory that the next read of this thread may overwrite."""
        dtype = model.range_dtype(name)
        held = getattr(self._local, "bytes", None)
        if held is None or held.numel() < each.size * dtype.itemsize:
            held = self._local.bytes = torch.empty(max(each.size * dtype.itemsize, 1), dtype=torch.uint8)
        out = held[: each.size * dtype.itemsize].view(dtype)
        model.read_range(name, each.start, out)
        return out

    def _require_finite(self, x: Tensor, base: Tensor | None, each: Range) -> None:
        """A sum that is not finite: say whose tensor it is, unless large numbers only overflowed the sum."""
        if base is not None and not bool(base.isfinite().all()):
            assert self.base is not None
            raise TwinmergeError(
                f"Tensor {each.name!r} of the base {self.base.name} holds NaN or infinity. Take a sound checkpoint of it."
            )
        name = self.canonical[each.name]
        for (expert, model), row in zip(self.experts.items(), x, strict=True):
            if not bool(row.isfinite().all()) and not bool(self._read(model, name, each).isfinite().all()):
                raise TwinmergeError(
                    f"Tensor {each.name!r} of the expert {expert!r} holds NaN or infinity. Take a sound checkpoint of it, or leave it out."
                )
