"""What is read, and what is refused with a sentence that names the file."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from twinmerge.errors import TwinmergeError
from twinmerge.store import ranges
from twinmerge.store.checkpoint import Checkpoint
from twinmerge.store.header import Spec, header_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


@pytest.mark.parametrize(
    "shard",
    ["gone.safetensors", "../model.safetensors", "sub/model.safetensors", "", "..", "/etc/passwd", "\0", "a" * 999],
)
def test_shard_that_is_not_in_the_folder_is_refused(tmp_path, shard):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(1)}, place / "model.safetensors")
    index(folder, {"a": shard})
    with pytest.raises(TwinmergeError, match="names the shard .*, which is not in the folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("not json", "[]", "{}", "[" * 5000, '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": ["a"]}'),
        *(
            '{"weight_map": {"a": [], "b": {}}}',
            '{"weight_map": {"a": 3}}',
            '{"weight_map": {"a": "\\ud800"}}',
            "\udcff",
        ),
    ],
)
def test_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
    with pytest.raises(TwinmergeError, match="index.json (is not a valid index|cannot be read: ).*again"):
        Checkpoint.open(tmp_path)


def test_index_with_a_tensor_twice_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s1.safetensors")
    text = '{"weight_map": {"a": "s1.safetensors", "a": "s1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TwinmergeError, match="index.json cannot be read: the key 'a' stands twice. Download it again"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "s1", "b": "s1"}, "puts the tensor 'b' into s1.safetensors, which does not hold it"),
        ({"a": "s1", "b": "s2", "c": "s2"}, "puts the tensor 'c' into s2.safetensors, which does not hold it"),
        ({"a": "s2", "b": "s1"}, "puts the tensor 'a' into s2.safetensors, which does not hold it"),
        ({"a": "s1"}, None),
        ({"b": "s2", "z": "s2"}, "s2.safetensors, which does not hold it"),
        ({"a": "s1", "b": "s2", "x": "s3"}, "s3.safetensors holds the tensor 'y', which .*index.json does not name"),
    ],
)
def test_index_that_does_not_fit_its_shards(tmp_path, weight_map, says):
    for shard, held in {"s1": "a", "s2": "b", "s3": "xy"}.items():
        save_file({name: torch.ones(1) for name in held}, tmp_path / f"{shard}.safetensors")
    index(tmp_path, {name: f"{shard}.safetensors" for name, shard in weight_map.items()})
    if says is None:
        assert list(Checkpoint.open(tmp_path).specs) == ["a"]
        return
    with pytest.raises(TwinmergeError, match=says + ". Download both again"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.pth", "model.ckpt", "a.pt"])
def test_only_pickles_is_refused_with_advice(tmp_path, file):
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(TwinmergeError, match=f"pickled weights .{file}.*can run code.*save_file"):
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
    with pytest.raises(
        TwinmergeError, match="Tensor 'a' in .* has dtype F8_E.*Convert the model to bfloat16 first: python"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.slow
def test_the_command_for_float8_does_it(tmp_path):
    """Both kinds: stored as float8, and quantized by blocks with scales beside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, tie_word_embeddings=False, **sizes)
    for kind in ("plain", "scaled"):
        folder = tmp_path / kind
        LlamaForCausalLM(config).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        wanted = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            scale = tensors[name].abs().max() / 448 if kind == "scaled" else torch.tensor(1.0)
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            if kind == "scaled":
                tensors[name + "_scale_inv"] = scale.reshape(1, 1)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if kind == "scaled":
            text = json.loads((folder / "config.json").read_text())
            text["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
            (folder / "config.json").write_text(json.dumps(text))
        with pytest.raises(TwinmergeError) as error:
            Checkpoint.open(folder)
        command = str(error.value).partition("first: ")[2].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
        made = Checkpoint.open(tmp_path / f"{kind}-bfloat16")
        assert made.specs.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(made.read(name).float(), tensor, rtol=0.1, atol=0.01)


# ------------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of three shards with every dtype, and its tensors."""
    folder = tmp_path_factory.mktemp("model")
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
    tensors = {str(dtype): (torch.arange(60).reshape(3, 4, 5) % 7).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(2, 0, 3)}
    names = sorted(tensors)
    for i in range(3):
        save_file({n: tensors[n] for n in names[i::3]}, folder / f"{i}.safetensors", metadata={str(i): "x"})
    index(folder, {n: f"{i}.safetensors" for i in range(3) for n in names[i::3]})
    return folder, tensors


@pytest.fixture
def three_at_a_time(monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [memoryview(buffers[0])[:3]], offset))


@pytest.mark.parametrize("mode", ["whole", "three bytes a call"])
def test_reads_what_was_saved(model, mode, request):
    if mode != "whole":
        request.getfixturevalue("three_at_a_time")
    folder, tensors = model
    checkpoint = Checkpoint.open(folder)
    assert [file.name for file in checkpoint.files] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert checkpoint.metadata == {"0": "x", "1": "x", "2": "x"}
    assert checkpoint.specs == {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor)


