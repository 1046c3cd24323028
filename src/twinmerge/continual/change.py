"""One expert into a state or out of it: old state, base and expert go piece by piece into the next state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twinmerge.continual.pieces import (
    Sums,
    in_shape,
    is_whole,
    kept_of,
    of_model,
    pieces,
    places_of,
    worked,
)
from twinmerge.continual.state import AddedExpert, Description, StateFile, StateWriter, next_state
from twinmerge.engine.ranges import Range
from twinmerge.engine.written import check_written
from twinmerge.errors import ModelError
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.fold import Fold, State, SumFold
from twinmerge.methods.kit.given import state_of
from twinmerge.models.opened import OpenedModel
from twinmerge.store.checkpoint import Spec
from twinmerge.store.ranges import bytes_of

Kind = Literal["absorb", "release"]
Digests = dict[str, list[str]]
"""Part -> checksums of the blocks of a piece."""


class Told(NamedTuple):
    """The report of a piece once it is written. old: of the state before; content: of the expert; square:
    ‖τ‖² of the piece; size: the same of what is kept."""

    old: Digests
    content: list[str]
    square: float
    size: float


class Change:
    """What becomes of a state when an expert comes ("absorb") or goes ("release").

    Args:
        fold: the method of the state.
        base: its base.
        about: the state's description with the expert as the last one.
        names: the tensors that are merged.
    """

    def __init__(
        self,
        kind: Kind,
        fold: Fold,
        base: OpenedModel,
        state: StateFile,
        about: Description,
        expert: OpenedModel,
        names: list[str],
    ) -> None:
        self.kind, self.fold, self.base, self.state, self.expert = kind, fold, base, state, expert
        self.entry = about.experts[-1]
        self.about = about if kind == "absorb" else replace(about, experts=about.experts[:-1])
        self.dtype: torch.dtype = getattr(torch, about.dtype)
        self.places = places_of(base, names)
        self.shapes = {name: fold.parts(place) for name, place in self.places.items()}

    def write(self, progress: bool) -> Description:
        """Put the next state in the place of this one.

        Returns:
            what it is of.

        Raises:
            TwinmergeError: NaN or infinity in the expert, a damaged state, another expert than came, a disk that is
                full.
        """
        check_written([self.base, self.expert])
        before, read = Sums(self.state.expected, str(self.state.file)), Sums()
        squares, sizes = [], []
        specs = {f"{part}/{n}": Spec(self.dtype, shape) for n in self.shapes for part, shape in self.shapes[n].items()}
        if not self.about.experts:  # nothing is what is kept of none
            specs = {}
        with next_state(self.state.folder, self.state.base, self.about, specs) as writer:
            title = f"{'adding' if self.kind == 'absorb' else 'removing'} {self.entry.name}"
            todo = list(pieces(self.places, self.fold.absorbs_whole))
            for each, piece in worked(todo, lambda each: self._piece(each, writer), title, progress):
                for part, found in piece.old.items():
                    before.add(f"{part}/{each.name}", found)
                read.add(each.name, piece.content)
                squares.append(piece.square)
                sizes.append(piece.size)
            before.check()
            entry = replace(self.entry, content=read.of_all(), norm=math.sqrt(math.fsum(squares)))
            norm = math.sqrt(math.fsum(sizes)) if self.about.experts else 0.0
            about = replace(self.about, state_norm=norm, experts=self._experts(entry))
            writer.commit(about)
        return about

    def _experts(self, read: AddedExpert) -> tuple[AddedExpert, ...]:
        """Those of the next state, `read` being the expert that was read."""
        if self.kind == "absorb":
            return (*self.about.experts[:-1], read)
        if read.content != self.entry.content:
            raise ModelError(
                f"The weights of {self.expert.name} are not those that were added as {self.entry.name!r}: taking them "
                "out would leave a difference. Name the model that was added with --expert."
            )
        return self.about.experts

    def _piece(self, each: Range, writer: StateWriter) -> Told:
        place, shapes = self.places[each.name], self.shapes[each.name]
        own = of_model(self.expert, each, f"the expert {self.entry.name!r}")
        delta = own.values - of_model(self.base, each, f"the base {self.base.name}").values
        old = kept_of(self.state, shapes, each, place)
        held = in_shape({part: found.values for part, found in old.items()}, shapes, each, place)
        new = self._changed(held, delta.reshape(place.shape) if is_whole(each, place) else delta, place)
        sizes = shapes if is_whole(each, place) else dict.fromkeys(shapes, (each.size,))
        new = state_of(new, sizes, each.name, self.fold)
        if self.about.experts:
            self._write(new, each, place, writer)
        size = sum(float(x.double().square().sum()) for x in new.values())
        return Told({part: r.digests for part, r in old.items()}, own.digests, float(delta.square().sum()), size)

    def _changed(self, held: State, delta: Tensor, place: Place) -> State:
        if self.kind == "absorb":
            return self.fold.absorb(held, delta, place)
        assert isinstance(self.fold, SumFold)
        return self.fold.release(held, delta, place)

    def _write(self, new: State, each: Range, place: Place, writer: StateWriter) -> None:
        for part, tensor in new.items():
            flat = tensor.to(self.dtype).contiguous().reshape(-1)
            if not math.isfinite(flat.sum().item()) and not bool(flat.isfinite().all()):
                raise ModelError(
                    f"Tensor {each.name!r} of the state would not fit {self.about.dtype}. Make the state in float64."
                )
            raw = np.frombuffer(bytes_of(flat), np.uint8)
            writer.write(f"{part}/{each.name}", 0 if is_whole(each, place) else each.start, raw)
