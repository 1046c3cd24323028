"""The pages name files that are there, and the architecture is read once."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import twinmerge as tm
from twinmerge.cli.command import COMMANDS
from twinmerge.methods.kit.registry import METHODS
from twinmerge.testing import check_codec, check_method, check_router

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


def without_code(text: str) -> str:
    """A page without what stands in it as code."""
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site name them, and those that are written out."""
    found: list[str] = []
    for heading in re.findall(
        r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.M
    ):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return {*found, *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)}


def broken_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for target in re.findall(r"\]\(([^()\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (
            anchor and file.suffix == ".md" and anchor not in anchors_of(file.read_text(encoding="utf-8"))
        ):
            wrong.append(target)
    return wrong


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_of_the_pages_are_there(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Here, `now`\n\n```\n# not this\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[a](b.md#here-now) [b](b.md#not-this) [c](none.md) `[d](x.md)` [e](#top) [f](https://a.b)\n\n# Top\n"
    )
    assert broken_links(page) == ["b.md#not-this", "none.md"]


def test_every_room_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "twinmerge").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"| `{path.name}/` |" in text, path.name


def script_of(name: str) -> Any:
    """A script of docs/."""
    spec = spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_on_methods_is_what_their_classes_say() -> None:
    page = script_of("methods_page").page()
    assert page == (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "Run python docs/methods_page.py."
    assert all(f"| `{name}` |" in page for name in METHODS.files())


def test_the_page_on_mergekit_is_what_the_tables_of_the_code_say() -> None:
    script = script_of("mergekit_page")
    written = (ROOT / "docs" / "mergekit.md").read_text(encoding="utf-8")
    assert script.page(script.by_hand()) == written, "Run python docs/mergekit_page.py."


def listed(text: str) -> dict[str, str]:
    """Command -> its call, by the table of a page; "`twin compress`, `refine`" are two of one group."""
    table = text.partition("| command | call | gives |")[2].partition("\n\n")[0]
    found = {}
    for row in re.findall(r"^\| (`.+?) \| (.+?) \| .*\|$", table, re.MULTILINE):
        names = [name.partition(" --")[0] for name in re.findall(r"`([^`]+)`", row[0])]
        group = names[0].rpartition(" ")[0]
        found |= {f"{group} {name}".strip() if " " not in name else name: row[1] for name in names}
    return found


def test_the_page_lists_every_command_and_no_other() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert listed(text).keys() == COMMANDS.keys()
    assert listed("| command | call | gives |\n| `masks build`, `extract --x` | `a` | |\n\n").keys() == {
        "masks build",
        "masks extract",
    }


def test_calls_that_the_page_names_are_there() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for call in re.findall(r"`(tm\.[\w.]+)\(", text):
        found: object = tm
        for name in call.split(".")[1:]:
            found = getattr(found, name)
        assert callable(found), call


def examples() -> dict[str, str]:
    """File that a Python block of CONTRIBUTING.md names -> the block."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n# (src/\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {Path(file).stem: block for file, block in blocks}


def test_the_examples_of_contributing_do_what_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples()
    assert found.keys() == {"halfway", "centroid", "thirds", "norms"}
    own = ModuleType("examples_of_contributing")
    monkeypatch.setitem(sys.modules, own.__name__, own)
    for name in ("halfway", "centroid", "thirds"):
        exec(found[name], vars(own))
    for scale in (0.5, 1.0, 0.0):
        check_method(own.Halfway, scale=scale)
    check_router(own.CentroidRouter, power=2.0)
    check_codec(own.Thirds)
    before = dict(COMMANDS)
    try:
        exec(found["norms"], {"__name__": "twinmerge.cli.norms"})
        assert COMMANDS.pop("norms").__doc__
    finally:
        COMMANDS.clear()
        COMMANDS.update(before)
