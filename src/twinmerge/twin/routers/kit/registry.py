"""Routers by name, as a class or as an object: a file of `twin/routers/`, an entry point of the group
`twinmerge.routers`, or a class of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinmerge.errors import RecipeError
from twinmerge.origin import class_named, is_own, name_of
from twinmerge.plugins import Plugins
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.kit.sound import check_class

ROUTERS = Plugins[Router](
    Router,
    "router",
    "twinmerge.twin.routers",
    "twinmerge.routers",
    check_class,
    lambda: (
        f" Choose from {', '.join(router_names())}; see `twinmerge twin routers`, or install the "
        "package that offers it."
    ),
)

RouterLike = str | type[Router] | Router
"""A name from `twinmerge twin routers`, a class, or an object with its options, which is not fitted itself."""


def router_names() -> list[str]:
    """All routers, the built-in ones by their files, then those of installed packages."""
    return ROUTERS.names()


def is_router(name: str) -> bool:
    """Whether there is a router of that name, or it is that of a class which no folder and no entry point has."""
    return is_own(name) or name in ROUTERS.names()


def router_class(given: RouterLike) -> type[Router]:
    """The class of a router; of a name only its own file is imported.

    Raises:
        TwinmergeError: an unknown name (with the nearest right one), or a class that lacks what a router needs.

    Example:
        >>> router_class("gausian")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: Unknown router 'gausian'. Did you mean 'gaussian'? ...
    """
    if isinstance(given, str):
        return class_named(given, ROUTERS) if is_own(given) else ROUTERS.find(given)
    cls = type(given) if isinstance(given, Router) else given
    return ROUTERS.require(cls, getattr(cls, "__name__", repr(cls)))


def kind_of(router: Router) -> RouterLike:
    """What `make_router` makes another one of that kind by, in this process."""
    return type(router) if is_own(router.kind) else router.kind


def make_router(given: RouterLike, options: Mapping[str, Any] | None = None) -> Router:
    """A router that is yet to be fitted, with its options checked.

    Args:
        given: a name, a class, or an object, whose own options are those that it was made with.
        options: option -> value.

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
    cls, own = router_class(given), given.options() if isinstance(given, Router) else {}
    if twice := own.keys() & (options or {}).keys():
        raise RecipeError(f"{min(twice)!r} is given twice, in the router and beside it. Give it once.")
    name = given if isinstance(given, str) else name_of(cls, ROUTERS)
    return cls(name, **{**own, **(options or {})})
