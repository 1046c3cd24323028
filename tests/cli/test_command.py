"""The command itself: help, version, warnings, imports, and the installed script."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import twinmerge.cli
from twinmerge.cli.command import COMMANDS, GROUPS, in_order
from twinmerge.cli.command import command as command_of
from twinmerge.cli.help import OPTIONS
from twinmerge.errors import TwinmergeError
from twinmerge.plugins import files_of

HELPED = ["", *GROUPS, *COMMANDS]


def python(code: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


@pytest.mark.parametrize("words", HELPED)
def test_help(command: Any, words: str) -> None:
    for flag in ("--help", "-h"):
        ran = command(*words.split(), flag)
        assert ran.code == 0 and ran.err == "" and f"Usage: twinmerge {words}".rstrip() in ran.out
    found: Any = typer.main.get_command(twinmerge.cli.app)
    for word in words.split():
        found = found.commands[word]
    first = (found.help or "").split("\n")[0]
    assert first and " ".join(first.split()[:4]) in " ".join(ran.out.split())
    options = [name for p in found.params for name in p.opts if name.startswith("--")]
    assert all(name in ran.out for name in options)
    assert set(getattr(found, "commands", {})) == {
        name.split()[-1] for name in HELPED[1:] if name.rpartition(" ")[0] == words and hasattr(found, "commands")
    }


def test_version_and_usage(command: Any) -> None:
    assert command("--version").out == version("twinmerge") + "\n"
    assert command("-V").out == version("twinmerge") + "\n"
    for words in (["--vresion"], ["mrege"], ["twin", "build"], ["methods", "--threads", "0"]):
        ran = command(*words)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1) and ran.err.startswith("Error: ")
        assert "--help`." in ran.err
    for words in ([], ["twin"]):
        ran = command(*words)
        assert ran.code == 2 and ran.err == "" and "Usage: twinmerge" in ran.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("merge --methd ties", "has no option --methd. Did you mean '--method'?"),
        ("merge --density 0.2", "no option --density, which is a parameter of methods. Write -p density=VALUE."),
        ("merge ties --base b", "ties is a method, and a recipe file is expected first. Write --method ties."),
        ("merge out recipe.yaml", "The recipe comes first, and then the output: recipe.yaml out."),
        ("merge --method ties m k --base b", "Name models by --base MODEL and --expert NAME=MODEL."),
        ("merge . out", ". is a folder, and a recipe file is expected first."),
        ("merge --method ties --threads many", "--threads is 'many', and should be a whole number."),
        ("merge --method ties --threads 0", "--threads is '0', and should be greater than or equal to 1."),
        (
            "merge --method ties --base b --expert models/math",
            "Write --expert NAME=MODEL, such as --expert math=models/math.",
        ),
        ("merge --method ties --base b --expert a=m -p 0.2", "Write -p NAME=VALUE, such as -p density=0.2."),
        (
            "merge --method ties --base b --expert a=m --weight 0.5",
            "Write --weight NAME=NUMBER, such as --weight a=0.5.",
        ),
        ("evaluate m", "`twinmerge evaluate` needs --suite FOLDER (a suite: tasks.json and a folder per task)."),
        ("push m", "needs the argument REPO (NAME or ORGANISATION/NAME on the hub"),
        ("diff a b c", "`twinmerge diff A B` takes no more arguments, and 'c' is one. Everything else is an option."),
        ("twin predict text .", "'text' is no folder, and . is one. The twin comes first, and then its texts."),
        ("methods linaer", "Unknown method 'linaer'. Did you mean 'linear'? It is average here."),
        ("search --method ties --base b --expert a=m --suite s --grid scale=0.1:1", "such as scale=0.1:1.0:10"),
        ("measure fishr", "No such command 'fishr'. Did you mean 'fisher'? See `twinmerge measure --help`."),
        ("measure fisher m --data", "Option '--data' requires an argument. See `twinmerge --help`."),
    ],
)
def test_a_wrong_line_gets_the_sentence_that_helps(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command(*words.split())
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1) and says in ran.err, ran
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_the_command_has_its_panel_and_every_command_an_example() -> None:
    seen: set[str] = set()

    def look(found: Any, words: str) -> None:
        for name, below in getattr(found, "commands", {}).items():
            look(below, f"{words} {name}")
        if not hasattr(found, "commands"):
            assert f"twinmerge{words} " in found.help or found.help.endswith(f"twinmerge{words}"), words
            for option in (each for each in found.params if each.param_type_name == "option"):
                seen.add(max(option.opts, key=len))
                assert option.help and option.help[0].isupper() and option.help.endswith((".", "?")), (
                    words,
                    option.opts,
                )
                assert not option.help.startswith(("Of ", "As ")), (words, option.opts)
                assert option.is_flag == (option.metavar == ""), (words, option.opts)

    look(typer.main.get_command(twinmerge.cli.app), "")
    known = {name for names in OPTIONS.values() for name in names}
    assert known == seen and len(known) == sum(map(len, OPTIONS.values()))


def test_threads(command: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert command("diff", zoo.base, zoo.base, "--threads", 3).code == 0
    assert command("diff", zoo.base, zoo.base).code == 0
    assert asked == [3, os.cpu_count()]


def test_errors_and_warnings_are_one_line_each(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(**_: Any) -> None:
        warnings.warn("one\n   two", stacklevel=1)
        warnings.warn("three", FutureWarning, stacklevel=1)
        raise TwinmergeError("Bad file:\n  line 3,\n  a  b.")

    before = warnings.showwarning
    monkeypatch.setattr(twinmerge.cli, "app", talk)
    assert command() == (2, "", "Warning: one two\nWarning: three\nError: Bad file: line 3, a  b.\n")
    assert warnings.showwarning is before


def test_interrupt(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(twinmerge.cli, "app", stop)
    assert command() == (130, "", "Interrupted. Run the same command again: it goes on where it can, or begins anew.\n")


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys, twinmerge\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from twinmerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\nprint('light')"
    )
    ran = python(code, "--help")
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, ["light"]), ran.stderr


def test_the_installed_script(zoo: Any, tmp_path: Path) -> None:
    """One real process: a mistake with the hub offline, and texts that are cut."""
    (script,) = entry_points(group="console_scripts", name="twinmerge")
    assert script.value == "twinmerge.cli:main" and script.load() is twinmerge.cli.main
    code = (
        "import sys\nfrom twinmerge.cli import main\n"
        "try:\n    sys.argv = ['twinmerge', 'twin', 'predict', sys.argv[1], 'w3 ' * 40, '--threads', '1', '--json']\n    main()\n"
        "except SystemExit as left:\n    assert not left.code\n"
        "sys.argv = ['twinmerge', 'merge', '--method', 'average', '--expert', 'a=no-one/nothing', '--expert', 'b=x/y', '-o', 'out']\n"
        "main()"
    )
    command = [sys.executable, "-c", code, str(zoo.twin)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "COLUMNS": "200"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert ran.returncode == 3 and '"label": "' in ran.stdout
    assert ran.stderr.splitlines() == [
        "Warning: 1 of 1 texts were longer than the 16 tokens that the model takes and were cut.",
        "Error: 'no-one/nothing' is no folder here, and as a hub id it is not in the local cache and the hub cannot be "
        "reached. Check the path, or go online (unset HF_HUB_OFFLINE) and run again.",
    ]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_every_function_of_a_command_says_its_words_once() -> None:
    """A file of the folder is enough: nothing names it elsewhere."""
    files = {Path(inspect.getfile(function)).stem for function in COMMANDS.values()}
    assert files <= files_of("twinmerge.cli").keys() and len(files) >= 14
    assert sorted(in_order()) == sorted(COMMANDS) and in_order()[0] == "merge"
    with pytest.raises(AssertionError, match="merge is two commands"):
        command_of("merge")(lambda: None)
    with pytest.raises(AssertionError, match="nowhere x is of no group"):
        command_of("nowhere x")(lambda: None)
    assert "nowhere x" not in COMMANDS
