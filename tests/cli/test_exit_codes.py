"""Exit codes through the real command, one mistake of each class at least; README.md has the table."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import twinmerge as tm
import twinmerge.cli
from twinmerge.cli.failure import message_and_code
from twinmerge.store import disk

RECIPE = "twinmerge: 1\nmerge_method: average\nmodels:\n  - model: MOOD\n  - model: KIND\n"


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What reached the command's end."""
    found: list[BaseException] = []

    def spy(error: BaseException) -> tuple[str, int]:
        found.append(error)
        return message_and_code(error)

    monkeypatch.setattr(twinmerge.cli, "message_and_code", spy)
    return found


@pytest.fixture
def fails(command: Any, raised: list[BaseException]) -> Callable[..., str]:
    """fails(kind, code, *words) -> the sentence of the one error, which is of exactly this kind."""

    def run(kind: type[BaseException], code: int, *words: object) -> str:
        ran = command(*words)
        assert [type(error) for error in raised] == [kind], (raised, ran)
        assert (ran.code, ran.out) == (code, "") and ran.err == f"Error: {raised[0]}\n", ran
        return ran.err

    return run


def average(zoo: Any, *more: object) -> list[object]:
    return ["merge", "--method", "average", *zoo.given, *more]


# ---------------------------------------------------------------------------------------------- 2: the call


def test_an_option_that_is_not_there(command: Any, raised: list[BaseException], zoo: Any, tmp_path: Path) -> None:
    ran = command(*average(zoo, "-o", tmp_path / "out", "--dtpye", "float32"))
    assert [type(each).__name__ for each in raised] == ["NoSuchOption"]  # typer's own
    assert ran.code == 2 and "has no option --dtpye. Did you mean '--dtype'?" in ran.err


def test_options_that_do_not_go_together(fails: Any, zoo: Any, tmp_path: Path) -> None:
    assert "Two outputs" in fails(tm.UsageError, 2, "merge", tmp_path / "r.yaml", tmp_path / "a", "-o", tmp_path / "b")


def test_an_unknown_method(fails: Any, zoo: Any, tmp_path: Path) -> None:
    words = ["merge", "--method", "averge", *zoo.given, "-o", tmp_path / "out"]
    assert "Did you mean 'average'?" in fails(tm.RecipeError, 2, *words)


def test_an_unknown_router(fails: Any, zoo: Any) -> None:
    assert "Did you mean 'gaussian'?" in fails(tm.RecipeError, 2, "twin", "routers", "gausian")


def test_an_unknown_parameter(fails: Any, zoo: Any, tmp_path: Path) -> None:
    assert "no parameter 'scale'" in fails(tm.RecipeError, 2, *average(zoo, "-p", "scale=1", "-o", tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("models:", "modles:"), "unknown key 'modles'. Did you mean 'models'?"),
        (("average", "averge"), "Unknown method 'averge'"),
        (("models:", "]"), "cannot be read"),
        (("twinmerge: 1", "twinmerge: 2"), "Update twinmerge"),
    ],
)
def test_a_recipe(fails: Any, tmp_path: Path, change: tuple[str, str], says: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(*change))
    assert says in fails(tm.RecipeError, 2, "merge", tmp_path / "r.yaml", tmp_path / "out")


@pytest.mark.parametrize("words", [["merge", "no.yaml", "out"], ["merge", "--plan", "no.json", "-o", "out"]])
def test_a_recipe_or_plan_that_is_not_there(fails: Any, words: list[str]) -> None:
    assert "cannot be read: No such file" in fails(tm.RecipeError, 2, *words)


def test_an_expert_that_a_twin_does_not_have(fails: Any, zoo: Any) -> None:
    assert "Did you mean 'mood'?" in fails(tm.UsageError, 2, "twin", "predict", zoo.twin, "w3", "--expert", "mod")


