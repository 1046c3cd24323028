"""The pages of docs/ say what is so: their examples print what they show, and the notebooks run."""

from __future__ import annotations

import ast
import json
import re
import shlex
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer

import twinmerge.cli
from twinmerge.moved import COMMANDS as OLD

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(
    [*DOCS.glob("start/*.md"), *DOCS.glob("guides/*.md"), *DOCS.glob("from/*.md")]
    + [DOCS / f"{name}.md" for name in ("formats", "glossary", "faq", "errors")]
)
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
COMMAND = re.compile(r"^(?:\$ )?(twinmerge [a-z].*?)(?<!\\)$", re.MULTILINE | re.DOTALL)


def script(name: str) -> Any:
    """A script of docs/."""
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


EXAMPLES = script("examples")


def options_of() -> dict[str, set[str]]:
    """Command in words -> all of its options."""

    def below(found: Any, words: str) -> dict[str, set[str]]:
        known: dict[str, set[str]] = {}
        for name, command in getattr(found, "commands", {}).items():
            known |= below(command, f"{words} {name}".strip())
        if not known:
            known[words] = {o for p in found.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
        return known

    return below(typer.main.get_command(twinmerge.cli.app), "")


def commands(text: str) -> list[list[str]]:
    """The commands in the fenced blocks of a page, as words."""
    found = []
    for block in EXAMPLES.blocks(text):
        if block.kind in ("sh", "console"):
            joined = block.text.replace("\\\n", " ")
            found += [shlex.split(line, comments=True) for line in COMMAND.findall(joined)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_commands_and_options_of_a_page_are_there(page: Path) -> None:
    known = options_of()
    for words in commands(page.read_text(encoding="utf-8")):
        name = next(n for n in (" ".join(words[1:3]), words[1]) if n in known)
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert name not in OLD and given <= known[name] | {"--help"}, (page.name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_python_of_a_page_can_be_read(page: Path) -> None:
    for block in EXAMPLES.blocks(page.read_text(encoding="utf-8")):
        if block.kind == "python":
            ast.parse(block.text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_stored_without_outputs(notebook: Path) -> None:
    book = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


def test_five_notebooks() -> None:
    assert len(NOTEBOOKS) == 5


def test_models_to_try_with_are_the_same_on_every_page() -> None:
    """A script stands where it is needed, and nowhere otherwise."""
    seen: dict[str, str] = {}
    for page in PAGES:
        for block in EXAMPLES.blocks(page.read_text(encoding="utf-8")):
            if block.title and block.title.startswith("tiny"):
                assert seen.setdefault(block.title, block.text) == block.text, (page.name, block.title)
    assert seen.keys() == {"tiny.py", "tiny_llama.py", "tiny_lora.py", "tiny_st.py"}


@pytest.mark.parametrize(
    "shown, found, same",
    [
        ("12 rows, 98.1 %, 3.2 s", "12 rows, 98.0 %, 9.9 s", True),
        ("2 rows", "3 rows", False),
        ("a […] d", "a b c d", True),
        ("a […] d", "a b c", False),
        ("[…] d e", "a d e", True),
        ("label film", "label bank", False),
        ("0.51", "0.49", True),
        ("0.51", "0.30", False),
        ("102 rows", "101 rows", True),
        ('"seconds": 0.1', '"seconds": 7.0', True),
        ("", "more", False),
    ],
)
def test_what_counts_as_the_same_output(shown: str, found: str, same: bool) -> None:
    assert EXAMPLES.alike(shown, found) is same


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", EXAMPLES.pages())
def test_examples_of_a_page_print_what_it_shows(page: str) -> None:
    if page.startswith("from/sentence") and not find_spec("sentence_transformers"):
        pytest.skip("sentence-transformers is not installed")
    if "lora" in page or "peft" in page:
        pytest.importorskip("peft")
    wrong = EXAMPLES.differing((DOCS / page).read_text(encoding="utf-8"))
    assert not wrong, "\n".join(f"{page} shows\n{each.shown}and prints\n{each.found}" for each in wrong)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(notebook: Path) -> None:
    """In a kernel where nbclient is installed, else cell by cell."""
    notebooks = script("notebooks")
    if find_spec("nbclient"):
        page = notebooks.page(notebooks.executed(notebook), notebook.stem)
        assert page.startswith("# ") and "Traceback" not in page
        return
    book = json.loads(notebook.read_text(encoding="utf-8"))
    with EXAMPLES.inside(None):
        space: dict[str, Any] = {"__name__": "__main__"}
        for cell in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
            exec("".join(cell["source"]), space)
