"""The documentation site: what is made of the code says what the code says, and what is broken is found."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

import twinmerge as tm
import twinmerge.cli
from twinmerge.methods.kit.registry import METHODS, make_method, method_class

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts of docs/ by their names; they import each other as files of one folder."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(DOCS))


@pytest.mark.parametrize("name", ["formula", "parameter_rows", "griffe_docstrings"])
def test_examples_in_the_scripts_run(scripts: Any, name: str) -> None:
    if name == "griffe_docstrings":
        pytest.importorskip("griffe", reason="griffe is not installed: make docs installs it")
    ran = doctest.testmod(scripts(name))
    assert ran.attempted and not ran.failed


# -------------------------------------------------------------------------------------------- formulas

DRAWN = {
    "θ = θ0 + λ": "<mi>θ</mi><mo>=</mo><msub><mi>θ</mi><mn>0</mn></msub><mo>+</mo><mi>λ</mi>",
    "Σt wt τ′t": '<munder><mo movablelimits="true">∑</mo><mi>t</mi></munder><msub><mi>w</mi><mi>t</mi></msub>'
    "<msub><mi>τ′</mi><mi>t</mi></msub>",
    "V1ᵀ": "<msubsup><mi>V</mi><mn>1</mn><mrow><mi>T</mi></mrow></msubsup>",
    "(Σ ct)⁻¹": '<mo stretchy="false" lspace="0" rspace="0">(</mo><mo movablelimits="true">∑</mo>'
    '<msub><mi>c</mi><mi>t</mi></msub><msup><mo stretchy="false" lspace="0" rspace="0">)</mo>'
    "<mrow><mo>−</mo><mn>1</mn></mrow></msup>",
}


@pytest.mark.parametrize("text", DRAWN)
def test_a_formula_drawn_by_hand(scripts: Any, text: str) -> None:
    assert scripts("formula").mathematics(text) == f"<math>{DRAWN[text]}</math>"


def test_words_stay_text_and_parameters_are_names(scripts: Any) -> None:
    formula = scripts("formula")
    said = formula.mathematics("Where a model, at s = 1, is as it was; V of A.", ())
    words = re.sub(r"<math.*?</math>", "#", said)
    assert words == "Where a model, at #, is as it was; # of A."
    assert "<math" not in formula.mathematics("No base is needed: the models add up to 1 (and so on).")
    named = '<mo>/</mo><mi mathvariant="normal">density</mi></math>'
    assert named in formula.mathematics("m ⊙ τ / density", ("density",))
    assert named not in formula.mathematics("m ⊙ τ / density")


def docstrings() -> Iterator[tuple[str, str]]:
    from twinmerge.twin.routers.kit.registry import ROUTERS

    for plugins in (METHODS, ROUTERS):
        for name in plugins.files():
            yield name, (inspect.getdoc(plugins.find(name)) or "").split("\nExample:")[0]


def test_a_drawn_formula_says_all_that_the_docstring_says(scripts: Any) -> None:
    formula = scripts("formula")
    seen = 0
    for name, text in docstrings():
        head, *rest = text.split("\n\n")
        for line in [head, *[line for part in rest for line in part.split("\n") if line.startswith("    ")]]:
            drawn = formula.mathematics(line)
            assert formula.plain(drawn, html=True) == formula.plain(line), (name, line)
            assert drawn.count("<math") == drawn.count("</math>")
            seen += "<math" in drawn
    assert seen > 40
    assert formula.plain("θ0 + τt") != formula.plain("θ0 + τ") and formula.plain("a b") == formula.plain("ab")


# --------------------------------------------------------------------------------------- method pages


@pytest.fixture(scope="module")
def method_pages(scripts: Any) -> dict[str, str]:
    return scripts("class_pages").method_pages()


def test_every_method_has_a_page_that_says_what_its_class_says(method_pages: dict[str, str]) -> None:
    assert method_pages.keys() == {f"methods/{name}.md" for name in METHODS.files()}
    for name in METHODS.files():
        page, cls = method_pages[f"methods/{name}.md"], method_class(name)
        rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
        assert rows == list(cls.model_fields), name
        assert set(re.findall(r"^- \*\*(\w+)\*\*:", page, re.MULTILINE)) == cls.laws, name
        assert all(f"`{theirs}`" in page for theirs in cls.mergekit)
        assert not re.search(r"^ *(\d+\. |- )?<math", page, re.MULTILINE), "Markdown would take it for a block"
        assert cls.strong in page.replace("\\", "") and '<p class="formula">' in page
        assert all(f"https://arxiv.org/abs/{found}" in page for found in re.findall(r"\d{4}\.\d{5}", cls.paper)), name


def bounds(info: Any) -> tuple[float | None, float | None, float | None, float | None]:
    """ge, gt, le, lt of a field, as its class declares them."""
    found = {
        key: getattr(each, key) for each in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(each, key)
    }
    return found.get("ge"), found.get("gt"), found.get("le"), found.get("lt")


SAID = {
    (0, None, 1, None): "0 to 1",
    (0, None, None, None): "0 or more",
    (1, None, None, None): "1 or more",
    (None, 0, None, None): "above 0",
    (None, 0, 1, None): "above 0, to 1",
    (0, None, None, 0.5): "from 0, below 0.5",
}


def test_ranges_that_were_found_by_trying_are_those_that_classes_declare(scripts: Any) -> None:
    rows = scripts("parameter_rows")
    seen = set()
    for name in METHODS.files():
        cls = method_class(name)
        for row in rows.of_method(name, cls):
            info = cls.model_fields[row.name]
            if "density" not in row.name and (declared := bounds(info)) != (None, None, None, None):
                assert row.allowed == SAID[declared], (name, row)
                seen.add(declared)
            if name in ("della", "della_linear") and row.name in (
                "density",
                "epsilon",
            ):  # density ± epsilon is a chance
                assert row.allowed == f"0 to {0.93 if row.name == 'density' else 0.3}, with the other defaults"
            elif row.name == "density" and name != "pcb":
                assert row.allowed == "0 to 1", name
            if row.name in ("scale", "weights"):
                assert row.allowed == "any number", name
    assert seen == SAID.keys()
    told = {row.name: row for row in rows.of_method("ties", method_class("ties"))}
    assert told["scope"].allowed == "`model`, `tensor`" and told["scope"].default == "`model`"
    assert told["density"].kind == "number, or one for each expert" and told["density"].default == "`0.2`"


def typed(page: str) -> list[list[str]]:
    """The words of the commands that a page shows."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [
        shlex.split(line.removeprefix("$ "))[1:] for block in blocks for line in block.replace("\\\n", "").splitlines()
    ]


