"""Threads stay as they were; and which of a test's many cases run always, while the others are slow.

`@pytest.mark.few(n)`: n at even distances. `@pytest.mark.kinds("method")`: where this parameter names a merging method,
the first of each kind of methods, with whatever other parameters the case has. Hypothesis tries 40 examples, and 100
with `make test-all`, where a test does not say how many.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator

import pytest
import torch
from hypothesis import settings

from twinmerge.maths.threads import OMP
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import method_class

settings.register_profile("thorough", settings(), max_examples=100)
settings.register_profile("quick", settings(), max_examples=40)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A test leaves the number of threads as it was: with more of them than cores, what comes after takes many times as
    long."""
    threads, said = torch.get_num_threads(), os.environ.get(OMP)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    os.environ.pop(OMP, None)
    if said is not None:
        os.environ[OMP] = said


def kind(name: str) -> Hashable:
    """Methods of one kind go the same way through the engine."""
    cls = method_class(name)
    return cls.grain, cls.has_rule(), cls.space, cls.passes is Method.passes, cls.outputs, tuple(cls.needs)


def kept(cases: list[pytest.Item]) -> set[pytest.Item]:
    """Those of a test that run always."""
    few, kinds = (cases[0].get_closest_marker(name) for name in ("few", "kinds"))
    if few is not None:
        (count,) = few.args
        return {cases[i * (len(cases) - 1) // max(1, count - 1)] for i in range(count)}
    assert kinds is not None
    (field,) = kinds.args
    first: dict[Hashable, pytest.Item] = {}
    for case in cases:
        given = case.callspec.params  # type: ignore[attr-defined]
        others = tuple(repr(value) for name, value in given.items() if name != field)
        first.setdefault((kind(given[field]), others), case)
    return set(first.values())


@pytest.hookimpl(tryfirst=True)  # before the cases that are marked slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        marked = item.get_closest_marker("few") or item.get_closest_marker("kinds")
        if marked and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        always = kept(cases)
        for case in cases:
            if case not in always:
                case.add_marker(pytest.mark.slow)
