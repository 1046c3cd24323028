"""Old names of modules import the module of today, and say so once."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from twinmerge.moved import MOVED


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


def test_what_is_imported_by_both_names_is_one_thing() -> None:
    code = (
        "from twinmerge.statistics.measure import measure; from twinmerge.measure.measure import measure as old; "
        "import twinmerge.measure.gram, twinmerge.statistics.gram; "
        "print(measure is old, twinmerge.measure.gram is twinmerge.statistics.gram)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr


def test_a_file_that_became_a_folder_gives_its_old_names() -> None:
    code = "import warnings; warnings.simplefilter('error')\n\nfrom twinmerge.twin.masks import compress"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "twin.masks.compress is twinmerge.twin.masks.build.compress now" in done.stderr
    code = "from twinmerge.twin.masks import compress; import twinmerge; print(compress is twinmerge.compress)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
