"""The base and the experts of a merge, read range by range.

Longer than other files: all that a tile is made of is read in one class.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from twinmerge.engine.models import Models
from twinmerge.engine.plan import Entries, Entry, Plan, Source, needs_of, shapes_of
from twinmerge.engine.ranges import PIECE, Range
from twinmerge.engine.seen import Digests, Seen
from twinmerge.engine.written import check_tensors, require_read
from twinmerge.errors import DataError, ModelError, RecipeError
from twinmerge.maths import fused
from twinmerge.maths.rule import Values
from twinmerge.methods.kit.base import Gram, Place, Stored, Tile
from twinmerge.methods.kit.masks import MaskMethod
from twinmerge.models.opened import as_tensor
from twinmerge.statistics.file import Statistics
from twinmerge.store.checksum import block_digests, joined
from twinmerge.store.header import SIZES, torch_dtype
from twinmerge.store.manifest import OUTPUT

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors

FISHER = "fisher of "  # an expert's statistics among the digests


class Inputs:
    """What the tiles of a merge are made of: the entries of a plan, opened.

    Pickled, it is its plan: who loads it opens the models by itself, once for all that is sent of one sealed plan.

    Args:
        entries: the tensors that are read, by their names in the output; these key random numbers and order equal
            entries, so that neither depends on how another input spells its names.
        models: the opened models.
        device: where the arithmetic runs.
        statistics: of each expert, for methods that need them.
        plan: that the entries are of.

    Attributes:
        compiled: the compiled library may do the work.
    """

    def __init__(
        self,
        entries: Entries,
        models: Models,
        device: torch.device | str = "cpu",
        statistics: Mapping[str, Statistics] = MappingProxyType({}),
        plan: Plan | None = None,
    ) -> None:
        self.entries, self.models, self.device = entries, models, device
        self.statistics, self.plan = statistics, plan
        self.shapes = shapes_of(entries)
        self.needs = needs_of(entries)
        self.seen = Seen(self.shapes)
        self.compiled = fused.available() and str(device) == "cpu"
        if not self.compiled or any(_needs_torch(entry) for entry in entries.values()):
            import torch  # noqa: F401  before there are workers: each would import it, and give it all cores
        self._local = threading.local()

    @classmethod
    def of(cls, plan: Plan, models: Models, device: torch.device | str = "cpu") -> Inputs:
        """The opened inputs of a plan.

        Raises:
            TwinmergeError: statistics that were measured on another model.
        """
        statistics = open_statistics(plan, models) if needs_of(plan.merged) else {}
        return cls(plan.merged, models, device, statistics, plan)

    def with_plan(self, plan: Plan) -> Inputs:
        """The same inputs of a plan with other rules."""
        other = copy.copy(self)
        other.plan, other.entries = plan, plan.merged
        return other

    def __copy__(self) -> Inputs:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Callable[..., Inputs], tuple[Plan, str]]:
        """What a pickle has: the sealed plan, for `opened_plan`."""
        plan = self.plan
        if plan is None or plan.key is None:
            raise TypeError("Only the inputs of a sealed plan can be pickled. Seal it first.")
        return opened_plan, (plan, str(self.device))

    @cached_property
    def examples(self) -> dict[str, int]:
        """How many each expert's statistics are summed over, where the method reads Fisher information."""
        found = {e: self.statistics[e].examples for e in self.models.experts if "fisher" in self.needs}
        if none := next((expert for expert, count in found.items() if count < 1), None):
            raise DataError(f"The Fisher information of {none!r} is of no example. Measure it on a file that has some.")
        return found

    def from_headers(self) -> dict[str, object]:
        """What passes would find, as the headers of the statistics say."""
        if "fisher" not in self.needs:
            return {}
        from twinmerge.methods.fisher import FisherSquares, squares_of, unsound

        found = []
        for i, expert in enumerate(self.models.experts):
            squares = self.statistics[expert].header["squares"]
            parts = []
            for out, entry in self.entries.items():
                if not entry.experts[i].view.whole:  # headers are of whole tensors
                    return {}
                total, square = squares.get(entry.tensor, (0.0, 0.0))
                if not (math.isfinite(square) and total >= 0):
                    raise unsound(expert, out)
                parts.append((total, square, entry.size))
            found.append(squares_of(parts, self.examples[expert]))
        return {FisherSquares.name: found}

    def load(self, each: Range, digests: Digests | None = None) -> Tile:
        """The tile of a range.

        Args:
            each: the range.
            digests: is given the checksums of what was read.

        Raises:
            TwinmergeError: NaN or infinity (names tensor and expert), once its numbers are looked at.
        """
        return self._tile(each, self.stored(each, digests))

    def pieces(self, each: Range, stored: Stored) -> Iterator[Tile]:
        """The same in pieces that fit a core's cache."""
        step = PIECE if self.entries[each.name].grain == "element" else max(each.size, 1)
        for at in range(0, max(each.size, 1), step):
            stop = min(at + step, each.size)
            yield self._tile(Range(each.name, each.start + at, each.start + stop), _part(stored, at, stop))

    def stored(self, each: Range, digests: Digests | None = None) -> Stored:
        """The range of every input as it is stored, in memory that the next range of this thread overwrites.

        Args:
            each: the range.
            digests: is given the checksums of what was read.
        """
        entry = self.entries[each.name]
        values = {}
        for label, source in entry.sources.items():
            values[label] = self._read(entry, label, source, each)
            if digests is not None:  # while the bytes are in the cache
                digests[label] = block_digests(values[label].memory, SIZES[values[label].code])
        fisher = tuple(self._fisher(e, entry, each) for e in self.models.experts) if "fisher" in self.needs else ()
        if digests is not None:
            for expert, measured in zip(self.models.experts, fisher, strict=False):
                if self.statistics[expert].has(entry.tensor):
                    digests[f"{FISHER}{expert}"] = block_digests(measured.memory, SIZES[measured.code])
        base = None if entry.base is None else values.pop(entry.base_label)
        return Stored(base, tuple(values.values()), fisher)

    def place(self, each: Range) -> Place:
        """Where a range lies."""
        return self.entries[each.name].place._replace(offset=each.start)

    def buffer(self, label: str, size: int) -> NDArray[np.uint8]:
        """Memory of this thread, which the next call with this label gives again."""
        held: dict[str, NDArray[np.uint8]] = self._local.__dict__
        if label not in held or len(held[label]) < size:
            held[label] = np.empty(size, np.uint8)
        return held[label][:size]

    def require(self, source: str, tensor: str, blocks: Sequence[str]) -> bool:
        """Refuse what was read where it was something else in an earlier pass, or is not what was written.

        Args:
            source: "output", the name of an input, or of its statistics.
            tensor: by its name in the output.
            blocks: its checksums.

        Returns:
            whether these are checksums of a whole tensor of an input.

        Raises:
            TwinmergeError: a tensor that is not what was written, which is known of what was written here.
        """
        if source == OUTPUT:
            return True
        self.seen.compare(source, tensor, blocks)
        entry = (self.entries if self.plan is None else self.plan.entries)[tensor]
        if source.startswith(FISHER):
            expert = source.removeprefix(FISHER)
            if entry.sources[expert].view.whole:
                self.statistics[expert].require(entry.tensor, joined(blocks))
            return False
        found = entry.sources[source]
        if not found.view.whole:  # `check_parts` has looked at all of it
            return False
        require_read(self.models.of_source(entry, source), found.tensor, joined(blocks))
        return True

    def check_parts(self) -> None:
        """Look at the tensors of which only a part is read, where it is known what was written.

        Raises:
            TwinmergeError: a tensor that changed.
        """
        for entry in self.entries.values():
            for label, source in entry.sources.items():
                for model, name in self.models.of_source(entry, label).read_of(source.tensor):
                    check_tensors(model, [name])
                if not source.view.whole:
                    check_tensors(self.models.of_source(entry, label), [source.tensor])
                    if "fisher" in self.needs and label in self.statistics and self.statistics[label].has(entry.tensor):
                        self.statistics[label].read(entry.tensor)

    def _read(self, entry: Entry, label: str, source: Source, each: Range) -> Values:
        model = self.models.of_source(entry, label)
        out = self.buffer(label, each.size * SIZES[source.code])
        if source.view.whole:
            model.read_range(source.tensor, each.start, out)
        else:
            shape = model.spec(source.tensor).shape
            source.view.read(partial(model.read_range, source.tensor), shape, SIZES[source.code], each.start, out)
        return Values(out, source.code)

    def _fisher(self, expert: str, entry: Entry, each: Range) -> Values:
        """Of a range; zeros where none was measured."""
        out = self.buffer(f"fisher of {expert}", each.size * SIZES["F32"])
        if not self.statistics[expert].has(entry.tensor):
            out.fill(0)
            return Values(out, "F32")
        source = entry.sources[expert]
        read = partial(self.statistics[expert].read_range, entry.tensor)
        source.view.read(read, self.models.experts[expert].spec(source.tensor).shape, SIZES["F32"], each.start, out)
        return Values(out, "F32")

    def _tile(self, each: Range, stored: Stored) -> Tile:
        entry = self.entries[each.name]
        known = all(v.code in fused.CODES for v in (*stored.experts, *filter(None, [stored.base])))
        grams = []
        if "gram" in self.needs:
            grams = [partial(gram, self.statistics[e], entry.tensor) for e in self.models.experts]
        return Tile.of(
            lambda: self._widened(each, stored),
            self.place(each),
            stored if self.compiled and known else None,
            lambda: self._measured(each, stored),
            grams,
            self._factors(entry) if entry.grain == "matrix" else None,
            tuple(self.examples.values()),
        )

    def _factors(self, entry: Entry) -> list[Factors] | None:
        """Of every expert's delta, where all are adapters of this base's very tensor."""
        base = self.models.labelled(entry.base_label)
        experts = {label: self.models.experts[label] for label in entry.place.experts}
        deltas = entry.base is not None and entry.rule.space != "parameters"
        whole = all(source.view.whole and source.tensor == entry.tensor for source in entry.sources.values())
        if not deltas or not whole or not any(expert.low_rank(entry.tensor) for expert in experts.values()):
            return None
        found = []
        for label, expert in experts.items():
            factors = expert.factors_on(base, entry.tensor)
            if factors is None:
                return None
            if not all(bool(side.isfinite().all()) for side in factors):
                raise ModelError(_not_finite(entry.name, label))
            found.append(factors)
        return found

    def _measured(self, each: Range, stored: Stored) -> Tensor | None:
        """The Fisher information of a range, widened."""
        if not stored.fisher:
            return None
        import torch

        return torch.stack([_numbers(v).reshape(self._shape(each)) for v in stored.fisher]).to(self.device)

    def _shape(self, each: Range) -> tuple[int, ...]:
        """Of the tile of a range."""
        grain, shape = self.entries[each.name].grain, self.shapes[each.name]
        if grain == "element":
            return (each.size,)
        return shape if grain == "matrix" else (each.size // max(1, math.prod(shape[1:])), *shape[1:])

    def _widened(self, each: Range, stored: Stored) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """x, base and the dtype of sums."""
        import torch

        deltas = self.entries[each.name].rule.space != "parameters"
        x = torch.empty((len(stored.experts), each.size), dtype=self.entries[each.name].place.rounded)
        for row, values in zip(x, stored.experts, strict=True):
            row.copy_(_numbers(values))
        base = None
        if stored.base is not None:
            base = _numbers(stored.base).to(x.dtype)
            if deltas:
                x -= base
        if not math.isfinite(x.sum().item() + (0.0 if base is None or deltas else base.sum().item())):
            self._require_finite(each, stored)
        if str(self.device) != "cpu":
            x, base = x.to(self.device), None if base is None else base.to(self.device)
        shape = self._shape(each)
        x, base = x.reshape(len(x), *shape), None if base is None else base.reshape(shape)
        narrow = all(SIZES[v.code] <= 2 for v in (*stored.experts, *filter(None, [stored.base])))
        return x, base, torch.float32 if narrow else torch.float64

    def _require_finite(self, each: Range, stored: Stored) -> None:
        """A sum that is not finite: say whose tensor it is, unless large numbers only overflowed the sum."""
        entry = self.entries[each.name]
        if stored.base is not None and not bool(_numbers(stored.base).isfinite().all()):
            raise ModelError(
                f"Tensor {each.name!r} of the base {self.models.labelled(entry.base_label).name} holds NaN or infinity. "
                "Take a sound checkpoint of it."
            )
        for expert, values in zip(entry.place.experts, stored.experts, strict=True):
            if not bool(_numbers(values).isfinite().all()):
                raise ModelError(_not_finite(each.name, expert))


def open_statistics(plan: Plan, models: Models) -> dict[str, Statistics]:
    """The statistics of each expert; headers only are read.

    Raises:
        TwinmergeError: they were measured on another model; another tensor than the one they are of, or a part of
            one.
    """
    found = {}
    for name in models.experts:
        statistics = Statistics.open(Path(plan.recipe.statistics[name]), plan.method.needs[0])
        if statistics.model != models.experts[name].fingerprint():
            raise DataError(
                f"{statistics.file} was measured on another model than the expert {name!r}. Measure that model, or "
                "name the right file."
            )
        found[name] = statistics
    for out, entry in plan.merged.items():
        other = any(source.tensor != entry.tensor for source in entry.experts)
        if other or ("gram" in plan.method.needs and not all(source.view.whole for source in entry.experts)):
            raise RecipeError(
                f"{out!r} is made of another tensor, or of a part of one, in some expert, and the statistics are of "
                f"{entry.tensor!r}. Merge it by a method that reads no statistics, such as average."
            )
    return found


_OPENED: dict[str, Inputs] = {}
"""Of this process: the sealed plan that it was sent last, opened."""


def opened_plan(plan: Plan, device: str = "cpu") -> Inputs:
    """The inputs of a sealed plan in this process, which opens them when it is first asked.

    Raises:
        TwinmergeError: a model that is not there, or is not the one that the plan was made for.
    """
    assert plan.key is not None
    if plan.key not in _OPENED:
        models = Models.of(plan.recipe, plan.architecture)
        models.require(plan)
        _OPENED.clear()
        _OPENED[plan.key] = Inputs.of(plan, models, device)
    return _OPENED[plan.key].with_plan(plan)


def gram(statistics: Statistics, name: str) -> Gram | None:
    """The Gram matrix that was measured of a matrix's inputs, per token."""
    module = statistics.header["modules"].get(name)
    if module is None:
        return None
    count = statistics.header["counts"][module["group"]]
    return Gram(statistics.read(f"gram/{module['group']}") / max(count, 1), bool(module["turned"]))


def _needs_torch(entry: Entry) -> bool:
    """Whether the compiled library does not know the rule, or not what is done with its result; it knows nothing of
    rows and matrices."""
    method = entry.rule
    scaled_after = method.space == "parameters" and entry.base is not None
    ruled = method.has_mask_rule() if isinstance(method, MaskMethod) else method.has_rule()
    return not ruled or entry.grain != "element" or scaled_after


def _not_finite(tensor: str, expert: str) -> str:
    return (
        f"Tensor {tensor!r} of the expert {expert!r} holds NaN or infinity. Take a sound checkpoint of it, or leave "
        "it out."
    )


def _numbers(values: Values) -> Tensor:
    return as_tensor(values.memory, torch_dtype(values.code))


def _part(stored: Stored, start: int, stop: int) -> Stored:
    def cut(values: Values) -> Values:
        size = SIZES[values.code]
        return Values(values.memory[start * size : stop * size], values.code)

    fisher = tuple(map(cut, stored.fisher))
    return Stored(None if stored.base is None else cut(stored.base), tuple(map(cut, stored.experts)), fisher)
