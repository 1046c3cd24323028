"""The donor of a tokenizer: its folder, its tokens, what its configs say, and its weights where they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinmerge.engine.sides import GENERATION, MODEL, json_in
from twinmerge.engine.tokens.read import read_tokens
from twinmerge.engine.transplant.shared import special_ids
from twinmerge.engine.transplant.texts import Texts
from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel
from twinmerge.models.opening import open_model
from twinmerge.models.tokens import Tokens
from twinmerge.store.locate import locate


@dataclass(frozen=True)
class Donor:
    """Whose tokenizer a model gets.

    Attributes:
        ref: what the user wrote.
        folder: where it is.
        commit: of the hub, None for a folder.
        texts: of its tokens.
        config: what its config.json says; empty without one.
        generation: what its generation_config.json says; empty without one.
        special: what it is for -> id, of its special tokens.
    """

    ref: str
    folder: Path
    commit: str | None
    texts: Texts
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    special: Mapping[str, int]

    @classmethod
    def of(cls, ref: str) -> Donor:
        """Of a path or hub id.

        Raises:
            ModelError: nothing there, or no tokenizer; an adapter.
        """
        found = locate(ref)
        if found.adapter is not None:
            raise ModelError(f"{ref} is an adapter on a base. Name the folder that has the tokenizer.")
        tokens = read_tokens(found.folder)
        if tokens is None:
            raise ModelError(
                f"{ref} has no tokenizer that can be read (tokenizer.json, vocab.txt, …). Name a folder that has one."
            )
        config = json_in(found.folder, MODEL)
        special = special_ids(found.folder, config, tokens)
        return cls(
            ref, found.folder, found.commit, Texts.of(tokens), config, json_in(found.folder, GENERATION), special
        )

    @property
    def tokens(self) -> Tokens:
        """Its tokens."""
        return self.texts.tokens

    def opened(self, method: str) -> OpenedModel:
        """Its weights.

        Args:
            method: that needs them.

        Raises:
            ModelError: it has none that can be opened.
        """
        try:
            return open_model(self.ref)
        except ModelError as error:
            raise ModelError(
                f"--method {method} looks at the donor's embeddings, which cannot be opened. {error} Or take --method "
                "subtokens, for which a tokenizer is enough."
            ) from error
