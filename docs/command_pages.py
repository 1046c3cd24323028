"""The command reference and the man page, made from the commands themselves.

`docs/make_site.py` writes them at the build; they are in no commit.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import typer
from class_pages import escaped
from reference_pages import places

import twinmerge.cli
from twinmerge.cli import failure
from twinmerge.cli.command import GROUPS

DOCS = Path(__file__).parent
FOUND = {"verify", "diff"}
"""Commands with the exit code 1, for what they look for."""


class Command(NamedTuple):
    """A command: its words, what typer knows of it, its text and its examples."""

    words: str
    known: Any
    text: list[str]
    examples: list[str]


class Option(NamedTuple):
    """An option or argument: how it is typed, its default, what is allowed, what it means, and its group."""

    typed: str
    default: str
    allowed: str
    meaning: str
    panel: str
    argument: bool


def commands() -> list[Command]:
    """Every command, in the order of the help."""

    def below(found: Any, words: str) -> Iterator[Command]:
        for name, each in found.commands.items():
            whole = f"{words} {name}".strip()
            if hasattr(each, "commands"):
                yield from below(each, whole)
            elif not each.hidden:
                yield Command(whole, each, *_split(each))

    return list(below(typer.main.get_command(twinmerge.cli.app), ""))


def _split(known: Any) -> tuple[list[str], list[str]]:
    """The paragraphs of a command's text, and the lines in it that are to be typed."""
    text: list[str] = []
    examples: list[str] = []
    whole = "\n\n".join(filter(None, (inspect.cleandoc(known.help or ""), inspect.cleandoc(known.epilog or ""))))
    for paragraph in re.split(r"\n\s*\n|\f", whole):
        said = " ".join(paragraph.replace("\b", "").split())
        said = re.sub(r"^(?:Examples?: *)(?=\$? ?twinmerge )", "", said)
        if said.removeprefix("$ ").startswith("twinmerge "):
            examples.append(said.removeprefix("$ "))
        elif said and said not in ("Example:", "Examples:"):
            text.append(said)
    return text, examples


def options(command: Command) -> list[Option]:
    """The arguments and options of a command, arguments first."""
    found = []
    for each in command.known.params:
        if getattr(each, "hidden", False) or each.name == "help":
            continue
        argument = each.param_type_name == "argument"
        metavar = _metavar(each)
        if argument:
            typed = metavar
        else:
            names = ", ".join(sorted(each.opts, key=len))
            if each.secondary_opts:
                names += " / " + ", ".join(each.secondary_opts)
            typed = names if getattr(each, "is_flag", False) else f"{names} {metavar}"
        panel = getattr(each, "rich_help_panel", None) or ("Arguments" if argument else "Options")
        found.append(Option(typed, _default(each), _allowed(each), each.help or "", panel, argument))
    return sorted(found, key=lambda option: not option.argument)


