"""The house of benchmarks/: who may import whom, and that documented commands and their tables stay in step."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
FILES = {p.relative_to(BENCHMARKS).with_suffix("").as_posix().replace("/", "."): p for p in BENCHMARKS.rglob("*.py")}
COMMANDS = sorted(name for name in FILES if "." not in name)
PAGES = {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
COMMAND = re.compile(r"^\S*python benchmarks/(\w+)\.py(.*)$", re.MULTILINE)


def imported(name: str) -> set[str]:
    """The modules of benchmarks/ that a file imports anywhere, for its annotations too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES)


def of(name: str) -> str:
    """Whom a file serves: "kit", or the benchmark that it is, or is a part of."""
    return name.partition(".")[0].removesuffix("_parts")


def sections() -> list[tuple[str, str, str]]:
    """Page, heading, text of every section of the documentation."""
    found = []
    for page, text in PAGES.items():
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            heading, _, body = part.partition("\n")
            found.append((page, heading, body))
    return found


def told(name: str) -> set[tuple[str, str]]:
    """The tables that a benchmark says it makes: page and heading."""
    about = ast.get_docstring(ast.parse(FILES[name].read_text())) or ""
    return {(page, " ".join(heading.split())) for page, heading in re.findall(r'(docs/\w+\.md), "([^"]+)"', about)}


def test_folders_are_the_kit_and_the_parts_of_a_benchmark() -> None:
    assert {of(name) for name in FILES} == {"kit", *COMMANDS}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_the_kit_and_its_own_parts(name: str) -> None:
    allowed = {"kit"} if of(name) == "kit" else {"kit", of(name)}
    assert {of(other) for other in imported(name)} <= allowed
    assert not imported(name) & set(COMMANDS)  # a part knows no command


def test_no_two_files_import_each_other() -> None:
    left = {name: imported(name) - {name} for name in FILES}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_names_its_command_and_its_tables(name: str) -> None:
    about = ast.get_docstring(ast.parse(FILES[name].read_text())) or ""
    assert f"python benchmarks/{name}.py" in "\n".join(about.split("\n")[:12])
    in_docs = {(page, heading) for page, heading, body in sections() if name in dict(COMMAND.findall(body))}
    assert told(name) == in_docs


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_documented_commands_can_be_given(page: str) -> None:
    text = PAGES.get(page) or (ROOT / page).read_text()
    for name, rest in COMMAND.findall(text):
        nodes = [n for n in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(n, ast.Constant)]
        known = {node.value for node in nodes if isinstance(node.value, str)}
        words = shlex.split(rest)
        assert {word for word in words if word.startswith("--")} <= known, f"{name}{rest}"
        assert not words or words[0].startswith("--") or words[0] in known, f"{name}{rest}"


def test_files_are_short() -> None:
    long = {name: len(path.read_text().split("\n")) for name, path in FILES.items()}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
