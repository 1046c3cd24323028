"""Files as safetensors itself would write them; a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from twinmerge.errors import TwinmergeError
from twinmerge.store import output, ranges
from twinmerge.store import partial as partial_files
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter, layout, write_checkpoint
from twinmerge.store.header import header_of
from twinmerge.store.output import OutputFile, OutputFolder

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
    assert [spec.itemsize for spec in files["model.safetensors"].values()] == [8, 8, 4, 4, 4, 2, 2, 1, 1]
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


# -------------------------------------------------------------------------------- CheckpointWriter


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_order_of_parts_gives_what_safetensors_writes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parts")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4))
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, shape in enumerate(shapes)}
    writer = CheckpointWriter(folder, layout(specs_of(tensors)))
    parts = []
    for name, tensor in tensors.items():
        cuts = sorted(data.draw(st.lists(st.integers(0, tensor.numel()), max_size=3)))
        edges = [0, *cuts, tensor.numel()]
        parts += [(name, a, flat(tensor)[a:b]) for a, b in itertools.pairwise(edges)]
    for part in data.draw(st.permutations(parts)):
        writer.write(*part)
    writer.finish()
    assert (folder / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_files_are_there_at_once_in_full_length_and_many_threads_fill_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "MAX_OPEN", len(ranges.OpenFile._opened) + 3)
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [memoryview(buffers[0])[:3]], offset))
    tensors = {f"t{i:02d}": torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(40)}
    files = layout(specs_of(tensors), shard_bytes=800)
    writer = CheckpointWriter(tmp_path, files, {"format": "pt", "by": "test"})
    sizes = {file: (tmp_path / file).stat().st_size for file in files}
    assert len(files) == 10 and not (tmp_path / "model.safetensors.index.json").exists()
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(writer.write, n, s, t[s : s + 10]) for n, t in tensors.items() for s in range(0, 50, 10)]
    assert all(job.exception() is None for job in jobs)
    writer.finish()
    assert sizes == {file: (tmp_path / file).stat().st_size for file in files}
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.metadata == {"format": "pt", "by": "test"}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_file_that_is_begun_is_kept_and_another_is_not(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6.0)}
    files = layout(specs_of(tensors))
    file = tmp_path / "model.safetensors"
    first = CheckpointWriter(tmp_path, files)
    assert not first.kept
    first.write("a", 1, tensors["a"][1:])
    first.close()
    second = CheckpointWriter(tmp_path, files)
    assert second.kept
    second.write("a", 0, tensors["a"][:1])
    second.write("b", 0, tensors["b"])
    second.finish()
    assert file.read_bytes() == save(tensors, metadata={"format": "pt"})
    whole = file.read_bytes()
    header = len(whole) - 40
    for other in (whole[:-1], whole + b"\0", whole.replace(b"F32", b"I32", 1), whole[:header]):
        file.write_bytes(other)
        assert not CheckpointWriter(tmp_path, files).kept
        assert file.read_bytes() == whole[:header] + bytes(40)


def test_link_in_the_place_of_a_file_is_not_followed(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "mine").write_bytes(header_of({"a": Spec(torch.int8, (1,))}, {"format": "pt"}) + b"\7")
    (tmp_path / "partial" / "model.safetensors").symlink_to(tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    write(tmp_path / "partial", {"a": torch.ones(1, dtype=torch.int8)})
    assert (tmp_path / "mine").read_bytes() == before
    assert not (tmp_path / "partial" / "model.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("start", "tensor", "says"),
    [
        (0, torch.zeros(5), "'a' has 4 elements of float32, not 0 ... 4 of float32"),
        (-1, torch.zeros(1), "not -1"),
        (4, torch.zeros(1), "not 4"),
        (0, torch.zeros(1).bfloat16(), "of bfloat16"),
        (0, torch.zeros(2, 2), "expected a contiguous 1-D tensor"),
        (0, torch.zeros(8)[::2], "expected a contiguous 1-D tensor"),
    ],
)
def test_part_that_is_none_of_the_tensor(tmp_path, start, tensor, says):
    writer = CheckpointWriter(tmp_path, layout(specs_of({"a": torch.zeros(4)})))
    with pytest.raises(ValueError, match=says):
        writer.write("a", start, tensor)


# ------------------------------------------------------------------------------------ OutputFolder


def names(folder: Path) -> list[str]:
    """What is in an output, besides its manifest, or in anything else."""
    return sorted(p.name for p in folder.rglob("*") if p.name != "twinmerge.checksums.json")


def ours(folder: Path) -> Path:
    """A `.partial` as a killed run leaves it."""
    (folder / "output").mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "journal").write_text('{"twinmerge": 1, "key": "k"}\n')
    return folder / "output"


def test_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with OutputFolder(out) as partial:
        assert partial == tmp_path / "deep" / "out.partial" / "output"
        (partial / "a").write_text("1")
        assert not out.exists()
    assert names(out) == ["a"] and not partial.parent.exists()


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
    (ours(tmp_path / "out.partial") / "stale").write_text("old")
    with OutputFolder(tmp_path / "out") as partial:
        (partial / "new").write_text("1")
    assert names(tmp_path) == ["new", "out"]


STRANGE = {
    "a file": {"notes.txt": "mine"},
    "files that are called like ours": {"lock": "mine", "journal": "mine"},
    "a journal of somebody else": {"journal": '{"key": "k"}\n', "lock": "", "output/a": "mine"},
    "a lock that has something in it": {"lock": "4711"},
    "an output alone": {"output/model.safetensors": "mine"},
    "a folder as lock": {"lock/a": "mine"},
}


@pytest.mark.parametrize("files", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("kind", [OutputFolder, OutputFile])
def test_partial_of_somebody_else_is_left_alone(tmp_path, files, kind):
    partial = tmp_path / "out.partial"
    for name, text in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text)
    before = {p: p.read_text() for p in partial.rglob("*") if p.is_file()}
    with pytest.raises(
        TwinmergeError, match="out.partial, where the output is written first, is there already and was"
    ):
        kind(tmp_path / "out").__enter__()
    assert {p: p.read_text() for p in partial.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("journal", [None, "", '{"tw', '{"twinmerge": 1, "key": "k', '{"twinmerge": 1, "key": "k"}\n'])
def test_partial_that_was_only_begun_is_taken(tmp_path, lock, journal):
    (tmp_path / "out.partial").mkdir()
    if lock:
        (tmp_path / "out.partial" / "lock").touch()
    if journal is not None:
        (tmp_path / "out.partial" / "journal").write_text(journal)
    with OutputFolder(tmp_path / "out", key="k") as partial:
        (partial / "a").write_text("1")
    assert names(tmp_path) == ["a", "out"]


def test_partial_that_holds_an_input_is_left_alone(tmp_path):
    write(ours(tmp_path / "out.partial"), {"a": torch.ones(1)})
    opened = Checkpoint.open(tmp_path / "out.partial" / "output")
    with pytest.raises(TwinmergeError, match="out.partial, where the output is written first, holds an input"):
        OutputFolder(tmp_path / "out").__enter__()
    assert opened.read("a").item() == 1.0
    opened.close()
    with OutputFolder(tmp_path / "out"):
        pass


@pytest.mark.parametrize("lock", [True, False])
def test_what_a_kill_after_the_naming_left_is_removed_by_the_same_command(tmp_path, lock):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with OutputFolder(out, key="k") as folder:
        (folder / "a").write_bytes(b"a")
    partial.mkdir()
    (partial / "journal").write_bytes(partial_files.first_line("k"))
    if lock:
        (partial / "lock").touch()
    with pytest.raises(TwinmergeError, match="is there already"):
        OutputFolder(out, key="k").check()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("extra", ["output", "notes.txt"])
def test_what_holds_more_than_a_journal_stays_beside_its_output(tmp_path, extra):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").touch()
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal").write_bytes(partial_files.first_line("k"))
    (partial / extra).mkdir()
    with pytest.raises(TwinmergeError, match="is there already"):
        OutputFolder(tmp_path / "out", key="k").check()
    assert sorted(os.listdir(partial)) == sorted(["journal", extra])


@pytest.mark.parametrize("key", [None, "k"])
def test_a_disk_that_is_full_before_the_first_line_leaves_nothing(tmp_path, monkeypatch, key):
    def full(fd, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output.disk, "append", full)
    with pytest.raises(TwinmergeError, match="cannot be made"), OutputFolder(tmp_path / "out", key=key):
        pass
    assert os.listdir(tmp_path) == []


def test_file_appears_whole_and_replaces_only_if_asked(tmp_path):
    where = tmp_path / "a.json"
    with pytest.raises(KeyError), OutputFile(where) as new:  # noqa: PT012
        new.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with OutputFile(where) as new:
        new.write_text("1")
        with pytest.raises(TwinmergeError, match="is being written by another process"):
            OutputFile(where).__enter__()
    with pytest.raises(TwinmergeError, match="a.json is there already"):
        OutputFile(where).check()
    with OutputFile(where, replace=True) as new:
        new.write_text("2")
        assert where.read_text() == "1"
    assert where.read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "link").symlink_to(where)
    (tmp_path / "folder").mkdir()
    for name, said in (("link", "is a link"), ("folder", "is there already")):
        with pytest.raises(TwinmergeError, match=said):
            OutputFile(tmp_path / name, replace=True).check()


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


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_that_fills_while_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", full)

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


def test_output_or_partial_that_is_a_link_or_a_file_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with pytest.raises(TwinmergeError, match="The output .*out is a link. Name the folder itself"):
        OutputFolder(tmp_path / "out").__enter__()
    (tmp_path / "a.partial").symlink_to(tmp_path / "there")
    (tmp_path / "b.partial").write_text("mine")
    for name in "ab":
        with pytest.raises(TwinmergeError, match=f"{name}.partial, where the output is written first, is no folder"):
            OutputFolder(tmp_path / name, key="k").__enter__()
    assert list((tmp_path / "there").iterdir()) == [] and (tmp_path / "b.partial").read_text() == "mine"


def test_links_in_the_partial_are_not_followed(tmp_path):
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("keep")
    content = ours(tmp_path / "out.partial")
    for name, target in {"a.json": "mine", "model.safetensors": "mine", "sub": "kept"}.items():
        (content / name).symlink_to(tmp_path / target)
    out = OutputFolder(tmp_path / "out", key="k", kept=["model.safetensors"])
    with out as partial:
        out.record({"a": 1})
        assert names(partial) == ["model.safetensors"]
        write(partial, {"a": torch.ones(1)})
        assert not (partial / "model.safetensors").is_symlink()
    assert (tmp_path / "mine").read_text() == "keep" and (tmp_path / "kept" / "file").read_text() == "keep"
    (tmp_path / "next.partial").mkdir()
    (tmp_path / "next.partial" / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(TwinmergeError, match="was not made by twinmerge"):
        OutputFolder(tmp_path / "next").__enter__()
    assert not (tmp_path / "made").exists()


def test_output_that_cannot_get_its_name_stays_whole(tmp_path):
    def run() -> None:
        with OutputFolder(tmp_path / "out", key="k") as partial:
            (partial / "a").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("2")

    with pytest.raises(
        TwinmergeError, match="The output is whole in .*out.partial/output, but cannot be named .*out: .*Rename"
    ):
        run()
    assert names(tmp_path / "out.partial" / "output") == ["a"]


# ---------------------------------------------------------------------------------------- resuming


def interrupted(out: OutputFolder, *lines: dict[str, object], error: BaseException | None = None) -> list[object]:
    """Enter, write the lines into the journal and a file for each, stop; what was done before comes back."""
    with pytest.raises(BaseException, match="stop|No space") as caught, out as partial:  # noqa: PT012
        for line in lines:
            (partial / str(line["file"])).write_text("x")
            out.record(line)
        raise error or KeyboardInterrupt("stop")
    assert isinstance(caught.value, (KeyboardInterrupt, TwinmergeError))
    return [*out.done, str(caught.value)] if error else out.done


def test_journal_of_the_same_key_goes_on(tmp_path):
    where = tmp_path / "out"
    kept = ["a", "c", "d"]
    assert interrupted(OutputFolder(where, key="k", kept=kept), {"file": "a", "é": [1, None]}, {"file": "b"}) == []
    assert names(tmp_path) == ["a", "b", "journal", "out.partial", "output"]
    out = OutputFolder(where, key="k", kept=kept)
    assert interrupted(out, {"file": "c"}) == [{"file": "a", "é": [1, None]}, {"file": "b"}]
    (tmp_path / "out.partial" / "output" / "d").mkdir()
    out = OutputFolder(where, key="k", kept=kept)
    with out as partial:
        assert [line["file"] for line in out.done] == ["a", "b", "c"]
        assert (partial / "a").exists() and not where.exists()
    assert names(tmp_path) == ["a", "c", "out"]  # the rest is written anew each time


@pytest.mark.parametrize("key", ["other", None])
def test_partial_of_another_key_or_without_is_started_afresh(tmp_path, key):
    interrupted(OutputFolder(tmp_path / "out", key="k"), {"file": "a"})
    out = OutputFolder(tmp_path / "out", key=key)
    with out as partial:
        assert out.done == [] and not (partial / "a").exists()
    assert names(tmp_path / "out") == []


MARK = b'{"twinmerge": 1, "key": '


@pytest.mark.parametrize(
    "rest", [b'"k"}', b"junk\n", b'\n{"file": "a"}\n', b"\xff\n", b'"K"}\n', b"null}\n", b'"k"}x\n']
)
def test_journal_without_its_first_line_is_started_afresh(tmp_path, rest):
    (ours(tmp_path / "out.partial") / "sub").mkdir()
    (tmp_path / "out.partial" / "journal").write_bytes(MARK + rest)
    out = OutputFolder(tmp_path / "out", key="k", kept=["sub"])
    with out as partial:
        assert out.done == [] and (partial.parent / "journal").read_bytes() == MARK + b'"k"}\n'
        assert not (partial / "sub").exists()


@pytest.mark.parametrize(
    "torn", [b"{", b'{"file": "b"}', b'{"file"\n', b'{"fi{"file": "c"}\n{"file": "d"}\n', b"\0\0\n\0"]
)
def test_torn_end_of_the_journal_is_cut_off(tmp_path, torn):
    interrupted(OutputFolder(tmp_path / "out", key="k"), {"file": "a"})
    with (tmp_path / "out.partial" / "journal").open("ab") as journal:
        journal.write(torn)
    assert interrupted(OutputFolder(tmp_path / "out", key="k"), {"file": "e"}) == [{"file": "a"}]
    text = (tmp_path / "out.partial" / "journal").read_bytes()
    assert text == MARK + b'"k"}\n{"file": "a"}\n{"file": "e"}\n'


def test_lines_of_many_threads_stay_whole(tmp_path):
    out = OutputFolder(tmp_path / "out", key="k")
    with out as partial, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: out.record({"i": i, "pad": "x" * (i % 50)}), range(500)))
        lines = [json.loads(line) for line in (partial.parent / "journal").read_text().splitlines()]
    assert sorted(line["i"] for line in lines[1:]) == list(range(500))


def test_journal_that_cannot_take_a_line(tmp_path, monkeypatch):
    out = OutputFolder(tmp_path / "out", key="k")
    with pytest.raises(TwinmergeError, match="No space left"), out:  # noqa: PT012
        monkeypatch.setattr(os, "write", lambda fd, text: len(text) - 1)
        out.record({"a": 1})
    with pytest.raises(AssertionError, match="only inside the with, and with a key"):
        OutputFolder(tmp_path / "b").record({})


def test_full_disk_says_how_many_bytes_are_missing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))

    def run() -> None:
        with OutputFolder(tmp_path / "out", needed_bytes=10**8, key="k") as partial:
            nonlocal free
            (partial / "some").write_bytes(bytes(10**6))
            os.sync()
            free = 1000
            full()

    with pytest.raises(TwinmergeError) as error:
        run()
    there = sum(f.stat().st_blocks * 512 for f in (tmp_path / "out.partial").rglob("*") if f.is_file())
    missing = 10**8 - there - 1000
    assert there >= 10**6 and str(error.value) == (
        f"No space left while writing {tmp_path / 'out'}; {missing} bytes are missing. "
        "Free some space and run the same command again: it goes on where it stopped."
    )
    assert (tmp_path / "out.partial" / "output" / "some").exists()
    # what is there already is not needed a second time
    out = OutputFolder(tmp_path / "out", needed_bytes=10**8, key="k")
    with pytest.raises(TwinmergeError, match="No space for .*needs 0.10 GB"):
        out.check()
    free += missing
    out.check()


def test_full_disk_of_unknown_need(tmp_path):
    said = interrupted(OutputFolder(tmp_path / "out", key="k"), error=OSError(errno.EDQUOT, "Disk quota exceeded"))[-1]
    assert "the disk or your share of it is full. Free some space and run the same command again" in said


KILLED = """
import sys, time, torch
from twinmerge.store.header import Spec
from twinmerge.store.output import OutputFolder
from twinmerge.store.checkpoint_writer import CheckpointWriter
from twinmerge.store.checkpoint_writer import layout
files = layout({n: Spec(torch.float32, (1000,)) for n in "ab"}, 4000)
out = OutputFolder(sys.argv[1], key="k", kept=files)
with out as partial:
    writer = CheckpointWriter(partial, files)
    for i in range(0, 1000, 100):
        for n in "ab":
            writer.write(n, i, torch.arange(i, i + 100).float())
            out.record({"tensor": n, "start": i})
        print(i, flush=True)
        if i == 600:
            writer.write("a", 700, torch.full((50,), -1.0))  # half a piece, not recorded
            time.sleep(100)