def _kind(option: Any) -> Any:
    """The type that a value of an option is read as."""
    kind = option.type_descriptor.annotation
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _metavar(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    kind = _kind(option)
    if option.param_type_name == "argument":
        return str(option.name).upper() + ("..." if option.nargs == -1 else "")
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(kind, "VALUE")


def _default(option: Any) -> str:
    value = option.default
    if option.required:
        return "must be given"
    if callable(value):
        return ""
    if value is None or isinstance(value, (list, tuple)) or type(value).__name__ == "Sentinel":
        return ""
    if getattr(option, "is_flag", False):
        if not option.secondary_opts:
            return ""
        return f"`{(option.opts if value else option.secondary_opts)[0]}`"
    return f"`{value}`"


def _allowed(option: Any) -> str:
    kind = _kind(option)
    words = get_args(kind) if get_origin(kind) is Literal else kind if isinstance(kind, EnumType) else ()
    if words:
        return ", ".join(f"`{getattr(word, 'value', word)}`" for word in words)
    least, most = option.min, option.max
    if least is not None:
        return f"{least} or more" if most is None else f"{least} to {most}"
    if most is not None:
        return f"at most {most}"
    return "may be repeated" if option.multiple and "epeat" not in (option.help or "") else ""


# ------------------------------------------------------------------------------------------------- calls


def calls() -> dict[str, list[str]]:
    """Command -> the rows of docs/python.md that tell its call: what is typed, the call, what it gives."""
    table = (DOCS / "python.md").read_text(encoding="utf-8")
    table = table.partition("| command | call | gives |")[2].partition("\n\n")[0]
    found: dict[str, list[str]] = {}
    for cell, row in re.findall(r"^\| (`.+?) \| (.+?) \|$", table, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        group = names[0].partition(" --")[0].rpartition(" ")[0]
        for name in names:
            words = name.partition(" --")[0]
            words = f"{group} {words}".strip() if " " not in words else words
            call, _, gives = row.partition(" | ")
            found.setdefault(words, []).append(f"{call} gives {gives}" if gives.strip() else call)
    return found


def exit_codes() -> dict[str, str]:
    """Exit code -> what it means, as `cli/failure.py` says it."""
    text = " ".join((failure.__doc__ or "").partition("Exit codes: ")[2].split()).rstrip(".")
    return dict(re.findall(r"(\d+) ([^;]+)", text))


# ------------------------------------------------------------------------------------------------- pages


def command_pages() -> dict[str, str]:
    """Path below docs/ -> page: one for each first word, and the list of all."""
    by_page: dict[str, list[Command]] = {}
    for command in commands():
        by_page.setdefault(command.words.partition(" ")[0], []).append(command)
    found = {f"commands/{first}.md": _page(first, of) for first, of in by_page.items()}
    return {"commands/index.md": _index(by_page), **found}


def _index(by_page: dict[str, list[Command]]) -> str:
    lines = [
        "# Commands",
        "",
        "`twinmerge --help` lists these, `twinmerge COMMAND --help` shows one. Each does what one",
        "[call of Python](../python.md) does. Results are on stdout, as data with `--json`; all else is on stderr.",
        "",
        "The same as a man page: [twinmerge.1](../twinmerge.1), to be read with `man ./twinmerge.1`.",
        "`twinmerge --install-completion` makes the shell complete commands, options, methods and files.",
        "",
        "| command | what it does |",
        "| --- | --- |",
    ]
    for first, of in by_page.items():
        for command in of:
            target = f"{first}.md" + (f"#{slug(command.words)}" if " " in command.words else "")
            said = command.text[0] if command.text else ""
            lines.append(f"| [`{command.words}`]({target}) | {escaped(said)} |")
    lines += ["", "## Exit codes", "", "| code | meaning |", "| ---: | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in exit_codes().items()]
    return "\n".join([*lines, ""])


def slug(words: str) -> str:
    return f"twinmerge-{words.replace(' ', '-')}"


def _page(first: str, of: list[Command]) -> str:
    single = len(of) == 1 and " " not in of[0].words
    lines = [f"# twinmerge {first}", ""]
    if not single:
        lines += [escaped(GROUPS.get(first, "")), ""]
    for command in of:
        if not single:
            lines += [f"## twinmerge {command.words}", ""]
        lines += [*_body(command, "##" if single else "###"), ""]
    lines += ["Exit codes are in the [list of commands](index.md#exit-codes)."]
    return "\n".join([*lines, ""])


def _body(command: Command, level: str) -> list[str]:
    lines = [part for said in command.text for part in (escaped(said), "")]
    if command.examples:
        lines += ["```console", *[f"$ {example}" for example in command.examples], "```", ""]
    told = calls().get(command.words, [])
    if told:
        said = "; ".join(re.sub(r"`[^`]+`", _call, each) for each in told)
        lines += [f"From Python: {said}. See [From Python](../python.md#commands-and-calls).", ""]
    if command.words in FOUND:
        lines += [f"The exit code is 1 where it finds what it looks for: {exit_codes()['1']}.", ""]
    by_panel: dict[str, list[Option]] = {}
    for option in options(command):
        by_panel.setdefault(option.panel, []).append(option)
    for panel, of in by_panel.items():
        lines += [f"**{panel}**", "", *_table(of), ""]
    return lines[:-1]


def _call(code: re.Match[str]) -> str:
    """A call in code, as a link into the reference where it begins with what is in there."""
    words = re.match(r"`(tm|twin|state)\.(\w+)(?:\.(\w+))?\(", code[0])
    if words is None:
        return code[0]
    start, first, second = words.groups()
    name, own = (first, second) if start == "tm" else ({"twin": "Twin", "state": "Continual"}[start], first)
    page = places().get(name)
    return f"[{code[0]}](../reference/{page}.md#twinmerge.{name}{f'.{own}' if own else ''})" if page else code[0]


def _table(of: list[Option]) -> list[str]:
    """Options as a table, without the columns in which nothing stands."""
    rows = [
        (f"`{each.typed.replace('|', chr(92) + '|')}`", escaped(each.meaning), each.allowed, each.default)
        for each in of
    ]
    heads = ("option", "meaning", "allowed", "default")
    kept = [i for i in range(len(heads)) if i < 2 or any(row[i] for row in rows)]
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line[i] for i in kept) + " |" for line in lines]


# ---------------------------------------------------------------------------------------------- man page


def man_page(version: str, date: str) -> str:
    """The help as a man page, in troff."""
    lines = [
        f'.TH TWINMERGE 1 "{date}" "twinmerge {version}" "twinmerge"',
        ".SH NAME",
        "twinmerge \\- " + roff(_summary()),
        ".SH SYNOPSIS",
        ".B twinmerge",
        "COMMAND [OPTIONS] [ARGUMENTS]",
        ".SH DESCRIPTION",
        roff(
            "Results are on stdout, as data with --json; all else is on stderr. Each command is a call of Python, too."
        ),
        ".SH COMMANDS",
    ]
    for command in commands():
        lines += [f".SS twinmerge {roff(command.words)}"]
        for i, said in enumerate(command.text):
            lines += [*([".PP"] if i else []), roff(said)]
        for example in command.examples:
            lines += [".PP", ".RS 4", ".nf", roff(example), ".fi", ".RE"]
        for option in options(command):
            allowed = [plain for plain in (option.allowed, option.default) if plain]
            beside = f" [{'; '.join(each.replace('`', '') for each in allowed)}]" if allowed else ""
            lines += [".TP", f"\\fB{roff(option.typed)}\\fR", roff(option.meaning + beside) or "\\ "]
    lines += [".SH EXIT STATUS"]
    for code, meaning in exit_codes().items():
        lines += [".TP", f"\\fB{code}\\fR", roff(meaning.replace("`", ""))]
    return "\n".join([*lines, ""])


def _summary() -> str:
    text = str(twinmerge.cli.app.info.help or "").partition("\n\n")[0]
    return " ".join(text.split()).rstrip(".")


def roff(text: str) -> str:
    """A text with what troff would take for its own, escaped."""
    text = " ".join(text.replace("`", "").split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
