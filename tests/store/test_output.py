"""Files as safetensors itself would write them; a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.output import OutputFolder, header_of, layout, write_checkpoint

MIXED = {
    "b.half": torch.tensor([1.5, -2.0, 0.1], dtype=torch.bfloat16),
    "a.bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "c.flags": torch.tensor([True, False]),
    "d.scalar": torch.tensor(3.25),
    "e.empty": torch.empty(0, 4),
    "f.ids": torch.arange(5),
    "g.double": torch.tensor([[0.1, 0.2]], dtype=torch.float64),
    "h.f16": torch.tensor([65504.0], dtype=torch.float16),
    "i.turned": torch.arange(6.0).reshape(2, 3).T,
}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 10**9) -> dict[str, dict[str, Spec]]:
    files = layout(specs_of(tensors), shard_bytes)
    write_checkpoint(folder, files, [(name, tensors[name]) for specs in files.values() for name in specs])
    return files


def test_header_is_these_bytes():
    got = header_of({"w": Spec(torch.float32, (2, 1)), "é": Spec(torch.int8, (3,))}, {"format": "pt"})
    text = (
        '{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"é":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}'
    ).encode()
    assert got == len(got[8:]).to_bytes(8, "little") + text + b" " * (len(got) - 8 - len(text))
    assert len(got) % 8 == 0 and len(got) - 8 - len(text) < 8


@pytest.mark.parametrize("name", ["w", "ww", "www", "wwww", "wwwww", "wwwwww", "wwwwwww", "wwwwwwww"])
def test_one_file_equals_what_safetensors_writes(tmp_path, name):
    tensors = {name: torch.arange(6.0).reshape(2, 3), "z": torch.ones(1)}
    write(tmp_path, tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_every_dtype_and_odd_shape_comes_back(tmp_path):
    files = write(tmp_path, MIXED)
    assert [spec.dtype.itemsize for spec in files["model.safetensors"].values()] == [8, 8, 4, 4, 4, 2, 2, 1, 1]
    assert list(files["model.safetensors"])[:2] == ["f.ids", "g.double"]
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape and torch.equal(got[name], tensor)


def test_shards_split_by_name_and_size_with_an_index(tmp_path):
    tensors = {n: torch.full((4,), float(i)) for i, n in enumerate(["c", "a", "b", "e", "d"])}
    tensors["b"] = torch.zeros(100)  # larger than a shard: alone in its own
    files = write(tmp_path, tensors, shard_bytes=32)
    assert [list(specs) for specs in files.values()] == [["a"], ["b"], ["c", "d"], ["e"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 4 * 16 + 400}
    assert index["weight_map"] == {
        "a": "model-00001-of-00004.safetensors",
        "b": "model-00002-of-00004.safetensors",
        "c": "model-00003-of-00004.safetensors",
        "d": "model-00003-of-00004.safetensors",
        "e": "model-00004-of-00004.safetensors",
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("limit", "count"), [(32, 1), (31, 2), (16, 2), (15, 2)])
def test_a_shard_holds_at_most_its_size(limit, count):
    assert len(layout(specs_of({"a": torch.ones(4), "b": torch.ones(4)}), limit)) == count


def test_a_tensor_that_is_not_the_one_laid_out_is_refused(tmp_path):
    files = layout(specs_of({"a": torch.ones(2)}))
    with pytest.raises(AssertionError, match="laid out a"):
        write_checkpoint(tmp_path, files, [("a", torch.ones(2).half())])


# ------------------------------------------------------------------------------------ OutputFolder


def test_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with OutputFolder(out) as partial:
        assert partial == tmp_path / "deep" / "out.partial"
        (partial / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"] and not partial.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(tmp_path, error):
    def interrupted() -> None:
        with OutputFolder(tmp_path / "out") as partial:
            (partial / "a").write_text("1")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_folder_with_something_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(TwinmergeError, match="not empty"):
        OutputFolder(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "mine").read_text() == "keep" and len(list(tmp_path.iterdir())) == 1


def test_a_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(TwinmergeError, match="not empty"):
        OutputFolder(tmp_path / "out").check()


def test_empty_folder_is_replaced_and_stale_partial_removed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("old")
    with OutputFolder(tmp_path / "out") as partial:
        (partial / "new").write_text("1")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_output_without_a_name_is_refused(name):
    with pytest.raises(TwinmergeError, match="has no name of its own"):
        OutputFolder(name)


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 1, 99))
    OutputFolder(tmp_path / "out", needed_bytes=99).check()
    with pytest.raises(TwinmergeError, match="No space for .*needs .* GB and .* GB are free"):
        OutputFolder(tmp_path / "out", needed_bytes=100).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(file, tensor) -> None:
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("twinmerge.store.output.write_tensor", full)

    def fill() -> None:
        with OutputFolder(tmp_path / "out") as partial:
            write(partial, {"a": torch.ones(3)})

    with pytest.raises(
        TwinmergeError, match="^No space left while writing .*; what was written is removed[.]"
    ) as error:
        fill()
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_another_write_error_keeps_its_kind(tmp_path):
    def deny() -> None:
        with OutputFolder(tmp_path / "out"):
            raise OSError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        deny()
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TwinmergeError):
        OutputFolder(tmp_path / "file" / "out").__enter__()
