"""What a shell offers, and the scripts that ask for it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twinmerge.cli.command import COMMANDS, GROUPS
from twinmerge.cli.complete import methods, of_masks, over_time, recipes
from twinmerge.methods.kit.registry import method_class, method_names

SHELLS = ("bash", "zsh", "fish")


def offered(command: Any, monkeypatch: pytest.MonkeyPatch, shell: str, *words: str) -> list[str]:
    """What is offered for the last word."""
    line = " ".join(("twinmerge", *words))
    monkeypatch.setenv("_TWINMERGE_COMPLETE", f"complete_{shell}")
    if shell == "bash":
        monkeypatch.setenv("COMP_WORDS", line.strip())
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    ran = command()
    monkeypatch.delenv("_TWINMERGE_COMPLETE")
    assert ran.err == ""
    if shell == "zsh":
        return [found[1] for each in ran.out.splitlines() if (found := re.match(r'(?:_arg.*?\(\()?"([^"]+)"', each))]
    return [each.split("\t")[0] for each in ran.out.splitlines()]


def group(words: str) -> str:
    return words.split()[0]


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_methods_and_recipes(
    shell: str, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.yaml", "other.json", "note.md"):
        (tmp_path / name).write_text("")
    ask = [command, monkeypatch, shell]
    assert {*offered(*ask, "")} == {group(words) for words in COMMANDS} | {*GROUPS}
    assert {*offered(*ask, "recipe", "")} == {w.split()[1] for w in COMMANDS if group(w) == "recipe"}
    assert offered(*ask, "pus") == ["push"]
    assert {"--method", "--chat-template"} <= {*offered(*ask, "merge", "--")}
    assert offered(*ask, "merge", "--method", "ti") == ["ties"] == offered(*ask, "methods", "ti")
    assert offered(*ask, "merge", "o") == ["one.yaml", "other.json"] == offered(*ask, "recipe", "explain", "o")
    assert offered(*ask, "masks", "build", "--method", "t") == ["tall_masks"]


def test_methods_of_a_command_are_those_that_it_takes() -> None:
    assert methods("") == method_names() and methods("no such") == []
    classes = {name: method_class(name) for name in method_names()}
    assert of_masks("") == [n for n, cls in classes.items() if cls.outputs == "masks"]
    assert {"iso_c", "magmax"} <= {*over_time("")} and "ties" not in over_time("")


def test_recipes_of_another_folder_and_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.yml", ".hidden.yaml", "b.txt"):
        (tmp_path / "in" / name).write_text("")
    assert recipes("in/") == ["in/a.yml"] and recipes("in/.") == ["in/.hidden.yaml"]
    assert recipes("") == recipes("i") == []  # the shell itself goes into folders
    assert recipes(f"{tmp_path}/in/a") == [f"{tmp_path}/in/a.yml"] and recipes("none/x") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_asks_the_command(
    shell: str, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    monkeypatch.setattr("typer._completion_shared._get_shell_name", lambda: shell, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = command("--show-completion")
    assert shown.code == 0 and "_TWINMERGE_COMPLETE" in shown.out and f"complete_{shell}" in shown.out
    installed = command("--install-completion")
    assert installed.code == 0 and f"{shell} completion installed in" in installed.out
    texts = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert any("_TWINMERGE_COMPLETE" in text for text in texts)


def test_bash_itself(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    script = command("--show-completion").out
    program = tmp_path / "twinmerge"
    program.write_text(f"#!{sys.executable}\nfrom twinmerge.cli import main\nmain()\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    ask = 'COMP_WORDS=(twinmerge recipe ""); COMP_CWORD=2; _twinmerge_completion "$1"; echo "${COMPREPLY[@]}"'
    ran = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}", "bash", str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": os.environ["PATH"]},
    )
    assert ran.stdout.split() == [w.split()[1] for w in COMMANDS if group(w) == "recipe"], ran.stderr
