"""Every family does what docs/families.md says, and nothing wrong."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

_spec = util.spec_from_file_location("family_checks", Path(__file__).parent / "family_checks.py")
assert _spec is not None and _spec.loader is not None
family_checks = util.module_from_spec(_spec)
import sys  # noqa: E402  (dataclasses look their module up)

sys.modules["family_checks"] = family_checks
_spec.loader.exec_module(family_checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", family_checks.FAMILIES)
def test_a_family_is_as_the_page_says(name: str) -> None:
    found = family_checks.check(name)
    assert found.sound, found
    assert family_checks.row(found) in family_checks.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_every_family() -> None:
    lines = family_checks.PAGE.read_text(encoding="utf-8").split("\n")
    listed = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ") and "`" in line]
    assert listed == sorted(family_checks.FAMILIES, key=listed.index) and len(listed) >= 90
