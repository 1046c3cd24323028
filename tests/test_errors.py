"""The tree of errors: small, public, and whole after a pickle."""

from __future__ import annotations

import errno
import pickle

import pytest

import twinmerge as tm
from twinmerge import errors
from twinmerge.errors import TwinmergeError, unreadable
from twinmerge.maths.workers import forked

TREE = {
    "TwinmergeError": ValueError,
    "UsageError": tm.TwinmergeError,
    "RecipeError": tm.UsageError,
    "DataError": tm.TwinmergeError,
    "ModelError": tm.DataError,
    "DamagedFile": tm.DataError,
    "ResourceError": tm.TwinmergeError,
    "OutputError": tm.ResourceError,
}


def test_the_tree_is_all_there_is_and_public():
    own = {n: k for n, k in vars(errors).items() if isinstance(k, type) and k.__module__ == errors.__name__}
    assert {name: kind.__base__ for name, kind in own.items()} == TREE
    assert all(getattr(tm, name) is kind and name in dir(tm) for name, kind in own.items())
    assert all((kind.__doc__ or "").count("\n") == 0 for name, kind in own.items() if name != "TwinmergeError")


@pytest.mark.parametrize("name", TREE)
def test_a_pickle_keeps_class_words_and_notes(name: str):
    error = getattr(tm, name)("The disk is full. Free some space.")
    error.add_note("in range 3")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error) and str(other) == str(error) and other.__notes__ == ["in range 3"]


def test_a_worker_process_sends_them_as_they_are():
    def broken(number: int) -> int:
        raise tm.DamagedFile(f"Part {number} is damaged. Copy it again.")

    with pytest.raises(tm.DamagedFile) as caught:
        list(forked(broken, [1]))
    assert str(caught.value) == "Part 1 is damaged. Copy it again."
    assert "in broken" in caught.value.__notes__[0]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, None])
def test_a_file_that_is_not_there_is_the_data(number: int | None):
    assert unreadable(OSError("it changed") if number is None else OSError(number, "x")) is tm.DataError


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_file_that_the_machine_refuses_is_no_data_error(number: int):
    kind = unreadable(OSError(number, "x"))
    assert kind is tm.ResourceError and issubclass(kind, TwinmergeError)


def test_what_ends_too_early_is_the_data():
    assert unreadable(EOFError("it ends at byte 3")) is unreadable(ValueError("a name with 0")) is tm.DataError
