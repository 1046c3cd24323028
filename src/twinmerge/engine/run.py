"""Passes and tiles: run one method over all merged tensors.

A range of every input is read, made into one float32 tile, given to the method's rule and handed on; threads share the
ranges and memory holds a few tiles for each. Passes that a later one, or the first tensor, must wait for sweep over all
tensors; those of one tensor that come last are run just before it is merged, so that most methods read every input once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

from twinmerge.engine.ranges import SEEN, TILE, Grains, Range, Shapes, grouped, ranges, sample
from twinmerge.engine.seen import Folds, Seen
from twinmerge.maths.threads import parallel, thread_count
from twinmerge.maths.workers import CAN_FORK, forked
from twinmerge.methods.kit.base import Known, Method, Partial, Pass, Place, Tile

LARGE = 1 << 24  # elements from which on worker processes pay for themselves
SHARES = 4  # parts of a sweep for each worker: a step of the progress bar each
BLOCKS = 8  # of rows that one worker adds up
BATCH = 512  # tiles between two passes of one tensor: enough for all workers, few enough to stay in the page cache
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Run:
    """One method over the tensors `names`.

    Args:
        names: all tensors that are merged (they are what "the whole model" means for model-scope passes), in the order
            in which they are read.
        shapes: name -> shape.
        load: range -> its tile, flat, or in rows or the tensor's shape by its grain. Called from any thread.
        grains: of every tensor; what the method says of it where None.
        tile: elements of a tile, a multiple of 65,536; the result does not depend on it.
        processes: spread large work over forked processes and not over threads (see `maths/workers.py`).
        seen: where `load` notes what it reads.

    Attributes:
        known: what the passes found; a pass whose result is put there before `survey` is left out.
    """

    def __init__(
        self,
        method: Method,
        names: Sequence[str],
        shapes: Shapes,
        load: Callable[[Range], Tile],
        grains: Grains | None = None,
        tile: int = TILE,
        progress: bool = True,
        processes: bool = False,
        seen: Seen | None = None,
    ) -> None:
        self.seen = seen or Seen({})
        self.method, self.names, self.shapes, self.load = method, list(names), shapes, load
        self.grains = grains or {name: method.grain_of(Place(name, shapes[name])) for name in names}
        self.tile, self.progress = tile, progress
        self.processes = processes and CAN_FORK and method.grain != "matrix"
        passes = list(method.passes())
        last_model = max((i for i, p in enumerate(passes) if p.scope == "model"), default=-1)
        self.leading, self.trailing = passes[: last_model + 1], passes[last_model + 1 :]
        self.known: dict[str, Any] = {}
        self.known_of: dict[str, dict[str, Any]] = {name: {} for name in names}

    def survey(self) -> None:
        """All passes that must be over before the first tensor is merged."""
        for number, step in enumerate(self.leading, 1):
            if step.name in self.known:  # it was told
                continue
            self._sweep(step, self.names, f"pass {number} of {len(self.leading)}")

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
        """Merge the ranges, each group in one thread.

        Args:
            combine: range and what is known of its tensor -> what is to be told of it.

        Yields:
            the answers of a group, in the order of the groups.
        """

        def work(group: list[Range]) -> list[Answer]:
            return [combine(each, self._of(each.name)) for each in group]

        with tqdm(
            total=sum(each.size for group in groups for each in group),
            desc="merging",
            unit="",
            unit_scale=True,
            delay=1,
            leave=False,
            disable=_off(self.progress),
        ) as bar:
            for batch in self._batches(groups):
                for step in self.trailing:
                    title = step.name if step.grain else None  # what decomposes takes its time
                    self._sweep(step, list(dict.fromkeys(each.name for group in batch for each in group)), title)
                # what waits are answers, not tiles; a matrix takes longer than many that follow it
                ahead = len(batch) if self.method.grain == "matrix" else None
                for group, answers in zip(batch, self._map(work, batch, ahead=ahead), strict=True):
                    yield answers
                    bar.update(sum(each.size for each in group))
                for each in (each for group in batch for each in group) if self.trailing else ():
                    if each.stop == math.prod(self.shapes[each.name]):
                        self.known_of[each.name].clear()

    def _batches(self, groups: Sequence[list[Range]]) -> Iterator[Sequence[list[Range]]]:
        """All groups at once; with passes of a tensor to run before, whole tensors of some 512 tiles."""
        if not self.trailing:
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

    def _sweep(self, step: Pass, names: Sequence[str], title: str | None) -> None:
        """One pass over tensors: one total for the model, or one for each tensor."""
        names = [n for n in names if step.grain in (None, self.grains[n])]
        if not names:  # then earlier passes found nothing either, which `wanted` might ask for
            return
        by_tensor = step.scope == "tensor"
        wanted = {name: step.wanted(self._of(name)) for name in names} if by_tensor else {}
        all_or_some = None if by_tensor else step.wanted(self.known)
        seen = [
            n for n in names if (n not in wanted or wanted[n] is None) and (all_or_some is None or n in all_or_some)
        ]
        if not seen:
            return
        totals: dict[str, Partial] = {name: {} for name in seen} if by_tensor else {"": {}}
        tile = min(SEEN, self.tile)
        work = sample(seen, self.shapes) if step.sampled else ranges(seen, self.shapes, tile, self.grains)
        groups = list(grouped(work, tile))

        def look(share: Sequence[list[Range]]) -> tuple[dict[str, Partial], Folds]:
            self.seen.take()
            found: dict[str, Partial] = {}
            for each in (each for group in share for each in group):
                part = step.observe(self.load(each), self._of(each.name))
                step.add(found.setdefault(each.name if by_tensor else "", {}), part)
            return found, self.seen.take()

        # floating sums are taken over the same blocks in the same order, whatever the number of threads
        count = -(-len(groups) // BLOCKS) if step.grain else min(len(groups), SHARES * thread_count())
        shares = [groups[i * len(groups) // count : (i + 1) * len(groups) // count] for i in range(count)]
        bar = tqdm(
            total=count, desc=title, delay=1, leave=False, disable=True if title is None else _off(self.progress)
        )
        taken = []
        with bar:
            for found, noted in self._map(look, shares, all(len(share) > 1 for share in shares)):
                taken.append(noted)
                for key, part in found.items():
                    Pass.add(step, totals[key], part)
                bar.update()
        self.seen.end(*taken)
        if by_tensor:

            def finished(name: str) -> object:
                return step.finish(totals[name], self._of(name))

            for name, answer in zip(totals, self._map(finished, list(totals), large=False), strict=True):
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
        if self.processes and large:
            return forked(function, items)
        return parallel(function, items, ahead)

    def _of(self, name: str) -> Known:
        own = self.known_of[name]
        return {**self.known, **own} if own else self.known


def _off(progress: bool) -> bool | None:
    """None lets tqdm show its bar on a terminal only."""
    return None if progress else True
