"""Methods by name: a file of `methods/`, or an entry point of the group `twinmerge.methods`."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from twinmerge import methods
from twinmerge.errors import TwinmergeError, nearest
from twinmerge.methods.kit.base import Method, PerExpert, per_expert

GROUP = "twinmerge.methods"
LARGEST = 1e30  # of a number that is multiplied with
FILES = Path(methods.__file__).parent


def method_names() -> list[str]:
    """All methods, the built-in ones by their files, then those of installed packages.

    Example:
        >>> "ties" in method_names()
        True
    """
    own = _own()
    return sorted(own) + sorted({e.name for e in metadata.entry_points(group=GROUP)} - own)


def method_class(name: str) -> type[Method]:
    """The class of a method; only its own file is imported.

    Errors:
        TwinmergeError: unknown name (with the nearest right one).

    Example:
        >>> method_class("tie")
        Traceback (most recent call last):
        ...
        twinmerge.errors.TwinmergeError: Unknown method 'tie'. Did you mean 'ties'? See `twinmerge methods`.
    """
    if name not in _own():  # looking through what is installed takes longer than importing a method
        entry = next((e for e in metadata.entry_points(group=GROUP) if e.name == name), None)
        if entry is None:
            raise TwinmergeError(f"Unknown method {name!r}.{nearest(name, method_names())} See `twinmerge methods`.")
        loaded: type[Method] = entry.load()
        return loaded
    module = import_module(f"twinmerge.methods.{name}")
    for _, found in inspect.getmembers(module, inspect.isclass):
        if issubclass(found, Method) and found.__module__ == module.__name__ and not inspect.isabstract(found):
            return found
    raise TwinmergeError(f"The file of method {name!r} has no Method class. Reinstall twinmerge.")


def _own() -> set[str]:
    return {p.stem for p in FILES.glob("*.py")} - {"__init__"}


def is_per_expert(cls: type[Method], parameter: str) -> bool:
    """True for parameters that may differ between experts."""
    annotation = cls.model_fields[parameter].annotation
    return isinstance(annotation, types.UnionType) and set(typing.get_args(annotation)) == set(
        typing.get_args(PerExpert)
    )


def make_method(name: str, experts: tuple[str, ...], parameters: Mapping[str, Any]) -> Method:
    """A method with its parameters checked.

    Args:
        name: of the method.
        experts: names, in the order of the stack.
        parameters: field -> value; `expert.field` sets the field for one expert.

    Errors:
        TwinmergeError: unknown method, parameter or expert (with the nearest right one), a value out of its range,
            a number of experts that the method is not defined for.

    Example:
        >>> make_method("ties", ("a", "b"), {"density": 0.2, "b.density": 0.5}).density
        (0.2, 0.5)
    """
    cls = method_class(name)
    fields = cls.model_fields
    values: dict[str, Any] = {}
    single: dict[str, dict[str, Any]] = {}
    for key, value in parameters.items():
        expert, dot, field = key.rpartition(".")
        if field not in fields:
            raise TwinmergeError(
                f"{name} has no parameter {field!r}.{nearest(field, fields)} It has: {', '.join(fields) or 'none'}."
            )
        if not dot:
            values[field] = value
            continue
        if expert not in experts:
            raise TwinmergeError(
                f"{key} names no expert of this merge.{nearest(expert, experts)} It has: {', '.join(experts)}."
            )
        if not is_per_expert(cls, field):
            raise TwinmergeError(
                f"{name}'s {field} is one value for all experts. Write {field}={value} without {expert!r}."
            )
        single.setdefault(field, {})[expert] = value
    for field, chosen in single.items():
        general = values.get(field, fields[field].default)
        if not isinstance(general, (list, tuple)):
            general = [general] * len(experts)
        if len(general) == len(experts):  # else all of them are told of below
            values[field] = tuple(chosen.get(e, own) for e, own in zip(experts, general, strict=True))
    values = {field: _plain(value) for field, value in values.items()}
    for field, value in values.items():
        if field.endswith("density"):
            _check_share(name, field, value)
    try:
        method = cls.model_validate(values, strict=True)
    except ValidationError as error:
        first = max(error.errors(), key=lambda each: len(each["loc"]))  # of one expert's number rather than of all
        if not first["loc"]:  # of several fields together
            raise TwinmergeError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
        field = str(first["loc"][0])
        raise TwinmergeError(
            f"{name}: {field}={first['input']!r:.80} is not allowed: {first['msg']}. See `twinmerge methods {name}`."
        ) from error
    _check_sizes(name, method)
    _check_count(name, cls, method, len(experts))
    return method


def _plain(value: Any) -> Any:
    """Python's own numbers and tuples for those of NumPy and JSON."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in value)
    return value.item() if hasattr(value, "item") and getattr(value, "size", 0) == 1 else value


def _check_share(name: str, field: str, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
            raise TwinmergeError(
                f"{name}: {field}={number!r:.80} is out of range. Give a share between 0 and 1, such as 0.2."
            )


def _check_sizes(name: str, method: Method) -> None:
    """Sums of 16-bit models are in float32, where larger numbers are infinite and smaller weights nothing."""
    for field, value in method:
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, float) or abs(number) in (0.0, math.inf):
                continue
            if abs(number) > LARGEST or (field == "weights" and abs(number) < 1 / LARGEST):
                raise TwinmergeError(
                    f"{name}: {field}={number:g} is out of range. Give 0, or a number between {1 / LARGEST:g} and {LARGEST:g} in size."
                )


def _check_count(name: str, cls: type[Method], method: Method, count: int) -> None:
    if count < cls.experts_min or (cls.experts_max is not None and count > cls.experts_max):
        wanted = f"exactly {cls.experts_min}" if cls.experts_min == cls.experts_max else f"at least {cls.experts_min}"
        raise TwinmergeError(f"{name} merges {wanted} experts, got {count}. Name them with --expert name=path.")
    for field in cls.model_fields:
        value = getattr(method, field)
        if is_per_expert(cls, field) and isinstance(value, tuple) and len(value) != count:
            raise TwinmergeError(
                f"{name}: {len(value)} values of {field} for {count} experts. Give one per expert, or one for all."
            )
    weights = per_expert(getattr(method, "weights", 1.0), count)
    if cls.space == "parameters" and getattr(method, "normalize", True):
        total = math.fsum(weights)
        some = abs(total) > 1e-9 * math.fsum(map(abs, weights))  # less is what rounding left of 0
        if not some or (total < 0 and getattr(method, "compat", "paper") == "paper"):
            raise TwinmergeError(
                f"{name}: the weights add up to {total:g}, and the average divides by that. Make it positive."
            )


def require_model(method: str) -> None:
    """Refuse a method that gives masks where one model is wanted.

    Errors:
        TwinmergeError: such a method.

    Example:
        >>> require_model("ties")
    """
    if method_class(method).outputs != "model":
        raise TwinmergeError(
            f"{method} makes a mask for each expert, and no one model of them. Use `twinmerge compress --method {method}`."
        )
