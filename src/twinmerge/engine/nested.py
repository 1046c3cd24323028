"""A merged model as an input of another merge: its tensors are computed where they are read, and written nowhere."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.engine.combine import combine
from twinmerge.engine.inputs import Inputs
from twinmerge.engine.models import Models
from twinmerge.engine.plan import Plan
from twinmerge.engine.prepare import new_run, plan_of, surveyed
from twinmerge.engine.ranges import TILE_BYTES, Range, rows_of
from twinmerge.engine.rounding import narrowed
from twinmerge.engine.run import Run
from twinmerge.errors import ModelError
from twinmerge.maths.sums import BLOCK
from twinmerge.models.opened import Openable, OpenedModel, as_bytes, as_tensor
from twinmerge.recipes.nesting import require_few
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.header import SIZES, torch_dtype
from twinmerge.store.ranges import bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from twinmerge.store.ranges import Flat

KEPT = 1 << 28  # bytes of whole tensors that are kept, since matrices are computed in one piece
MANY = 1024  # blocks that are kept, at most: small tensors have one each


@dataclass(frozen=True)
class Nested(Openable):
    """The model that a recipe makes, as an input; opened once, however many merges it is an input of.

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
        model, heads = self._made
        if heads:
            raise _of_heads(name)
        return replace(model, name=name or model.name)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps: it opens its models anew."""
        return {"recipe": self.recipe}

    @cached_property
    def _made(self) -> tuple[OpenedModel, bool]:
        """The model that all uses share, and whether it keeps heads of its experts."""
        models = Models.of(self.recipe, architecture=True)
        plan = plan_of(self.recipe, models)
        base = models.base
        specs = {entry.tensor: entry.spec for entry in plan.entries.values()}
        stored = {entry.tensor: out for out, entry in plan.entries.items()}
        architecture = base.architecture
        if plan.config and architecture is not None and architecture.config is not None:
            architecture = architecture.with_config({**architecture.config.to_dict(), **plan.config})
        files = tuple(dict.fromkeys(file for each in plan.inputs.values() for file in each.files))
        in_memory = any(not each.files for each in plan.inputs.values())
        files = () if in_memory else files
        made = OpenedModel(
            "the merge on the way",
            specs,
            stored,
            architecture,
            Computed(plan, models, files),
            folder=base.folder,
            files=files,
            config_changes={**base.config_changes, **plan.config},
            sides=base.sides,
        )
        return made, any(plan.heads.values())


def with_nested(recipe: Recipe) -> Recipe:
    """The recipe whose models that are recipes themselves can be opened.

    Equal ones become one model, which is opened, surveyed and, range by range, computed once for all that use it.

    Raises:
        RecipeError: as `require_few`.
    """
    require_few(recipe)
    return _One().of(recipe)


class _One:
    """The models of a merge that are recipes, each once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, bool, bool], Nested] = {}
        self._equal: dict[Any, list[Nested]] = {}

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with such models in the place of recipes."""
        models = [recipe.base, *recipe.experts.values()]
        if not any(isinstance(model, Recipe) for model in models):
            return recipe
        experts = {name: self._model(model, recipe) for name, model in recipe.experts.items()}
        return replace(recipe, base=self._model(recipe.base, recipe), experts=experts)

    def _model(self, model: Any, outer: Recipe) -> Any:
        if not isinstance(model, Recipe):
            return model
        by_names, allow_pickle = model.by_names or outer.by_names, model.allow_pickle or outer.allow_pickle
        key = id(model), by_names, allow_pickle  # a shared recipe is looked into once
        if key not in self._found:
            own = self.of(replace(model, by_names=by_names, allow_pickle=allow_pickle))
            alike = self._equal.setdefault((own.method_name, tuple(own.experts)), [])
            made = next((each for each in alike if _same(each.recipe, own)), None)
            if made is None:
                made = Nested(own)
                alike.append(made)
            self._found[key] = made
        return self._found[key]


def _same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes, in which equal recipes are one model already, are equal."""
    if any(
        getattr(one, each.name) != getattr(other, each.name)
        for each in fields(Recipe)
        if each.compare and each.name not in ("base", "experts")
    ):
        return False
    pairs = zip((one.base, *one.experts.values()), (other.base, *other.experts.values()), strict=True)
    return all(a is b or (isinstance(a, (str, os.PathLike)) and a == b) for a, b in pairs)


