"""Checkpoints of a run, against the decay that they stand for."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.engine.checkpoints import checkpoint_weights, checkpoints_in, merge_checkpoints
from twinmerge.errors import DataError, UsageError

DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: math.cos(math.pi * u / 2) ** 2,
    "minus_sqrt": lambda u: 1 - u**0.5,
}


@given(st.sampled_from(sorted(DECAY)), st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_weights_are_those_of_updates_that_decay(schedule: str, updates: list[float]) -> None:
    """The merge is the first checkpoint and all updates, each by what the decay has left of it."""
    points = [0.3]
    for update in updates:
        points.append(points[-1] + update)
    n = len(points)
    want = points[0] + sum(DECAY[schedule](j / n) * update for j, update in enumerate(updates, 1))
    weights = checkpoint_weights(n, schedule)  # type: ignore[arg-type]
    assert sum(w * p for w, p in zip(weights, points, strict=True)) == pytest.approx(want, abs=1e-12)
    assert sum(weights) == pytest.approx(1.0) and min(weights) >= 0


def test_weights_by_hand() -> None:
    assert checkpoint_weights(3, "ema", 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert checkpoint_weights(2, "cosine") == pytest.approx([0.5, 0.5])
    assert checkpoint_weights(1, "minus_sqrt") == [1.0]
    for bad in (0.0, 1.0, -1.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            checkpoint_weights(3, "ema", bad)
    with pytest.raises(UsageError, match="no schedule 'sqrt'"):
        checkpoint_weights(3, "sqrt")  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for step in (500, 1000, 1500, 20):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"not read")
        for p in model.parameters():
            p.data += 0.01 * torch.randn_like(p)
    (tmp_path / "run" / "logs").mkdir()
    return tmp_path / "run"


def test_a_run_is_merged_by_step_and_not_by_name(run: Path, tmp_path: Path) -> None:
    assert list(checkpoints_in(run)) == [20, 500, 1000, 1500]
    merge_checkpoints(run, tmp_path / "out", schedule="minus_sqrt", last=3, progress=False)
    got = load_file(tmp_path / "out" / "model.safetensors")
    parts = [load_file(run / f"checkpoint-{s}" / "model.safetensors") for s in (500, 1000, 1500)]
    weights = checkpoint_weights(3, "minus_sqrt")
    for name, value in got.items():
        want = sum(w * p[name].double() for w, p in zip(weights, parts, strict=True))
        assert torch.allclose(value.double(), want, atol=1e-7)
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "optimizer.pt").exists()


def test_hundreds_of_checkpoints_are_read_side_by_side(run: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    source = list(checkpoints_in(run).values())
    for i in range(300):
        (many / f"step_{i}").symlink_to(source[i % 4], target_is_directory=True)
    got = merge_checkpoints(many, schedule="linear", progress=False).state_dict()
    for name, value in got.items():
        want = sum(load_file(p / "model.safetensors")[name].double() for p in source) / 4
        assert torch.allclose(value.double(), want, atol=1e-6)


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no checkpoints inside"):
        checkpoints_in(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        checkpoints_in(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has 4 checkpoints"):
        merge_checkpoints(run, last=5, progress=False)
    (run / "checkpoint-20").rename(run / "checkpoint-0500")
    with pytest.raises(DataError, match="are of one step"):
        checkpoints_in(run)
    (run / "checkpoint-0500").rename(run / "run2-step7")
    with pytest.raises(DataError, match="several numbers"):
        checkpoints_in(run)


def test_folders_of_no_run_adapters_and_pickles_are_told_of(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    for name, message in {
        "model-v2": "is no checkpoint of a run",
        "epoch-3": "names of two kinds",
    }.items():
        copy.mkdir()
        for each in ("checkpoint-500", "checkpoint-1000"):
            (copy / each).symlink_to(run / each, target_is_directory=True)
        (copy / name).symlink_to(run / "checkpoint-1500", target_is_directory=True)
        with pytest.raises(DataError, match=message):
            checkpoints_in(copy)
        shutil.rmtree(copy)
    for name, message in {
        "adapter_model.safetensors": "twinmerge lora merge",
        "pytorch_model.bin": "Add --allow-pickle",
    }.items():
        (copy / "checkpoint-1").mkdir(parents=True)
        (copy / "checkpoint-1" / name).write_bytes(b"")
        with pytest.raises(DataError, match=message):
            checkpoints_in(copy)
        if name.endswith(".bin"):
            assert [*checkpoints_in(copy, allow_pickle=True)] == [1]
        shutil.rmtree(copy)
