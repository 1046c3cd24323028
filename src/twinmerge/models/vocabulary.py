"""Whether the inputs of a merge mean the same token by the same row of their embeddings."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        files = base / name, expert / name
        if all(file.is_file() for file in files):
            if filecmp.cmp(*files, shallow=False):
                return None
            theirs, own = map(_tokens, files)
            return None if theirs is None or own is None else _differing(theirs, own)
    for name in OPAQUE:
        files = base / name, expert / name
        if all(file.is_file() for file in files) and not filecmp.cmp(*files, shallow=False):
            return f"its {name} is another file than the base's"
    return None


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


def _tokens(file: Path) -> dict[str, int] | None:
    """Token -> id, None where the file is not of a known form."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            lines = text.split("\n")  # and nowhere else: tokens hold other line breaks, such as U+2028
            return {token: i for i, token in enumerate(lines if lines[-1] else lines[:-1])}
        raw: Any = json.loads(text)
        if file.name == "vocab.json":
            return {str(token): int(i) for token, i in raw.items()}
        vocabulary = raw["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t[0], i) for i, t in enumerate(vocabulary))
        added = ((token["content"], token["id"]) for token in raw.get("added_tokens") or ())
        return {str(token): int(i) for token, i in (*pairs, *added)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
