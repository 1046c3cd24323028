"""mergekit in an environment of its own; it is only ever run by its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MERGEKIT = "0.1.5"


def peer_versions(program: Path) -> dict[str, Any]:
    """What stands in mergekit's environment."""
    code = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({n: version(n) for n in ('mergekit', 'torch', 'safetensors', 'transformers')}))"
    )
    line = [str(program.with_name("python")), "-c", code]
    return {"peer_versions": json.loads(subprocess.run(line, capture_output=True, check=True).stdout)}


def mergekit_yaml(folder: Path, torch: str, constraints: Path) -> Path:
    """The `mergekit-yaml` of an environment in `folder`, made the first time: the same torch and the same pins as
    ours."""
    program, ready = folder / "bin" / "mergekit-yaml", folder / "ready.json"
    wanted = {"mergekit": MERGEKIT, "torch": torch, "python": sys.version}
    if not ready.is_file() or json.loads(ready.read_text()) != wanted:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "-c", str(constraints)]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([*pip, f"torch=={torch}"], check=True)
        subprocess.run([*pip, f"mergekit=={MERGEKIT}"], check=True)
        ready.write_text(json.dumps(wanted))
    return program
