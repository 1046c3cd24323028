"""No two files of the package import each other, directly or through others, nor does one for its annotations alone."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import twinmerge

ROOT = Path(twinmerge.__file__).parent
OPEN: tuple[set[str], ...] = ()
"""Circles that are still to be opened: none may be added."""


def test_files_are_short_or_say_why() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 400:
            assert "Longer than other files:" in (ast.get_docstring(ast.parse(text)) or ""), path


@cache
def imported() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere."""
    files = {".".join(("twinmerge", *p.relative_to(ROOT).with_suffix("").parts)): p for p in ROOT.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        both = {(n.module, f"{n.module}.{alias.name}") for n in nodes for alias in n.names}
        found[name] = {whole if whole in files else module for module, whole in both if {module, whole} & set(files)}
        found[name].discard(name)
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for other in graph.get(stack.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        reach[start] = seen
    own = [frozenset({b for b in reach[a] if a in reach[b]}) for a in graph if a in reach[a]]
    return [set(each) for each in dict.fromkeys(own)]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [{"a", "b", "c"}]


def test_the_rooms_of_a_twin_do_not_import_each_other_back() -> None:
    """A folder below twin/ counts as one, as each file beside it does."""
    rooms: dict[str, set[str]] = {}
    for name, others in imported().items():
        room = name.split(".")[:3]
        if room[:2] == ["twinmerge", "twin"]:
            to = {tuple(other.split(".")[:3]) for other in others if other.startswith("twinmerge.twin.")}
            rooms.setdefault(".".join(room), set()).update(".".join(each) for each in to if list(each) != room)
    assert {"twinmerge.twin.mixing", "twinmerge.twin.routers", "twinmerge.twin.masks"} < set(rooms)
    assert circles(rooms) == []
    assert len(list((ROOT / "twin").glob("*.py"))) <= 20


def test_no_circle() -> None:
    assert [each for each in circles(imported()) if not any(each <= known for known in OPEN)] == []
