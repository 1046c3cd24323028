"""Passes and tiles: run one method over all merged tensors.

A range of every input is read, made into one widened tile, given to the method's rule and handed on; threads share
the ranges and memory holds a few tiles for each. Passes that a later one, or the first tensor, must wait for sweep
over all tensors; those of one tensor that come last are run just before it is merged, so that most methods read every
input once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from twinmerge.engine.ranges import SEEN, TILE, Grains, Range, Shapes, grouped, ranges, sample
from twinmerge.engine.seen import Digests, Folds, Seen, note
from twinmerge.errors import RecipeError
from twinmerge.maths.threads import parallel, thread_count
from twinmerge.maths.workers import CAN_FORK, forked
from twinmerge.methods.kit.base import Known, Method, Partial, Pass, Place, Tile
from twinmerge.methods.kit.given import partial_of, wanted_of
from twinmerge.progress import logged
from twinmerge.progress import meter as progress_meter
from twinmerge.recipes.lines import unscaled

LARGE = 1 << 24  # elements from which on worker processes pay for themselves
SHARES = 4  # parts of a sweep for each worker: a step of the progress bar each
BLOCKS = 8  # of rows that one worker adds up
BATCH = 512  # tiles between two passes of one tensor: enough for all workers, few enough to stay in the page cache
Item = TypeVar("Item")
Answer = TypeVar("Answer")
Each = TypeVar("Each")


Load = Callable[[Range, Digests], Tile]
"""A range's tile; the digests are given the checksums of what was read."""
Map = Callable[[Callable[[Item], Answer], Sequence[Item]], Iterable[Answer]]
"""What spreads work: the function of every item, in order, as `concurrent.futures.Executor.map` gives it."""


