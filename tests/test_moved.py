"""Old names of modules import the module of today, and say so once."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import twinmerge
from twinmerge.moved import MOVED, NAMES, old_name


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_of_today(old: str) -> None:
    sys.modules.pop(f"twinmerge.{old}", None)
    new = import_module(f"twinmerge.{MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=f"twinmerge.{old} is twinmerge.{MOVED[old]} now") as told:
        assert import_module(f"twinmerge.{old}") is new
    own = [
        each for each in told if str(each.message).startswith(f"twinmerge.{old} ")
    ]  # a package above may say so of itself
    assert len(own) == 1 and new.__spec__ is not None and new.__spec__.name == f"twinmerge.{MOVED[old]}"
    sys.modules.pop(f"twinmerge.{old}", None)


def test_the_warning_names_the_line_that_imports() -> None:
    code = "import warnings; warnings.simplefilter('error')\n\nfrom twinmerge.methods.base import Method"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "twinmerge.methods.kit.base" in done.stderr and 'File "<string>", line 3' in done.stderr


def test_what_never_was_there_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="twinmerge.methods.bases"):
        import_module("twinmerge.methods.bases")


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("engine.plain_data", "recipes.plain_data", "from_yaml"),
        pytest.param("twin.moments", "statistics.moments", "Moments", marks=pytest.mark.slow),  # with torch: 4 s
    ],
)
def test_what_is_imported_by_both_names_is_one_thing(old: str, new: str, name: str) -> None:
    code = (
        f"from twinmerge.{new} import {name}; from twinmerge.{old} import {name} as old; "
        f"import twinmerge.{old}, twinmerge.{new}; "
        f"print({name} is old, twinmerge.{old} is twinmerge.{new})"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr


def test_a_file_that_became_a_folder_gives_its_old_names() -> None:
    code = "import warnings; warnings.simplefilter('error')\n\nfrom twinmerge.twin.masks import compress"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "twinmerge.twin.masks.compress is twinmerge.build_masks now" in done.stderr
    code = "from twinmerge.twin.masks import compress; import twinmerge.twin.masks.build as now; print(compress is now.write_masks)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_gives_what_took_its_place(old: str) -> None:
    module, _, name = f"twinmerge.{old}".rpartition(".")
    new, home, now = NAMES[old]
    with pytest.warns(
        DeprecationWarning, match=f"{module}.{name} is twinmerge.{new} now. The old name goes with 0.1.0"
    ):
        found = getattr(import_module(module), name)
    assert found is getattr(import_module(f"twinmerge.{home}"), now)
    public = new if "." not in new else None
    assert public is None or (public in twinmerge.__all__ and callable(getattr(twinmerge, public)))


def test_what_never_was_a_name_is_no_attribute() -> None:
    for module in ("twinmerge", "twinmerge.engine.merge", "twinmerge.twin.masks", "twinmerge.twin.masks.extract"):
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nonsense'"):
            import_module(module).nonsense  # noqa: B018
    with pytest.raises(AttributeError):
        old_name("twinmerge", "merge")


def test_the_module_measure_is_gone_since_the_call_has_its_name() -> None:
    assert callable(twinmerge.measure)
    with pytest.raises(ModuleNotFoundError, match="No module named 'twinmerge.measure'"):
        import_module("twinmerge.measure")
    assert callable(twinmerge.measure)
