"""Who is told of the mixtures that a twin answers with: functions of the caller's, and a log of JSON lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from twinmerge.errors import OutputError
from twinmerge.results import Table, json_text
from twinmerge.store import disk


def refused_rows(mixture: Tensor, routing: Tensor | None) -> list[bool]:
    """Of each row, whether the router left it to the shared model: its weights are 0 though it was routed.

    Args:
        mixture: (rows, experts).
        routing: the router's probabilities, None where the mixture was named.
    """
    if routing is None:
        return [False] * len(mixture)
    return [not used for used in mixture.any(1).tolist()]


@dataclass(frozen=True, repr=False)
class Mixtures(Table):
    """The mixtures that the rows of one batch are answered with. As a table: a row for each.

    Attributes:
        experts: the columns.
        mixture: (rows, experts), the weights; all 0 where the shared model answers alone.
        routing: (rows, experts), the router's probabilities; None where the mixture was named.
        head: of each row, whose output layers answer; None for models without heads.
    """

    experts: Sequence[str]
    mixture: Tensor
    routing: Tensor | None = None
    head: Sequence[str] | None = None

    @property
    def refused(self) -> list[bool]:
        """Of each row, whether the router left it to the shared model."""
        return refused_rows(self.mixture, self.routing)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data of each row: mixture, routing, head, refused."""
        none = [None] * len(self.mixture)
        routing = none if self.routing is None else [self._named(row) for row in self.routing.tolist()]
        heads = none if self.head is None else list(self.head)
        rows = zip(self.mixture.tolist(), routing, heads, self.refused, strict=True)
        return [
            {"mixture": self._named(weights), "routing": soft, "head": head, "refused": refused}
            for weights, soft, head, refused in rows
        ]

    def _named(self, row: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.experts, row, strict=True))

    def _summary(self) -> str:
        return f"{len(self.mixture)} rows of {len(self.experts)} experts, {sum(self.refused)} refused"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        rows = [[row["head"], row["refused"], *row["mixture"].values()] for row in self.to_dict()]
        return ["head", "refused", *self.experts], rows


Watcher = Callable[[Mixtures], Any]


class Watchers:
    """The functions that are told, in the order in which they came. Threads may add and remove them at any time."""

    def __init__(self) -> None:
        self._told: tuple[tuple[object, Watcher], ...] = ()  # replaced, never changed: a thread may go through it
        self._lock = Lock()

    def add(self, function: Watcher) -> Handle:
        """One more; one that is there already is told twice."""
        handle = Handle(self)
        with self._lock:
            self._told = (*self._told, (handle, function))
        return handle

    def remove(self, handle: object) -> None:
        """One less, where it is still there."""
        with self._lock:
            self._told = tuple(each for each in self._told if each[0] is not handle)

    def __bool__(self) -> bool:
        return bool(self._told)

    def tell(self, found: Mixtures) -> None:
        """Call each; what one raises reaches who asked the twin."""
        for _, function in self._told:
            function(found)


class Handle:
    """Takes a function away again that is told of mixtures: by `remove()`, or at the end of a `with`."""

    def __init__(self, watchers: Watchers) -> None:
        self._watchers = watchers

    def remove(self) -> None:
        """The function is not called any more."""
        self._watchers.remove(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


class MixtureLog:
    """A file to which every row's mixture is appended (see `Twin.log_mixtures`).

    A batch is one write at the end of the file, so that lines of several threads or processes stay whole.

    Args:
        file: made where it is not there.

    Raises:
        OutputError: it cannot be written.

    Example:
        >>> import json, tempfile, torch
        >>> file = Path(tempfile.mkdtemp()) / "mixtures.jsonl"
        >>> MixtureLog(file)(Mixtures(["a", "b"], torch.tensor([[1.0, 0.0]]), None, ["a"]))
        >>> {name: value for name, value in json.loads(file.read_text()).items() if name != "time"}
        {'mixture': {'a': 1.0, 'b': 0.0}, 'routing': None, 'head': 'a', 'refused': False}
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self._append(b"")

    def __call__(self, found: Mixtures) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = [json_text({"time": now, **row}) for row in found.to_dict()]
        self._append("".join(f"{line}\n" for line in lines).encode())

    def _append(self, text: bytes) -> None:
        try:
            fd = disk.call(os.open, self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                disk.append(fd, text)
            finally:
                os.close(fd)
        except OSError as error:
            raise OutputError(
                f"The log {self.file} cannot be written: {error.strerror}. Make room or name another file, or remove "
                "the log."
            ) from error
