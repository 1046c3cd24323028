"""Routers: from what a twin reads of an input to one logit for each expert. One file for each, found by its name.

One of your own derives from `Router`, which is here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmerge.twin.routers.kit.base import Router as Router


def __getattr__(name: str) -> Any:
    """`Router`, when it is asked for: the command lists these files without an import of torch."""
    if name != "Router":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from twinmerge.twin.routers.kit.base import Router

    return Router
