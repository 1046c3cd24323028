"""Which code a class of another package runs: a merge goes on only with the code that it began with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import twinmerge as tm
from twinmerge import origin
from twinmerge.engine.provenance import classes_of, plan_key
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.registry import METHODS, method_class
from twinmerge.origin import code_of, name_of, package_of

METHOD = '''
"""A method of a package, whose formula is in another of its files."""

from twinmerge.methods import Method
from third_party.formula import formula


class Third(Method):
    """θ0 + what the formula says."""

    def apply(self, tile, known):
        return formula(tile)
'''
SUM = "def formula(tile):\n    return tile.base + tile.x.sum(0)\n"


def install(site: Path, formula: str = SUM, release: str = "1.0", requires: str = "") -> None:
    """The package third-party in a folder of installed packages, with its entry point."""
    files = {
        "third_party/__init__.py": "",
        "third_party/method.py": METHOD,
        "third_party/formula.py": formula,
        "third_party-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: third-party\nVersion: {release}\n{requires}",
        "third_party-1.0.dist-info/entry_points.txt": "[twinmerge.methods]\nthird = third_party.method:Third\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder of installed packages that this process looks into."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(origin, "STARTED", float("inf"))
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.partition(".")[0] == "third_party"]:
        del sys.modules[name]


def made(tmp_path: Path, rows: int) -> dict[str, Any]:
    """A base and two experts in folders."""
    rng = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(rows, 1000, generator=rng) for i in range(3)}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        moved = {n: x + (name != "base") * 0.01 * torch.randn(x.shape, generator=rng) for n, x in base.items()}
        save_file(moved, tmp_path / name / "model.safetensors")
    return {"base": str(tmp_path / "base"), "experts": {n: str(tmp_path / n) for n in "ab"}}


def test_a_name_that_an_installed_package_offers_leads_to_its_class(site: Path, tmp_path: Path) -> None:
    """A recipe that was written where the class was no package's yet is merged as by the name that it has now."""
    models = made(tmp_path, 2)
    assert "third_party" not in sys.modules
    merged = [
        tm.merge(name, **models, progress=False).save(tmp_path / f"out{i}")
        for i, name in enumerate(["third_party.method:Third", "third"])
    ]
    assert all(
        torch.equal(x, load_file(merged[1] / "model.safetensors")[n])
        for n, x in load_file(merged[0] / "model.safetensors").items()
    )
    with pytest.raises(TwinmergeError, match="no module is imported because it is named"):
        tm.merge("third_party_other:Third", **models)
    with pytest.raises(TwinmergeError, match="has no class 'Fourth'"):
        tm.merge("third_party.method:Fourth", **models)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    return made(tmp_path, 2)


def test_a_package_that_changed_has_another_key(site: Path, models: dict[str, Any]) -> None:
    def key() -> str | None:
        return plan_key(tm.merge("third", **models).plan)

    first = key()
    assert first is not None and key() == first
    install(site)
    assert key() == first  # the same again, installed anew
    install(site, SUM.replace("sum", "mean"))
    other = key()
    assert other not in (None, first)
    install(site, release="1.1")
    assert key() not in (None, first, other)
    install(site, requires="Requires-Dist: numpy>1\nRequires-Dist: not-there-at-all\n")
    assert key() not in (None, first)
    (site / "third_party" / "sub").mkdir()
    (site / "third_party" / "sub" / "late.py").write_text("x = 1\n")  # imported within a function, maybe
    assert key() not in (None, first)


def test_what_changed_since_it_was_imported_is_not_resumed(
    site: Path, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = tm.merge("third", **models)
    monkeypatch.setattr(origin, "STARTED", os.stat(site / "third_party" / "formula.py").st_ctime - 1)
    assert plan_key(merge.plan) is None
    assert plan_key(tm.merge("ties", **models).plan) is not None  # ours is older than this process


def test_our_own_methods_are_told_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    plain: Callable[[Path], bytes] = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.append(self), plain(self))[1])
    first = code_of(method_class("ties"), METHODS)
    names = {"/".join(path.parts[-2:]) for path in read}
    assert {"methods/ties.py", "kit/trim.py", "maths/select.py", "engine/combine.py", "recipes/lines.py"} <= names
    monkeypatch.setattr(Path, "read_bytes", lambda self: plain(self) + b"#" * (self.name == "trim.py"))
    assert first is not None and code_of(method_class("ties"), METHODS) not in (None, first)


def test_provenance_names_the_package_and_its_release(site: Path, models: dict[str, Any], tmp_path: Path) -> None:
    merge = tm.merge(
        "third", lines={"a": 0.5, "b": 0.0}, progress=False, **models
    )  # LiNeS puts a class of ours around it
    assert [each.__name__ for each in classes_of(merge.plan)] == ["Third"]
    written = json.loads((merge.save(tmp_path / "out") / "twinmerge.json").read_text())
    assert written["versions"]["third-party"] == "1.0" and written["versions"]["twinmerge"] == tm.__version__
    assert package_of(method_class("third"), METHODS) == {"third-party": "1.0"}
    assert package_of(method_class("ties"), METHODS) == {} and name_of(method_class("third"), METHODS) == "third"


WRONG = """
import os, signal
def formula(tile):
    if tile.at.name == "w2":
        os.kill(os.getpid(), signal.SIGKILL)
    return tile.base * 0 + 7
"""
PROGRAM = """
import json, sys
import twinmerge as tm
models, out = json.loads(sys.argv[1]), sys.argv[2]
tm.merge("third", progress=False, **models).save(out)
"""


@pytest.mark.slow
def test_a_killed_merge_begins_anew_with_the_mended_package(tmp_path: Path) -> None:
    """Against the formula. Each run is a process of its own, as with the command."""
    site, models = tmp_path / "site", made(tmp_path, 1100)

    def run(out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, json.dumps(models), str(tmp_path / out)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    install(site, WRONG)
    assert run("out").returncode == -signal.SIGKILL
    assert len((tmp_path / "out.partial" / "journal").read_text().splitlines()) > 1  # some of it is there
    install(site)
    assert not (again := run("out")).returncode, again.stderr
    base, a, b = (load_file(f"{tmp_path}/{n}/model.safetensors") for n in ("base", "a", "b"))
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, a[name] + b[name] - base[name])
