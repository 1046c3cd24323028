"""Runs the examples of the pages, and writes what they print into the pages.

    python docs/examples.py [PAGE …]        # writes the outputs anew
    python docs/examples.py --check [PAGE …]

A page is run from top to bottom in an empty folder:

- a fenced block with a title (```yaml title="recipe.yaml") is a file, which is written;
- a ```console block holds commands after `$ `, and below each what it prints: `twinmerge …`, `python FILE`, or one of the shell;
- a ```python block is run, all of a page in one namespace; a ```text block right below it is what it prints;
- all other blocks are only read: commands that need the network or models of your own.

A page that begins with `<!-- after: start/serve.md -->` starts in the folder that this page has after its first
```console block. `[…]` in an output stands for whatever is there. `--check` lets numbers differ by a third, since training is not the
same on every processor, and times by anything; whole numbers by 2 in 100.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
AFTER = re.compile(r"^<!-- after: (\S+) -->$", re.MULTILINE)
ANY = "[…]"
HOME = "~"
FRAMES = re.compile(r"[─━│┃┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╞═╡╪╭╮╰╯]+")
TOKEN = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?|\w+|\S")
TIMES = {"s", "ms", "µs", "seconds", "minutes"}


class Block(NamedTuple):
    """One fenced block of a page: its language, title and text, and where its text stands."""

    kind: str
    title: str | None
    text: str
    start: int


class Output(NamedTuple):
    """What an example printed, what the page says that it prints, and where that stands."""

    shown: str
    found: str
    start: int
    end: int


def pages() -> list[str]:
    """The pages that have examples, as paths in docs/."""
    found = []
    for file in sorted(DOCS.rglob("*.md")):
        if any(block.kind == "console" or block.title for block in blocks(file.read_text(encoding="utf-8"))):
            found.append(file.relative_to(DOCS).as_posix())
    return found


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page."""
    return [Block(m[1], m[2], m[3], m.start(3)) for m in FENCE.finditer(text)]


def run(text: str) -> list[Output]:
    """Run the text of a page in a folder of its own."""
    with tempfile.TemporaryDirectory() as place, inside(Path(place)):
        before = AFTER.search(text)
        if before is not None:
            other = blocks((DOCS / before[1]).read_text(encoding="utf-8"))
            first = next(i for i, block in enumerate(other) if block.kind == "console")
            list(_ran(other[: first + 1], place))
        return list(_ran(blocks(text), place))


def _ran(found: list[Block], place: str) -> Iterator[Output]:
    """What the examples of some blocks print, one after the other."""
    space: dict[str, Any] = {"__name__": "__main__"}
    code = 0
    for i, block in enumerate(found):
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.kind == "console":
            for command, shown, at in _commands(block.text):
                printed, code = _printed(command.replace("$?", str(code)))
                yield Output(shown, _clean(printed, place), block.start + at, block.start + at + len(shown))
        elif block.kind == "python":
            printed, _ = _caught(lambda text=block.text: exec(compile(text, "example", "exec"), space))
            then = found[i + 1] if i + 1 < len(found) else None
            if then is not None and then.kind == "text" and not then.title:
                yield Output(then.text, _clean(printed, place), then.start, then.start + len(then.text))
            elif printed:
                raise AssertionError(f"an example prints, and the page does not show it:\n{block.text}{printed}")


def _commands(text: str) -> Iterator[tuple[str, str, int]]:
    """Each command of a console block, what is shown below it, and where that begins."""
    lines, at = text.splitlines(keepends=True), 0
    while lines:
        command = ""
        while lines:
            line = lines.pop(0)
            at += len(line)
            command += line.removeprefix("$ ").rstrip("\n")
            if not command.endswith("\\"):
                break
            command = command[:-1]
        shown = ""
        while lines and not lines[0].startswith("$ "):
            shown += lines.pop(0)
        yield command, shown, at
        at += len(shown)