def parsed(found: Any, words: list[str]) -> None:
    """Let typer read a command without running it."""
    while hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    found.make_context("twinmerge", list(words))


def test_commands_and_calls_of_the_method_pages_can_be_given(method_pages: dict[str, str]) -> None:
    known = typer.main.get_command(twinmerge.cli.app)
    for path, page in method_pages.items():
        commands = typed(page)
        assert commands, path
        for words in commands:
            parsed(known, words)
        (call,) = re.findall(r"^(?:merge = )?(tm\.(?:merge|build_masks)\(.*\))", page, re.MULTILINE)
        if call.startswith("tm.merge"):
            given = dict(re.findall(r"^(statistics) = (.+)$", page, re.MULTILINE))
            names = {"tm": tm, **{name: ast.literal_eval(value) for name, value in given.items()}}
            assert eval(call, names).recipe.method == Path(path).stem  # without an out nothing is done
        else:
            parsed_call: Any = ast.parse(call, mode="eval").body
            method, base, experts, out = map(ast.literal_eval, parsed_call.args)
            parameters = {each.arg: ast.literal_eval(each.value) for each in parsed_call.keywords}
            assert (method, base, out) == (Path(path).stem, "BASE", "MASKS")
            assert make_method(method, tuple(experts), parameters).outputs == "masks"


def test_scores_on_the_pages_stand_in_the_measurements(method_pages: dict[str, str]) -> None:
    quality = (DOCS / "quality.md").read_text(encoding="utf-8")
    seen = 0
    for page in method_pages.values():
        for row in re.findall(r"^\| (.+ \[[\d., ]+\].*) \| \[.*\) \|$", page, re.MULTILINE):
            assert f"| {row} |" in quality
            seen += 1
    assert seen > 15


def test_all_routers_and_codecs_are_on_their_pages(scripts: Any) -> None:
    from twinmerge.maths.codec import CODECS
    from twinmerge.twin.routers.kit.listing import list_routers

    pages = scripts("class_pages")
    routers, codecs = pages.router_page(), pages.codec_page()
    for name, about in list_routers().items():
        assert f"\n## {name}\n" in routers
        assert all(f"| `{option}` |" in routers for option in about["options"])
    assert all(f"| `{name}` |" in codecs for name in CODECS.files())


# ------------------------------------------------------------------------------ commands and reference


def test_every_option_of_every_command_is_in_the_reference_and_in_the_man_page(scripts: Any) -> None:
    pages = scripts("command_pages")
    written, found = pages.command_pages(), pages.commands()
    manual = pages.man_page("1.0", "2026-01-01").replace("\\-", "-")
    assert {command.words for command in found} == set(twinmerge.cli.COMMANDS)
    for command in found:
        page = written[f"commands/{command.words.split()[0]}.md"]
        assert f"# twinmerge {command.words}\n" in page
        for option in command.known.params:
            names = [name for name in option.opts if option.param_type_name == "option" and name != "--help"]
            assert all(re.search(rf"\| `[^`]*{name}\b", page) and re.search(rf"{name}\b", manual) for name in names)
        assert command.words in pages.calls(), f"docs/python.md has no call for {command.words}"
        for example in command.examples:
            assert f"$ {example}" in page
    index = written["commands/index.md"]
    assert all(f"| [`{command.words}`](" in index for command in found)
    assert set(pages.exit_codes()) == {"0", "1", "2", "3", "4", "130"}


