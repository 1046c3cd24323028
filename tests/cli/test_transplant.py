"""`twinmerge transplant`: what it says, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_what_it_says(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("transplant", zoo.alice, "--tokenizer", zoo.lm, "--dry-run")
    count = json.loads((zoo.lm / "tokenizer.json").read_text())["model"]["vocab"]
    first, *_, last = ran.err.splitlines()
    assert (
        ran.code == 0 and ran.out == "" and first.startswith(f"{len(count)} of {len(count)} tokens are shared (100 %);")
    )
    assert last == "Nothing is written (--dry-run)."
    ran = command("transplant", zoo.alice, "--tokenizer", zoo.lm, "--method", "copy", "-o", tmp_path / "out")
    assert ran.code == 0 and "no new rows." in ran.err and f"-> {tmp_path / 'out'}" in " ".join(ran.err.split())
    assert command("verify", tmp_path / "out").code == 0


def test_mistakes(command: Any, zoo: Any, tmp_path: Path) -> None:
    ran = command("transplant", zoo.alice, "--tokenizer", zoo.lm)
    assert ran.code == 2 and ran.err.startswith("Error: No output is named. Add -o FOLDER, or --dry-run")
    ran = command("transplant", zoo.alice, "--tokenizer", tmp_path, "-o", tmp_path / "out")
    assert ran.code == 3 and "has no tokenizer that can be read" in " ".join(ran.err.split())
    ran = command("transplant", zoo.alice, "--tokenizer", zoo.lm, "--method", "best", "-o", tmp_path / "out")
    assert ran.code == 2 and "'omp'" in ran.err and not (tmp_path / "out").exists()
