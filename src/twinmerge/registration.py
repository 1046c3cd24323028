"""Has transformers open twins by itself, once both are imported, in whichever order; neither imports the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."
CALLS = {
    f"{AUTO}configuration_auto": ("twin.auto.config", "register_config"),
    f"{AUTO}tokenization_auto": ("twin.auto.config", "register_tokenizer"),
    f"{AUTO}modeling_auto": ("twin.auto.model", "register_models"),
}
"""Module of transformers -> what registers with its auto class, by module and name."""


def register_with_transformers() -> None:
    """Register a twin's classes with the auto classes that are imported already, and with the others when they are."""
    for name in CALLS:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(name: str) -> None:
    module, function = CALLS[name]
    getattr(import_module(f"twinmerge.{module}"), function)()


class _Finder(MetaPathFinder):
    """Waits for the auto classes."""

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in CALLS or name in self._asked:
            return None
        self._asked.add(name)  # the others are asked next, and this one with them
        try:
            spec = find_spec(name)
        finally:
            self._asked.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name)
        return spec


class _Loader(Loader):
    """The module's own loader, and then the registration."""

    def __init__(self, own: Loader, name: str) -> None:
        self.own, self.name = own, name

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.own, name)  # what else a loader can do, such as get_source

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        _register(self.name)
