"""Whether the inputs of a merge mean the same token by the same row of their embeddings."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmerge.store.foreign import VOCABULARY, find, parse_json, read_bytes

READABLE = ("tokenizer.json", "vocab.json", "vocab.txt")
OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def other_tokens(base: Path | None, expert: Path | None) -> str | None:
    """What the expert's tokenizer means otherwise than the base's, in words.

    Returns:
        None where they mean the same, or where one of the folders has no tokenizer that can be compared.

    Example:
        >>> import tempfile
        >>> base, expert = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> _ = (base / "vocab.txt").write_text("[PAD]\\ncat\\ndog"), (expert / "vocab.txt").write_text("[PAD]\\ndog\\ncat")
        >>> other_tokens(base, expert)
        "2 of its 3 tokens have another id than in the base or none there, such as 'dog' (1, in the base 2)"
    """
    if base is None or expert is None:
        return None
    for name in READABLE:
        if (files := _both(base, expert, name)) is not None:
            theirs, own = (None, None) if files[0] == files[1] else (_tokens(name, raw) for raw in files)
            return None if theirs is None or own is None else _differing(theirs, own)
    for name in OPAQUE:
        if (files := _both(base, expert, name)) is not None and files[0] != files[1]:
            return f"its {name} is another file than the base's"
    return None


def tokens_in(folder: Path) -> dict[str, int] | None:
    """Token -> id of the tokenizer in a folder; None where there is none that can be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "vocab.txt").write_text("[PAD]\\ncat")
        >>> tokens_in(folder)
        {'[PAD]': 0, 'cat': 1}
    """
    for name in READABLE:
        if (file := find(folder, name)) is not None:
            return _tokens(name, read_bytes(file, VOCABULARY.bytes, "Take it away, or restore it."))
    return None


def _both(base: Path, expert: Path, name: str) -> tuple[bytes, bytes] | None:
    theirs, own = find(base, name), find(expert, name)
    if theirs is None or own is None:
        return None
    advice = "Take it away, or restore it."
    return read_bytes(theirs, VOCABULARY.bytes, advice), read_bytes(own, VOCABULARY.bytes, advice)


def _differing(base: Mapping[str, int], expert: Mapping[str, int]) -> str | None:
    other = sorted((i, token) for token, i in expert.items() if base.get(token) != i)
    if not other:
        return None
    i, token = other[0]
    there = f"in the base {base[token]}" if token in base else "not in the base"
    return (
        f"{len(other)} of its {len(expert)} tokens have another id than in the base or none there, such as "
        f"{token!r} ({i}, {there})"
    )


def _tokens(name: str, raw: bytes) -> dict[str, int] | None:
    """Token -> id, None where the file is not of a known form."""
    try:
        if (
            name == "vocab.txt"
        ):  # as transformers reads it: line feeds, carriage returns and both end a line, nothing else
            lines = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").readlines()
            return {token.rstrip("\n"): i for i, token in enumerate(lines)}
        found: Any = parse_json(raw, VOCABULARY)
        if name == "vocab.json":
            return {str(token): int(i) for token, i in found.items()}
        vocabulary = found["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t[0], i) for i, t in enumerate(vocabulary))
        added = ((token["content"], token["id"]) for token in found.get("added_tokens") or ())
        return {str(token): int(i) for token, i in (*pairs, *added)}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def warn_of_tokens(found: Mapping[str, str], stacklevel: int) -> None:
    """Warn of every expert whose tokenizer gives rows of the embeddings another meaning.

    Args:
        found: expert -> what its tokenizer means otherwise.
        stacklevel: of the warning.
    """
    for name, said in found.items():
        warnings.warn(
            f"The expert {name!r} has another tokenizer: {said}. Rows of the embeddings go together by their number, "
            "so say tokenizer: union in the recipe (--tokenizer union), or keep the embeddings with --head.",
            stacklevel=stacklevel,
        )
