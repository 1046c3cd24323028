"""Old names of modules, public names and commands: they go on working, with a warning, until 0.1.0."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MOVED = {
    "engine.lines": "recipes.lines",
    "engine.lora": "engine.adapters.merge",
    "engine.lora_extract": "engine.adapters.extract",
    "engine.lora_folder": "engine.adapters.folder",
    "engine.mergekit": "recipes.mergekit",
    "engine.names": "recipes.names",
    "engine.plain_data": "recipes.plain_data",
    "engine.recipe": "recipes.recipe",
    "engine.side_files": "engine.folder",
    "methods.base": "methods.kit.base",
    "methods.fold": "methods.kit.fold",
    "methods.masks": "methods.kit.masks",
    "methods.registry": "methods.kit.registry",
    "methods.spectral": "methods.kit.spectral",
    "methods.tall": "methods.kit.tall",
    "methods.trim": "methods.kit.trim",
    "statistics.rows": "tasks.rows",
    "models.statistics": "statistics.file",
    "twin.converted": "twin.mixing.converted",
    "twin.early": "models.layers",
    "twin.extract": "twin.masks.extract",
    "twin.features": "twin.routers.kit.features",
    "twin.forward": "twin.mixing.forward",
    "twin.glance": "twin.mixing.glance",
    "twin.layout": "twin.mixing.layout",
    "twin.levels": "twin.masks.levels",
    "twin.masked_modules": "twin.mixing.masked_modules",
    "twin.mixture": "twin.mixing.mixture",
    "twin.modules": "twin.mixing.modules",
    "twin.moments": "statistics.moments",
    "twin.novelty": "twin.routers.kit.novelty",
    "twin.parts": "twin.mixing.parts",
    "twin.planner": "twin.mixing.planner",
    "twin.routers.calibration": "twin.routers.kit.calibration",
    "twin.routers.fit": "twin.routers.kit.fit",
    "twin.routers.linear": "twin.routers.kit.linear",
    "twin.routers.router": "twin.routers.kit.base",
    "twin.runtime": "twin.mixing.runtime",
    "twin.rebuilt": "twin.mixing.rebuilt",
    "twin.sample": "twin.mixing.sample",
    "twin.statistics": "twin.routers.kit.aggregates",
}
"""Old name -> name of today, of modules below twinmerge."""

NAMES = {
    "compress": ("build_masks", "twin.masks.build", "write_masks"),
    "engine.merge.merge": ("merge", "engine.calls", "merge"),
    "extract": ("extract_masked", "twin.masks.extract", "extract_masked"),
    "twin.masks.Compressed": ("twin.masks.results.BuiltMasks", "twin.masks.results", "BuiltMasks"),
    "twin.masks.changed_tensors": ("twin.masks.build.changed_tensors", "twin.masks.build", "changed_tensors"),
    "twin.masks.compress": ("build_masks", "twin.masks.build", "write_masks"),
    "twin.masks.in_given_order": ("twin.masks.build.in_given_order", "twin.masks.build", "in_given_order"),
    "twin.masks.mask_merge": ("twin.masks.build.mask_merge", "twin.masks.build", "mask_merge"),
    "twin.masks.walk": ("twin.masks.build.walk", "twin.masks.build", "walk"),
    "twin.masks.extract.extract": ("extract_masked", "twin.masks.extract", "extract_masked"),
}
"""Old name -> what to write now, and the module and the name of what it still gives."""

COMMANDS = {"compress": "masks build", "extract": "masks extract", "twin run": "twin predict"}
"""Old command -> command of today."""

OPTIONS = {
    "search": {"--rows": "--limit"},
    "masks build": {"--rows": "--limit"},
    "twin build": {"--rows": "--limit"},
    "twin export": {"--for": "--server"},
}
"""Command -> old option -> option of today."""

KEYWORDS = {"free": "unconstrained", "batch_rows": "batch_size"}
"""Old argument of the calls of a twin -> argument of today."""


def old_name(module: str, name: str, known: Iterable[str] = ()) -> Any:
    """What a module's `__getattr__` gives for an old name.

    Args:
        module: of this package.
        name: that it has not.
        known: the names that it has, of which the nearest is named.

    Raises:
        AttributeError: it never was one.
    """
    package, _, below = module.partition(".")
    found = NAMES.get(f"{below}.{name}" if below else name)
    if found is None:
        raise no_attribute(f"module {module!r}", name, known)
    new, home, now = found
    warnings.warn(
        f"{module}.{name} is {package}.{new} now. The old name goes with 0.1.0.", DeprecationWarning, stacklevel=3
    )
    return getattr(import_module(f"{package}.{home}"), now)


def no_attribute(owner: str, name: str, known: Iterable[str]) -> AttributeError:
    """The error about an attribute that is not there, with the nearest that is.

    Example:
        >>> no_attribute("module 'twinmerge'", "mrge", ["merge", "diff"])
        AttributeError("module 'twinmerge' has no attribute 'mrge'. Did you mean 'merge'?")
    """
    from twinmerge.errors import nearest

    near = "" if name.startswith("_") else nearest(name, (each for each in known if each != name and each[0] != "_"))
    text = f"{owner} has no attribute {name!r}{'.' if near else ''}{near}"
    return AttributeError(text, name=name, obj=None)  # with its object, Python would name the nearest once more


def new_command(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words of a command line with the names of today, of the command and its options, and what to say of old ones.

    Example:
        >>> new_command(["twin", "run", "T"])
        (['twin', 'predict', 'T'], '`twinmerge twin run` is `twinmerge twin predict` now. The old name goes with 0.1.0.')
        >>> new_command(["search", "--rows=9"])
        (['search', '--limit=9'], '--rows of `twinmerge search` is --limit now. The old name goes with 0.1.0.')
        >>> new_command(["twin", "build"])
        (['twin', 'build'], None)
    """
    found, renamed = list(words), []
    for old, new in COMMANDS.items():
        if found[: len(own := old.split())] == own:
            found = [*new.split(), *found[len(own) :]]
            renamed.append(f"`twinmerge {old}` is `twinmerge {new}` now.")
            break
    for command, options in OPTIONS.items():
        if found[: len(own := command.split())] != own:
            continue
        for i, word in enumerate(found):
            option, equals, value = word.partition("=")
            if option in options:
                found[i] = f"{options[option]}{equals}{value}"
                renamed.append(f"{option} of `twinmerge {command}` is {options[option]} now.")
    return found, f"{' '.join(renamed)} The old name goes with 0.1.0." if renamed else None


def with_old_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which takes an old argument as the one of today, with a warning."""

    @wraps(function)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> T:
        for old, new in KEYWORDS.items():
            if old in kwargs and new not in kwargs:
                warnings.warn(f"{old}= is {new}= now. The old name goes with 0.1.0.", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
        return function(*args, **kwargs)

    return renamed


def with_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a method that a call was given, those in an old mapping `parameters` among them, with a
    warning."""
    found, old = dict(given), given.get("parameters")
    if isinstance(old, Mapping):
        warnings.warn(
            "parameters={...} is **{...} now: give each parameter by its name. The old name goes with 0.1.0.",
            DeprecationWarning,
            stacklevel=4,
        )
        found = {**old, **{name: value for name, value in found.items() if name != "parameters"}}
    return found


class _Finder(MetaPathFinder):
    """Asked first: files of a package that has moved would be found again under its old name, and run twice."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MOVED:
            return None
        new = f"{package}.{MOVED[name]}"
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        warnings.warn_explicit(
            f"{fullname} is {new} now. The old name goes with 0.1.0.",
            DeprecationWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
        )
        return ModuleSpec(fullname, _Loader(new))


class _Loader(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; the import has put another spec into it."""
        module.__spec__ = self.spec


def serve_old_names() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
