"""What must be known about whole tensors, or the whole model, before tiles are merged: exact reductions over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Generic, Literal, TypeVar

from twinmerge.methods.kit.tile import Grain, Tile

T_co = TypeVar("T_co", covariant=True)  # what a pass finds
Found = TypeVar("Found")

Partial = dict[str, Any]
"""A pass's result for one tile. Unless the pass says otherwise, integer values of equal keys add, and floating values
have a key of their own."""

Scope = Literal["model", "tensor"]
"""What a count or a reduction is over."""


class Pass(ABC, Generic[T_co]):
    """One exact reduction over tiles before the last read; `Pass[T]` finds a T, which `Known.of` gives to what comes
    later.

    name: by which `Known` has it, one of its own in each method.
    scope: "tensor" starts afresh for each tensor, "model" runs over all merged tensors first.
    sampled: the tiles are a thin sample of the model (at most a million entries), for passes that only guess.
    rare: it is left out most of the time (see `wanted`).
    grain: only tensors of which the method says that (see `Method.grain_of`); None for all.
    """

    name: str
    scope: Scope
    sampled: ClassVar[bool] = False
    rare: bool = False
    grain: ClassVar[Grain | None] = None

    def wanted(self, known: Known) -> Collection[str] | None:
        """The tensors that the pass must see; None for all. With none at all the pass is left out."""
        return None

    @abstractmethod
    def observe(self, tile: Tile, known: Known) -> Partial:
        """What one tile adds."""

    def add(self, total: Partial, part: Partial) -> None:
        """Put a tile's result into the total; the order of the tiles does not matter."""
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value

    @abstractmethod
    def finish(self, total: Partial, known: Known) -> T_co:
        """What later passes and `apply` find in `known`."""


class Known(dict[str, Any]):
    """What the earlier passes found, by the name of the pass; `of` gives it with its type.

    Example:
        >>> class Entries(Pass[int]):
        ...     name, scope = "entries", "tensor"
        ...     def observe(self, tile, known):
        ...         return {"entries": tile.x[0].numel()}
        ...     def finish(self, total, known):
        ...         return total["entries"]
        >>> Known(entries=3).of(Entries), Known().maybe(Entries), Known(entries=3)["entries"]
        (3, None, 3)
    """

    def of(self, step: type[Pass[Found]] | Pass[Found]) -> Found:
        """What a pass found, or what the pass of that name did, whose class is derived from this one.

        Raises:
            KeyError: it has not run.
        """
        found: Found = self[step.name]
        return found

    def maybe(self, step: type[Pass[Found]] | Pass[Found]) -> Found | None:
        """The same; None where it has not run."""
        return self.get(step.name)
