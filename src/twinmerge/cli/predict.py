"""`twinmerge twin predict`: ask a twin."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Device, Json, Threads, device_of, numbers, print_json, print_table, said
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads
from twinmerge.tables import visible

if TYPE_CHECKING:
    from twinmerge.twin.predict import Prediction
    from twinmerge.twin.twin import Twin

FILES = (".jsonl", ".txt")


@command("twin predict")
def predict(
    twin: Annotated[str, typer.Argument(help="A twin: a folder or a hub id.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to answer; a file (.jsonl, .txt) is answered row by row.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A file of texts to answer (.jsonl or .txt).")
    ] = None,
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="NAME", help="Use this expert instead of the router.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NAME", help="Answer with the head of this expert; the router mixes."),
    ] = None,
    mixture: Annotated[
        list[str] | None,
        typer.Option(
            "--mixture", metavar="NAME=WEIGHT", help="The weight of one expert, instead of the router. Repeat."
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide the weights of --mixture by their sum.")
    ] = False,
    soft: Annotated[
        bool, typer.Option("--soft", help="Mix all experts by the router's probabilities, not the best one alone.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens that a language model writes for each text.")
    ] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Apply the chat template; by default where the tokenizer has one."),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer texts: label, expert, the router's probability and mixture of each. A language model writes its answer.

    twinmerge twin predict TWIN "a lovely film" "where is my card?"

    twinmerge twin predict TWIN rows.jsonl --json
    """
    from twinmerge.twin.replies.reply import generates
    from twinmerge.twin.twin import Twin

    use_threads(threads)
    if not os.path.exists(twin) and (folder := next((word for word in text or () if os.path.isdir(word)), None)):
        raise UsageError(f"{twin!r:.80} is no folder, and {folder} is one. The twin comes first, and then its texts.")
    texts = _inputs(text or (), file)
    if not texts:
        raise UsageError("There is no text to answer. Give texts or a file as arguments.")
    choice: dict[str, Any] = {"expert": expert, "head": head, "mixture": numbers(mixture, "--mixture") or None}
    choice = {name: value for name, value in choice.items() if value is not None}
    if soft:
        choice["experts_per_row"] = None
    if normalize:
        choice["normalize"] = True
    loaded = Twin.from_pretrained(twin).to(device_of(device))
    if generates(loaded):
        if head is not None:
            raise UsageError("This twin is of a language model and has no heads. Leave --head out.")
        _write(loaded, texts, json, {"max_new_tokens": max_new_tokens, "chat": chat, **choice})
        return
    found = loaded.predict(texts, detail=True, **choice)
    if json:
        print_json(found.to_dict())
        return
    columns, rows = ["text", "label", "sure", "expert (router)", "mixture"], [*map(_row, texts, found)]
    if not any(_mixed(each) for each in found):  # it is the expert's alone
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table("", columns, rows, short=True)
    if refused := sum(each.refused for each in found):
        said(f"{refused} of {len(found)} refused: far from every expert's inputs, so the shared model answered alone.")


def _inputs(words: Sequence[str], file: Path | None) -> list[Any]:
    """The texts that are given, and the rows of files; a word that is a file, or is called like one, is a file."""
    from twinmerge.tasks.rows import read_inputs

    found: list[Any] = []
    for word in words:
        if os.path.isfile(word) or (word.endswith(FILES) and not any(mark.isspace() for mark in word)):
            rows = read_inputs(Path(word))
            said(f"{word} is a file: its {len(rows)} rows are answered.")
            found += rows
        elif os.path.isdir(word):
            raise UsageError(f"{word} is a folder. Name a file of texts in it, or give the texts themselves.")
        else:
            found.append(word)
    return [*found, *(read_inputs(file) if file else [])]


def _row(text: Any, found: Prediction) -> tuple[str, ...]:
    from twinmerge.twin.replies.reply import shown

    said = text if isinstance(text, str) else " / ".join(str(part) for part in text[:2] if part)
    sure = f"{100 * found.confidence:.0f} %"
    refused = ", refused" if found.refused else ""
    return said, found.label, sure, f"{found.expert}{_routed(found)}{refused}", shown(found.mixture)


def _mixed(found: Prediction) -> bool:
    """Whether the mixture says more than whose head answered."""
    return not found.refused and found.mixture.get(found.expert) != 1.0


def _routed(found: Prediction) -> str:
    """The router's likeliest expert with its probability; without its name where its head is the one that answered."""
    if found.routing is None:
        return ""
    name, share = max(found.routing.items(), key=lambda item: item[1])
    return f" ({'' if name == found.expert else f'{name} '}{100 * share:.0f} %)"


def _write(twin: Twin, texts: Sequence[Any], json: bool, how: dict[str, Any]) -> None:
    """What a language model writes, as it writes it."""
    from twinmerge.twin.replies.reply import Replies

    if json:
        print_json(twin.reply(texts, **how).to_dict())
        return

    def piece(text: str) -> None:
        sys.stdout.write(visible(text))  # a model may write what a terminal obeys
        sys.stdout.flush()

    found = Replies()
    for text in texts:
        if len(texts) > 1:
            said(f"> {text:.200}")
        found += twin.reply([text], on_text=piece, **how)
        sys.stdout.write("\n")
        said(f"[{found[-1].said}]")
