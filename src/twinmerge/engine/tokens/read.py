"""The tokens of a model's tokenizer: their ids, and the settings of those that were added to its vocabulary.

Of a tokenizer.json only that is read, since its merges take longer than all else. Other forms are transformers' to
read, which makes a tokenizer.json of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from twinmerge.errors import DamagedFile, ModelError
from twinmerge.models.tokens import Added, Tokens
from twinmerge.store.foreign import VOCABULARY, find, read_bytes, read_json
from twinmerge.store.json_members import members

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.model.v*", "*.tiktoken", "tekken.json", "vocab.*"),
    "added_tokens.json",
)
"""Where tokens lie that are not in a tokenizer.json."""
SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)
"""Keys of tokenizer_config.json that name tokens."""


def read_tokens(folder: Path, seen: dict[bytes, Tokens] | None = None) -> Tokens | None:
    """The tokens of the tokenizer in a folder; None where it has none.

    Args:
        folder: of a model.
        seen: what was read before, so that equal files are taken apart once.

    Raises:
        TwinmergeError: a damaged file; another form of tokenizer that transformers does not read.
    """
    file = find(folder, FILE)
    if file is None:
        return _by_transformers(folder) if _has_vocabulary(folder) else None
    again = partial(read_bytes, file, VOCABULARY.bytes, "Restore it.")
    raw = again()
    config = find(folder, CONFIG)
    read = (file,) if config is None else (file, config)
    known = (seen or {}).get(raw)
    found = replace(known or _parsed(folder, raw, read), folder=folder, read=read, write=again)
    if not found.fits or any(token not in found.ids for token in named_in(config_of(folder))):
        return _by_transformers(folder)  # it numbers them anew, and adds what only the config names
    if seen is not None:
        seen.setdefault(raw, found)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder; empty without one."""
    file = find(folder, CONFIG)
    return {} if file is None else read_json(file, VOCABULARY, finite=False)


def named_in(config: Mapping[str, Any]) -> list[str]:
    """The tokens that a tokenizer_config.json names.

    Example:
        >>> named_in({"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<a>"], "pad_token": None})
        ['</s>', '<a>']
    """
    found: list[Any] = []
    for value in (config.get(key) for key in SPECIAL):
        named = value.values() if isinstance(value, dict) and "content" not in value else [value]
        found += value if isinstance(value, list) else named
    decoder = config.get("added_tokens_decoder")
    found += decoder.values() if isinstance(decoder, dict) else []
    texts = (value.get("content") if isinstance(value, dict) else value for value in found)
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def _has_vocabulary(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES)


def _parsed(folder: Path, raw: bytes, read: tuple[Path, ...]) -> Tokens:
    """What a tokenizer.json says of its tokens."""
    try:
        found = members(raw.decode(), "model", {"merges"})
        model = found["model"]
        if not isinstance(model.get("vocab"), (dict, list)):  # its merges come before
            found = members(raw.decode(), "model", ())
            model = found["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            ids = vocabulary
        else:
            ids = {piece[0]: number for number, piece in enumerate(vocabulary)}
            if len(ids) < len(vocabulary):
                raise ValueError("a token stands twice in it")
        kind = model.get("type") or ("Unigram" if isinstance(vocabulary, list) else "BPE" if "merges" in model else "")
        listed = [each for each in found.get("added_tokens") or () if each["content"]]
        fits = _numbered(vocabulary, ids, listed)
        listed.sort(key=lambda each: each["id"])
        added = {each["content"]: Added(*(each[key] for key in Added._fields)) for each in listed}
        ids = {**ids, **{each["content"]: each["id"] for each in listed}}
        if not ids or not all(type(number) is int and number >= 0 for number in ids.values()):
            raise ValueError("an id is no whole number from 0 on")
        if len({*ids.values()}) < len(ids):
            raise ValueError("two tokens have one id")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"its form is not known ({type(error).__name__})"
        raise DamagedFile(f"{folder / FILE} cannot be read: {said}. Restore it.") from error
    return Tokens(folder, lambda: raw, str(kind), len(vocabulary), ids, added, read, fits)


def _numbered(vocabulary: Sized, ids: Mapping[str, int], listed: Sequence[Mapping[str, Any]]) -> bool:
    """Whether loading gives the added tokens the ids that their file states: it counts on from the vocabulary."""
    top = -1
    for each in listed:
        number = ids.get(each["content"], len(vocabulary) if top < len(vocabulary) else top + 1)
        if number != each["id"]:
            return False
        top = max(top, number)
    return True


def _by_transformers(folder: Path) -> Tokens:
    """What transformers makes of other files."""
    from twinmerge.tasks.encode import open_tokenizer

    backend = getattr(open_tokenizer(folder), "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"The tokenizer in {folder} is none that a {FILE} can be made of. Save it with a fast tokenizer of "
            "transformers, which writes one."
        )
    read = tuple(sorted({file for pattern in (*VOCABULARIES, FILE, CONFIG) for file in folder.glob(pattern)}))
    found = _parsed(folder, backend.to_str().encode(), read)
    if not found.fits:
        raise ModelError(
            f"The tokenizer in {folder} states other ids of its added tokens than loading gives them. Load it in "
            "transformers and save it again."
        )
    return found
