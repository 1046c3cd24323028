"""Experts as masks of one vector: made, read at any threshold while one is chosen, written back as models."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

_WERE_HERE = ("Compressed", "changed_tensors", "compress", "in_given_order", "mask_merge", "walk")


def __getattr__(name: str) -> Any:
    """What this module held while it was a file; until 0.1.0."""
    if name not in _WERE_HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} is {__name__}.build.{name} now. The old name goes with 0.1.0.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(import_module(f"{__name__}.build"), name)
