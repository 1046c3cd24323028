"""How much is told: quiet, verbose, progress, and what is left after an interrupt."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import twinmerge as tm
from twinmerge import progress


class Terminal(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_quiet_leaves_results_and_errors(command: Any, zoo: Any, tmp_path: Path) -> None:
    words = ["merge", "--method", "average", *zoo.given]
    assert command(*words, "-o", tmp_path / "loud").err.startswith("Merged 23 tensors")
    assert command(*words, "-o", tmp_path / "quiet", "--quiet") == (0, "", "")
    assert (tmp_path / "quiet" / "model.safetensors").is_file()
    assert "Ready: " in command("check", *words[1:], "-q").out
    assert command(*words, "-o", tmp_path / "quiet", "-q").err.startswith("Error: ")
    assert command(*words, "-o", tmp_path / "again").err.startswith("Merged 23 tensors")  # the next command tells again


def test_verbose_shows_what_the_library_logs(command: Any, zoo: Any, tmp_path: Path) -> None:
    words = ["merge", "--method", "ties", "--base", zoo.base, *zoo.given, "-o", tmp_path / "out"]
    told = command(*words, "-v").err
    assert f"opened {zoo.base}: 23 tensors" in told
    assert all(f" {what}" in told for what in ("merged ", "synced ")) and " s)" in told
    assert logging.getLogger("twinmerge").handlers == [] and logging.getLogger("twinmerge").level == logging.NOTSET
    assert "ask for less and for more" in command(*words, "-q", "-v").err


def test_the_log_is_pythons_and_silent_by_itself(
    zoo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tm.merge("average", None, zoo.experts, tmp_path / "a")
    assert capfd.readouterr() == ("", "") and not caplog.records
    with caplog.at_level(logging.INFO, "twinmerge"):
        tm.merge("average", None, zoo.experts, tmp_path / "b")
    assert {record.name for record in caplog.records} >= {"twinmerge.models", "twinmerge.engine", "twinmerge.store"}


def test_a_bar_has_its_rate_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0)
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    with progress.meter("reading", True, 4, mininterval=0) as meter:
        meter.update(2)
        meter.refresh()
    text = shown.getvalue()
    assert "reading:  50%" in text and "it/s]" in text and "<" in text
    assert progress.meter("reading", False, 4).disable and not progress.meter("reading", True, 4).disable
    with progress.hidden():
        assert progress.bar("ab").disable and list(progress.bar("ab")) == ["a", "b"]
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert progress.bar("ab").disable  # no terminal


def test_an_interrupt_says_what_is_left_and_how_to_go_on(
    command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = ["merge", "--method", "average", *zoo.given, "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("twinmerge.store.output.OutputFolder._complete", stop)
        ran = command(*words)
    assert ran.code == 130 and (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    assert ran.err == (
        f"Interrupted. {tmp_path}/out.partial holds what is done of {tmp_path}/out. Run the same command again: it "
        "goes on from there; or remove that folder.\n"
    )
    assert command(*words).code == 0 and not (tmp_path / "out.partial").exists()
    assert tm.verify(tmp_path / "out", progress=False).ok
    state = tmp_path / "state"
    assert command("continual", "init", state, "--base", zoo.base).code == 0
    add = tm.Continual.add
    with monkeypatch.context() as patch:
        patch.setattr(
            tm.Continual, "add", lambda self, name, model: stop() if name == "kind" else add(self, name, model)
        )
        ran = command("continual", "add", state, f"mood={zoo.mood}", f"kind={zoo.kind}")
    told = f"The state {state} is whole and has mood. Run the command again for the others."
    assert ran == (130, "", f"Interrupted. {told}\n")
    given = ["twin", "build", "--base", zoo.base, *zoo.given, "--rank", 1, "-o", tmp_path / "twin"]
    with monkeypatch.context() as patch:
        patch.setattr("twinmerge.store.output.OutputFolder._complete", stop)
        ran = command(*given)
    assert ran.code == 130 and not list(tmp_path.glob("twin*"))
    assert ran.err.startswith(f"Interrupted. Nothing of {tmp_path}/twin is left on the disk.")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process in the background of a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_goes_on_says_so_and_a_stop_is_told_at_once(
    command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal in the middle of the work: the word comes before anything that was begun has ended."""
    words = ["merge", "--method", "average", *zoo.given, "-o", tmp_path / "out"]

    write, written = os.write, []

    def stop(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    for quiet in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr("twinmerge.store.output.OutputFolder._complete", stop)
            written.clear()
            patch.setattr(
                "os.write", lambda to, text: written.append(text) or len(text) if to == 2 else write(to, text)
            )
            before = signal.getsignal(signal.SIGINT)
            ran = command(*words, *(["-q"] if quiet else []))
        assert ran.code == 130 and signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
        assert written == ([] if quiet else ["Stopping …\n".encode()]) and "Interrupted." in ran.err
    there = sum(t.numel() * 4 for t in load_file(zoo.base / "model.safetensors").values()) / 1e6
    assert "Goes on" not in command(*words, "-q", "--dry-run").err
    ran = command(*words)
    told = re.search(r"Goes on where it stopped: (\S+) of (\S+) MB were written\.", ran.err.replace("\n", " "))
    assert ran.code == 0 and told is not None and told[1] == told[2] and 0 < float(told[1]) <= 1.1 * there
    assert "Goes on" not in command(*words, "--overwrite").err
