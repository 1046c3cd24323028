"""The command on models that are no plain folders of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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


def test_files_and_pickles(unknown: Path, command: Callable[..., Any]) -> None:
    files = {name: unknown / name / "model.safetensors" for name in ("base", "a")}
    named = ("--method", "average", "--expert", f"a={files['base']}", "--expert", f"b={files['a']}")
    assert command("merge", *named, "-o", unknown / "m.safetensors").code == 0
    wanted = load_file(files["base"])["w"] + np.float32(0.125)
    assert np.allclose(load_file(unknown / "m.safetensors")["w"], wanted, rtol=0, atol=1e-6)
    again = command("merge", *named, "-o", unknown / "m.safetensors")
    assert again.code == 2 and "is there already" in " ".join(again.err.split())
    assert command("merge", *named, "-o", unknown / "m.safetensors", "--overwrite").code == 0
    assert command("check", *named, "-o", unknown / "n.safetensors").code == 0
    torch.save({"w": torch.ones(5, 4)}, unknown / "old.ckpt")
    old = ("--method", "average", "--expert", f"a={unknown / 'old.ckpt'}", "-o", unknown / "old")
    refused = command("merge", *old)
    assert refused.code == 3 and "weights_only=True" in "".join(refused.err.split())
    assert command("merge", *old, "--allow-pickle").code == 0
    assert (load_file(unknown / "old" / "model.safetensors")["w"] == 1).all()


def test_several_documents_by_names(unknown: Path, command: Callable[..., Any]) -> None:
    one = (unknown / "r.yaml").read_text()
    last = f"merge_method: linear\nmodels:\n- {{model: r, parameters: {{weight: 1}}}}\n- {{model: {unknown}/a, parameters: {{weight: 1}}}}\n"
    (unknown / "two.yaml").write_text(f"name: r\n{one}---\n{last}")
    for at, options in enumerate(((), ("--intermediate-dir", unknown / "way"))):
        assert command("merge", unknown / "two.yaml", unknown / f"o{at}", "--by-names", *options).code == 0
    one, two = ((unknown / f"o{at}" / "model.safetensors").read_bytes() for at in range(2))
    assert one == two and (unknown / "way" / "r" / "model.safetensors").is_file()


def test_a_folder_of_parts(unknown: Path, command: Callable[..., Any]) -> None:
    for name in ("base", "a", "b"):
        folder = unknown / name
        listed = {"_class_name": "DiffusionPipeline", "unet": ["diffusers", "UNet2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(listed))
        (folder / "unet").mkdir()
        (folder / "config.json").unlink()
        (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
        (folder / "model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.safetensors")
    checked = json.loads(command("check", unknown / "r.yaml", "--json").out)
    assert checked["parts"] == ["unet"] and checked["merged_tensors"] == 1
    assert command("merge", unknown / "r.yaml", unknown / "out").code == 0
    base, out = (load_file(unknown / n / "unet" / "diffusion_pytorch_model.safetensors")["w"] for n in ("base", "out"))
    assert np.allclose(out, base - np.float32(0.125), rtol=0, atol=1e-6)
    assert command("verify", unknown / "out").code == 0
    assert command("check", unknown / "r.yaml", "--plan", unknown / "plan.json").code == 2
