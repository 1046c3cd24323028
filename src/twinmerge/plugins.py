"""Kinds of which every file of a folder is one: methods, codecs, and what other packages offer under the same entry
point."""

from __future__ import annotations

import inspect
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twinmerge.errors import RecipeError, ResourceError, TwinmergeError, UsageError, in_one_line, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


def files_of(package: str) -> dict[str, Path]:
    """Name -> file of all that are in the folders of a package; none of them is imported.

    Example:
        >>> files_of("twinmerge.twin.routers")["knn"].name
        'knn.py'
    """
    files = (p for folder in import_module(package).__path__ for p in Path(folder).glob("*.py"))
    return {p.stem: p for p in sorted(files, key=lambda p: p.stem) if p.stem != "__init__"}


class Plugins(Generic[T]):
    """The classes of one kind by name: a file of the folder, or an entry point of the group.

    Nothing is imported before it is asked for, and then its own file alone. Other packages cannot take the name of a
    file.

    Args:
        base: what every class of the kind derives from.
        kind: in messages, such as "method".
        package: the folder, by its dotted name.
        group: of the entry points.
        check: refuses a class that lacks what the kind needs, with a `TwinmergeError` that names what. It sees each
            class once.
        see: the end of the message for an unknown name.

    Example:
        >>> from twinmerge.methods.kit.base import Method
        >>> methods = Plugins[Method](Method, "method", "twinmerge.methods", "twinmerge.methods")
        >>> "ties" in methods.names(), methods.find("ties").__name__
        (True, 'Ties')
        >>> methods.find("tie")
        Traceback (most recent call last):
        ...
        twinmerge.errors.RecipeError: Unknown method 'tie'. Did you mean 'ties'?
    """

    def __init__(
        self,
        base: type[Any],
        kind: str,
        package: str,
        group: str,
        check: Callable[[type[T], str], None] = lambda cls, name: None,
        see: Callable[[], str] = lambda: "",
    ) -> None:
        self.base, self.kind, self.package, self.group, self.check, self.see = base, kind, package, group, check, see
        self._files: dict[str, type[T]] = {}
        self._sound: weakref.WeakSet[type[T]] = weakref.WeakSet()

    def files(self) -> dict[str, Path]:
        """Name -> file of all that are in the folder."""
        return files_of(self.package)

    def names(self) -> list[str]:
        """All names: those of files, then those of other packages."""
        own = self.files()
        return [*own, *sorted({e.name for e in self.offered()} - own.keys())]

    def offered(self) -> list[EntryPoint]:
        """What other packages have; looking through what is installed takes longer than importing a file."""
        from importlib import metadata  # 15 ms

        return list(metadata.entry_points(group=self.group))

    def find(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            TwinmergeError: an unknown name (with the nearest right one); a class that cannot be loaded or lacks
                something.
        """
        if name in self._files or name in self.files():
            return self._of_file(name)
        entry = self.entry(name)
        if entry is None:
            raise RecipeError(f"Unknown {self.kind} {name!r:.80}.{nearest(name, self.names())}{self.see()}")
        try:
            found = entry.load()
        except (Exception, SystemExit) as error:  # whatever the import of a stranger's file raises
            raise ResourceError(
                f"The {self.kind} {name!r} of {_package(entry)} cannot be loaded: {_why(error)}. Mend or uninstall "
                "that package."
            ) from error
        return self.require(found, name)

    def entry(self, name: str) -> EntryPoint | None:
        """What another package offers under that name; None where there is nothing.

        Raises:
            ResourceError: two packages offer it.
        """
        found = {(e.value, _package(e)): e for e in self.offered() if e.name == name}
        if len(found) > 1:
            both = " and ".join(f"{package} ({value})" for value, package in found)
            raise ResourceError(f"The name {name!r} is that of two {self.kind}s: {both}. Uninstall one of them.")
        return next(iter(found.values()), None)

    def all(self) -> dict[str, type[T]]:
        """Every class by its name; one that cannot be loaded is a warning, and hides no other."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.find(name)
            except TwinmergeError as error:
                warnings.warn(f"Left out: {error}", stacklevel=3)
        return found

    def mentioned(self, word: str) -> Iterator[str]:
        """Names of the files that have the word in double quotes, then of what other packages offer: where an alias
        may stand.

        Reading the files takes a millisecond; importing them all would take PyTorch's import.
        """
        quoted = f'"{word}"'
        own = self.files()
        yield from (name for name, file in own.items() if quoted in file.read_text(encoding="utf-8"))
        yield from (name for name in self.names() if name not in own)

    def require(self, found: Any, name: str) -> type[T]:
        """The class, if it is all that its kind needs.

        Raises:
            TwinmergeError: it is not; the message says what to add.
        """
        title = self.base.__name__
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise UsageError(
                f"{name} is no {self.kind}: {found!r:.80} does not derive from {title}. Derive it from {title}."
            )
        if missing := sorted(getattr(found, "__abstractmethods__", ())):
            raise UsageError(
                f"{name} is no {self.kind} yet: {found.__name__} does not define {', '.join(missing)}. Define it."
            )
        if found not in self._sound:
            self.check(found, name)
            self._sound.add(found)
        return found

    def _of_file(self, name: str) -> type[T]:
        if name not in self._files:
            try:
                module = import_module(f"{self.package}.{name}")
            except (Exception, SystemExit) as error:  # of a file that is being written, say
                raise UsageError(
                    f"The {self.kind} {name!r} cannot be loaded: {_why(error)}. Mend {self.files()[name]}, or take it "
                    "out of its folder."
                ) from error
            classes = (
                found for _, found in inspect.getmembers(module, inspect.isclass) if found.__module__ == module.__name__
            )
            own = sorted((c for c in classes if issubclass(c, self.base)), key=inspect.isabstract)
            if not own:
                raise UsageError(
                    f"The file {self.files()[name]} has no {self.base.__name__} class. Add one, or take the file out "
                    "of its folder."
                )
            self._files[name] = self.require(own[0], name)
        return self._files[name]


def _package(entry: EntryPoint) -> str:
    """What messages call the package of an entry point."""
    found = getattr(entry, "dist", None)
    return "another package" if found is None else f"the package {found.name}"


def _why(error: BaseException) -> str:
    """An error of an import in one line: where, what, and the first sentence that it says.

    Example:
        >>> _why(ImportError("No module named 'x'"))
        "ImportError: No module named 'x'"
    """
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
    where = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
    if isinstance(error, SyntaxError) and error.filename:
        where, error = f"{error.filename}, line {error.lineno}: ", type(error)(error.msg)
    return where + in_one_line(error).partition(". ")[0]
