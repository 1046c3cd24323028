"""One class that cannot be loaded hides no other: what there is is listed, and why it is left out."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import twinmerge as tm
from twinmerge import methods
from twinmerge.cli import app
from twinmerge.continual.folds import fold_names
from twinmerge.errors import TwinmergeError
from twinmerge.maths import codecs
from twinmerge.methods.kit.registry import METHODS, method_class
from twinmerge.plugins import files_of
from twinmerge.recipes.schema import from_description
from twinmerge.twin import routers

KINDS = {
    "twinmerge.methods": (tm.list_methods, "ties", ["methods"]),
    "twinmerge.routers": (tm.list_routers, "knn", ["twin", "routers"]),
    "twinmerge.codecs": (tm.list_codecs, "int8", None),
}


def stop() -> Any:
    raise ImportError("No module named 'missing'")


@pytest.fixture(params=KINDS)
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A group with three entry points that come to nothing, and one that has the name of ours."""
    loads = {"broken": stop, "dict": lambda: dict, "object": lambda: object(), "knn": stop, "ties": stop, "int8": stop}
    entries = [SimpleNamespace(name=n, value=f"own:{n}", load=load) for n, load in loads.items()]
    own = {KINDS[request.param][1], "broken", "dict", "object"}
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda group: [e for e in entries if e.name in own] if group == request.param else [],
    )
    return str(request.param)


def test_all_others_are_listed_and_what_is_left_out_is_said(group: str) -> None:
    list_all, name, _ = KINDS[group]
    with pytest.warns(UserWarning, match="^Left out: ") as told:
        found = list_all()
    assert name in found and not {"broken", "dict", "object"} & set(found)
    said = sorted(str(one.message) for one in told)
    assert len(said) == 3
    assert any("broken" in one and "ImportError: No module named 'missing'" in one for one in said)
    assert all("does not derive from" in one for one in said if "'broken'" not in one)


def test_one_alone_is_still_refused_by_name(group: str) -> None:
    if group != "twinmerge.codecs":
        with pytest.raises(TwinmergeError, match="'broken' of .* package cannot be loaded"):
            KINDS[group][0]("broken")  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:Left out")
def test_the_command_lists_them_too(group: str) -> None:
    _, name, words = KINDS[group]
    if words is not None:
        for more in ([], ["--json"]):
            found = CliRunner().invoke(app, [*words, *more])
            assert found.exit_code == 0 and name in found.output, found.output


@pytest.mark.filterwarnings("ignore:Left out")
def test_what_takes_experts_over_time_is_found_too(group: str) -> None:
    assert "opcm" in fold_names()


# --------------------------------------------------------------------------------------------- files


MISTAKES = {
    "annotation": (
        "from twinmerge.methods import Method\n\n\nclass Own(Method):\n    power = 2.0\n",
        "line 4: PydanticUserError: A non-annotated attribute was detected: `power = 2.0`.",
    ),
    "syntax": ("def f(:\n    pass\n", "line 1: SyntaxError: invalid syntax."),
    "indent": ("def f():\npass\n", "line 2: IndentationError: expected an indented block"),
    "import": ("import not_there_at_all\n", "line 1: ModuleNotFoundError: No module named 'not_there_at_all'."),
    "exit": ("raise SystemExit(3)\n", "line 1: SystemExit: 3."),
    "name": ("x = y\n", "line 1: NameError: name 'y' is not defined."),
}
FOLDERS = {
    "method": (methods, tm.list_methods),
    "router": (routers, tm.list_routers),
    "codec": (codecs, tm.list_codecs),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_file_with_a_mistake_is_named_and_hides_no_other(
    kind: str, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, listed = FOLDERS[kind]
    text, message = MISTAKES[mistake]
    (tmp_path / "wrong.py").write_text(text)
    before = dict(listed())
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    with pytest.warns(UserWarning, match="^Left out: The") as told:
        assert dict(listed()) == before
    (said,) = [str(each.message) for each in told if "wrong" in str(each.message)]
    assert said.startswith(f"Left out: The {kind} 'wrong' cannot be loaded: {tmp_path / 'wrong.py'}, {message}")
    assert said.endswith(f"Mend {tmp_path / 'wrong.py'}, or take it out of its folder.") and "\n" not in said
    assert f"{package.__name__}.wrong" not in sys.modules


def test_a_list_of_what_can_be_done_leaves_it_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fold_names()
    (tmp_path / "wrong.py").write_text("import not_there_at_all\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    with pytest.warns(UserWarning, match="The method 'wrong' cannot be loaded"):
        assert fold_names() == before
    with pytest.raises(TwinmergeError, match="The method 'wrong' cannot be loaded: .*ModuleNotFoundError"):
        tm.merge("wrong", "base", {"a": "x"})
    assert tm.merge("ties", "base", {"a": "x"}).recipe.method == "ties"


# --------------------------------------------------------------------------------------- entry points


def install(site: Path, package: str, value: str, source: str = "") -> None:
    """A package whose entry point "mine" is a method, in a folder of installed packages."""
    where = site / f"{package}-1.0.dist-info"
    where.mkdir(parents=True)
    (where / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (where / "entry_points.txt").write_text(f"[twinmerge.methods]\nmine = {value}\n")
    (site / f"{value.partition(':')[0]}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def test_a_package_that_cannot_be_loaded_is_named_with_the_line(site: Path) -> None:
    install(site, "some-package", "plugins_of_some:Mine", "\nimport not_there_at_all\n")
    with pytest.raises(TwinmergeError) as told:
        method_class("mine")
    assert str(told.value) == (
        f"The method 'mine' of the package some-package cannot be loaded: {site / 'plugins_of_some.py'}, line 2: "
        "ModuleNotFoundError: No module named 'not_there_at_all'. Mend or uninstall that package."
    )
    with pytest.warns(UserWarning, match="^Left out: The method 'mine' of the package some-package cannot be loaded"):
        assert "mine" not in tm.list_methods() and "ties" in tm.list_methods()


def test_an_entry_point_that_leads_nowhere_is_named(site: Path) -> None:
    install(site, "some-package", "plugins_without:Mine")
    with pytest.raises(TwinmergeError, match="of the package some-package cannot be loaded: AttributeError: .*'Mine'"):
        method_class("mine")


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install(site, "one-package", "plugins_of_one:Mine")
    install(site, "other-package", "plugins_of_other:Mine")
    with pytest.raises(TwinmergeError) as told:
        method_class("mine")
    said = str(told.value)
    assert said.startswith("The name 'mine' is that of two methods: ") and said.endswith("Uninstall one of them.")
    assert "the package one-package (plugins_of_one:Mine)" in said and " and the package other-package (" in said
    with pytest.warns(UserWarning, match="Left out: The name 'mine' is that of two methods"):
        assert "mine" not in tm.list_methods()


def test_one_package_that_is_found_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a folder stands on the path twice, in other words."""
    entry = metadata.EntryPoint("mine", "twinmerge.methods.ties:Ties", "twinmerge.methods")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry, entry])
    assert METHODS.find("mine").__name__ == "Ties"


# ---------------------------------------------------------------------------- a package that is gone


def test_a_recipe_whose_package_is_gone_says_what_to_install(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"twinmerge": 1, "merge_method": "gone", "base_model": "b", "models": [{"model": "x"}]}
    with pytest.raises(TwinmergeError, match="Unknown method 'gone'.*or install the package that offers it"):
        from_description(recipe)


def test_files_of_a_folder_are_those_with_a_name() -> None:
    assert {"ties", "dare"} <= files_of("twinmerge.methods").keys() and "__init__" not in files_of("twinmerge.methods")
