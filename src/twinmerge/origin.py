"""Where a class that is not ours comes from: the name that leads to it, its package, and the code that it runs."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twinmerge.errors import RecipeError
from twinmerge.plugins import Plugins

if TYPE_CHECKING:
    from importlib.metadata import Distribution

T = TypeVar("T")
OURS = "twinmerge"
ROOMS = ("methods", "maths", "recipes", "engine")  # of ours: what decides a merge's numbers
NO_CODE = {"abc", "builtins", "pydantic", "typing"}  # what every class derives from; they have releases
SOURCES = (".py", ".so", ".pyd", ".dll", ".dylib")
ALIKE = 0.85  # of two names: one is a typing error of the other
STARTED = time.time()  # what changed since may not be what this process has imported


def is_ours(kind: type[Any]) -> bool:
    """Whether a class is one of this package, which its own tests look at.

    Example:
        >>> is_ours(Plugins), is_ours(Path)
        (True, False)
    """
    return kind.__module__.partition(".")[0] == OURS


def other_arguments(cls: type[Any], takes: Mapping[str, str]) -> str | None:
    """What is said of the first function of a class that cannot be called as it is going to be; None where all can.

    Args:
        cls: the class.
        takes: name of a function -> its arguments but for self.

    Example:
        >>> other_arguments(Plugins, {"names": "first, second, third, fourth"})
        'names takes other arguments. Write def names(self, first, second, third, fourth).'
    """
    for function, arguments in takes.items():
        try:
            inspect.signature(getattr(cls, function)).bind(None, *arguments.split(", "))
        except TypeError:
            return f"{function} takes other arguments. Write def {function}(self, {arguments})."
    return None


def misspelt(cls: type[Any], base: type[Any]) -> tuple[str, str] | None:
    """A public name of a class that is not one of its base, but nearly: it would do nothing; and the one that is meant.

    What can be called may be a typing error of what can be called, all else of all else. Our own classes are looked at
    by their tests.

    Example:
        >>> class Base:
        ...     sliced = True
        >>> class Own(Base):
        ...     slice = False
        >>> Own.__module__ = "theirs"
        >>> misspelt(Own, Base)
        ('slice', 'sliced')
    """
    own = {key: value for key, value in {**_annotations(base), **vars(base)}.items() if key[0] != "_"}
    for given, value in given_by(cls, base).items():
        alike = [key for key, other in own.items() if _is_verb(other) == _is_verb(value)]
        close = difflib.get_close_matches(given, alike, n=1, cutoff=ALIKE)
        if given not in own and close:
            return given, close[0]
    return None


def given_by(cls: type[Any], base: type[Any]) -> dict[str, Any]:
    """Public name -> value, or what it is annotated with, of a class and of those between it and ours."""
    found: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        if issubclass(each, base) and not is_ours(each):
            found |= {**_annotations(each), **vars(each)}
    return {key: value for key, value in found.items() if key[0] != "_"}


def _annotations(cls: type[Any]) -> dict[str, Any]:
    try:
        return inspect.get_annotations(cls)
    except NameError:  # of what only a type checker imports
        return {}


def _is_verb(value: object) -> bool:
    return inspect.isroutine(value) or isinstance(value, property)


# ----------------------------------------------------------------------------------------------- names


def is_own(name: str) -> bool:
    """Whether a name, as `name_of` gives it, is that of a class which no folder and no entry point has.

    Example:
        >>> is_own("ties"), is_own("package.module:Halfway")
        (False, True)
    """
    return ":" in name or name.startswith("<")


def name_of(cls: type[T], plugins: Plugins[T]) -> str:
    """The name of a class in what is written down: that of its file or entry point where it has one, else
    "module:Class", or "<Class of module>" where that leads to no class in another process, as for one that was
    defined in a notebook or a function."""
    folder, _, name = cls.__module__.rpartition(".")
    own = plugins.files()
    if folder == plugins.package and name in own and plugins.find(name) is cls:
        return name
    if (entry := next((e for e in plugins.offered() if _at(e.value) is cls and e.name not in own), None)) is not None:
        return entry.name
    place = f"{cls.__module__}:{cls.__qualname__}"
    found = None if cls.__module__ == "__main__" else _at(place)
    return place if found is cls else f"<{cls.__qualname__} of {cls.__module__}>"


def class_named(name: str, plugins: Plugins[T]) -> type[T]:
    """The class of a name that `is_own`. Nothing is imported for a name, which may stand in a stranger's file, but
    what an installed package offers.

    Raises:
        TwinmergeError: no name leads to it, its module is not imported, or it lacks something.
    """
    kind = plugins.kind
    if name.startswith("<"):
        raise RecipeError(
            f"The {kind} {name} was a class that no name leads to, since it was defined in a notebook, a script or a "
            "function. Put it in a module of its own, and give the class instead."
        )
    module, _, cls = name.partition(":")
    if module not in sys.modules:
        own = plugins.files()
        if (
            offered := next((e.name for e in plugins.offered() if e.value == name and e.name not in own), None)
        ) is not None:
            return plugins.find(offered)
        call = f": tm.merge({cls:.80}, …)" if kind == "method" else ""
        raise RecipeError(
            f"The {kind} {name!r:.80} is a class of the module {module!r:.80}, and no module is imported because it is "
            f"named. In Python import it first, or give the class itself{call}. For the command, install a package "
            f"that has it as an entry point of {plugins.group}, as docs/start/research.md shows."
        )
    found = _at(name)
    if found is None:
        raise RecipeError(
            f"The module {module!r} has no class {cls!r:.80}. Take the release that the file was made with."
        )
    return plugins.require(found, cls)


def _at(place: str) -> object | None:
    """What is at "module:name.name" of the modules that are imported."""
    module, _, path = place.partition(":")
    found: object | None = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# ------------------------------------------------------------------------------------------------ code


def package_of(cls: type[T], plugins: Plugins[T]) -> dict[str, str]:
    """Name and release of the package that offers a class; empty for ours, and where none does."""
    found = _distribution(cls, plugins)
    return {} if found is None else {found.name: found.version}


def code_of(cls: type[T], plugins: Plugins[T]) -> list[Any] | None:
    """What tells whether a class still runs the code that it ran: its package and what that requires, by release, and
    a checksum of its package's source files, whether they are imported or not.

    None where some of its code has no file, as in a notebook, or a file changed since this process began.
    """
    import hashlib  # 10 ms

    modules = {each.__module__ for each in cls.__mro__}
    files: set[Path] = set()
    for module in modules:
        root = module.partition(".")[0]
        if root in NO_CODE:
            continue
        own = getattr(sys.modules.get(module), "__file__", None)
        if own is None or module == "__main__":
            return None
        files.update([Path(own), *_below(root)])
    found = _distribution(cls, plugins)
    digest = hashlib.sha256()
    for file in sorted(files | _installed(found)):
        status, content = file.stat(), file.read_bytes()
        if max(status.st_mtime, status.st_ctime) > STARTED:
            return None
        digest.update(f"{file.name} {len(content)}\0".encode() + content)
    return [*_releases(found), digest.hexdigest()]


def _distribution(cls: type[Any], plugins: Plugins[Any]) -> Distribution | None:
    """The package whose entry point leads to a class."""
    if is_ours(cls):
        return None
    found = (getattr(e, "dist", None) for e in plugins.offered() if _at(e.value) is cls)
    return next((each for each in found if each is not None), None)


def _below(root: str) -> Iterator[Path]:
    """The sources in the folders of a package; none of a module that is a single file."""
    for folder in getattr(sys.modules.get(root), "__path__", ()):
        for start in (os.path.join(folder, room) for room in (ROOMS if root == OURS else ("",))):
            for place, _, names in os.walk(start):
                yield from (Path(place, name) for name in names if name.endswith(SOURCES))


def _installed(found: Distribution | None) -> set[Path]:
    """The sources that a package has installed, where it may be of several single files."""
    named = [] if found is None else found.files or []
    paths = {Path(str(each.locate())) for each in named if each.name.endswith(SOURCES)}
    return {path for path in paths if path.is_file()}


def _releases(found: Distribution | None) -> Iterator[tuple[str, str]]:
    """Of a package and of what it requires, where that is installed."""
    if found is None:
        return
    from importlib.metadata import PackageNotFoundError, version

    yield found.name, found.version
    for line in sorted(found.requires or []):
        name = re.match(r"[\w.\-]+", line)
        try:
            yield line, version(name[0]) if name else ""
        except PackageNotFoundError:
            continue