@pytest.mark.slow
def test_the_man_page_is_read_without_a_warning(scripts: Any, tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    file = tmp_path / "twinmerge.1"
    file.write_text(scripts("command_pages").man_page("1.0", "2026-01-01"), encoding="utf-8")
    ran = subprocess.run(
        ["groff", "-man", "-Tutf8", "-P-cbou", "-k", "-ww", "-b", file], capture_output=True, text=True, check=True
    )
    assert ran.stderr == "" and "COMMANDS" in ran.stdout


def test_every_public_name_is_in_the_python_reference(scripts: Any) -> None:
    written = scripts("reference_pages").reference_pages()
    named = re.findall(r"^::: twinmerge\.(\w+)$", "\n".join(written.values()), re.MULTILINE)
    assert sorted(named) == sorted(name for name in tm.__all__ if not name.startswith("__"))
    for name, page in re.findall(r"\[`tm\.(\w+)`\]\((\w+)\.md#", written["reference/index.md"]):
        assert f"::: twinmerge.{name}\n" in written[f"reference/{page}.md"]


# ------------------------------------------------------------------------------------------- the site


def test_what_is_broken_in_a_site_is_found(scripts: Any, tmp_path: Path) -> None:
    faults = scripts("check_site").faults
    (tmp_path / "sub").mkdir()
    good = '<a href="sub/b.html#here">b</a><a href="https://example.org/x">out</a><img src="p.png"><a id="top" href="#top">'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "sub" / "b.html").write_text('<h1 id="here"><a href="../a.html">a</a>')
    (tmp_path / "p.png").write_bytes(b"")
    assert faults(tmp_path) == []
    (tmp_path / "c.html").write_text(
        '<a href="none.html">x</a><a href="sub/b.html#gone">x</a><script src="https://cdn.example.org/k.js"></script>'
        '<link rel="stylesheet" href="//fonts.example.org/f.css"><img src="q.png"><a href="../outside">x</a>'
    )
    (tmp_path / "s.css").write_text("a { background: url(https://example.org/f.woff2) }")
    assert sorted(fault.partition(" ")[2] for fault in faults(tmp_path)) == [
        "../outside leads nowhere",
        "fetches //fonts.example.org/f.css",
        "fetches https://cdn.example.org/k.js",
        "fetches https://example.org/f.woff2",
        "none.html leads nowhere",
        "q.png leads nowhere",
        "sub/b.html#gone has no such anchor",
    ]
    assert faults(tmp_path / "sub" / "nothing") == [f"{tmp_path / 'sub' / 'nothing'} has no page"]


def test_links_are_moved_with_their_pages(scripts: Any) -> None:
    site = scripts("make_site")
    there = site.sources()
    text = (
        "[q](docs/quality.md#quality) [l](LICENSE) ![p](docs/pictures/ladder.png) `[c](docs/x.md)` [w](https://a.b/c)"
    )
    moved = site.relinked(text, ROOT / "README.md", "index.md", there)
    assert moved == "[q](quality.md#quality) l ![p](pictures/ladder.png) `[c](docs/x.md)` [w](https://a.b/c)"
    assert site.relinked("[r](../README.md)", DOCS / "quality.md", "quality.md", there) == "[r](index.md)"


def test_a_page_in_no_navigation_and_one_that_is_not_there_stop_the_build(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = scripts("make_site")
    monkeypatch.setattr(site, "WORK", tmp_path)
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    for name in ("a.md", "sub/b.md", "c.md"):
        (tmp_path / "docs" / name).write_text("# Page")
    nav = '[project]\nnav = [{ "A" = "a.md" }, { "S" = ["sub/b.md", { "C" = "c.md" }] }]'
    site.check_navigation(nav)
    with pytest.raises(SystemExit, match=r"^c\.md is in no navigation"):
        site.check_navigation(nav.replace('{ "C" = "c.md" }', ""))
    with pytest.raises(SystemExit, match=r"^d\.md is in nav of docs/zensical\.toml, and there is no such page$"):
        site.check_navigation(nav.replace("nav = [", 'nav = ["d.md", '))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="Zensical is not installed: make docs installs it")
def test_the_site_builds(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = scripts("make_site")
    monkeypatch.setattr(site, "WORK", tmp_path / "work")
    monkeypatch.setattr(site, "SITE", tmp_path / "site")
    site.main(run=False)
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "methods/ties.html" in home
    assert "<math" in (tmp_path / "site" / "methods" / "ties.html").read_text(encoding="utf-8")
    calls = (tmp_path / "site" / "reference" / "calls.html").read_text(encoding="utf-8")
    assert 'id="twinmerge.merge"' in calls
