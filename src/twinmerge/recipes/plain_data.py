"""Plain data out of YAML and JSON that somebody wrote: strictly, and in bounded time and memory.

YAML is read with JSON's idea of a number (`1e-5` is one; `1:30`, `010` and `1_000` are texts), without tags and dates.
What a merge key (`<<`) brings are the keys that the mapping does not have itself. A key that is there twice, a key that
is no text, and more values than any recipe has are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from twinmerge.errors import DataError, RecipeError
from twinmerge.store.foreign import Most, parse_json, read_bytes

BYTES = {"yaml": 1 << 18, "json": 1 << 22}  # of a file, at most; a recipe of a hundred models has 20 kB
VALUES = 10_000  # of a recipe of 1,024 experts with a weight each; aliases count as often as they are used
DEPTH = 40
NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?")
"""A number in a text, as `float` reads it; leading zeros, underscores and colons mean something else to some reader."""

_INT, _FLOAT, _BOOL, _NULL, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "str"))
_RESOLVERS = (
    (
        _BOOL,
        re.compile(r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)\Z"),
        "yYnNtTfFoO",
    ),
    (_INT, re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"), "-+0123456789"),
    (_FLOAT, re.compile(rf"(?:{NUMBER.pattern}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"), "-+.0123456789"),
    (_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes, and stops where there are too many."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    count = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > VALUES or self.depth > DEPTH:
            raise _too_much()
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Puts what some reader takes for a number or a date in quotes, and writes twice what stands twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """A person reads what stands there, and no mark of it."""
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, [*_first])


def read_text(file: Path, what: str) -> bytes:
    """What a YAML or (by its suffix) JSON file holds.

    Args:
        what: the file is, in messages.

    Raises:
        RecipeError: no such file, or a larger one than a recipe is.
    """
    try:
        return read_bytes(file, BYTES["json" if file.suffix == ".json" else "yaml"], f"Give a {what}.")
    except DataError as error:
        raise RecipeError(str(error)) from error


def documents_in(content: bytes, json: bool, where: str) -> list[Any]:
    """The data of every document in a YAML text, or of the one in a JSON text.

    Raises:
        TwinmergeError: no UTF-8; and as `from_yaml` and `from_json`, but for several documents.

    Example:
        >>> documents_in(b"a: 1", False, "it"), documents_in(b'{"a": 1}', True, "it")
        ([{'a': 1}], [{'a': 1}])
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where} cannot be read: {error}. Write plain YAML or JSON.") from error
    return [from_json(text, where)] if json else all_from_yaml(text, where)


def from_yaml(text: str, where: str) -> Any:
    """The data in a YAML text.

    Args:
        where: it comes from, at the beginning of messages.

    Raises:
        TwinmergeError: no YAML, several documents, a key twice, a key that is no text, a tag, too many values.

    Example:
        >>> from_yaml("{tol: 1e-9, at: 1:30, also: 010, keep: yes}", "it")
        {'tol': 1e-09, 'at': '1:30', 'also': '010', 'keep': True}
        >>> from_yaml("{density: 0.1, density: 0.2}", "it")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: it cannot be read: line 1 has the key 'density' a second time. Keep one of them.
    """
    found = all_from_yaml(text, where)
    if len(found) > 1:
        raise RecipeError(f"{where} cannot be read: it has several documents. Give a file for each.")
    return found[0] if found else None


def all_from_yaml(text: str, where: str) -> list[Any]:
    """The data of every document in a YAML text.

    Raises:
        TwinmergeError: as `from_yaml`, but for several documents.

    Example:
        >>> all_from_yaml("a: 1\\n---\\nb: 2", "it")
        [{'a': 1}, {'b': 2}]
    """
    loader, found, reader = None, [], _Reader()
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if node is not None and not (isinstance(node, yaml.ScalarNode) and node.value == "" and node.tag == _NULL):
                found.append(reader.value(node, 0))
        return found
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} cannot be read: {_said(error)}. Write plain YAML or JSON.") from error
    except (_UnreadableError, RecursionError) as error:
        said = error if isinstance(error, _UnreadableError) else _too_much()
        raise RecipeError(f"{where} cannot be read: {said}") from error
    finally:
        if loader is not None:
            loader.dispose()


