"""Methods by name, as a class or as an object: a file of `methods/`, an entry point of `twinmerge.methods`, or a
class of one's own."""

from __future__ import annotations

import math
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from pydantic import ValidationError

from twinmerge.errors import RecipeError, TwinmergeError, nearest
from twinmerge.methods.kit.base import Method, PerExpert
from twinmerge.methods.kit.dialect import Number
from twinmerge.methods.kit.sound import check_class, check_object
from twinmerge.methods.kit.trial import try_method
from twinmerge.origin import class_named, name_of
from twinmerge.origin import is_ours as is_ours
from twinmerge.origin import is_own as is_own
from twinmerge.plugins import Plugins

LARGEST = 1e30  # of a number that is multiplied with
SEE = " See `twinmerge methods`, or install the package that offers it."
METHODS = Plugins[Method](Method, "method", "twinmerge.methods", "twinmerge.methods", check_class, lambda: SEE)

_TRIED: weakref.WeakSet[type[Method]] = weakref.WeakSet()
MethodLike = str | type[Method] | Method
"""A name from `twinmerge methods`, a class, or an object with its parameters."""


def method_names() -> list[str]:
    """All methods, the built-in ones by their files, then those of installed packages.

    Example:
        >>> "ties" in method_names()
        True
    """
    return METHODS.names()


def by_any_name(word: str) -> str:
    """The method that a word stands for, in any case and with hyphens: by its name here, or by mergekit's or PEFT's;
    the word itself where that is none.

    Example:
        >>> by_any_name("Dare-Linear"), by_any_name("TIES"), by_any_name("cat"), by_any_name("nonesuch")
        ('dare', 'ties', 'task_arithmetic', 'nonesuch')
    """
    plain = word.lower().replace("-", "_")
    for name in (word, plain):
        if name in METHODS.files() or is_own(name) or METHODS.entry(name) is not None:
            return name
    return said_otherwise(plain, lambda cls: plain in (*cls.aliases, *cls.mergekit, *cls.peft)) or word


def implied_by(given: MethodLike) -> Mapping[str, Any]:
    """The parameters that a method has where it is called by PEFT's name of it: what that name says there.

    Example:
        >>> implied_by("cat"), implied_by("ties_svd"), implied_by("ties")
        ({'scale': 1.0}, {'scope': 'tensor'}, {})
    """
    if not isinstance(given, str) or is_own(given):
        return {}
    return method_class(given).peft.get(given.lower().replace("-", "_"), {})


def method_class(given: MethodLike) -> type[Method]:
    """The class of a method, by any name of it; of a name only its own file is imported.

    Raises:
        TwinmergeError: unknown name (with the nearest right one), or a class that lacks something.

    Example:
        >>> method_class("tie")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: Unknown method 'tie'. Did you mean 'ties'? See `twinmerge methods`, or install \
the package that offers it.
    """
    if isinstance(given, str):
        return class_named(given, METHODS) if is_own(given) else _found(by_any_name(given))
    return METHODS.require(type(given) if isinstance(given, Method) else given, short_name(given))


def _found(name: str) -> type[Method]:
    """The class of a name; where it is nearly one that other tools have, the error says what that is here."""
    try:
        return METHODS.find(name)
    except RecipeError as error:
        if "Did you mean" in str(error):
            raise
        others = {
            word: here for here, cls in METHODS.all().items() for word in (*cls.aliases, *cls.mergekit, *cls.peft)
        }
        near = nearest(name, others)
        meant = next((word for word in others if f"{word!r}" in near), None)
        if meant is None:
            raise
        raise RecipeError(f"Unknown method {name!r:.80}.{near} It is {others[meant]} here.{SEE}") from error


def method_name(given: MethodLike) -> str:
    """The name of a method in recipes and provenance: that of `twinmerge methods` where it has one, else
    "module:Class", or "<Class of module>" where that leads to no class in another process, as for one that was
    defined in a notebook or a function.

    Example:
        >>> method_name("ties"), method_name(method_class("ties")(density=0.5))
        ('ties', 'ties')
        >>> class Mine(Method):
        ...     def apply(self, tile, known):
        ...         return tile.x[0]
        >>> Mine.__module__ = "__main__"
        >>> method_name(Mine)
        '<Mine of __main__>'
    """
    if isinstance(given, str):
        return by_any_name(given)
    return name_of(method_class(given), METHODS)


def short_name(given: object) -> str:
    """What messages call a method.

    Example:
        >>> short_name("ties"), short_name("package.module:Halfway")
        ('ties', 'Halfway')
    """
    if isinstance(given, str):
        return given.rpartition(":")[2]
    cls = type(given) if isinstance(given, Method) else given
    return getattr(cls, "__name__", repr(cls))


def given_to(given: MethodLike) -> dict[str, Any]:
    """The parameters that an object was made with.

    Example:
        >>> given_to(method_class("ties")(density=0.5)), given_to("ties")
        ({'density': 0.5}, {})
    """
    if not isinstance(given, Method):
        return {}
    return {name: value for name, value in given if name in given.model_fields_set}


def said_otherwise(word: str, says: Callable[[type[Method]], bool]) -> str | None:
    """The name of the method whose class says that a word stands for it, or None.

    The file of that name is asked first, then those that have the word in quotes, then other packages, so that
    PyTorch is not imported for a name that needs none.

    Example:
        >>> said_otherwise("linear", lambda method: "linear" in method.aliases)
        'average'
    """
    first = [word] if word in METHODS.files() else []
    for name in chain(first, METHODS.mentioned(word)):
        try:
            if says(METHODS.find(name)):
                return name
        except TwinmergeError:  # of another package: whoever names it is told
            continue
    return None


