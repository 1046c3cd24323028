"""Many numbered names as one: `layers.{0-31}.mlp.weight`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from twinmerge.errors import ModelError, RecipeError

SLOT = re.compile(r"\{([0-9,-]*)\}")
RUN = re.compile(r"(0|[1-9][0-9]{0,8})(?:-(0|[1-9][0-9]{0,8}))?")
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
MOST = 1_000_000  # names of one pattern: more than any model has tensors


def patterns_of(names: Iterable[str]) -> list[str]:
    """Few patterns that stand for just these names, each once; a name with a brace in it is refused.

    Args:
        names: dotted ones, each once.

    Raises:
        ModelError: a name with a brace.

    Example:
        >>> patterns_of(["layers.0.a", "layers.1.a", "layers.2.a", "layers.4.a", "norm"])
        ['layers.{0-2,4}.a', 'norm']
    """
    shapes: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        if "{" in name or "}" in name:
            raise ModelError(
                f"The tensor {name!r} has a brace in its name, which a plan has no way to write. Rename it."
            )
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if NUMBER.fullmatch(part))
        shapes.setdefault(tuple("{}" if NUMBER.fullmatch(part) else part for part in parts), []).append(numbers)
    return [_filled(shape, slots) for shape, numbers in shapes.items() for slots in _products(numbers)]


def names_of(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for.

    Raises:
        TwinmergeError: it is no pattern.

    Example:
        >>> list(names_of("layers.{0-1,5}.a"))
        ['layers.0.a', 'layers.1.a', 'layers.5.a']
    """
    parts = SLOT.split(pattern)
    slots = [_numbers(slot, pattern) for slot in parts[1::2]]
    if any("{" in text or "}" in text for text in parts[::2]):
        raise _wrong(pattern)
    count = 1
    for slot in slots:
        count *= len(slot)
    if count > MOST:
        raise _wrong(pattern)
    for chosen in itertools.product(*slots):
        texts = itertools.zip_longest(parts[::2], map(str, chosen), fillvalue="")
        yield "".join(itertools.chain.from_iterable(texts))


def _products(rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Rows of numbers as few products of sets of numbers."""
    if not rows[0]:
        return [()]
    tails: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in rows:
        tails.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rests in tails.items():
        alike.setdefault(tuple(sorted(rests)), []).append(first)
    return [(tuple(sorted(firsts)), *rest) for rests, firsts in alike.items() for rest in _products(rests)]


def _filled(shape: Sequence[str], slots: Sequence[Sequence[int]]) -> str:
    left = iter(slots)
    return ".".join(_slot(next(left)) if part == "{}" else part for part in shape)


def _slot(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _numbers(slot: str, pattern: str) -> list[int]:
    found: list[int] = []
    for run in slot.split(","):
        match = RUN.fullmatch(run)
        if match is None:
            raise _wrong(pattern)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST or (found and first <= found[-1]):
            raise _wrong(pattern)
        found += range(first, last + 1)
    return found


def _wrong(pattern: str) -> RecipeError:
    return RecipeError(
        f"{pattern!r:.120} stands for no tensors. Write their name, and rising numbers in braces: "
        f"layers.{{0-31}}.weight."
    )
