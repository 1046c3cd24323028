"""A model that is put together out of layers of several: what a recipe says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twinmerge.errors import RecipeError, nearest

BASE = "base"
SLICE_KEYS = ("sources", "base_model", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters")


@dataclass(frozen=True)
class Span:
    """Layers of one model.

    Attributes:
        model: the name of an expert, or "base".
        start, stop: the first layer, counted from 0, and the one after the last.
    """

    model: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Slice:
    """Layers that follow each other in the output, each merged of one layer of every source.

    Attributes:
        sources: layers of models, all as many.
        base: the model that changes are taken against in this slice, or None for the recipe's.
        parameters: that hold here, as those of the recipe (field or expert.field -> value or `Setting`).
    """

    sources: tuple[Span, ...]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Its layers."""
        return len(self.sources[0])

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("A slice has no source. Name a model and its layers.")

    def describe(self) -> dict[str, Any]:
        """The same as plain data, but for the parameters."""
        sources = [{"model": span.model, "layer_range": [span.start, span.stop]} for span in self.sources]
        return {"sources": sources} | ({} if self.base is None else {"base_model": self.base})


def within(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a slice, and those of its recipe of which it says nothing.

    Example:
        >>> within({"density": 0.5, "x.scale": 2}, {"x.density": 0.2, "scale": 1, "seed": 3})
        {'scale': 1, 'seed': 3, 'density': 0.5, 'x.scale': 2}
    """
    return {key: value for key, value in outer.items() if key.rpartition(".")[2] not in inner} | dict(inner)


def span_of(model: str, raw: Any, where: str) -> Span:
    """A `layer_range` of a model.

    Raises:
        RecipeError: no two whole numbers, negative ones, a range that is empty or backwards.

    Example:
        >>> span_of("a", [0, 4], "here")
        Span(model='a', start=0, stop=4)
    """
    whole = isinstance(raw, (list, tuple)) and len(raw) == 2 and all(type(each) is int for each in raw)
    if not whole or raw[0] < 0:
        raise RecipeError(f"{where}: layer_range is {raw!r:.80}. Write two numbers, such as [0, 8].")
    if raw[1] <= raw[0]:
        raise RecipeError(f"{where}: layer_range {list(raw)} holds no layer. Write the lower number first.")
    return Span(model, raw[0], raw[1])


def check_slice(sources: Sequence[Span], where: str) -> None:
    """Refuse sources that do not go side by side.

    Raises:
        RecipeError: other numbers of layers; a model twice.
    """
    if odd := next((span for span in sources if len(span) != len(sources[0])), None):
        raise RecipeError(
            f"{where}: {sources[0].model!r} gives {len(sources[0])} layers and {odd.model!r} {len(odd)}. Give ranges "
            "of one length."
        )
    names = [span.model for span in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"{where}: the model {twice!r} stands twice in one slice. List it once.")


def known_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse a key that is none.

    Raises:
        RecipeError: such a key, with the nearest right one.
    """
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r:.80}.{nearest(str(key), known)} Known: {', '.join(known)}.")


def end_sources(slices: Sequence[Slice], mergekit: bool) -> tuple[Span, ...]:
    """The sources of what comes after the layers: those of the last slice, of which mergekit takes no more than the
    first slice has."""
    last = slices[-1].sources
    return last[: len(slices[0].sources)] if mergekit else last
