"""Classes by name: a file of a folder where every file has one, or an entry point of an installed package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twinmerge.errors import TwinmergeError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


def files_of(package: str) -> list[str]:
    """The files of a package by name; none of them is imported, and folders are left out.

    Example:
        >>> files_of("twinmerge.twin.routers")
        ['entropy', 'gaussian', 'knn', 'logistic', 'mlp', 'projection']
    """
    return sorted(each.name for each in iter_modules(import_module(package).__path__) if not each.ispkg)


class Plugins(Generic[T]):
    """All classes of one kind, each imported when it is first asked for.

    Args:
        what: the kind, for a sentence.
        base: the class that each derives from.
        package: each of its files has one.
        group: of the entry points of installed packages.
        see: what lists them, for a sentence.
        lacks: what a class does not have that its kind needs, by name.
    """

    def __init__(
        self, what: str, base: type[T], package: str, group: str, see: str, lacks: Callable[[type[T]], Iterable[str]]
    ) -> None:
        self.what, self.base, self.package, self.group = what, base, package, group
        self.see, self.lacks = see, lacks

    def names(self) -> list[str]:
        """The package's own by their files, then those of installed packages."""
        own = files_of(self.package)
        return own + sorted({entry.name for entry in self._entries()} - set(own))

    def __contains__(self, name: object) -> bool:
        return name in files_of(self.package) or name in self.names()

    def find(self, name: str) -> type[T]:
        """The class of that name; the package's own before those of others.

        Raises:
            TwinmergeError: no such name (with the nearest one), or a class that lacks what its kind needs.
        """
        if name in files_of(self.package):  # looking through what is installed takes longer than importing one
            module = import_module(f"{self.package}.{name}")
            own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
            fitting = sorted((c for c in own if issubclass(c, self.base)), key=inspect.isabstract)
            found: Any = fitting[0] if fitting else None
            return self._whole(name, found, f"the file {module.__file__}")
        entry = next((e for e in self._entries() if e.name == name), None)
        if entry is None:
            names = self.names()
            raise TwinmergeError(
                f"Unknown {self.what} {name!r}.{nearest(name, names)} Choose from {', '.join(names)}; see {self.see}."
            )
        try:
            found = entry.load()
        except Exception as error:  # whatever another's package does when it is imported
            raise TwinmergeError(
                f"The {self.what} {name!r} ({entry.value}) cannot be imported: {error}. Mend or remove its package."
            ) from error
        return self._whole(name, found, entry.value)

    def _entries(self) -> Iterable[EntryPoint]:
        """What installed packages offer."""
        from importlib import metadata  # its import takes longer than that of all commands

        return metadata.entry_points(group=self.group)

    def _whole(self, name: str, found: Any, where: str) -> type[T]:
        """The class, where it is one of the kind and lacks nothing."""
        kind = f"{self.base.__module__}.{self.base.__qualname__}"
        if not (inspect.isclass(found) and issubclass(found, self.base)):
            raise TwinmergeError(
                f"The {self.what} {name!r} ({where}) is no class that derives from {kind}. Make it one."
            )
        if lacking := [*sorted(getattr(found, "__abstractmethods__", ())), *self.lacks(found)]:
            raise TwinmergeError(
                f"The {self.what} {name!r} ({where}) lacks {', '.join(lacking)}. Add what {kind} asks for."
            )
        return found
