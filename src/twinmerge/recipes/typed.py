"""A recipe as somebody typed it, which an output carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Typed:
    """A recipe as it was typed.

    Attributes:
        content: of the file, byte for byte.
        json: its language; YAML else.
    """

    content: bytes
    json: bool = False