class Run:
    """A method over the tensors `names`.

    Args:
        method: that merges them, or name -> method where its parameters differ between tensors.
        names: all tensors that are merged (they are what "the whole model" means for model-scope passes), in the
            order in which they are read.
        shapes: name -> shape.
        load: range -> its tile, flat, or in rows or the tensor's shape by its grain. Called from any thread.
        grains: of every tensor; what the method says of it where None.
        tile: elements of a tile, a multiple of 65,536; the result does not depend on it.
        processes: spread large work over forked processes and not over threads (see `maths/workers.py`).
        seen: where what is read is compared with what earlier passes read.
        spread: what spreads work over workers elsewhere, which get pickles; threads or forks of this machine where
            None.

    Attributes:
        known: what the passes found; a pass whose result is put there before `survey` is left out.

    Raises:
        TwinmergeError: parameters that differ between tensors, where a pass over the whole model asks for one.
    """

    def __init__(
        self,
        method: Method | Mapping[str, Method],
        names: Sequence[str],
        shapes: Shapes,
        load: Load,
        grains: Grains | None = None,
        tile: int = TILE,
        progress: bool = True,
        processes: bool = False,
        seen: Seen | None = None,
        spread: Map[Any, Any] | None = None,
    ) -> None:
        self.seen = seen or Seen({})
        self.methods = method if isinstance(method, Mapping) else dict.fromkeys(names, method)
        self.names, self.shapes, self.load = list(names), shapes, load
        self.grains = grains or {name: self.methods[name].grain_of(Place(name, shapes[name])) for name in names}
        self.tile, self.progress, self.spread = tile, progress, spread
        self.rules = _shared(self.methods)
        self.matrices = any(rule.method.grain == "matrix" for rule in self.rules)
        self.processes = processes and CAN_FORK and not self.matrices
        self.leading: list[Pass[Any]] = []
        for rule in self.rules:
            last_model = max((i for i, step in enumerate(rule.trailing) if step.scope == "model"), default=-1)
            leading, rule.trailing = rule.trailing[: last_model + 1], rule.trailing[last_model + 1 :]
            if leading and len(self.rules) > 1:
                raise RecipeError(
                    f"{type(rule.method).__name__} looks at the whole model before it merges a tensor, so its "
                    "parameters cannot differ between tensors. Give one value for all, or compat: mergekit where the "
                    "method has it."
                )
            self.leading = leading
        self.known = Known()
        self.known_of = {name: Known() for name in names}
        self._settled: set[str] = set()

    @property
    def has_trailing(self) -> bool:
        """Whether some tensor has passes of its own that run just before it is merged."""
        return any(rule.trailing for rule in self.rules)

    def survey_last(self, step: Pass[Any]) -> None:
        """Run one more pass over the whole model when all others have run, so that it knows all.

        Raises:
            RecipeError: parameters that differ between tensors.
        """
        if len(self.rules) > 1:
            raise RecipeError(
                f"{step.name} looks at the whole merged model, so the method's parameters cannot differ between "
                f"tensors. Give one value for all, or say what {step.name} is to find."
            )
        self.leading = [*self.leading, *self.rules[0].trailing, step]
        self.rules[0].trailing = []

    def settled(self, name: str) -> Known:
        """What is known of a tensor, after its own passes; for who merges tensors in an order of his own."""
        if name not in self._settled:
            self._sweep_tensors([name])
            self._settled.add(name)
        return self._of(name)

    def survey(self) -> None:
        """All passes that must be over before the first tensor is merged."""
        for number, step in enumerate(self.leading, 1):
            if step.name in self.known:  # from a header
                continue
            self._sweep(step, self.names, f"pass {number} of {len(self.leading)}")

    def looked_at(self) -> Iterator[Range]:
        """What is read of every input, as far as headers tell: in each pass that runs, and where tensors are merged."""
        yield from self.surveyed_at()
        groups = self.groups()
        for batch in self._batches(groups) if self.has_trailing else ():
            yield from self.settled_at(_names(batch))
        yield from (each for group in groups for each in group)

    def surveyed_at(self) -> Iterator[Range]:
        """The same of `survey` alone."""
        for step in self.leading:
            if step.name not in self.known:
                yield from self._swept(step, self.names)

    def settled_at(self, names: Sequence[str]) -> Iterator[Range]:
        """The same of the passes that run just before tensors that are merged together."""
        for rule in self.rules:
            own = [name for name in names if name in rule.names]
            for step in rule.trailing:
                yield from self._swept(step, own)

    def _swept(self, step: Pass[Any], names: Sequence[str]) -> Iterator[Range]:
        names = [n for n in names if step.grain in (None, self.grains[n])]
        if not step.rare:
            yield from self._work(step, names)

    def _work(self, step: Pass[Any], names: Sequence[str]) -> Iterator[Range]:
        """The ranges that a pass over some tensors looks at."""
        if step.sampled:
            return sample(names, self.shapes)
        return ranges(names, self.shapes, min(SEEN, self.tile), self.grains)

    def groups(self, order: Iterable[str] | None = None) -> list[list[Range]]:
        """The work of `merge`, in its order: ranges that are done together."""
        names = list(order or self.names)
        tensors = [name for name in names if self.grains[name] != "element"]
        # the largest first: one that comes last would leave the other threads without work
        tensors.sort(key=lambda name: -math.prod(self.shapes[name]))
        alone = [[each] for each in ranges(tensors, self.shapes, self.tile, self.grains)]
        cut = (name for name in names if self.grains[name] == "element")
        return [*alone, *grouped(ranges(cut, self.shapes, self.tile), self.tile)]

    def merge(self, groups: Sequence[list[Range]], combine: Callable[[Range, Known], Answer]) -> Iterator[list[Answer]]:
        """Merge the ranges, each group in one worker.

        Args:
            groups: as `groups` gives them.
            combine: range and what is known of its tensor -> what is to be said of it.

        Yields:
            the answers of a group, in the order of the groups.
        """
        total = sum(each.size for group in groups for each in group)
        shown = progress_meter("merging", self.progress, total, unit="", unit_scale=True)
        with shown as bar, logged(f"merged {total} parameters", "engine"):
            for batch in self._batches(groups):
                self._sweep_tensors(_names(batch))
                # what waits are answers, not tiles; a matrix takes longer than many that follow it
                ahead = len(batch) if self.matrices else None
                items = [_Item(group, {each.name: self.known_of[each.name] for each in group}) for group in batch]
                work = _Merge(combine, self.known)
                for group, answers in zip(batch, self._map(work, items, ahead=ahead), strict=True):
                    yield answers
                    bar.update(sum(each.size for each in group))
                for each in (each for group in batch for each in group) if self.has_trailing else ():
                    if each.stop == math.prod(self.shapes[each.name]):
                        self.known_of[each.name].clear()

    def _batches(self, groups: Sequence[list[Range]]) -> Iterator[Sequence[list[Range]]]:
        """All groups at once; with passes of a tensor to run before, whole tensors of some 512 tiles."""
        if not self.has_trailing:
            yield groups
            return
        batch: list[list[Range]] = []
        for group in groups:
            if len(batch) >= BATCH and group[0].start == 0:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _sweep_tensors(self, names: Sequence[str]) -> None:
        """The passes of some tensors that come last, of the tensors of one method together."""
        for rule in self.rules if self.has_trailing else ():
            own = [name for name in names if name in rule.names]
            for step in rule.trailing if own else ():
                self._sweep(step, own, step.name if step.grain else None)  # what decomposes takes its time

    def _sweep(self, step: Pass[Any], names: Sequence[str], title: str | None) -> None:
        """One pass over tensors: one total for the model, or one for each tensor."""
        names = [n for n in names if step.grain in (None, self.grains[n])]
        if not names:  # then earlier passes found nothing either, which `wanted` might ask for
            return
        by_tensor = step.scope == "tensor"
        wanted = {name: wanted_of(step.wanted(self._of(name)), step) for name in names} if by_tensor else {}
        all_or_some = None if by_tensor else wanted_of(step.wanted(self.known), step)
        seen = [
            n for n in names if (n not in wanted or wanted[n] is None) and (all_or_some is None or n in all_or_some)
        ]
        if not seen:
            return
        totals: dict[str, Partial] = {name: {} for name in seen} if by_tensor else {"": {}}
        groups = list(grouped(self._work(step, seen), min(SEEN, self.tile)))
        # floating sums are taken over the same blocks in the same order, whatever the number of threads
        count = -(-len(groups) // BLOCKS) if step.grain else min(len(groups), SHARES * thread_count())
        shares = [groups[i * len(groups) // count : (i + 1) * len(groups) // count] for i in range(count)]
        items = [_Item(share, {e.name: self.known_of[e.name] for g in share for e in g}) for share in shares]
        look = _Look(step, self.load, self.seen.sizes, self.known)
        bar = progress_meter(title or "", self.progress and title is not None, count)
        taken = []
        with bar, logged(f"{step.name}: a pass over {len(seen)} tensors", "engine"):
            for found, noted in self._map(look, items, all(len(share) > 1 for share in shares)):
                taken.append(noted)
                for key, part in found.items():
                    Pass.add(step, totals[key], part)
                bar.update()
        self.seen.end(*taken)
        if by_tensor:

            def finished(name: str) -> object:
                return step.finish(totals[name], self._of(name))

            for name, answer in zip(totals, parallel(finished, list(totals)), strict=True):
                self.known_of[name][step.name] = answer
        else:
            self.known[step.name] = step.finish(totals[""], self.known)

    def _map(
        self,
        function: Callable[[Item], Answer],
        items: Sequence[Item],
        large: bool | None = None,
        ahead: int | None = None,
    ) -> Iterator[Answer]:
        """The one seam: `function` of every item, in order, somewhere."""
        if large is None:
            large = len(items) * self.tile >= LARGE
        if self.spread is not None:
            return iter(self.spread(function, items))
        if self.processes and large:
            return forked(function, items)
        return parallel(function, items, ahead)

    def _of(self, name: str) -> Known:
        return _joined(self.known, self.known_of[name])


@dataclass
class _Rule:
    """A method, the tensors that it merges, and its passes that run just before each."""

    method: Method
    names: set[str]
    trailing: list[Pass[Any]]


class _Item(NamedTuple, Generic[Each]):
    """A worker's share: what it works on, and what is known of its tensors alone."""

    work: Sequence[Each]
    own: Mapping[str, Known]


@dataclass(frozen=True)
class _Look:
    """A pass over a share of its tiles."""

    step: Pass[Any]
    load: Load
    sizes: Mapping[str, int]
    known: Known

    def __call__(self, item: _Item[list[Range]]) -> tuple[dict[str, Partial], Folds]:
        found: dict[str, Partial] = {}
        folds: Folds = {}
        for each in (each for group in item.work for each in group):
            digests = Digests()
            tile = self.load(each, digests)
            note(folds, self.sizes, each, digests)
            part = partial_of(self.step.observe(tile, _joined(self.known, item.own[each.name])), self.step)
            self.step.add(found.setdefault(each.name if self.step.scope == "tensor" else "", {}), part)
        return found, folds


@dataclass(frozen=True)
class _Merge(Generic[Answer]):
    """What is done with a group of ranges."""

    combine: Callable[[Range, Known], Answer]
    known: Known

    def __call__(self, item: _Item[Range]) -> list[Answer]:
        return [self.combine(each, _joined(self.known, item.own[each.name])) for each in item.work]


def _names(batch: Sequence[list[Range]]) -> list[str]:
    return list(dict.fromkeys(each.name for group in batch for each in group))


def _joined(known: Known, own: Known) -> Known:
    return Known(known | own) if own else known


def _shared(methods: Mapping[str, Method]) -> list[_Rule]:
    """The tensors whose methods have the same passes together: equal methods, but for what LiNeS scales after all."""
    groups: dict[Method, _Rule] = {}
    of: dict[int, _Rule] = {}
    for name, method in methods.items():
        if id(method) not in of:
            key = unscaled(method)
            if key not in groups:
                groups[key] = _Rule(method, set(), list(method.passes()))
            of[id(method)] = groups[key]
        of[id(method)].names.add(name)
    return list(groups.values())
