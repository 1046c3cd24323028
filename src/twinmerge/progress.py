"""Progress: one kind of bar for all that takes time. It shows after a second, on a terminal alone, with its rate and
the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm.std import tqdm

T = TypeVar("T")
DELAY = 1  # seconds that pass before a bar is shown
_hidden = False
_listeners: list[Callable[[str], object]] = []


def bar(of: Iterable[T], what: str = "", progress: bool = True, total: float | None = None, **how: Any) -> tqdm[T]:
    """A bar over what is gone through.

    Args:
        of: what is gone through.
        what: is done, in a word.
        progress: False shows none.
        total: how much there is, where `of` does not say.
        how: is handed on, such as unit="text".

    Example:
        >>> [x for x in bar("ab", "spelling")]
        ['a', 'b']
    """
    from tqdm.auto import tqdm

    made: Any = tqdm(of, what, total, delay=DELAY, leave=False, disable=off(progress), **how)
    return made  # type: ignore[no-any-return]


def meter(what: str, progress: bool, total: float, **how: Any) -> tqdm[Any]:
    """A bar that its caller moves by `update`.

    Args:
        what: is done, in a word.
        progress: False shows none.
        total: how much there is.
        how: is handed on, such as unit_scale=True.
    """
    return bar((), what, progress, total, **how)


def off(progress: bool) -> bool | None:
    """Whether a bar is not shown; None: where stderr is no terminal."""
    return None if progress and not _hidden else True


@contextmanager
def logged(what: str, place: str) -> Iterator[None]:
    """A step of some time, and how long it took, on Python's log "twinmerge" at the level INFO.

    Args:
        what: is done, such as "read a".
        place: the log below "twinmerge", by the room of the package that logs: "engine".

    Example:
        >>> with logged("spelt", "doctest"):
        ...     pass
    """
    import time

    began = time.perf_counter()
    yield
    log(f"{what} ({time.perf_counter() - began:.2f} s)", place)


def log(what: str, place: str) -> None:
    """A line on Python's log "twinmerge", which shows nothing unless a program, or --verbose, asks for it."""
    import logging

    logging.getLogger(f"twinmerge.{place}").info("%s", what)


def note(what: str, place: str) -> None:
    """A sentence for people, where somebody listens (the command does), and on Python's log.

    Args:
        what: the sentence.
        place: as of `log`.
    """
    log(what, place)
    for listener in _listeners:
        listener(what)


@contextmanager
def heard(listener: Callable[[str], object]) -> Iterator[None]:
    """Inside, the listener gets every `note`.

    Example:
        >>> with heard(print):
        ...     note("Goes on.", "doctest")
        Goes on.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """No bars inside, whatever a call asks for.

    Example:
        >>> with hidden():
        ...     bar("ab").disable
        True
    """
    global _hidden
    before, _hidden = _hidden, hide or _hidden
    try:
        yield
    finally:
        _hidden = before
