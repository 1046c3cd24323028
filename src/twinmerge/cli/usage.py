"""What is wrong with a command line, in the one sentence that would have helped."""

from __future__ import annotations

import re
from typing import Any

from twinmerge.errors import nearest

KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}


def sentence(error: BaseException) -> str | None:
    """What is said of an error of the parser; None of any other, and "" where the help was shown instead.

    The parser's own classes are not public, so they are known by their names.
    """
    ctx: Any = getattr(error, "ctx", None)
    kind = type(error).__name__
    if not hasattr(error, "format_message"):
        return None
    if kind == "NoArgsIsHelpError":
        return ""
    see = f"See `{ctx.command_path if ctx else 'twinmerge'} --help`."
    if kind == "NoSuchOption" and ctx is not None:
        return f"`{ctx.command_path}` has no option {_option(str(getattr(error, 'option_name', '')), ctx)} {see}"
    param: Any = getattr(error, "param", None)
    if kind == "MissingParameter" and param is not None:
        about = str(param.help or "").rstrip(".")
        about = about if about[1:2].isupper() else f"{about[:1].lower()}{about[1:]}"
        return f"`{ctx.command_path}` needs {_called(param)} ({about}). {see}"
    if kind == "BadParameter" and param is not None:
        return f"{_name(param)} is {_value(error)!r}, and {_wanted(str(getattr(error, 'message', '')))}. {see}"
    message = str(getattr(error, "message", error)).rstrip(".")
    if ctx is not None and (extra := re.fullmatch(r"Got unexpected extra argument\(s\) \((.*)\)", message)):
        usage = " ".join([ctx.command_path, *(_name(p) for p in ctx.command.params if not _is_option(p))])
        return f"`{usage}` takes no more arguments, and {extra[1]!r:.80} is one. Everything else is an option. {see}"
    return f"{message}{'' if message.endswith('?') else '.'} {see}"


def _option(given: str, ctx: Any) -> str:
    """An option that is not there, and what was meant: another option, or a parameter of a method."""
    known = [name for param in ctx.command.params for name in (*param.opts, *param.secondary_opts) if name[:1] == "-"]
    name = given.lstrip("-").replace("-", "_")
    if "--parameter" in known and name in _parameters():
        return f"{given}, which is a parameter of methods. Write -p {name}=VALUE."
    return f"{given}.{nearest(given, known)}"


def _parameters() -> set[str]:
    """The parameters of all methods."""
    from twinmerge.methods.kit.registry import METHODS

    return {name for cls in METHODS.all().values() for name in cls.model_fields}


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def _name(param: Any) -> str:
    return max(param.opts, key=len) if _is_option(param) else str(param.metavar or param.name.upper())


def _called(param: Any) -> str:
    return f"{_name(param)} {param.metavar or ''}".strip() if _is_option(param) else f"the argument {_name(param)}"


def _value(error: BaseException) -> object:
    """What was given, which only the error behind this one knows."""
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    return found[0].get("input") if found else ""


def _wanted(message: str) -> str:
    """
    Example:
        >>> _wanted("Input should be a valid integer, unable to parse string as an integer")
        'should be a whole number'
    """
    for word, plain in KINDS.items():
        if message.startswith(f"Input should be a valid {word}"):
            return f"should be {plain}"
    return message.removeprefix("Input ").rstrip(".")
