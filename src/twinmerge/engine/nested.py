"""A merged model as an input of another merge: its tensors are computed where they are read, and written nowhere."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.engine.combine import combine
from twinmerge.engine.inputs import Inputs
from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan
from twinmerge.engine.prepare import new_run, plan_of, surveyed
from twinmerge.engine.ranges import Range, rows_of
from twinmerge.engine.rounding import narrowed
from twinmerge.engine.run import Run
from twinmerge.errors import ModelError
from twinmerge.maths.sums import BLOCK
from twinmerge.models.opened import Openable, OpenedModel, as_bytes, as_tensor
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.header import SIZES, torch_dtype
from twinmerge.store.ranges import bytes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from twinmerge.store.ranges import Flat

KEPT = 1 << 28  # bytes of whole tensors that are kept, since matrices are computed in one piece


@dataclass(frozen=True)
class Nested(Openable):
    """The model that a recipe makes, as an input.

    Attributes:
        recipe: of the merge.
    """

    recipe: Recipe

    def opened(self, name: str | None) -> OpenedModel:
        """The merged model, of which nothing is computed yet.

        Args:
            name: how messages call it.

        Raises:
            TwinmergeError: as a merge of the recipe.
        """
        models = Models.of(self.recipe, architecture=True)
        plan = plan_of(self.recipe, models)
        if plan.heads and any(plan.heads.values()):
            raise _of_heads(name)
        base = models.base
        specs = {entry.tensor: entry.spec for entry in plan.entries.values()}
        stored = {entry.tensor: out for out, entry in plan.entries.items()}
        architecture = base.architecture
        if plan.config and architecture is not None and architecture.config is not None:
            architecture = architecture.with_config({**architecture.config.to_dict(), **plan.config})
        files = tuple(dict.fromkeys(file for each in plan.inputs.values() for file in each.files))
        in_memory = any(not each.files for each in plan.inputs.values())
        return OpenedModel(
            name or "the merge on the way",
            specs,
            stored,
            architecture,
            Computed(plan, models),
            folder=base.folder,
            files=() if in_memory else files,
            config_changes={**base.config_changes, **plan.config},
            sides=base.sides,
        )


def with_nested(recipe: Recipe) -> Recipe:
    """The recipe whose models that are recipes themselves can be opened."""

    def of(model: Any) -> Any:
        if not isinstance(model, Recipe):
            return model
        by_names, allow_pickle = model.by_names or recipe.by_names, model.allow_pickle or recipe.allow_pickle
        return Nested(with_nested(replace(model, by_names=by_names, allow_pickle=allow_pickle)))

    models = [recipe.base, *recipe.experts.values()]
    if not any(isinstance(model, Recipe) for model in models):
        return recipe
    return replace(recipe, base=of(recipe.base), experts={name: of(model) for name, model in recipe.experts.items()})


class Computed:
    """The tensors of a merge, range by range, with the numbers that its folder would have.

    Args:
        plan: of the merge.
        models: its opened models. What must be known of all of them is found at the first read.
    """

    def __init__(self, plan: Plan, models: Models) -> None:
        self.plan, self.models = plan, models
        self._lock = threading.RLock()
        self._whole: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        import torch

        spec = self.plan.entries[name].spec
        out = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, out)
        return out.reshape(spec.shape)

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat."""
        entry = self.plan.entries[name]
        size = entry.spec.itemsize
        to = out if isinstance(out, np.ndarray) else as_bytes(out)
        stop = start + to.nbytes // size
        if stop == start:
            return
        for piece in self.pieces(name, start, stop):
            values = self._values(piece)
            at, end = max(start, piece.start), min(stop, piece.stop)
            to[(at - start) * size : (end - start) * size] = values[
                (at - piece.start) * size : (end - piece.start) * size
            ]

    def place(self, name: str) -> tuple[int, int]:
        """Where its first input lies."""
        entry = self.plan.entries[name]
        label = next(iter(entry.sources))
        return self.models.of_source(entry, label).place(entry.sources[label].tensor)

    @cached_property
    def _ready(self) -> tuple[Run, Inputs]:
        """The run, and the inputs with their rules settled."""
        inputs = Inputs.of(self.plan, self.models)
        run = new_run(self.plan, inputs, progress=False, spread=map)  # whoever reads is a worker itself
        return run, surveyed(run, inputs)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[Range]:
        """The ranges that are computed for the elements from `start` to `stop` − 1."""
        at = start
        while at < stop:
            piece = self._piece(name, at, stop)
            yield piece
            at = piece.stop

    def _piece(self, name: str, at: int, stop: int) -> Range:
        """The range that is computed for the elements from `at` on: whole blocks, whole rows, or all."""
        entry = self.plan.entries[name]
        if entry.grain == "matrix":
            return Range(name, 0, entry.size)
        step = BLOCK if entry.grain == "element" else rows_of(entry.place.shape)
        first = at // step * step
        last = -(-stop // step) * step if entry.grain == "element" else first + step
        return Range(name, first, min(last, first + max(self.plan.tile, step), entry.size))

    def _values(self, each: Range) -> NDArray[np.uint8]:
        """The bytes of a range."""
        entry = self.plan.entries[each.name]
        if entry.method is None:
            return self._copied(each)
        with self._lock:
            run, inputs = self._ready
            assert inputs.plan is not None
            known, rounding = run.settled(each.name), inputs.plan.rounding(each.name)
        if entry.grain == "element":
            return combine(each, known, inputs, rounding).values
        key = f"{each.name}\0{each.start}"
        with self._lock:
            if key not in self._whole:
                self._whole[key] = combine(each, known, inputs, rounding).values.copy()
            self._whole.move_to_end(key)
            while sum(v.nbytes for v in self._whole.values()) > KEPT and len(self._whole) > 1:
                self._whole.popitem(last=False)
            return self._whole[key]

    def _copied(self, each: Range) -> NDArray[np.uint8]:
        entry = self.plan.entries[each.name]
        assert entry.base is not None
        stored = np.empty(each.size * SIZES[entry.base.code], np.uint8)
        self.models.labelled(entry.base_label).read_range(entry.base.tensor, each.start, stored)
        if entry.base.code == entry.spec.code:
            return stored
        found = narrowed(as_tensor(stored, torch_dtype(entry.base.code)), entry.spec.code, each.name)
        return np.frombuffer(bytes_of(found), np.uint8)


def _of_heads(name: str | None) -> ModelError:
    return ModelError(
        f"{name or 'A merge on the way'} keeps output layers of its experts apart, so it is no one model to merge on. "
        "Write it to a folder first."
    )
