"""What is read, and what is refused with a sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint import Checkpoint


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_single_file_by_any_name(tmp_path):
    save_file({"a": torch.ones(2, 3).bfloat16(), "n": torch.tensor(4)}, tmp_path / "weights.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert {n: (s.dtype, s.shape, s.numel, s.bytes, s.is_float) for n, s in checkpoint.specs.items()} == {
        "a": (torch.bfloat16, (2, 3), 6, 12, True),
        "n": (torch.int64, (), 1, 8, False),
    }
    assert checkpoint.read("n").item() == 4


def test_tensor_read_again_after_close(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.close()
    assert checkpoint.read("a").tolist() == [0, 1, 2]


def test_index_wins_over_other_files(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "s2.safetensors")
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    index(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"})
    assert sorted(Checkpoint.open(tmp_path).specs) == ["a", "b"]


@pytest.mark.parametrize("damage", ["cut header", "cut data", "tail", "garbage", "empty", "huge header"])
def test_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut header": whole[:20],
            "cut data": whole[:-1],
            "tail": whole + b"\0",
            "garbage": b"this is no model" * 20,
            "empty": b"",
            "huge header": (len(whole) * 2).to_bytes(8, "little") + whole[8:],
        }[damage]
    )
    with pytest.raises(TwinmergeError, match="model.safetensors is truncated or no safetensors file"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards_is_named(tmp_path):
    for shard in ("s1", "s2"):
        save_file({"a": torch.ones(1), shard: torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    index(tmp_path, {"a": "s1.safetensors", "s2": "s2.safetensors"})
    with pytest.raises(TwinmergeError, match="Tensor 'a' stands in both .*s1.safetensors and .*s2.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shard", ["gone.safetensors", "../model.safetensors", "sub/model.safetensors", "", 3])
def test_shard_that_is_not_in_the_folder_is_refused(tmp_path, shard):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(1)}, place / "model.safetensors")
    index(folder, {"a": shard})
    with pytest.raises(TwinmergeError, match="names the shard .*, which is not in the folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [], "b": {}}}'])
def test_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TwinmergeError, match="is not a valid index"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.pth", "model.ckpt", "a.pt"])
def test_only_pickles_is_refused_with_advice(tmp_path, file):
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(TwinmergeError, match=f"pickled weights .{file}.*can run code.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_nothing_and_too_much_are_refused(tmp_path):
    with pytest.raises(TwinmergeError, match="holds no safetensors file"):
        Checkpoint.open(tmp_path)
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TwinmergeError, match="holds 2 safetensors files but no model.safetensors.index.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused_with_advice(tmp_path, dtype):
    save_file({"a": torch.ones(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(TwinmergeError, match="Tensor 'a' in .* has dtype F8_E.*Convert the model to bfloat16"):
        Checkpoint.open(tmp_path)
