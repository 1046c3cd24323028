"""Parameters that differ between tensors: by filters on their names, and by gradients over the layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.models.matching import matches
from twinmerge.tables import cell

CONTAINS, FILTER, VALUE = "contains", "filter", "value"


@dataclass(frozen=True)
class Choice:
    """One value, or a gradient of several, for some tensors.

    Attributes:
        values: one for all layers, or several from the first layer to the last, between which numbers are linear.
        filter: which tensors it is for; None for all.
        substring: the filter fits where it stands anywhere in a name (mergekit's rule); else it is a glob or whole
            dotted components.
    """

    values: tuple[Any, ...]
    filter: str | None = None
    substring: bool = False

    def fits(self, name: str) -> bool:
        """Whether it is for a tensor.

        Example:
            >>> Choice((1,), "layers.1", True).fits("layers.12.bias"), Choice((1,), "layers.1").fits("layers.12.bias")
            (True, False)
        """
        if self.filter is None:
            return True
        return self.filter in name if self.substring else matches(self.filter, name)

    def at(self, depth: float) -> Any:
        """The value at a depth from 0 (first layer) to 1 (last layer).

        Of m values, x = depth · (m − 1) and i = ⌊x⌋ it is (1 − (x − i)) · vᵢ + (x − i) · vᵢ₊₁; of what is no number
        it is vᵢ.

        Example:
            >>> Choice((0.0, 1.0, 0.0)).at(0.25), Choice((True, False)).at(0.9), Choice((7,)).at(0.3)
            (0.5, True, 7)
        """
        last = len(self.values) - 1
        x = depth * last
        i = int(x)
        if not all(_is_number(value) for value in self.values) or not last:
            return self.values[i]
        return (1 - (x - i)) * self.values[i] + (x - i) * self.values[min(i + 1, last)]

    def describe(self) -> dict[str, Any]:
        """The same as plain data."""
        found = {} if self.filter is None else {CONTAINS if self.substring else FILTER: self.filter}
        return {**found, VALUE: list(self.values) if self.values[1:] else self.values[0]}


@dataclass(frozen=True)
class Setting:
    """What a parameter is for each tensor: the first choice that fits."""

    choices: tuple[Choice, ...]

    def at(self, name: str, depth: float) -> Any:
        """The value for a tensor; None where no choice fits.

        Args:
            name: that filters look at.
            depth: 0 for the first layer of a slice and for all outside layers, 1 for the last layer.

        Example:
            >>> setting = Setting((Choice((0.9,), "mlp"), Choice((0.0, 1.0))))
            >>> setting.at("layers.2.mlp.up.weight", 0.5), setting.at("layers.2.attention.weight", 0.5)
            (0.9, 0.5)
        """
        first = next((choice for choice in self.choices if choice.fits(name)), None)
        return None if first is None else first.at(depth)

    @property
    def plain(self) -> Any:
        """The one value that it is for every tensor, or the setting itself where it differs."""
        first = self.choices[0] if self.choices else None
        return first.values[0] if first is not None and first.filter is None and not first.values[1:] else self

    @property
    def example(self) -> Any:
        """A value that some tensor may have; without a filter where there is such a one."""
        return next((c for c in self.choices if c.filter is None), self.choices[-1]).values[0]

    def then(self, other: Setting) -> Setting:
        """This one, and the other where no choice of this one fits."""
        return Setting(self.choices + other.choices)

    def mapped(self, change: Callable[[Any], Any]) -> Setting:
        """The same with every value changed."""
        return Setting(tuple(replace(choice, values=tuple(map(change, choice.values))) for choice in self.choices))

    def values(self) -> Iterator[Any]:
        """All values that stand in it."""
        return (value for choice in self.choices for value in choice.values)

    def describe(self) -> list[dict[str, Any]]:
        """The same as plain data, as recipes of ours have it."""
        return [choice.describe() for choice in self.choices]

    @classmethod
    def of(cls, raw: Any, where: str, mergekit: bool = False) -> Setting:
        """Out of plain data: a value, a list of values (a gradient), a choice, or a list of choices.

        A choice is {filter: TEXT, value: VALUE} or {contains: TEXT, value: VALUE}, the value being one or a gradient.

        Args:
            raw: what the recipe says.
            where: it stands, for messages.
            mergekit: `filter` is a text anywhere in the name, and "*" is no filter.

        Raises:
            RecipeError: something else.

        Example:
            >>> Setting.of([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], "here").at("a.mlp.b", 0.5)
            0.5
        """
        if isinstance(raw, Mapping):
            raw = [raw]
        if not isinstance(raw, (list, tuple)):
            return cls((Choice((raw,)),))
        if any(isinstance(each, Mapping) for each in raw):
            found = [_choice(each, where, mergekit) for each in raw]
            return cls(tuple(choice for choice in found if choice.values))
        return cls((Choice(_gradient(raw, where)),) if raw else ())


def is_setting(raw: Any) -> bool:
    """Whether plain data are choices: a mapping, or a list with a mapping in it.

    Example:
        >>> is_setting([{"value": 1}]), is_setting([0.5, 1.0])
        (True, False)
    """
    return isinstance(raw, Mapping) or (isinstance(raw, (list, tuple)) and any(isinstance(r, Mapping) for r in raw))


def _choice(raw: Any, where: str, mergekit: bool) -> Choice:
    known = (FILTER, VALUE) if mergekit else (FILTER, CONTAINS, VALUE)
    if not isinstance(raw, Mapping) or VALUE not in raw:
        raise RecipeError(f"{where}: {raw!r:.80} is no choice. Write {{filter: TEXT, value: NUMBER}}.")
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r:.80} of a choice.{nearest(str(key), known)}")
    if FILTER in raw and CONTAINS in raw:
        raise RecipeError(f"{where}: {raw!r:.80} has filter and contains. Keep one of them.")
    text, value = raw.get(FILTER, raw.get(CONTAINS)), raw[VALUE]
    if text is not None and (not isinstance(text, str) or not text):
        raise RecipeError(f"{where}: the filter {text!r:.80} is no text. Put it in quotes.")
    if isinstance(value, (list, tuple)) and not value:
        raise RecipeError(
            f"{where}: {raw!r:.80} has an empty list of values. Give it a number, or leave the choice out."
        )
    values = _gradient(value, where) if isinstance(value, (list, tuple)) else (value,)
    if mergekit and text == "*":
        text = None
    return Choice(values, text, text is not None and (mergekit or CONTAINS in raw))


def _gradient(raw: Sequence[Any], where: str) -> tuple[Any, ...]:
    if any(isinstance(each, (list, tuple, Mapping)) or each is None for each in raw):
        raise RecipeError(f"{where}: the gradient {raw!r:.80} holds more than values. Write a list of numbers.")
    return tuple(raw)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Choices by filters as a `Setting`."""
    read = {k: Setting.of(v, k).plain if is_setting(v) else v for k, v in parameters.items()}
    if empty := next((k for k, v in read.items() if isinstance(v, Setting) and not v.choices), None):
        raise RecipeError(f"{empty} has no value. Write {{filter: TEXT, value: NUMBER}}.")
    return read


def examples(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Values that some tensor may have."""
    return {k: v.example if isinstance(v, Setting) else v for k, v in parameters.items()}


def by_expert(parameters: Mapping[str, Any], experts: Iterable[str], fields: Collection[str]) -> dict[str, Any]:
    """The parameters with one key per expert in the place of a list that has a value for each.

    Args:
        parameters: field (or expert.field) -> value.
        experts: in the order of the lists.
        fields: that may have such lists.

    Example:
        >>> by_expert({"density": [0.2, 0.8], "y.density": 0.5, "scale": 1}, ["x", "y"], ["density"])
        {'x.density': 0.2, 'y.density': 0.5, 'scale': 1}
    """
    names, found = list(experts), dict[str, Any]()
    for key, value in parameters.items():
        whole = key in fields and isinstance(value, (list, tuple)) and len(value) == len(names)
        found |= {f"{n}.{key}": each for n, each in zip(names, value, strict=True)} if whole else {}
    return found | {k: v for k, v in parameters.items() if not (k in fields and f"{names[0]}.{k}" in found)}


def plain_value(value: Any) -> Any:
    """Python's own numbers and lists for those of NumPy, as files have them."""
    if isinstance(value, Setting):
        return value.describe()
    if isinstance(value, (list, tuple)):
        return [plain_value(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def shown_value(value: Any) -> str:
    """A parameter for a line: lists and choices whole, numbers short.

    Example:
        >>> shown_value([0.2, 1 / 3]), shown_value(Setting((Choice((0.5,), "mlp"),)))
        ('[0.2, 0.3333]', '[{filter: mlp, value: 0.5}]')
    """
    value = plain_value(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shown_value(each)}' for key, each in value.items())}}}"
    return cell(value)
