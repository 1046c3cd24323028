"""Errors that reach the command: a sentence and an exit code for each kind, a report for what nobody expected."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import twinmerge.cli
from twinmerge.cli.failure import message_and_code, report
from twinmerge.errors import TwinmergeError


def raising(error: BaseException) -> Any:
    def run(**_: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (TwinmergeError("Bad.\n Mend it."), 2, "Error: Bad. Mend it."),
        (KeyboardInterrupt(), 130, "Interrupted. Run the same command again"),
        (MemoryError(), 4, "Error: Out of memory (nothing is left). Close other programs"),
        (MemoryError("a worker process was ended"), 4, "Error: Out of memory (a worker process was ended)."),
        (
            RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"),
            4,
            "Error: Out of memory ([x] Default",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 4, "Error: Out of memory (CUDA out of memory.)"),
        (OSError(errno.EFBIG, "File too large", "x/y"), 4, "The system says of x/y: File too large."),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "a" * 1000),
            4,
            "…: File name too long. Give a shorter name.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 4, "Ask for the right to, or name another place."),
        (OSError(errno.EROFS, "Read-only file system", "x"), 4, "Name a place on another disk."),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "The system says: No space left on device. Free some"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x", None, "y"), 4, "of x and y: No such file"),
        (OSError(errno.EIO, "Input/output error", "\udcff"), 4, "of \\udcff: Input/output error"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 4, "stopped reading before its end"),
    ],
)
def test_known_kinds(command: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str) -> None:
    monkeypatch.setattr(twinmerge.cli, "app", raising(error))
    ran = command("merge")
    assert ran.code == code and ran.out == "" and says in ran.err and ran.err.count("\n") == 1, ran.err


def test_what_nobody_expected(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line and a file; the file says what a report needs, and nothing long that an error quotes from a file."""

    def run(**_: Any) -> None:
        secret = "from a file " * 1000
        try:
            raise KeyError(secret)
        except KeyError as error:
            raise ZeroDivisionError("nobody expected this") from error

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(twinmerge.cli, "app", run)
    ran = command("merge", "my recipe.yaml", "out")
    assert ran.code == 4 and ran.out == "" and ran.err.count("\n") == 1 and "Traceback" not in ran.err
    (file,) = tmp_path.iterdir()
    assert ran.err.startswith(
        "Error: Internal error (ZeroDivisionError: nobody expected this). Please report it, and attach"
    )
    assert str(file) in ran.err
    text = file.read_text()
    assert "twinmerge merge 'my recipe.yaml' out" in text and "ZeroDivisionError: nobody expected this" in text
    assert f"torch {torch.__version__}" in text and "test_failure.py" in text and text.count("from a file") < 60


def test_a_report_that_cannot_be_written(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(FileNotFoundError("no temp folder")))
    monkeypatch.setattr(twinmerge.cli, "app", raising(ZeroDivisionError("x")))
    ran = command("merge")
    assert ran.code == 4 and re.search(r"Internal error \(ZeroDivisionError: x, in test_failure.py line \d+\)", ran.err)


def test_a_report_names_what_a_worker_did() -> None:
    error = ValueError("x")
    error.add_note("in the worker: line 3")
    assert "in the worker: line 3" in report(error) and message_and_code(error)[1] == 4


def test_arguments_that_are_no_text(command: Any) -> None:
    ran = command("merge", "\udcff.yaml", "out")
    assert (ran.code, ran.out) == (2, "") and "The argument '\\udcff.yaml' is not UTF-8" in ran.err


def run(words: str, tail: str) -> subprocess.CompletedProcess[str]:
    """The command in a shell of its own, with something done to its streams."""
    line = f"{sys.executable} -m twinmerge {words} {tail}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_nobody_can_take() -> None:
    ran = run("recipe new ties", "> /dev/full")
    assert ran.returncode == 4 and re.fullmatch(
        "Error: The system says.*: No space left on device. Free some.*\n", ran.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", ["methods", "methods --json"])
def test_streams_that_are_closed_or_broken(words: str) -> None:
    for tail in (">&-", "2>&-", "<&- >&- 2>&-", "| true", "| head -c 1", "> /dev/full", "2> /dev/full"):
        ran = run(words, tail)
        assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr, (tail, ran.stderr)


@pytest.mark.slow
def test_an_interrupt_is_a_word(zoo: Any, tmp_path: Path) -> None:
    """A signal at many moments of a run; only what Python does before it reaches the command is not ours."""
    code = "import sys, twinmerge.cli\nprint('here', flush=True)\ntwinmerge.cli.main()"
    words = ["merge", "--method", "ties", "--base", str(zoo.base), *map(str, zoo.given), "-o"]
    for i, delay in enumerate((0.05, 0.3, 1.0)):
        command = [sys.executable, "-c", code, *words, str(tmp_path / str(i))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and "Traceback" not in said, said
        if process.returncode == 130:
            assert said.endswith("Interrupted. Run the same command again: it goes on where it can, or begins anew.\n")
