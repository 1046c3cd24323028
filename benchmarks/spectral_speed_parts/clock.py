"""Where the command's threads spend their time."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.family import Family
from twinmerge.engine.rounding import Rounding
from twinmerge.maths.threads import use_threads
from twinmerge.methods.kit.registry import make_method


class Clock:
    """CPU seconds that the threads spent in functions, less what they spent in others of them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._lock, self._local = threading.Lock(), threading.local()

    @contextmanager
    def on(self, label: str) -> Iterator[None]:
        inner: list[float] = self._local.__dict__.setdefault("inner", [])
        inner.append(0.0)
        start = time.thread_time()
        try:
            yield
        finally:
            took = time.thread_time() - start
            with self._lock:
                self.spent[label] += took - inner.pop()
            if inner:
                inner[-1] += took

    def watch(self, owner: Any, name: str, label: str) -> None:
        """From now on `owner.name` is timed."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.on(label):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def phases(method: str, family: Family, out: Path, threads: int) -> dict[str, float]:
    """The command's work in this process, by what it is, in CPU seconds; "waiting": what is left of the threads' wall
    time."""
    from twinmerge.engine import combine, inputs
    from twinmerge.engine import write as writing
    from twinmerge.engine.merge import Merge
    from twinmerge.recipes.recipe import Recipe
    from twinmerge.store.checkpoint_writer import CheckpointWriter

    clock, rule = Clock(), type(make_method(method, family.experts, {}))
    own = sys.modules[rule.__module__]
    for function in ("gram_svd", "gram_polar", "with_values", "normal_equations", "solve"):
        if hasattr(own, function):
            clock.watch(own, function, "decompositions")
    for step in (s for s in make_method(method, family.experts, {}).passes() if s.grain == "rows"):
        clock.watch(type(step), "sums", "sums over tables' rows")
        clock.watch(type(step), "finish", "decompositions")
    clock.watch(rule, "combine", "the rest of the rule")
    clock.watch(rule, "apply", "adding the change to the base")
    clock.watch(inputs.Inputs, "_read", "reading")
    clock.watch(inputs, "block_digests", "checksums of inputs")
    clock.watch(inputs.Inputs, "_widened", "deltas in float32")
    clock.watch(Rounding, "of", "rounding")
    clock.watch(combine, "erased", "counting what rounding erased")
    clock.watch(writing, "block_digests", "checksums of the output")
    clock.watch(CheckpointWriter, "write", "writing")
    clock.watch(CheckpointWriter, "finish", "fsync")
    use_threads(threads)
    models = {name: str(family.folder / name) for name in family.experts}
    start = time.perf_counter()
    merge = Merge(Recipe(method, str(family.folder / "base"), models), progress=False)
    merge.check()
    planned = time.perf_counter()
    merge.save(out)
    wall = time.perf_counter() - planned
    busy = sum(clock.spent.values())
    return {
        "imports": float("nan"),
        "opening and checking": planned - start,
        **clock.spent,
        "waiting and all else": threads * wall - busy,
        "wall of the merge": wall,
    }
