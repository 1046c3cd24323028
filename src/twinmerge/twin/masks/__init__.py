"""Experts as masks of one vector: made, read at any threshold while one is chosen, written back as models."""

from __future__ import annotations

from typing import Any

from twinmerge.moved import old_name


def __getattr__(name: str) -> Any:
    """What this module held while it was a file."""
    return old_name(__name__, name)
