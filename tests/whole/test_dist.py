"""What `python -m build` makes installs into an empty environment and works there: the wheel, and the source
distribution.

`make dist` sets DIST to the folder that it has built into; otherwise it is built here, from a copy of the tree.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
TREES = ("benchmarks", "docs", "src", "tests")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "_fused.*", "out")
TESTED = ("tests/maths/test_fused.py", "tests/methods/test_ties.py", "tests/cli/test_command.py")
TESTS_NEED = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist")


def run(command: Sequence[str | Path], folder: Path, **more: str) -> str:
    """What a process says; pip takes the pinned releases, and nothing of this tree is in its way."""
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**without, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), **more}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def built(folder: Path) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    if given := os.environ.get("DIST"):
        out = ROOT / given
    else:
        needed = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-c",
            ROOT / "constraints.txt",
            "setuptools",
        ]
        if subprocess.run(list(map(str, needed)), cwd=folder, capture_output=True).returncode:
            pytest.skip("building and installing need the package registry, and pip cannot reach it")
        source, out = folder / "source", folder / "dist"
        for name in TREES:
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
        for file in ROOT.iterdir():
            if file.is_file():
                shutil.copy(file, source)
        run([sys.executable, "-m", "build", "--outdir", out], source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def libraries(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if "/_fused." in name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_built_works_in_an_empty_environment(tmp_path: Path) -> None:
    wheel, sdist = built(tmp_path)
    compiles = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
    kind = "compiled" if compiles else "plain"
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert sdist.name == f"twinmerge-{version}.tar.gz"
    assert re.fullmatch(rf"twinmerge-{re.escape(version)}-py3-none-\w+\.whl", wheel.name)
    assert wheel.name.endswith("-any.whl") != compiles
    assert len(libraries(wheel)) == compiles

    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {*TREES, "Makefile", "constraints.txt", "setup.py"} <= {path.name for path in unpacked.iterdir()}
    assert not [*unpacked.rglob("*.so"), *unpacked.rglob("__pycache__")]

    run([sys.executable, "-m", "venv", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip"]
    checked = [python, "-I", HERE / "installed.py"]
    run([*pip, "install", wheel], tmp_path)
    run([*pip, "check"], tmp_path)
    run([*checked, tmp_path / "of_wheel", kind], tmp_path)

    run([*pip, "install", "--force-reinstall", "--no-deps", sdist], tmp_path)
    run([*checked, tmp_path / "of_sdist", kind], tmp_path)
    run([*pip, "install", *TESTS_NEED], tmp_path)
    assert " passed" in run([python, "-m", "pytest", "-q", *TESTED], unpacked)

    run([*pip, "wheel", "--no-deps", "-w", tmp_path / "plain", sdist], tmp_path, CC="false")
    (plain,) = (tmp_path / "plain").iterdir()
    assert plain.name == f"twinmerge-{version}-py3-none-any.whl"
    assert not libraries(plain)
    run([*pip, "install", "--force-reinstall", "--no-deps", plain], tmp_path)
    run([*checked, tmp_path / "of_plain", "plain"], tmp_path)