@pytest.mark.parametrize(
    "words", [["merge", "--method", "average", "EXPERTS"], ["twin", "export", "TWIN", "--expert", "mood"]]
)
def test_an_output_that_is_there_already(fails: Any, zoo: Any, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    full: list[object] = []
    for word in words:
        full += zoo.given if word == "EXPERTS" else [zoo.twin if word == "TWIN" else word]
    assert "is there already" in fails(tm.UsageError, 2, *full, "-o", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# ---------------------------------------------------------------------------------------------- 3: what is read


def test_a_model_that_is_not_there(fails: Any, zoo: Any, tmp_path: Path) -> None:
    words = average(zoo, "--expert", f"gone={tmp_path / 'gone'}", "-o", tmp_path / "out")
    assert "No model at" in fails(tm.ModelError, 3, *words)


def test_models_that_do_not_fit(fails: Any, zoo: Any, tmp_path: Path) -> None:
    words = average(zoo, "--base", zoo.lm, "-o", tmp_path / "out")
    assert "the base" in fails(tm.ModelError, 3, *words)


def test_a_truncated_file(fails: Any, zoo: Any, copied: Any, tmp_path: Path) -> None:
    file = copied(zoo.mood) / "model.safetensors"
    os.truncate(file, file.stat().st_size - 7)
    words = ["merge", "--method", "average", "--expert", f"a={file.parent}", "--expert", f"b={zoo.kind}"]
    assert "is truncated" in fails(tm.DamagedFile, 3, *words, "-o", tmp_path / "out")


def test_an_output_that_was_damaged(fails: Any, zoo: Any, copied: Any) -> None:
    twin = copied(zoo.twin)
    flip(twin / "twin.safetensors", -3)
    assert "is not what twinmerge wrote" in fails(tm.DamagedFile, 3, "twin", "predict", twin, "w3", "--expert", "mood")


def test_a_part_that_is_missing(fails: Any, zoo: Any, copied: Any) -> None:
    twin = copied(zoo.twin)
    (twin / "router.safetensors").unlink()
    assert "is missing" in fails(tm.DamagedFile, 3, "twin", "predict", twin, "w3")


def test_statistics_of_another_model(command: Any, fails: Any, zoo: Any, tmp_path: Path) -> None:
    file = tmp_path / "mood.safetensors"
    assert command("measure", "gram", zoo.mood, "--data", zoo.data["mood"], "-o", file).code == 0
    given = ["--expert", f"a={zoo.mood}", "--expert", f"b={zoo.kind}", "--base", zoo.base]
    both = ["--statistics", f"a={file}", "--statistics", f"b={file}"]
    words = ["merge", "--method", "regmean", *given, *both, "-o", tmp_path / "out"]
    assert "was measured on another model" in fails(tm.DataError, 3, *words)


def test_rows_and_suites(fails: Any, raised: list[BaseException], zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"txt": "w3"}\n')
    fails(tm.DataError, 3, "measure", "gram", zoo.mood, "--data", tmp_path / "rows.jsonl", "-o", tmp_path / "out")
    raised.clear()
    fails(tm.DataError, 3, "evaluate", zoo.merged, "--suite", tmp_path)


# ---------------------------------------------------------------------------------------------- 4: the machine


@pytest.mark.parametrize(
    ("broken", "number", "says"),
    [
        (os.pwritev, errno.ENOSPC, "No space left while writing"),
        (os.fsync, errno.EDQUOT, "No space left while writing"),
        (os.mkdir, errno.EROFS, "cannot be made: [Errno 30] Read-only file system"),
        (os.mkdir, errno.EACCES, "cannot be made: [Errno 13] Permission denied"),
        (os.replace, errno.EACCES, "cannot be named"),
    ],
)
@pytest.mark.parametrize("what", ["merge", "twin"])
def test_a_disk_that_refuses(
    fails: Any,
    zoo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    broken: Any,
    number: int,
    says: str,
) -> None:
    own = disk.call

    def call(function: Any, *args: Any, **more: Any) -> Any:
        if function is broken:
            raise OSError(number, os.strerror(number))
        return own(function, *args, **more)

    monkeypatch.setattr(disk, "call", call)
    words = average(zoo) if what == "merge" else ["twin", "export", zoo.twin, "--expert", "mood"]
    assert says in fails(tm.OutputError, 4, *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_another_process_writes(fails: Any, zoo: Any, tmp_path: Path) -> None:
    from twinmerge.store.output import OutputFolder

    with OutputFolder(tmp_path / "out"):
        assert "another process" in fails(tm.OutputError, 4, *average(zoo, "-o", tmp_path / "out"))


def test_a_disk_that_fails_while_it_is_read(
    fails: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    assert "Check the disk" in fails(tm.ResourceError, 4, *average(zoo, "-o", tmp_path / "out"))


def test_a_package_that_is_not_installed(fails: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinmerge.study.heatmap.find_spec", lambda _: None)
    assert "pip install" in fails(tm.ResourceError, 4, "diff", zoo.base, zoo.mood, "--picture", tmp_path / "x.png")


# ---------------------------------------------------------------------------------------------- 1: a finding


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_verify(command: Any, raised: list[BaseException], zoo: Any, copied: Any, tmp_path: Path) -> None:
    out = copied(zoo.twin)
    assert command("verify", out).code == 0
    flip(out / "twin.safetensors", -3)
    ran = command("verify", out)
    assert ran.code == 1 and ran.out == "" and "changed since the merge" in ran.err and ran.err.count("\n") == 1
    told_json = command("verify", out, "--json").json(1)
    assert told_json["ok"] is False
    flip(out / "twinmerge.checksums.json", 40)
    ran = command("verify", out)  # the checksums themselves
    assert ran.code == 1 and "twinmerge.checksums.json cannot be used" in ran.err
    flip(out / "twin.safetensors", 30)
    ran = command("verify", out / "twin.safetensors")
    assert ran.code == 1 and ran.err.startswith("Error: ") and not raised
    shutil.rmtree(out)
    ran = command("verify", out)  # nothing to look at is no finding
    assert ran.code == 3 and [type(error) for error in raised] == [tm.DataError]


def test_diff(command: Any, zoo: Any, copied: Any) -> None:
    same, other = copied(zoo.alice), copied(zoo.bob)
    for more in ([], ["--json"], ["--base", zoo.lm]):
        assert command("diff", zoo.alice, same, *more).code == 0
        ran = command("diff", zoo.alice, other, *more)
        assert ran.code == 1 and ran.out and "Error" not in ran.err
    assert command("diff", zoo.base, zoo.mood, "--no-rank").code == 1  # a head in one of them, and other values


# ---------------------------------------------------------------------------------------------- of others


def test_an_error_of_another_package_that_is_of_no_class_below_is_of_usage() -> None:
    class TheirsError(tm.TwinmergeError):
        pass

    assert message_and_code(TheirsError("x"))[1] == message_and_code(tm.TwinmergeError("x"))[1] == 2
    assert [message_and_code(kind("x"))[1] for kind in (tm.ModelError, tm.DamagedFile, tm.OutputError)] == [3, 3, 4]