"""


def test_kill_and_resume(tmp_path):
    where = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(where)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and any(line == "600\n" for line in child.stdout)
    for key in ("k", "other", None):  # while it lives, nobody else may write there
        with pytest.raises(TwinmergeError, match="is being written by another process. Wait for it, or name another"):
            OutputFolder(where, key=key).__enter__()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with (where.parent / "out.partial" / "journal").open("ab") as journal:
        journal.write(b'{"tensor": "a", "sta')
    tensors = {n: torch.arange(1000).float() for n in "ab"}
    written = []
    out = OutputFolder(where, key="k", kept=layout(specs_of(tensors), 4000))
    with out as partial:
        done = {(line["tensor"], line["start"]) for line in out.done}
        writer = CheckpointWriter(partial, layout(specs_of(tensors), 4000))
        for n in "ab":
            for i in range(0, 1000, 100):
                if (n, i) not in done:
                    writer.write(n, i, tensors[n][i : i + 100])
                    written.append((n, i))
        writer.finish()
    assert written == [(n, i) for n in "ab" for i in (700, 800, 900)]
    write(tmp_path, tensors, 4000)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert names(where) == files
    assert all((where / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


# -------------------------------------------------------------------------------------------- lock

# Forks, so that many processes cost one import.
CROWD = """
import os, sys
from pathlib import Path
from twinmerge.errors import TwinmergeError
from twinmerge.store.output import OutputFolder