def is_per_expert(cls: type[Method], parameter: str) -> bool:
    """True for parameters that may differ between experts."""
    annotation = cls.model_fields[parameter].annotation
    return isinstance(annotation, types.UnionType) and set(typing.get_args(annotation)) == set(
        typing.get_args(PerExpert)
    )


def make_method(
    given: MethodLike, experts: tuple[str, ...], parameters: Mapping[str, Any], based: bool = False
) -> Method:
    """A method with its parameters checked.

    Args:
        given: a name, a class, or an object, whose own parameters are those that it was made with.
        experts: names, in the order of the stack.
        parameters: field -> value; `expert.field` sets the field for one expert.
        based: a base is named beside them, for messages.

    Raises:
        TwinmergeError: unknown method, parameter or expert (with the nearest right one), a value out of its range, a
            number of experts that the method is not defined for.

    Example:
        >>> make_method("ties", ("a", "b"), {"density": 0.2, "b.density": 0.5}).density
        (0.2, 0.5)
    """
    cls, name = method_class(given), short_name(given)
    parameters = {**given_to(given), **parameters}
    fields = cls.model_fields
    values: dict[str, Any] = {}
    single: dict[str, dict[str, Any]] = {}
    for key, value in parameters.items():
        expert, dot, field = key.rpartition(".")
        if field not in fields:
            raise RecipeError(
                f"{name} has no parameter {field!r}.{nearest(field, fields)} It has: {', '.join(fields) or 'none'}."
            )
        if not dot:
            values[field] = value
            continue
        if expert not in experts:
            raise RecipeError(
                f"{key} names no expert of this merge.{nearest(expert, experts)} It has: {', '.join(experts)}."
            )
        if not is_per_expert(cls, field):
            raise RecipeError(
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
    if values.get("compat") == "mergekit":
        values |= _counted(cls, values)
    for field, value in values.items():
        if field.endswith("density"):
            _check_share(name, field, value)
    try:
        method = cls.model_validate(values, strict=True)
    except ValidationError as error:
        first = max(error.errors(), key=lambda each: len(each["loc"]))  # of one expert's number rather than of all
        if not first["loc"]:  # of several fields together
            raise RecipeError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
        field = str(first["loc"][0])
        if first["type"] == "missing":
            raise RecipeError(f"{name} needs a {field}, which has no default. Give one.") from error
        raise RecipeError(
            f"{name}: {field}={first['input']!r:.80} is not allowed: {first['msg']}. See `twinmerge methods {name}`."
        ) from error
    _check_sizes(name, method)
    _check_count(name, cls, method, experts, based)
    if not is_ours(cls):  # the tests look at our own
        check_object(method, name)
        if cls not in _TRIED:
            try_method(method, name, experts)
            _TRIED.add(cls)
    return method


def _plain(value: Any) -> Any:
    """Python's own numbers and tuples for those of NumPy and JSON."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in value)
    return value.item() if hasattr(value, "item") and getattr(value, "size", 0) == 1 else value


def _counted(cls: type[Method], values: Mapping[str, Any]) -> dict[str, Any]:
    """What mergekit's numbers count as, of those that have limits."""
    said = [number for dialect in cls.mergekit.values() for number in [*dialect.own.values(), *dialect.shared.values()]]
    found = {}
    for number in said:
        if isinstance(number, Number) and number.field in values:
            value = values[number.field]
            of = value if isinstance(value, tuple) else (value,)
            if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in of):
                counted = tuple(number.counted(each) for each in of)
                found[number.field] = counted if isinstance(value, tuple) else counted[0]
    return found


def _check_share(name: str, field: str, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, str):
            raise RecipeError(f"{name}: {field}={number!r:.80} is a text. Give a number, such as {field}=0.2.")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
            raise RecipeError(
                f"{name}: {field}={number!r:.80} is out of range. Give a share between 0 and 1, such as 0.2."
            )


def _check_sizes(name: str, method: Method) -> None:
    """Sums of 16-bit models are in float32, where larger numbers are infinite and smaller weights nothing."""
    for field, value in method:
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, float) or abs(number) in (0.0, math.inf):
                continue
            if abs(number) > LARGEST or (field == "weights" and abs(number) < 1 / LARGEST):
                raise RecipeError(
                    f"{name}: {field}={number:g} is out of range. Give 0, or a number between {1 / LARGEST:g} and "
                    f"{LARGEST:g} in size."
                )


def _check_count(name: str, cls: type[Method], method: Method, experts: tuple[str, ...], based: bool) -> None:
    count = len(experts)
    if count < cls.experts_min or (cls.experts_max is not None and count > cls.experts_max):
        wanted = f"exactly {cls.experts_min}" if cls.experts_min == cls.experts_max else f"at least {cls.experts_min}"
        experts_ = "expert" if cls.experts_max == 1 else "experts"
        base = " (the base does not count)" if based else ""
        raise RecipeError(f"{name} merges {wanted} {experts_}, got {count}{base}. Name them with --expert name=path.")
    for field in cls.model_fields:
        value = getattr(method, field)
        if is_per_expert(cls, field) and isinstance(value, tuple) and len(value) != count:
            raise RecipeError(
                f"{name}: {len(value)} values of {field} for {count} experts. Give one per expert, or one for all."
            )
    try:
        method.check(experts)
    except TwinmergeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def require_model(method: MethodLike) -> None:
    """Refuse a method that gives masks where one model is wanted.

    Raises:
        RecipeError: such a method.

    Example:
        >>> require_model("ties")
    """
    if method_class(method).outputs != "model":
        name = short_name(method)
        raise RecipeError(
            f"{name} makes a mask for each expert, and no one model of them. Use `twinmerge masks build --method "
            f"{name}`."
        )