class _Kept:
    """Blocks of tensors that were computed last, as many as fit."""

    def __init__(self) -> None:
        self.blocks: OrderedDict[tuple[str, int], NDArray[np.uint8]] = OrderedDict()
        self.bytes = 0
        self.states: object = None  # of the files that they were made of

    def put(self, name: str, number: int, values: NDArray[np.uint8]) -> None:
        """Keep a block, the latest of all."""
        self.bytes += values.nbytes - (old.nbytes if (old := self.blocks.get((name, number))) is not None else 0)
        self.blocks[name, number] = values

    def take(self, name: str, numbers: range, most: int) -> list[NDArray[np.uint8]]:
        """Blocks that are here; of the others those stay that were used last, as far as all are `most` bytes."""
        for number in numbers:
            self.blocks.move_to_end((name, number))
        while len(self.blocks) > len(numbers) and (self.bytes > most or len(self.blocks) > MANY):
            self.bytes -= self.blocks.popitem(last=False)[1].nbytes
        return [self.blocks[name, number] for number in numbers]


class Computed:
    """The tensors of a merge, range by range, with the numbers that its folder would have.

    What was computed last is kept, so that all that read a range of it compute it once: of what is cut anywhere a
    tile's bytes for each thread, of rows and matrices `KEPT`, or else what was asked for at once.

    Args:
        plan: of the merge.
        models: its opened models. What must be known of all of them is found at the first read.
        files: that it is made of; empty where a model is in memory.
    """

    def __init__(self, plan: Plan, models: Models, files: Sequence[Path] = ()) -> None:
        self.plan, self.models, self.files = plan, models, files
        self._lock = threading.RLock()
        self._whole = _Kept()
        self._local = threading.local()

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        import torch

        spec = self.plan.entries[name].spec
        out = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, out)
        return out.reshape(spec.shape)

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat."""
        size = self.plan.entries[name].spec.itemsize
        to = out if isinstance(out, np.ndarray) else as_bytes(out)
        stop = start + to.nbytes // size
        if stop == start:
            return
        step = self._step(name)
        wanted = range(start // step, -(-stop // step))
        for number, values in zip(wanted, self._blocks(name, wanted), strict=True):
            first = number * step
            low, high = max(start, first), min(stop, first + step)
            to[(low - start) * size : (high - start) * size] = values[(low - first) * size : (high - first) * size]

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
        """The ranges that are computed for the elements from `start` to `stop` − 1, where none of them is kept."""
        entry, step = self.plan.entries[name], self._step(name)
        at_once = max(1, self.plan.tile // BLOCK) if entry.grain == "element" else 1
        last = -(-stop // step)
        for first in range(start // step, last, at_once):
            yield Range(name, first * step, min((first + at_once) * step, last * step, entry.size))

    def _step(self, name: str) -> int:
        """Elements of a block."""
        entry = self.plan.entries[name]
        return {"element": BLOCK, "rows": rows_of(entry.place.shape), "matrix": entry.size}[entry.grain]

    def _blocks(self, name: str, wanted: range) -> Iterator[NDArray[np.uint8]]:
        """The bytes of blocks side by side."""
        entry = self.plan.entries[name]
        if entry.grain != "element":  # too large for every thread to keep its own
            for number in wanted:
                with self._lock:
                    (values,) = self._made(name, range(number, number + 1), self._whole, KEPT)
                yield values
            return
        kept, at_once = self._own(), max(1, self.plan.tile // BLOCK)
        most = max(TILE_BYTES, len(wanted) * BLOCK * entry.spec.itemsize)
        for first in range(wanted.start, wanted.stop, at_once):
            yield from self._made(name, range(first, min(first + at_once, wanted.stop)), kept, most)

    def _own(self) -> _Kept:
        """What this thread keeps, nothing from before an input changed: what is read then says so."""
        if not self.files and threading.current_thread() is threading.main_thread():
            return _Kept()  # who changes a model in memory does it there, between two merges
        try:
            states = [(found.st_size, found.st_mtime_ns, found.st_ino) for found in map(os.stat, self.files)]
        except OSError:
            return _Kept()
        kept: _Kept | None = getattr(self._local, "kept", None)
        if kept is None or kept.states != states:
            kept = self._local.kept = _Kept()
            kept.states = states
        return kept

    def _made(self, name: str, numbers: range, kept: _Kept, most: int) -> list[NDArray[np.uint8]]:
        """The bytes of blocks; those that are not kept are computed in one piece."""
        if missing := [number for number in numbers if (name, number) not in kept.blocks]:
            entry, step = self.plan.entries[name], self._step(name)
            whole = Range(name, missing[0] * step, min((missing[-1] + 1) * step, entry.size))
            values, size = self._computed(whole), step * entry.spec.itemsize
            for at, number in enumerate(range(missing[0], missing[-1] + 1)):
                kept.put(name, number, values[at * size : (at + 1) * size].copy())
        return kept.take(name, numbers, most)

    def _computed(self, each: Range) -> NDArray[np.uint8]:
        """The bytes of a range, in memory that the next range of this thread overwrites."""
        entry = self.plan.entries[each.name]
        if entry.method is None:
            return self._copied(each)
        with self._lock:
            run, inputs = self._ready
            assert inputs.plan is not None
            known, rounding = run.settled(each.name), inputs.plan.rounding(each.name)
        return combine(each, known, inputs, rounding).values

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