def run(where, me, key):
    try:
        out = OutputFolder(where, key=key)
        with out as partial:
            (partial / "a").write_text(str(me))
            (partial / "b").write_text(str(me))
        return 0
    except TwinmergeError as error:
        text = str(error)
        if "another process" in text or "there already and not empty" in text:
            return 1
        print(text, file=sys.stderr)
        return 2
    except BaseException:
        import traceback
        traceback.print_exc()
        return 3

def crowd(folders, key=None):
    children = []
    for me, where in enumerate(folders):
        if not (child := os.fork()):
            os._exit(run(where, me, key))
        children.append(child)
    print(*sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))

top = Path(sys.argv[1])
crowd([top / "many" / str(i) for i in range(16)])
for round in range(30):
    crowd([top / "one" / str(round)] * 6, [None, "k"][round % 2])
"""


def test_many_processes(tmp_path):
    """Sixteen folders at once; then, thirty times, six processes that all want the same one."""
    done = subprocess.run([sys.executable, "-c", CROWD, str(tmp_path)], capture_output=True, text=True, check=True)
    first, *rounds = done.stdout.splitlines()
    assert first.split() == ["0"] * 16, done.stderr
    assert Counter(rounds) == {"0 1 1 1 1 1": 30}, done.stderr
    folders = [*(tmp_path / "many").iterdir(), *(tmp_path / "one").iterdir()]
    assert len(folders) == 46  # and no .partial
    for folder in folders:
        assert names(folder) == ["a", "b"]
        assert (folder / "a").read_text() == (folder / "b").read_text()


@pytest.mark.parametrize("locks", ["flock", "file"])
def test_second_one_into_a_folder_is_refused(tmp_path, monkeypatch, locks):
    if locks == "file":
        monkeypatch.setattr(partial_files, "fcntl", None)
    with OutputFolder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        with pytest.raises(
            TwinmergeError, match="out is being written by another process. Wait for it, or name another"
        ):
            OutputFolder(tmp_path / "out").__enter__()
        with OutputFolder(tmp_path / "other"):
            pass
        assert (partial / "a").read_text() == "1"
    assert names(tmp_path / "out") == ["a"]
    with pytest.raises(TwinmergeError, match="not empty"):
        OutputFolder(tmp_path / "out").__enter__()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_lock_that_another_process_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, calls = partial_files.fcntl.flock, []

    def slow(fd, kind):
        flock(fd, kind)
        calls.append(fd)
        if len(calls) == 1:  # the other one finished between our open and our lock
            shutil.rmtree(tmp_path / "out.partial")

    monkeypatch.setattr(partial_files.fcntl, "flock", slow)
    with OutputFolder(tmp_path / "out") as partial:
        assert len(calls) == 2 and (partial.parent / "lock").exists()


def test_output_that_appeared_meanwhile_is_refused(tmp_path, monkeypatch):
    lock = output.lock_file

    def slow(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("1")
        return lock(*args)

    monkeypatch.setattr(output, "lock_file", slow)
    with pytest.raises(TwinmergeError, match="not empty"):
        OutputFolder(tmp_path / "out").__enter__()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["out", "theirs"]