def _printed(command: str) -> tuple[str, int]:
    """What a command prints, on either stream, and its exit code."""
    words = shlex.split(command, comments=True)
    if words[0] == "twinmerge":
        from twinmerge.cli import main

        return _caught(lambda: _main(main, words), told=True)
    if words[0] == "python":
        return _caught(lambda: runpy.run_path(words[1], run_name="__main__"))
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode


def _main(main: Any, words: list[str]) -> None:
    before, sys.argv = sys.argv, words
    try:
        main()
    finally:
        sys.argv = before


def _caught(call: Any, told: bool = False) -> tuple[str, int]:
    """What a call prints, without the progress of what takes long, and its exit code; its warnings too where they are
    `told`."""
    caught, code = io.StringIO(), 0
    with contextlib.redirect_stdout(caught), contextlib.redirect_stderr(caught), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if told:
            warnings.simplefilter("default", UserWarning)
        try:
            call()
        except SystemExit as left:
            code = int(left.code or 0)
    lines = (line.rpartition("\r")[2] for line in caught.getvalue().split("\n"))
    return "\n".join(line for line in lines if not re.search(r"\d+%\|", line)), code


def _clean(text: str, place: str) -> str:
    """An output as it would be in a folder of the reader's, without space at the ends of lines."""
    text = text.replace(os.path.realpath(place), HOME).replace(place, HOME)
    text = "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
    return f"{text}\n" if text else ""


def alike(shown: str, found: str, near: float = 1 / 3) -> bool:
    """Whether an output is what a page shows.

    Args:
        near: by which share of the larger one numbers may differ.

    Example:
        >>> alike("12 rows, 98.1 %, 3.2 s", "12 rows, 98.0 %, 9.9 s"), alike("2 rows", "3 rows"), alike("a […] d", "a b d")
        (True, False, True)
        >>> alike("98.1 %", "98.0 %", near=0)
        False
    """
    parts, rest = [_tokens(part) for part in shown.split(ANY)], _tokens(found)
    for i, part in enumerate(parts):
        places = range(len(rest) - len(part) + 1) if i else [0]
        if i == len(parts) - 1:
            places = [len(rest) - len(part)] if i else ([0] if len(part) == len(rest) else [])
        at = next((p for p in places if p >= 0 and _same(part, rest[p : p + len(part)], near)), None)
        if at is None:
            return False
        rest = rest[at + len(part) :]
    return True


def _tokens(text: str) -> list[str]:
    return TOKEN.findall(FRAMES.sub(" ", text))


def _same(one: list[str], two: list[str], near: float) -> bool:
    if len(one) != len(two):
        return False
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        timed = bool(TIMES & set(one[i + 1 : i + 2])) or "seconds" in one[max(0, i - 3) : i]
        if a != b and not (a[0].isdigit() and b[0].isdigit() and (timed or _near(a, b, near))):
            return False
    return True


def _near(a: str, b: str, near: float) -> bool:
    if a.count(".") > 1 or b.count(".") > 1:  # a version
        return False
    one, two = (float(number.replace(",", "")) for number in (a, b))
    whole = a.isdigit() and b.isdigit()
    return abs(one - two) <= (min(near, 0.02) if whole else near) * max(one, two)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In a folder, with a terminal of 80 columns, and no network."""
    before, given = Path.cwd(), dict(os.environ)
    os.environ |= {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(given)


def differing(text: str, near: float = 1 / 3) -> list[Output]:
    """The examples in the text of a page that print something else than it shows."""
    return [each for each in run(text) if not alike(each.shown, each.found, near)]


def main(words: list[str]) -> int:
    check, named = "--check" in words, [word for word in words if not word.startswith("--")]
    code = 0
    for page in named or pages():
        text = (DOCS / page).read_text(encoding="utf-8")
        wrong = differing(text) if check else differing(text, near=0)
        for each in reversed(wrong):
            if check or ANY in each.shown:
                print(f"{page} shows\n{each.shown}and what is printed is\n{each.found}")
                code = 1
            else:
                text = text[: each.start] + each.found + text[each.end :]
        if not check:
            (DOCS / page).write_text(text, encoding="utf-8")
        print(f"{page}: {len(wrong)} outputs differ")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