def test_fresh_memory_each_time(model):
    checkpoint = Checkpoint.open(model[0])
    checkpoint.read("scalar").zero_()
    assert checkpoint.read("scalar").item() == 2.5


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_range_of_any_tensor(model, data):
    folder, tensors = model
    checkpoint = Checkpoint.open(folder)
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].reshape(-1)
    start = data.draw(st.integers(0, len(flat)))
    out = torch.zeros(data.draw(st.integers(0, len(flat) - start)), dtype=flat.dtype)
    checkpoint.read_into(name, start, out)
    assert torch.equal(out, flat[start : start + len(out)])


def test_place_is_where_the_bytes_are(model):
    folder, tensors = model
    checkpoint = Checkpoint.open(folder)
    for name, tensor in tensors.items():
        file, offset = checkpoint.place(name)
        raw = checkpoint.files[file].read_bytes()[offset : offset + checkpoint.specs[name].bytes]
        assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("start", "out", "says"),
    [
        (0, torch.zeros(61), "'torch.float32' has 60 elements of float32, not 0 ... 60 of float32"),
        (-1, torch.zeros(1), "not -1 ... -1"),
        (60, torch.zeros(1), "not 60 ... 60"),
        (61, torch.zeros(0), "not 61 ... 60"),
        (0, torch.zeros(1).half(), "not 0 ... 0 of float16"),
        (59, np.zeros(8, np.uint8), "not 59 ... 60 of float32"),
        (0, np.zeros(6, np.uint8), "not 0 ... 0 of float32"),
        (0, np.zeros((2, 4), np.uint8), "expected a contiguous 1-D array of bytes"),
        (0, torch.zeros(3, 4, 5), "expected a contiguous 1-D tensor"),
        (0, torch.zeros(20)[::2], "expected a contiguous 1-D tensor"),
    ],
)
def test_range_that_is_none_of_the_tensor(model, start, out, says):
    with pytest.raises(ValueError, match=says) as error:
        Checkpoint.open(model[0]).read_into("torch.float32", start, out)
    assert not isinstance(error.value, TwinmergeError)


def test_many_threads_read_at_once(model, monkeypatch):
    monkeypatch.setattr(ranges, "MAX_OPEN", len(ranges.OpenFile._opened) + 2)
    folder, tensors = model
    checkpoint = Checkpoint.open(folder)
    names = sorted(tensors)

    def right(i: int) -> bool:
        flat = tensors[names[i % len(names)]].reshape(-1)
        start = i % (len(flat) + 1)
        out = torch.empty(len(flat) - start, dtype=flat.dtype)
        checkpoint.read_into(names[i % len(names)], start, out)
        return torch.equal(out, flat[start:])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(1000)))


def test_file_that_became_shorter_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(100)}, file)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("b").sum() == 100  # now it is open
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(
        TwinmergeError, match="Tensor 'b' in .*model.safetensors cannot be read: it ends at byte .*, 8 bytes"
    ):
        checkpoint.read("b")
    for _ in range(2):
        with pytest.raises(TwinmergeError, match="Tensor 'a' in .*model.safetensors cannot be read: it changed since"):
            checkpoint.read("a")
        checkpoint.close()


@pytest.mark.parametrize("closed", [False, True])
def test_file_that_changed_under_the_same_size_and_time(tmp_path, closed):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    checkpoint, status = Checkpoint.open(tmp_path), file.stat()
    checkpoint.read("a")
    if closed:
        checkpoint.close()
    time.sleep(0.02)  # the clock of a file system ticks some hundred times a second
    with file.open("r+b") as content:
        content.seek(-2, os.SEEK_END)
        content.write(b"\0")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(TwinmergeError, match="Tensor 'a' in .*model.safetensors cannot be read: it changed since"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    "change",
    [lambda f: f.chmod(0o600), lambda f: os.link(f, f.with_name("other")), Path.unlink],
    ids=["rights", "links", "gone"],
)
def test_file_with_other_rights_or_names_is_the_same(tmp_path, change):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    file.chmod(0o644)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a")
    time.sleep(0.02)
    change(file)
    assert checkpoint.read("a").tolist() == [1, 1, 1, 1]


def test_file_that_is_gone_or_may_not_be_read(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    checkpoint = Checkpoint.open(tmp_path)
    file.rename(tmp_path / "moved")
    with pytest.raises(TwinmergeError, match="Tensor 'a' in .*model.safetensors cannot be read: .*No such file"):
        checkpoint.read("a")
    (tmp_path / "moved").rename(file)

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(TwinmergeError, match="model.safetensors cannot be opened: Permission denied. Make it readable"):
        Checkpoint.open(tmp_path)


def test_disk_that_fails_is_named(model, monkeypatch):
    checkpoint = Checkpoint.open(model[0])

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TwinmergeError, match="Tensor 'scalar' in .* cannot be read: .*Input/output error"):
        checkpoint.read("scalar")
    with pytest.raises(TwinmergeError, match="0.safetensors cannot be read: Input/output error"):
        Checkpoint.open(model[0])


