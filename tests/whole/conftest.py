"""Tiny models, and an output of every kind that is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def operations() -> ModuleType:
    found = importlib.util.spec_from_file_location("operations", Path(__file__).with_name("operations.py"))
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def zoo(operations: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = operations.Zoo(tmp_path_factory.mktemp("zoo"))
    made.make()
    for name in ("merge", "extract", "lora merge", "export lora", "materialise", "measure"):
        operations.OPERATIONS[name](made, made.root / name)
    return made
