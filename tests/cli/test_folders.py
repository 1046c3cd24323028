"""The command on models that are no plain folders of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5, 4)).astype(np.float32)
    for name, change in {"base": 0, "a": 0.25, "b": -0.5}.items():
        (tmp_path / name).mkdir()
        save_file({"w": base + np.float32(change)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "of-tomorrow"}))
    (tmp_path / "r.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels:\n"
        + "".join(f"- {{model: {tmp_path}/{n}, parameters: {{weight: 0.5}}}}\n" for n in "ab")
    )
    return tmp_path


def test_by_names(unknown: Path, command: Callable[..., Any]) -> None:
    options = ("--method", "task_arithmetic", "--base", unknown / "base", "-p", "scale=0.5")
    experts = ("--expert", f"a={unknown / 'a'}", "--expert", f"b={unknown / 'b'}")
    refused = command("merge", *options, *experts, "-o", unknown / "out")
    assert refused.code == 3 and "--by-names" in refused.err
    assert command("merge", *options, *experts, "--by-names", "-o", unknown / "out").code == 0
    assert command("check", unknown / "r.yaml", "--by-names").code == 0
    done = command("merge", unknown / "r.yaml", unknown / "two", "--by-names")
    assert done.code == 0 and "no class is asked" in " ".join((done.out + done.err).split())
    wanted = load_file(unknown / "base" / "model.safetensors")["w"] - np.float32(0.125)
    for name in ("out", "two"):
        assert np.allclose(load_file(unknown / name / "model.safetensors")["w"], wanted, rtol=0, atol=1e-6)
    assert command("merge", unknown / "r.yaml", unknown / "o", "--by-names", "--smoke", unknown / "r.yaml").code == 2
