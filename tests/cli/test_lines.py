"""What people read fits into the terminal, or into 80 columns where there is none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from twinmerge.cli.lines import filled, width_of, wrapped
from twinmerge.methods.kit.registry import method_names
from twinmerge.twin.routers.kit.listing import list_routers


def too_long(text: str, width: int = 80) -> list[str]:
    """Lines beyond the width, but for what cannot be broken: one word, below an indent or a number."""
    return [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1]


def check(command: Any, cases: list[list[Any]]) -> None:
    for words in cases:
        ran = command(*words)
        assert ran.code == (2 if "tiess" in words else 0), ran.err
        assert too_long(ran.out) == [] and too_long(ran.err) == [], words


def test_nothing_is_wider_than_the_terminal(
    command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    given = ["--base", zoo.base, *zoo.given]
    check(
        command,
        [
            ["methods", "ties"],
            ["twin", "routers", "knn"],
            ["twin", "explain", zoo.twin, "w3 w4", "w20 w21"],
            ["merge", "--method", "ties", *given, "-o", tmp_path / "merged"],
            ["check", "--method", "tiess", *given],
        ],
    )
    monkeypatch.setenv("COLUMNS", "50")
    narrow = command("methods", "ties").out
    assert too_long(narrow.split("Parameters")[0], 50) == [] and "\n   ⌊density" in narrow


@pytest.mark.slow
def test_no_command_is_wider_than_the_terminal(
    command: Any, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    given = ["--base", zoo.base, *zoo.given]
    data = [word for task, file in zoo.data.items() for word in ("--data", f"{task}={file}")]
    check(
        command,
        [
            *(["methods", name] for name in method_names()),
            *(["twin", "routers", name] for name in list_routers()),
            ["methods"],
            ["twin", "routers"],
            ["merge", "--method", "average", *zoo.given, "-o", tmp_path / "merged"],
            ["verify", tmp_path / "merged"],
            ["lora", "extract", zoo.alice, "--base", zoo.lm, "--rank", 2, "-o", tmp_path / "lora"],
            ["twin", "build", *given, "--rank", 2, *data, "-o", tmp_path / "twin"],
            ["twin", "export", tmp_path / "twin", "--expert", "mood", "--lora", "-o", tmp_path / "adapter"],
            ["masks", "build", *given, "-o", tmp_path / "masks"],
        ],
    )


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    assert width_of(io.StringIO()) == 80
    monkeypatch.setattr("os.get_terminal_size", lambda _: __import__("os").terminal_size((132, 24)))
    with open("/dev/null", encoding="utf-8") as stream:
        assert width_of(stream) == 132
    monkeypatch.setenv("COLUMNS", "60")
    with open("/dev/null", encoding="utf-8") as stream:
        assert width_of(stream) == 60


def test_words_that_are_longer_stay_whole_and_nothing_is_lost() -> None:
    path = "/a" * 60
    text = f"Merged 3 tensors -> {path}\n  indented   twice\n\nend"
    assert wrapped(text, 40) == f"Merged 3 tensors ->\n{path}\n  indented   twice\n\nend"
    assert wrapped(text, 500) == text and wrapped("", 10) == ""
    filling = filled("A line\nand another.\n\nSource: one\nof two.\n- an item that\n  goes on\n- another", 12)
    assert filling.splitlines() == [
        "A line and", "another.", "", "Source: one", "of two.", "- an item", "  that goes", "  on", "- another"
    ]  # fmt: skip
