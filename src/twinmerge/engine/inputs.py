"""The base and the experts of a merge, read range by range."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from twinmerge.engine.ranges import PIECE, Grains, Range
from twinmerge.engine.seen import Seen
from twinmerge.errors import TwinmergeError
from twinmerge.maths import fused
from twinmerge.maths.fused import Values
from twinmerge.maths.threads import parallel
from twinmerge.methods.kit.base import TABLES, Gram, Method, Place, Stored, Tile
from twinmerge.models.opened import OpenedModel, as_tensor
from twinmerge.statistics.file import Statistics
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.checksum import block_digests
from twinmerge.store.header import SIZES, torch_dtype

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors

BASE = "base"
FISHER = "fisher of "  # an expert's statistics among the digests
Digests = dict[str, list[str]]
"""Input -> checksums of the blocks of a range, in order."""


class Inputs:
    """What the method's tiles are made of.

    Args:
        base: None where the method needs none.
        names: canonical name -> name of the tensor in the output, which keys random numbers and orders equal entries, so
            that neither depends on how another input spells its names.
        device: where the arithmetic runs.
        statistics: of each expert, for methods that need them.
        with_base: give the base to methods that work on parameters, too.
    """

    def __init__(
        self,
        method: Method,
        base: OpenedModel | None,
        experts: Mapping[str, OpenedModel],
        names: Mapping[str, str],
        device: torch.device | str = "cpu",
        statistics: Mapping[str, Statistics] = MappingProxyType({}),
        with_base: bool = False,
    ) -> None:
        self.method, self.deltas = method, method.space == "deltas"
        self.base = base if self.deltas or with_base else None
        self.experts, self.names, self.device = experts, names, device
        self.canonical = {out: name for name, out in names.items()}
        self._first = next(iter(experts.values()))
        # whose class says what each tensor is: models without a config.json have none
        models = [*experts.values(), *([] if base is None else [base])]
        self._told = next((m for m in models if knows_class(m)), self._first)
        self.shapes = {out: self._first.spec(name).shape for name, out in names.items()}
        self.seen = Seen(self.shapes)
        self.compiled = fused.available() and str(device) == "cpu"
        if not self.compiled or type(method).rule is Method.rule or (not self.deltas and with_base):
            import torch  # noqa: F401  before there are workers: each would import it, and give it all cores
        self._models = {**experts, **({} if self.base is None else {BASE: self.base})}
        self.needs, self.statistics = method.needs, statistics
        self._local = threading.local()

    @cached_property
    def grains(self) -> Grains:
        """Of every tensor; a core space is that of a tensor in one piece."""
        low_rank = {out for out, name in self.canonical.items() if any(e.low_rank(name) for e in self.experts.values())}
        found = {out: self.method.grain_of(self.place(Range(out, 0, 0))) for out in self.canonical}
        return {out: "matrix" if grain == "rows" and out in low_rank else grain for out, grain in found.items()}

    @cached_property
    def tables(self) -> dict[str, object] | None:
        """What the method takes for tables of embeddings, by names in the output, and who says so; None where it is all the same to it."""
        if not asks_for_tables(self.method):
            return None
        names = [out for out, name in self.canonical.items() if self._told.table(name)]
        return {"told_by": "class" if self.knows_class else "names", "names": names}

    @property
    def knows_class(self) -> bool:
        """Whether some model's class says what each tensor is for."""
        return knows_class(self._told)

    @cached_property
    def element_bytes(self) -> int:
        """Of one element of every input, of the widest dtype that it has."""
        inputs = (max(SIZES[model.range_code(n)] for n in self.canonical.values()) for model in self._models.values())
        return sum(inputs) + ("fisher" in self.needs) * SIZES["F32"] * len(self.experts)

    @cached_property
    def examples(self) -> dict[str, int]:
        """How many each expert's statistics are summed over, where the method reads Fisher information."""
        found = {e: self.statistics[e].examples for e in self.experts if "fisher" in self.needs}
        if none := next((expert for expert, count in found.items() if count < 1), None):
            raise TwinmergeError(
                f"The Fisher information of {none!r} is of no example. Measure it on a file that has some."
            )
        return found

    def told(self) -> dict[str, object]:
        """What passes would find, as the headers of the statistics tell it."""
        if "fisher" not in self.needs:
            return {}
        from twinmerge.methods.fisher import FisherSquares, squares_of, unsound

        found = []
        for expert, model in self.experts.items():
            squares = self.statistics[expert].header["squares"]
            parts = []
            for out, name in self.canonical.items():
                total, square = squares.get(name, (0.0, 0.0))
                if not (math.isfinite(square) and total >= 0):
                    raise unsound(expert, out)
                parts.append((total, square, math.prod(model.spec(name).shape)))
            found.append(squares_of(parts, self.examples[expert]))
        return {FisherSquares.name: found}

    def load(self, each: Range) -> Tile:
        """The tile of a range.

        Errors:
            TwinmergeError: NaN or infinity (names tensor and expert), once its numbers are looked at.
        """
        digests = Digests()
        stored = self.stored(each, digests)
        self.seen.note(each, digests)
        return self._tile(each, stored)

    def pieces(self, each: Range, stored: Stored) -> Iterator[Tile]:
        """The same in pieces that fit a core's cache."""
        step = PIECE if self.grains[each.name] == "element" else max(each.size, 1)
        for at in range(0, max(each.size, 1), step):
            stop = min(at + step, each.size)
            yield self._tile(Range(each.name, each.start + at, each.start + stop), _part(stored, at, stop))

    def stored(self, each: Range, digests: Digests | None = None) -> Stored:
        """The range of every input as it is stored, in memory that the next range of this thread overwrites.

        Args:
            digests: is given the checksums of what was read.
        """
        name = self.canonical[each.name]
        values = {}
        for label, model in self._models.items():
            values[label] = self._read(label, model, name, each)
            if digests is not None:  # while the bytes are in the cache
                digests[label] = block_digests(values[label].memory, SIZES[values[label].code])
        fisher = tuple(self._fisher(e, name, each) for e in self.experts) if "fisher" in self.needs else ()
        if digests is not None:
            for expert, measured in zip(self.experts, fisher, strict=False):
                if self.statistics[expert].has(name):
                    digests[f"{FISHER}{expert}"] = block_digests(measured.memory, SIZES[measured.code])
        return Stored(values.pop(BASE) if self.base is not None else None, tuple(values.values()), fisher)

    def place(self, each: Range) -> Place:
        return Place(
            each.name,
            self.shapes[each.name],
            each.start,
            tuple(self.experts),
            self._told.turned(self.canonical[each.name]),
            self._told.table(self.canonical[each.name]),
            self._told.stacked(self.canonical[each.name]),
        )

    def buffer(self, label: str, size: int) -> NDArray[np.uint8]:
        """Memory of this thread, which the next call with this label gives again."""
        held: dict[str, NDArray[np.uint8]] = self._local.__dict__
        if label not in held or len(held[label]) < size:
            held[label] = np.empty(size, np.uint8)
        return held[label][:size]

    def _read(self, label: str, model: OpenedModel, name: str, each: Range) -> Values:
        code = model.range_code(name)
        out = self.buffer(label, each.size * SIZES[code])
        model.read_range(name, each.start, out)
        return Values(out, code)

    def _fisher(self, expert: str, name: str, each: Range) -> Values:
        """Of a range; zeros where none was measured."""
        out = self.buffer(f"fisher of {expert}", each.size * SIZES["F32"])
        if self.statistics[expert].has(name):
            self.statistics[expert].read_range(name, each.start, out)
        else:
            out.fill(0)
        return Values(out, "F32")

    def _tile(self, each: Range, stored: Stored) -> Tile:
        known = all(v.code in fused.CODES for v in (*stored.experts, *filter(None, [stored.base])))
        grams = []
        if "gram" in self.needs:
            name = self.canonical[each.name]
            grams = [partial(gram, self.statistics[e], name) for e in self.experts]
        return Tile.of(
            lambda: self._widened(each, stored),
            self.place(each),
            stored if self.compiled and known else None,
            lambda: self._measured(each, stored),
            grams,
            self._factors(self.canonical[each.name]) if self.grains[each.name] == "matrix" else None,
            tuple(self.examples.values()),
        )

    def _factors(self, name: str) -> list[Factors] | None:
        """Of every expert's delta, where all are adapters of this base's very tensor."""
        if self.base is None or not self.deltas or not any(expert.low_rank(name) for expert in self.experts.values()):
            return None
        found = []
        for label, expert in self.experts.items():
            factors = expert.factors_on(self.base, name)
            if factors is None:
                return None
            if not all(bool(side.isfinite().all()) for side in factors):
                raise TwinmergeError(_not_finite(self.names[name], label))
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
        grain, shape = self.grains[each.name], self.shapes[each.name]
        if grain == "element":
            return (each.size,)
        return shape if grain == "matrix" else (each.size // max(1, math.prod(shape[1:])), *shape[1:])

    def _widened(self, each: Range, stored: Stored) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """x, base and the dtype of sums."""
        import torch

        x = torch.empty((len(self.experts), each.size), dtype=torch.float32)
        for row, values in zip(x, stored.experts, strict=True):
            row.copy_(_numbers(values))
        base = None
        if stored.base is not None:
            base = _numbers(stored.base).float()
            if self.deltas:
                x -= base
        if not math.isfinite(x.sum().item() + (0.0 if base is None or self.deltas else base.sum().item())):
            self._require_finite(each, stored)
        if str(self.device) != "cpu":
            x, base = x.to(self.device), None if base is None else base.to(self.device)
        shape = self._shape(each)
        x, base = x.reshape(len(x), *shape), None if base is None else base.reshape(shape)
        narrow = all(SIZES[v.code] <= 2 for v in (*stored.experts, *filter(None, [stored.base])))
        return x, base, torch.float32 if narrow else torch.float64

    def _require_finite(self, each: Range, stored: Stored) -> None:
        """A sum that is not finite: say whose tensor it is, unless large numbers only overflowed the sum."""
        if self.base is not None and stored.base is not None and not bool(_numbers(stored.base).isfinite().all()):
            raise TwinmergeError(
                f"Tensor {each.name!r} of the base {self.base.name} holds NaN or infinity. Take a sound checkpoint of it."
            )
        for expert, values in zip(self.experts, stored.experts, strict=True):
            if not bool(_numbers(values).isfinite().all()):
                raise TwinmergeError(_not_finite(each.name, expert))


def check_written(models: Iterable[OpenedModel]) -> None:
    """Read what was written here before, and refuse it where it is no longer what was written.

    For work that reads its inputs in ranges and sums nothing; other models are not read.

    Errors:
        TwinmergeError: a tensor that changed.
    """
    for model in models:
        if isinstance(model.source, Checkpoint) and model.source.expected:
            for _ in parallel(model.source.check, list(model.stored.values())):
                pass


def require_read(model: OpenedModel, name: str, found: str) -> None:
    """Refuse a tensor whose checksum, taken while it was read, is not the one with which it was written, where that is known.

    Errors:
        TwinmergeError: another one.
    """
    own = name if name in model.specs else model.aliases.get(name, name)
    if isinstance(model.source, Checkpoint) and own not in model.changes:
        model.source.require(model.stored[own], found)


def knows_class(model: OpenedModel) -> bool:
    """Whether the model's class says what each of its tensors is for."""
    return model.architecture is not None or model.tables is not None


def asks_for_tables(method: object) -> bool:
    """Whether a method treats tables of embeddings as the class tells them."""
    return TABLES in str(getattr(method, "elementwise", "")).split()


def warn_of_names(method: Method, model: OpenedModel, names: Iterable[str], stacklevel: int) -> None:
    """Say what a method that asks what tensors are for takes them for in a bare checkpoint, since no class says it.

    Args:
        names: canonical ones of what is merged.
    """
    names = list(names)
    if asks_for_tables(method):
        _warn_of_tables(model, names, stacklevel + 1)
    three = [n for n in names if len(model.spec(n).shape) == 3 and min(model.spec(n).shape) > 1]
    if three and method.grain == "matrix":
        stacks = [n for n in three if model.stacked(n)]
        warnings.warn(
            f"{model.name} has no config.json, so what its tensors of three axes are is told by their names: {len(stacks)} are experts, matrix "
            f"by matrix, and {len(three) - len(stacks)} kernels (out, rest), {three[0]!r} among them. Add its config.json.",
            stacklevel=stacklevel + 1,
        )


def _warn_of_tables(model: OpenedModel, names: Sequence[str], stacklevel: int) -> None:
    found = sorted(name for name in names if model.table(name))
    told = f"{', '.join(found[:3])}{' …' if len(found) > 3 else ''}" if found else "none has such a name"
    warnings.warn(
        f"{model.name} has no config.json, so tables of embeddings, which are not merged as matrices, are told by their usual names: "
        f"{told}. Add its config.json, or name them with elementwise.",
        stacklevel=stacklevel + 1,
    )


def _not_finite(tensor: str, expert: str) -> str:
    return f"Tensor {tensor!r} of the expert {expert!r} holds NaN or infinity. Take a sound checkpoint of it, or leave it out."


def _numbers(values: Values) -> Tensor:
    return as_tensor(values.memory, torch_dtype(values.code))


def _part(stored: Stored, start: int, stop: int) -> Stored:
    def cut(values: Values) -> Values:
        size = SIZES[values.code]
        return Values(values.memory[start * size : stop * size], values.code)

    fisher = tuple(map(cut, stored.fisher))
    return Stored(None if stored.base is None else cut(stored.base), tuple(map(cut, stored.experts)), fisher)


def gram(statistics: Statistics, name: str) -> Gram | None:
    """The Gram matrix that was measured of a matrix's inputs, per token."""
    module = statistics.header["modules"].get(name)
    if module is None:
        return None
    count = statistics.header["counts"][module["group"]]
    return Gram(statistics.read(f"gram/{module['group']}") / max(count, 1), bool(module["turned"]))
