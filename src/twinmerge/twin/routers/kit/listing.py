"""What can route a twin: every router with what it reads and its options."""

from __future__ import annotations

from typing import Any

from twinmerge.arguments import strict
from twinmerge.results import Listing
from twinmerge.twin.routers.kit.base import Router, fields_of
from twinmerge.twin.routers.kit.registry import ROUTERS, router_class


class Routers(Listing):
    """Router -> needs_inputs, reads, keeps_statistics, options."""


@strict
def list_routers(router: str | None = None) -> Routers:
    """What there is, or one router alone: its formula is in the class's docstring, its options here.

    Args:
        router: a name; all where None.

    Raises:
        TwinmergeError: an unknown router.

    Example:
        >>> list_routers("knn")["knn"]["needs_inputs"]
        True
    """
    classes = ROUTERS.all() if router is None else {router: router_class(router)}
    return Routers({name: _about(cls) for name, cls in classes.items()})


def options(router: type[Router]) -> dict[str, dict[str, Any]]:
    """Option -> its default and what it means."""
    fields = fields_of(router).options.model_fields
    return {name: {"default": field.default, "about": field.description} for name, field in fields.items()}


def _about(router: type[Router]) -> dict[str, Any]:
    return {
        "needs_inputs": router.needs_inputs,
        "reads": router.reads,
        "keeps_statistics": router.keeps_statistics,
        "options": options(router),
    }
