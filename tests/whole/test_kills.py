"""Every writing command, killed or out of space at system calls that write: the old or the new, and the same bytes
when run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("operations.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def wrong(kind: str, folder: Path, share: int, *names: str) -> list[str]:
    """What went wrong, operation by operation."""
    command = [sys.executable, str(SCRIPT), kind, str(folder), str(share), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_sample_of_the_calls(tmp_path: Path) -> None:
    assert wrong("kill,full", tmp_path, 2, "plain merge") == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_every_call_of_every_command(tmp_path: Path, kind: str) -> None:
    assert wrong(kind, tmp_path, 100) == []
