"""Arguments of a wrong kind become one sentence, by what the signature says."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from typing import Any, ParamSpec, TypeVar

from twinmerge.errors import UsageError, nearest

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", os.PathLike: "a path"}


def strict(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of the public surface refuse arguments that its annotations do not allow, in one sentence.

    Looked at are texts, numbers, paths, literals, mappings and lists with what is in them, and classes; `Any` allows
    all, and so does what only a type checker imports.

    Raises:
        TwinmergeError: an argument that is missing, unknown, given twice or of another kind.

    Example:
        >>> @strict
        ... def mix(parts: Mapping[str, float], rank: int | None = None) -> int:
        ...     return len(parts)
        >>> mix({"a": 1, "b": 0.5})
        2
        >>> mix(["a"])
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: mix takes parts as a mapping from a text to a number, not ['a'] (a list).
        >>> mix({}, rnk=2)
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: mix has no argument 'rnk'. Did you mean 'rank'?
    """
    signature = inspect.signature(function)
    kinds: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise _no_call(_name(function, args), signature, kwargs, error) from None
        for argument, value in given.items():
            parameter = signature.parameters[argument]
            if value is parameter.default or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if argument not in kinds:
                kinds[argument] = _kind(parameter.annotation, function)
            if not fits(value, kinds[argument]):
                raise UsageError(
                    f"{_name(function, args)} takes {argument} as {described(kinds[argument])}, not "
                    f"{shown(value)}.{_meant(value, kinds[argument])}"
                )
        return function(*args, **kwargs)

    return call


def _name(function: Callable[..., Any], args: Sequence[Any]) -> str:
    """What the caller knows the function as: a method by the class of its object, not by the one that it is written
    in."""
    name = function.__qualname__.rpartition("<locals>.")[2]
    first = next(iter(inspect.signature(function).parameters), "")
    if args and first in ("self", "cls") and "." in name:
        kind = args[0] if first == "cls" else type(args[0])
        name = f"{kind.__name__}.{function.__name__}"
    return name.removesuffix(".__init__")


