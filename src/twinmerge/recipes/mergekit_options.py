"""Options of mergekit-yaml, which people's scripts carry: what each is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from twinmerge.errors import UsageError


class Option(NamedTuple):
    """An option of mergekit.

    Attributes:
        said: what is said of it; empty where it is translated without a word.
        takes: whether a value follows it.
        here: what it is here, with {} for its value; empty for nothing.
        refused: it is not taken, and `said` says why.
    """

    said: str
    takes: bool = False
    here: tuple[str, ...] = ()
    refused: bool = False


NOTHING = "tensors are read as they are needed"
OPTIONS = {
    "--allow-crimes": Option("models of different classes are refused here", refused=False),
    "--no-allow-crimes": Option(""),
    "--async-write": Option("writing goes on beside the work anyway"),
    "--clone-tensors": Option(NOTHING),
    "--copy-tokenizer": Option(""),
    "--no-copy-tokenizer": Option("the tokenizer is copied; take its files out of the output"),
    "--cuda": Option("", here=("--device", "cuda")),
    "--no-cuda": Option(""),
    "--gpu-rich": Option("", here=("--device", "cuda")),
    "--lazy-unpickle": Option(NOTHING),
    "--no-lazy-unpickle": Option(NOTHING),
    "--lora-merge-cache": Option("adapters are applied on the way, so no cache is needed", takes=True),
    "--lora-merge-dtype": Option("adapters are applied in float32", takes=True),
    "--low-cpu-memory": Option(NOTHING),
    "--multi-gpu": Option("one device is used", here=("--device", "cuda")),
    "--num-threads": Option("", takes=True, here=("--threads", "{}")),
    "--out-shard-size": Option("", takes=True, here=("--shard-size", "{}")),
    "--random-seed": Option("", takes=True, here=("--random-seed", "{}")),
    "--read-to-gpu": Option(NOTHING),
    "--safe-serialization": Option(""),
    "--no-safe-serialization": Option("pickles are not written", refused=True),
    "--transformers-cache": Option("set HF_HOME instead", takes=True),
    "--trust-remote-code": Option("code of models is never run", refused=False),
    "--unsafe-truncate-embeddings": Option("rows are not cut off unasked", refused=True),
    "--write-model-card": Option(""),
    "--no-write-model-card": Option("a model card is written; take README.md out of the output"),
    "--write-threads": Option("writing takes no threads of its own", takes=True),
}


def translated_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a `twinmerge merge` without mergekit's options, and what to say of them.

    Args:
        words: after `merge`.

    Raises:
        UsageError: an option that cannot be followed.

    Example:
        >>> translated_options(["r.yaml", "out", "--cuda", "--out-shard-size", "1B", "--lazy-unpickle"])
        (['r.yaml', 'out', '--device', 'cuda', '--shard-size', '1GB'], ['--lazy-unpickle: tensors are read as they \
are needed.'])
    """
    found: list[str] = []
    said: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        option = OPTIONS.get(name)
        if option is None:
            found.append(word)
            continue
        if option.takes and not equals:
            value = next(left, "")
            if not value:
                raise UsageError(f"{name} needs a value. Give one, or leave it out.")
        if option.refused:
            raise UsageError(f"{name}, an option of mergekit, is not taken: {option.said}. Leave it out.")
        found += [each.format(_size(value) if name == "--out-shard-size" else value) for each in option.here]
        if option.said:
            said.append(f"{name}: {option.said}.")
    return found, said


def _size(text: str) -> str:
    """mergekit writes 5B for five billion bytes."""
    return (
        f"{text[:-1]}{ {'K': 'kB', 'M': 'MB', 'B': 'GB', 'G': 'GB'}[text[-1].upper()] }"
        if text[-1:].upper() in "KMBG"
        else text
    )
