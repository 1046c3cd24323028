"""Rules that all of the source holds, found by reading it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import twinmerge
from twinmerge import errors
from twinmerge.store.header import CONVERT

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
OURS = {"Twin", "tm.Twin"}
OWN_READERS = {
    "store/foreign.py",  # the door itself
    "store/partial.py",  # the journal of a folder that is being written
    "engine/verify.py",
    "recipes/recipe.py",
    "plugins.py",  # our own files
    "origin.py",  # the same, and those of installed packages
    "twin/routers/kit/sound.py",  # a header as a file would give it, in memory
}
OPENERS = {"from_pretrained", "from_config", "get_config_dict", "pipeline", "cached_file"}


def calls(text: str, names: set[str]) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call of one of the names in a source: (the call, what it is called on, its name)."""
    if not any(name in text for name in names):  # parsing takes long
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, ast.unparse(node.func.value), node.func.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node, "", node.func.id


def refuses_code(call: ast.Call) -> bool:
    given = {word.arg: word.value for word in call.keywords}
    value = given.get("trust_remote_code")
    return isinstance(value, ast.Constant) and value.value is False


def trusting(text: str, concrete: bool) -> list[str]:
    """The calls that open something of transformers' without refusing its code.

    concrete: whether calls on a named class of transformers count too, which never runs code of theirs.
    """
    return [
        ast.unparse(call)
        for call, on, name in calls(text, OPENERS)
        if name in OPENERS and on not in OURS and (concrete or "Auto" in on) and not refuses_code(call)
    ]


def test_nothing_is_opened_that_may_run_their_code():
    found = {str(file): trusting(file.read_text(), "src" in file.parts) for file in FILES}
    assert not {file: lines for file, lines in found.items() if lines}
    assert not trusting(CONVERT, True)


@pytest.mark.parametrize(
    "text",
    [
        "AutoConfig.from_pretrained(x)",
        "t.AutoModel.from_config(x, trust_remote_code=True)",
        "getattr(transformers, 'AutoTokenizer').from_pretrained(x, trust_remote_code=trust)",
        "pipeline('text-generation', x)",
    ],
)
def test_the_search_finds_what_it_is_for(text):
    assert trusting(text, True)


def test_lines_end_at_line_feeds_only():
    """`str.splitlines` splits at U+2028, U+0085 and form feeds too, which texts and tokens contain."""
    found = [
        f"{file}: {ast.unparse(call)}"
        for file in FILES
        for call, _, name in calls(file.read_text(), {"splitlines"})
        if name == "splitlines"
    ]
    assert not found


def test_files_are_read_through_the_one_door():
    """A pipe, a giant or a link in a stranger's folder is met once, in `store/foreign.py`. A new reader uses what is
    there."""
    found = [
        f"{file}: {ast.unparse(call)}"
        for file in sorted((ROOT / "src" / "twinmerge").rglob("*.py"))
        if file.relative_to(ROOT / "src" / "twinmerge").as_posix() not in OWN_READERS
        for call, on, name in calls(file.read_text(), {"json.load", ".read_text", ".read_bytes"})
        if (name in ("loads", "load") and on == "json") or (name in ("read_text", "read_bytes") and on)
    ]
    assert not found


BARE: set[str] = set()
"""Files whose errors may be of no class but the one above all; each needs a reason."""


def test_every_error_has_a_class_of_its_own():
    """A program tells a typo from a full disk by the class, and the command by its exit code."""
    classes = {
        kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ValueError)
    }
    classes -= {"TwinmergeError"}
    raised = {file: [name for _, _, name in calls(file.read_text(), {*classes, "TwinmergeError"})] for file in FILES}
    bare = {file for file, names in raised.items() if "TwinmergeError" in names}
    assert {str(file.relative_to(ROOT)) for file in bare} == BARE
    found = Counter(name for names in raised.values() for name in names if name in classes)
    assert found.keys() == classes and found.total() > 600, found


def test_a_public_name_stands_in_both_lists_of_the_package():
    """What is loaded when it is first used, and what a type checker reads."""
    (block,) = (
        node
        for node in ast.parse((ROOT / "src/twinmerge/__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    read = {alias.asname: node.module for node in block.body for alias in node.names}
    assert read == {name: f"twinmerge.{where}" for name, where in twinmerge._WHERE.items()}
