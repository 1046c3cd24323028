"""`@pytest.mark.few(n)`: of a test's many cases n run always, at even distances; the others are slow."""

from __future__ import annotations

from collections import defaultdict

import pytest


@pytest.hookimpl(tryfirst=True)  # before the cases that are marked slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("few")
        assert marker is not None
        (count,) = marker.args
        kept = {i * (len(cases) - 1) // max(1, count - 1) for i in range(count)}
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker(pytest.mark.slow)
