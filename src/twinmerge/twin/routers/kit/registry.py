"""Routers by name: a file of `twin/routers/`, or an entry point of the group `twinmerge.routers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinmerge.errors import UsageError
from twinmerge.plugins import Plugins
from twinmerge.twin.routers.kit.base import Router, lacks


def _check(cls: type[Router], name: str) -> None:
    """Refuse a class that lacks what its kind of router needs."""
    if missing := list(lacks(cls)):
        raise UsageError(f"{name} is no router yet: {cls.__name__} lacks {', '.join(missing)}. Add it.")


ROUTERS = Plugins[Router](
    Router,
    "router",
    "twinmerge.twin.routers",
    "twinmerge.routers",
    _check,
    lambda: f" Choose from {', '.join(router_names())}; see `twinmerge twin routers`.",
)


def router_names() -> list[str]:
    """All routers, the built-in ones by their files, then those of installed packages."""
    return ROUTERS.names()


def is_router(name: object) -> bool:
    """Whether there is a router of that name."""
    return name in ROUTERS.names()


def router_class(name: str) -> type[Router]:
    """The class of a router; only its own file is imported.

    Raises:
        TwinmergeError: an unknown name (with the nearest right one), or a class that lacks what a router needs.

    Example:
        >>> router_class("gausian")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: Unknown router 'gausian'. Did you mean 'gaussian'? ...
    """
    return ROUTERS.find(name)


def make_router(name: str, options: Mapping[str, Any] | None = None) -> Router:
    """A router that is yet to be fitted, with its options checked.

    Raises:
        TwinmergeError: as `router_class`; an option that the router does not have, or a value out of its range.

    Example:
        >>> make_router("knn", {"neighbours": 5}).options()
        {'neighbours': 5}
        >>> make_router("knn", {"neighbours": 0})
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: knn: neighbours=0 is not allowed: Input should be greater than or equal to 1. ...
    """
    return router_class(name)(name, **(options or {}))
