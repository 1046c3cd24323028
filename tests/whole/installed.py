"""Does what was installed work? Run by test_dist.py where twinmerge and what it needs are, and nothing else.

python -I installed.py FOLDER compiled|plain
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

MODELS = {"base": [[1.0, 2.0], [3.0, 4.0]], "a": [[2.0, 2.0], [3.0, 4.0]], "b": [[1.0, 4.0], [3.0, 2.0]]}
MERGED = [[1.5, 3.0], [3.0, 3.0]]  # the base plus half of each task vector


def main(folder: Path, wanted: str) -> None:
    """Raise what is wrong."""
    import twinmerge
    from twinmerge.maths import fused

    home = Path(twinmerge.__file__).parent
    assert home.is_relative_to(sys.prefix), f"{home} is not of this environment"
    assert twinmerge.__version__ == version("twinmerge")
    assert fused.available() == (wanted == "compiled"), f"compiled library: {fused.available()}, wanted: {wanted}"
    assert len([*(home / "maths").glob("_fused.*")]) == (wanted == "compiled")
    command = str(Path(sys.executable).with_name("twinmerge"))
    assert "merge" in subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout
    for name, values in MODELS.items():
        (folder / name).mkdir(parents=True)
        save_file({"w": np.array(values, np.float32)}, folder / name / "model.safetensors")
    given = ["--base", "base", "--expert", "a=a", "--expert", "b=b"]
    for method, options in {"task_arithmetic": ["-p", "scale=0.5"], "tsv": []}.items():
        subprocess.run([command, "merge", "--method", method, *given, *options, "-o", method], check=True, cwd=folder)
    assert load_file(folder / "task_arithmetic" / "model.safetensors")["w"].tolist() == MERGED
    assert np.isfinite(load_file(folder / "tsv" / "model.safetensors")["w"]).all()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
