"""The tokens that a model's own tokenizer splits the texts of another one's tokens into."""

from __future__ import annotations

from collections.abc import Sequence

from twinmerge.engine.transplant.texts import Texts
from twinmerge.errors import ModelError
from twinmerge.store.foreign import reason

BEFORE = ("x", "q", "a", ".", "1", "\n", "")
"""What a text is put after, one after the other, until that itself stays as it is: a text begins inside of another,
not as a tokenizer treats the first word of all."""


def pieces(model: Texts, texts: Sequence[bytes], rows: int, unknown: int | None) -> list[list[int]]:
    """Ids of the model's tokens for each text, as they come in the middle of a longer one.

    Bytes that are no text by themselves are the model's tokens of single bytes, where it has one for each of them.

    Args:
        model: its tokens.
        texts: to split.
        rows: of the model's tables; ids from there on are left out.
        unknown: the id that stands for what the tokenizer does not know, which is left out too.

    Returns:
        ids of each text; none where nothing is left.

    Raises:
        ModelError: a tokenizer that the tokenizers library does not read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(model.tokens.text.decode())
    except Exception as error:  # the library has no classes of errors of its own
        raise ModelError(
            f"The tokenizer in {model.tokens.folder} cannot be read ({reason(error)}). Save it again with transformers."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found: list[list[int]] = [[] for _ in texts]
    left: list[int] = []
    said: list[str] = []
    for number, raw in enumerate(texts):
        try:
            said.append(raw.decode())
            left.append(number)
        except UnicodeDecodeError:
            found[number] = _of_bytes(model, raw)
    for before in BEFORE:
        alone = tokenizer.encode(before, add_special_tokens=False).ids
        if before and (not alone or unknown in alone):  # a tokenizer that lacks it drops it, or a whole word with it
            continue
        split = tokenizer.encode_batch([f"{before}{text}" for text in said], add_special_tokens=False)
        again = []
        for number, text, each in zip(left, said, split, strict=True):
            if each.ids[: len(alone)] == alone and (len(each.ids) > len(alone) or not before):
                found[number] = each.ids[len(alone) :]
            else:
                again.append((number, text))
        left, said = [number for number, _ in again], [text for _, text in again]
    return [[i for i in ids if i < rows and i != unknown] for ids in found]


def _of_bytes(model: Texts, text: bytes) -> list[int]:
    """The tokens of single bytes; none where the model lacks one."""
    known = [model.by_text.get(bytes([byte])) for byte in text] if model.known else [None]
    return [each for each in known if each is not None] if None not in known else []