def strict_class(kind: type[T]) -> type[T]:
    """The same for what a class is made with."""
    setattr(kind, "__init__", strict(kind.__init__))  # noqa: B010  a type checker allows no other way
    return kind


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, by an annotation.

    Example:
        >>> (fits(1, float), fits(True, int), fits("abc", Sequence[str]),
        ...  fits({"a": 1}, Mapping[str, str]), fits("x", Any))
        (True, False, False, False, True)
    """
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is typing.Literal:
        return any(value is one or (type(value) is type(one) and value == one) for one in inside)
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin is bool:
        return isinstance(value, bool) or (
            type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
        )
    if origin in (int, float):
        number = numbers.Integral if origin is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            return False
        return not inside or all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    if origin in (Sequence, list, tuple, Collection):  # anything that has a length and an order will do
        plain = isinstance(value, Sized) and (hasattr(value, "__getitem__") or origin is Collection)
        if not plain or isinstance(value, (str, bytes, Mapping)):
            return False
        try:
            if origin is tuple and Ellipsis not in inside:
                return len(value) == len(inside) and all(map(fits, value, inside))
            return len(value) == 0 or not inside or inside[0] is Any or all(fits(item, inside[0]) for item in value)
        except TypeError:  # a tensor without axes
            return False
    if origin is Iterable:
        plain = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
        return plain and getattr(value, "shape", None) != ()
    if isinstance(origin, type) and issubclass(origin, os.PathLike):
        return isinstance(value, os.PathLike)  # whatever names a file or folder
    return isinstance(value, origin) if isinstance(origin, type) else True


def described(kind: Any) -> str:
    """A kind in words.

    Example:
        >>> described(Mapping[str, float] | None), described(str | os.PathLike[str])
        ('a mapping from a text to a number or None', 'a text or a path')
    """
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(one) for one in inside))
    if origin is typing.Literal:
        return " or ".join(repr(one) for one in inside)
    if kind is Any:
        return "anything"
    if kind is None or kind is type(None):
        return "None"
    if origin is Mapping:
        return "a mapping" + (f" from {described(inside[0])} to {described(inside[1])}" if inside else "")
    if origin is tuple and Ellipsis not in inside:
        return f"({', '.join(map(described, inside))})"
    if origin in (Sequence, list, tuple, Collection, Iterable):
        return "a list" + (f" of {described(inside[0])}" if inside and inside[0] is not Any else "")
    if origin is type and inside:
        return f"a class of {inside[0].__name__}"
    if isinstance(origin, type) and issubclass(origin, os.PathLike):
        return "a path"
    return WORDS.get(origin) or (f"a {origin.__name__}" if isinstance(origin, type) else "anything")


def shown(value: Any) -> str:
    """A value for a sentence, short.

    Example:
        >>> shown(None), shown([1]), shown("x" * 100)
        ('None', '[1] (a list)', "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... (a str)")
    """
    if value is None:
        return "None"
    kind = type(value).__name__
    if not isinstance(value, (str, bytes, int, float, list, tuple, dict, os.PathLike)):
        return f"a {kind}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 42 else text[:39] + '...'} ({'an' if kind[0] in 'aeiou' else 'a'} {kind})"


def at_least_one(name: str, value: Any) -> int:
    """A count.

    Raises:
        UsageError: no whole number from 1 on.

    Example:
        >>> at_least_one("batch_rows", 0)
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: batch_rows is 0. Give a whole number from 1 on.
    """
    if not fits(value, int) or value < 1:
        given_as = value if fits(value, int) else shown(value)
        raise UsageError(f"{name} is {given_as}. Give a whole number from 1 on.")
    return int(value)


def byte_count(text: str, whole: int) -> float:
    """Bytes out of what people write.

    Args:
        whole: what a percentage is of.

    Raises:
        UsageError: no number of bytes.

    Example:
        >>> byte_count("3.5MB", 0), byte_count("4%", 1000), byte_count("12", 0)
        (3500000.0, 40.0, 12.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|B|kB|KB|MB|GB|TB)?", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no number of bytes. Write 3500000, 3.5MB or 4% (of the shared model).")
    units = {None: 1.0, "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "%": whole / 100}
    return float(found[1]) * units[found[2]]


def _meant(value: Any, kind: Any) -> str:
    """What is meant: the nearest of the texts that an argument may be; a list, where it is one text alone."""
    kinds = {typing.get_origin(one) or one for one in (kind, *typing.get_args(kind))}
    if isinstance(value, str) and kinds & {Sequence, list, tuple, Collection, Iterable}:
        return " Give a list, also of one: [text]."
    if typing.get_origin(kind) is typing.Literal and isinstance(value, str):
        return nearest(value, typing.get_args(kind))
    return ""


def device_known(device: Any) -> None:
    """Refuse a device that PyTorch does not know.

    Raises:
        UsageError: a name that is none.
    """
    if str(device) == "cpu":
        return
    import torch

    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"There is no device {shown(device)}. Name cpu, cuda or mps.") from error


def dtype_known(dtype: Any) -> Any:
    """A floating dtype of torch by its name, or as it is; None for None and "auto".

    Raises:
        UsageError: it is none.

    Example:
        >>> dtype_known("bfloat16"), dtype_known("auto")
        (torch.bfloat16, None)
    """
    if dtype is None or dtype == "auto":
        return None
    import torch

    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        known = ("float32", "bfloat16", "float16", "float64")
        raise UsageError(
            f"There is no dtype {shown(dtype)} to run in.{nearest(str(dtype), known)} Name {', '.join(known)} or auto."
        )
    return found


def device_there(device: Any) -> None:
    """Refuse a device that this machine or this torch does not have.

    Raises:
        UsageError: it does not.
    """
    device_known(device)
    if str(device) == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"The device {device} is not there: {said}. Name another one, such as cpu.") from error


def _kind(annotation: Any, function: Callable[..., Any]) -> Any:
    """What an annotation means; anything where it has a name that only a type checker knows."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)  # the library's own source, as typing.get_type_hints does
    except (NameError, AttributeError, TypeError):
        return Any


def _no_call(name: str, signature: inspect.Signature, kwargs: Mapping[str, Any], error: TypeError) -> UsageError:
    """Arguments that no call has."""
    known = [
        n
        for n, p in signature.parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n not in ("self", "cls")
    ]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    strange = [n for n in kwargs if n not in known]
    if strange and not takes_all:
        return UsageError(
            f"{name} has no argument "
            f"{strange[0]!r}.{nearest(strange[0], known) or ' It has: ' + ', '.join(known) + '.'}"
        )
    return UsageError(f"{name} cannot be called like this: {error}. Its arguments are {', '.join(known)}.")
