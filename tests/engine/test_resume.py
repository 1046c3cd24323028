"""A merge that was stopped goes on where it stopped, and gives the same bytes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twinmerge.engine import write
from twinmerge.engine.calls import merge
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.checkpoint_writer import CheckpointWriter

SHAPES = {"a.weight": (900, 700), "b.bias": (5,), "c.weight": (3, 70_001), "d.weight": (400, 500), "e": (0,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    rng = torch.Generator().manual_seed(0)
    base = {n: 0.02 * torch.randn(s, generator=rng) for n, s in SHAPES.items()}
    for name in ("base", "x", "y"):
        (root / name).mkdir()
        moved = {n: (t if name == "base" else t + 3e-4 * torch.randn(t.shape, generator=rng)) for n, t in base.items()}
        tensors = {**{n: t.bfloat16() for n, t in moved.items()}, "ids": torch.arange(7)}
        save_file(tensors, root / name / "model.safetensors")
    return root


def plan(models: Path, method: str = "ties") -> Merge:
    recipe = Recipe(method, str(models / "base"), {n: str(models / n) for n in "xy"})
    return Merge(recipe, progress=False, tile=65_536)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def whole(models, tmp_path):
    return contents(plan(models).save(tmp_path / "whole"))


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9, 14, 16])
def test_a_stopped_merge_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch, whole, after):
    writes = []
    plain = CheckpointWriter.write

    def stopping(self, name, start, tensor):
        if len(writes) == after:
            raise StopError
        writes.append(name)
        plain(self, name, start, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stopping)
        with pytest.raises(StopError):
            plan(models).save(tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "journal").is_file()
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", lambda self, *w: (again.append(w[0]), plain(self, *w))[1])
        out = plan(models).save(tmp_path / "out")
    assert contents(out) == whole
    assert not (tmp_path / "out.partial").exists()
    if after > 10:
        assert len(again) < 17  # what was done is not done again


def test_what_the_disk_lost_is_done_again(models, tmp_path, monkeypatch, whole):
    """After a power loss: the journal is there, some of the values are not."""
    writes = []
    plain = CheckpointWriter.write

    def stopping(self, name, start, flat):
        if len(writes) == 14:
            raise StopError
        writes.append((name, start))
        plain(self, name, start, flat)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stopping)
        with pytest.raises(StopError):
            plan(models).save(tmp_path / "out")
    file = tmp_path / "out.partial" / "output" / "model.safetensors"
    held = file.read_bytes()
    file.write_bytes(held[:100_000] + bytes(400_000) + held[500_000:])
    assert file.read_bytes() != held
    assert contents(plan(models).save(tmp_path / "out")) == whole


def test_another_recipe_or_another_input_starts_afresh(models, tmp_path, monkeypatch, whole):
    def failing(self, name, start, tensor):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", failing)
        with pytest.raises(StopError):
            plan(models, "average").save(tmp_path / "out")
    assert contents(plan(models).save(tmp_path / "out")) == whole
    key = write_key(models)
    file = models / "x" / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    assert write_key(models) != key
    key, status = write_key(models), file.stat()
    time.sleep(0.02)  # the clock of a file system ticks some hundred times a second
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as copying tools do
    assert write_key(models) != key


def write_key(models: Path) -> str | None:
    from twinmerge.engine.provenance import plan_key

    return plan_key(plan(models).plan)


def test_a_full_disk_leaves_only_the_partial_and_says_what_is_missing(models, tmp_path, monkeypatch, whole):
    def full(self, name, start, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", full)
        with pytest.raises(TwinmergeError, match="[Nn]o space"):
            plan(models).save(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial", "whole"]
    assert contents(plan(models).save(tmp_path / "out")) == whole


KILLED = """
import os, signal, sys
import torch
from twinmerge.engine import ranges
from twinmerge.engine.calls import merge
from twinmerge.store.checkpoint_writer import CheckpointWriter
root, out, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
plain, count = CheckpointWriter.write, [0]
def write(self, *work):
    count[0] += 1
    if count[0] > after:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, *work)
CheckpointWriter.write = write
merge("ties", base=root + "/base", experts={n: root + "/" + n for n in "xy"}, progress=False).save(out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 10_000])
def test_kill_9_and_the_same_command_again(models, tmp_path, after):
    """With the engine's own tile; the last is not killed."""
    command = [sys.executable, "-c", KILLED, str(models)]
    want = tmp_path / "want"
    subprocess.run([*command, str(want), "10000"], check=True)
    killed = subprocess.run([*command, str(tmp_path / "out"), str(after)])
    assert killed.returncode == (0 if after == 10_000 else -9)
    if after != 10_000:
        subprocess.run([*command, str(tmp_path / "out"), "10000"], check=True)
    assert contents(tmp_path / "out") == contents(want)


@pytest.mark.slow
def test_the_command_killed_at_ten_random_times(models, tmp_path):
    """With forked workers, which must not outlive the command."""
    for by, name in enumerate(("base", "x", "y"), 1):
        (tmp_path / name).mkdir()
        rng = torch.Generator().manual_seed(0)
        tensors = {f"layers.{i}.w": torch.randn(2000, 2000, generator=rng).mul_(by).bfloat16() for i in range(12)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    command = [sys.executable, "-m", "twinmerge", "merge", "--method", "average", "--threads", "2"]
    command += [word for n in ("base", "x", "y") for word in ("--expert", f"{n}={tmp_path / n}")]
    start = time.monotonic()
    subprocess.run([*command, "-o", str(tmp_path / "want")], check=True)
    took = time.monotonic() - start
    random.seed(0)
    stopped = 0
    for i in range(10):
        out = tmp_path / f"out{i}"
        running = subprocess.Popen([*command, "-o", str(out)])
        time.sleep(random.uniform(0.4, 1.0) * took)
        running.kill()
        stopped += running.wait() == -9
        subprocess.run([*command, "-o", str(out)], check=True) if not out.exists() else None
        assert contents(out) == contents(tmp_path / "want")
    assert stopped >= 5


@pytest.mark.slow
def test_sixteen_merges_at_once(models, tmp_path):
    command = [sys.executable, "-c", KILLED, str(models)]
    running = [subprocess.Popen([*command, str(tmp_path / f"out{i}"), "10000"]) for i in range(16)]
    assert [p.wait() for p in running] == [0] * 16
    first = contents(tmp_path / "out0")
    assert all(contents(tmp_path / f"out{i}") == first for i in range(16))


def test_models_in_memory_are_not_resumed(models, tmp_path):
    assert write_key(models) is not None
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    base = BertModel(BertConfig(**sizes))
    out = merge("average", experts={"a": base, "b": base}, progress=False).save(tmp_path / "out")
    assert (out / "twinmerge.checksums.json").is_file()
    assert write.OUTPUT in (out / "twinmerge.checksums.json").read_text()