# --------------------------------------------------------------------------------------------- links


def cached(tmp_path: Path, *names: str) -> Path:
    """As huggingface_hub keeps a model: a folder of links to blobs."""
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / COMMIT, tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in names:
        save_file({name: torch.ones(1)}, blobs / name)
        (snapshot / f"{name}.safetensors").symlink_to(Path("../../blobs") / name)
    return snapshot


def test_links_of_the_hub_cache_work(tmp_path):
    snapshot = cached(tmp_path, "a", "b")
    (snapshot.parent.parent / "blobs" / "i").write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}')
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/i")
    assert Checkpoint.open(snapshot).read("b").tolist() == [1]
    (tmp_path / "link").symlink_to(snapshot)
    assert sorted(Checkpoint.open(tmp_path / "link").specs) == ["a", "b"]


def test_link_inside_the_folder_works(tmp_path):
    (tmp_path / "sub").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "sub" / "x")
    (tmp_path / "model.safetensors").symlink_to("sub/x")
    assert list(Checkpoint.open(tmp_path).specs) == ["a"]


@pytest.mark.parametrize("kind", ["single", "loose", "shard", "index", "not the cache", "beside the blobs"])
def test_link_out_of_the_folder_is_refused(tmp_path, kind):
    folder = cached(tmp_path) if kind == "beside the blobs" else tmp_path / "model"
    folder.mkdir(exist_ok=True)
    target = tmp_path / "blobs" / "x" if kind == "not the cache" else folder.parent / "secret"
    target.parent.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, target)
    link = {"loose": "x.safetensors", "index": "model.safetensors.index.json"}.get(kind, "model.safetensors")
    (folder / link).symlink_to(target)
    if kind == "shard":
        index(folder, {"a": "model.safetensors"})
    with pytest.raises(TwinmergeError, match=f"{link} is a link to .*, outside its folder. Put the file itself"):
        Checkpoint.open(folder)


# ------------------------------------------------------------------------------------- large and lean


def test_a_thousand_shards(tmp_path):
    shards = {f"{i:04d}.safetensors": {f"t{i}.{j}": Spec(torch.float32, (2,)) for j in range(4)} for i in range(1000)}
    for shard, specs in shards.items():
        (tmp_path / shard).write_bytes(header_of(specs, {"format": "pt"}) + bytes(32))
    index(tmp_path, {name: shard for shard, specs in shards.items() for name in specs})
    before, taken = len(os.listdir("/dev/fd")), time.process_time()
    checkpoint = Checkpoint.open(tmp_path)
    taken = time.process_time() - taken
    assert len(checkpoint.specs) == 4000 and taken < 2
    assert len(os.listdir("/dev/fd")) <= before + 1
    for name in checkpoint.specs:
        assert checkpoint.read(name).tolist() == [0, 0]
    assert len(os.listdir("/dev/fd")) <= before + ranges.MAX_OPEN


def test_reading_needs_no_safetensors(model):
    script = "import sys; from pathlib import Path; from twinmerge.store.checkpoint import Checkpoint; "
    script += "print(Checkpoint.open(Path(sys.argv[1])).read('scalar').item(), 'safetensors' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(model[0])], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.5", "False"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_reads_the_same(tmp_path, duplicate):
    save_file({"a": torch.arange(3), "b": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a")
    other = duplicate(checkpoint)
    assert other.specs == checkpoint.specs and torch.equal(other.read("b"), torch.ones(2, 2))
    other.close()
    del other
    gc.collect()
    assert checkpoint.read("a").tolist() == [0, 1, 2]


def test_an_index_of_a_million_shards_and_a_huge_header_are_refused_at_once(tmp_path):
    names = ",".join(f'"{i}":"{i}"' for i in range(1_000_000))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{names}}}}}')
    (tmp_path / "other").mkdir()
    with (tmp_path / "other" / "model.safetensors").open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little") + b"{")
        file.truncate(100_000_000)
    (tmp_path / "many").mkdir()
    tensors = ",".join(f'"{i}":{{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}' for i in range(250_000))
    (tmp_path / "many" / "model.safetensors").write_bytes(len(tensors).to_bytes(8, "little") + tensors.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for folder, says in (
        ("", "has some 1000001 items"),
        ("other", "announces 90000000 bytes"),
        ("many", "has 250000 braces"),
    ):
        began = time.perf_counter()
        with pytest.raises(TwinmergeError, match=says):
            Checkpoint.open(tmp_path / folder)
        assert time.perf_counter() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