def from_json(text: str, where: str) -> Any:
    """The data in a JSON text.

    Args:
        where: it comes from, at the beginning of messages.

    Raises:
        TwinmergeError: no JSON, NaN or infinity, a key twice, too many values.

    Example:
        >>> from_json('{"a": 1, "a": 2}', "it")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: it cannot be read: the key 'a' stands twice. Write plain YAML or JSON.
    """
    try:
        return parse_json(text, Most(BYTES["json"], VALUES))
    except ValueError as error:
        raise RecipeError(f"{where} cannot be read: {error}. Write plain YAML or JSON.") from error


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML that `from_yaml`, and every other reader, reads back as the same.

    Example:
        >>> to_yaml({"model": "1e5", "scale": 1e-5})
        "model: '1e5'\\nscale: 1.0e-05\\n"
    """
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def same_number(text: str) -> float | None:
    """The number that a text says to every reader, or None.

    Example:
        >>> same_number("1e-9"), same_number("1_0")
        (1e-09, None)
    """
    return float(text) if NUMBER.fullmatch(text) else None


def _said(error: yaml.YAMLError) -> str:
    """What PyYAML says, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, {problem}" if mark and problem else " ".join(str(error).split())


class _UnreadableError(Exception):
    """What is wrong, and what to do."""


def _too_much() -> _UnreadableError:
    return _UnreadableError(
        f"it has more than {VALUES} values, or more than {DEPTH} inside each other. No recipe needs so many."
    )


class _Reader:
    """Nodes to data, with aliases counted as often as they are used."""

    left = VALUES

    def value(self, node: yaml.Node, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > DEPTH:
            raise _too_much()
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node.tag, node.value, line)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(each, depth + 1) for each in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            found: dict[str, Any] = {}
            merged: dict[str, Any] = {}
            for key_node, each in node.value:
                line = key_node.start_mark.line + 1
                key = self.value(key_node, depth + 1)
                if key == "<<" and key_node.style is None:  # in quotes it is a key like any other
                    for other in reversed(self._mappings(each, depth + 1, line)):
                        merged |= other
                    continue
                if not isinstance(key, str):
                    raise _UnreadableError(f"line {line} has the key {key!r:.60}, which is no text. Put it in quotes.")
                if key in found:
                    raise _UnreadableError(f"line {line} has the key {key!r:.60} a second time. Keep one of them.")
                found[key] = self.value(each, depth + 1)
            return {**{key: merged[key] for key in merged if key not in found}, **found}
        raise _UnreadableError(f"line {line} has the tag {node.tag!r:.60}. Write plain values.")

    def _mappings(self, node: yaml.Node, depth: int, line: int) -> list[dict[str, Any]]:
        """What a merge key (<<) names: a mapping, or several of which the first wins."""
        value = self.value(node, depth)
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(each, dict) for each in found):
            raise _UnreadableError(f"line {line} has a merge key (<<) of what is no mapping. Write the keys out.")
        return found


def _scalar(tag: str, text: str, line: int) -> Any:
    try:
        if tag == _TEXT:
            return _sound(text)
        if tag == _NULL:
            return None
        if tag == _BOOL:
            return yaml.SafeLoader.bool_values[text.lower()]
        if tag == _INT:
            return int(text)
        if tag == _FLOAT:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError) as error:
        raise _UnreadableError(f"line {line} has {text!r:.60}, which is no {tag.rpartition(':')[2]}.") from error
    raise _UnreadableError(f"line {line} has the tag {tag!r:.60}. Write plain values.")


def _sound(text: str) -> str:
    if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise _UnreadableError(f"the text {text!r:.60} has letters that no name or path has. Leave them out.")
    return text
