"""The pages name files that are there, and the architecture is read once."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = (ROOT, ROOT / "src" / "twinmerge", ROOT / "tests")
NAMED = re.compile(r"`((?:[\w.]+/)+[\w.]*)`")


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/rules.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {name for name in NAMED.findall(text) if name.endswith((".py", ".c")) or name.startswith(("src/", "twin/"))}
    assert len(named) > 20
    lost = [name for name in named if not any((place / name).exists() for place in PLACES)]
    assert not lost


def test_pictures_and_pages_that_the_architecture_links_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_every_room_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "twinmerge").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"| `{path.name}/` |" in text, path.name


def test_the_page_on_mergekit_is_what_the_tables_of_the_code_say() -> None:
    spec = spec_from_file_location("mergekit_page", ROOT / "docs" / "mergekit_page.py")
    assert spec is not None and spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs" / "mergekit.md").read_text(encoding="utf-8")
    assert script.page(script.by_hand()) == written, "Run python docs/mergekit_page.py."
