"""The state file: its bytes, what damage to it does, and that it is replaced as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch

from twinmerge.continual.continual import Continual, seen_of
from twinmerge.continual.state import StateFile, StateWriter
from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint_writer import CheckpointWriter
from twinmerge.store.partial import alone_in


def header_of(file):
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), 8 + size


def rewritten(file, change):
    """The file with another header of any length."""
    header, start = header_of(file)
    about = json.loads(header["__metadata__"]["twinmerge"])
    change(about, header)
    header["__metadata__"] = {"twinmerge": json.dumps(about)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + file.read_bytes()[start:])


@pytest.fixture
def state(started):
    return started("iso_c", "ab")


@pytest.fixture
def file(state):
    return state.folder / "state.safetensors"


def refused(state, zoo, tmp_path, match):
    """Neither adding nor materialising goes, and nothing is left or changed."""
    before = (state.folder / "state.safetensors").read_bytes()
    for name, attempt in {
        "add": lambda: state.add("c", zoo.paths["c"]),
        "materialise": lambda: state.materialise(tmp_path / "out"),
    }.items():
        with pytest.raises(TwinmergeError, match=match):
            attempt()
        assert (state.folder / "state.safetensors").read_bytes() == before, name
        assert not list(state.folder.glob("*.partial")) and not (tmp_path / "out").exists(), name


# ---------------------------------------------------------------------------------------- its bytes


def test_the_format(zoo, state, file):
    header, start = header_of(file)
    about = json.loads(header.pop("__metadata__")["twinmerge"])
    assert (about["kind"], about["version"]) == ("continual", 3) and start % 8 == 0
    assert {"base", "base_model", "method", "parameters", "heads", "dtype", "experts", "removed"} <= set(about)
    assert about["method"] == "iso_c" and about["base_model"] == zoo.base and about["dtype"] == "float64"
    assert [e["name"] for e in about["experts"]] == ["a", "b"] and len(about["checksums"]) == 32 * len(header)
    assert {entry["dtype"] for entry in header.values()} == {"F64"} and all(n.startswith("sum/") for n in header)
    assert file.stat().st_size == start + max(entry["data_offsets"][1] for entry in header.values())
    assert sorted(x.name for x in state.folder.iterdir()) == ["state.safetensors"]


def test_the_same_experts_give_the_same_bytes(started, file):
    assert (started("iso_c", "ab", "again").folder / "state.safetensors").read_bytes() == file.read_bytes()


def test_the_numbers_are_the_sums(zoo, state, kept):
    base, a, b = (zoo.models[n].state_dict() for n in ("base", "a", "b"))
    for key, value in kept(state).items():
        name = key.removeprefix("sum/")
        want = (a[name].double() - base[name].double()) + (b[name].double() - base[name].double())
        assert torch.equal(value, want)


# ------------------------------------------------------------------------------------------- damage


def test_another_version_is_refused_by_name(zoo, state, file, tmp_path):
    rewritten(file, lambda about, _: about.update(version=4))
    refused(state, zoo, tmp_path, "has version 4 of the 'continual' layout, this release reads version 3")
    rewritten(file, lambda about, _: about.update(version=2))  # did not name its heads
    refused(state, zoo, tmp_path, "has version 2 of its layout.* Make the state again")
    with pytest.raises(TwinmergeError, match="version 2"):
        Continual(state.folder)


def test_another_kind_is_refused_by_name(zoo, state, file, tmp_path):
    rewritten(file, lambda about, _: about.update(kind="twin"))
    refused(state, zoo, tmp_path, "is a 'twin' artefact, expected 'continual'")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.99])
def test_a_truncated_file_is_refused(zoo, state, file, tmp_path, share):
    raw = file.read_bytes()
    file.write_bytes(raw[: int(share * len(raw))])
    refused(state, zoo, tmp_path, "state.safetensors")


@pytest.mark.parametrize("place", [0.0, 0.37, 0.9999])
@pytest.mark.parametrize("method", ["iso_c", "opcm"])
def test_one_bit_flipped_in_a_tensor_is_refused(zoo, started, tmp_path, method, place):
    state = started(method, "ab")
    file = state.folder / "state.safetensors"
    _, start = header_of(file)
    raw = bytearray(file.read_bytes())
    at = start + int(place * (len(raw) - start))
    raw[at] ^= 1
    file.write_bytes(raw)
    refused(state, zoo, tmp_path, "is not what was written: the file is damaged")


@pytest.mark.parametrize("byte", [3, 6, 7])
def test_whatever_byte_of_a_number_it_was_it_is_an_error(zoo, state, file, tmp_path, byte):
    """Flipped exponents give NaN, infinity, or numbers beyond float64."""
    _, start = header_of(file)
    raw = bytearray(file.read_bytes())
    raw[start + 8 * 100 + byte] = 255
    file.write_bytes(raw)
    refused(state, zoo, tmp_path, "state|NaN or infinity")


@pytest.mark.parametrize(
    "change",
    [
        lambda about, _: about.pop("experts"),
        lambda about, _: about.pop("checksums"),
        lambda about, _: about.update(experts=about["experts"] * 2),
        lambda about, _: about["experts"][0].update(norm="long"),
        lambda about, _: about["experts"][0].pop("content"),
        lambda about, _: about.update(surprise=1),
        lambda about, _: about["experts"][0].update(norm=1.5),
        lambda about, _: about["experts"][0].update(model="elsewhere"),
        lambda about, _: about.update(state_norm=2.5),
        lambda about, _: about["parameters"].update(scale=0.5),
        lambda about, _: about.update(removed=["z"]),
        lambda about, _: about.update(experts=7),
        lambda about, _: about.update(checksums=about["checksums"][32:]),
        lambda about, header: header.pop(next(n for n in header if n.startswith("sum/"))),
    ],
)
def test_a_header_that_was_edited_is_refused(zoo, state, file, tmp_path, change):
    rewritten(file, change)
    refused(state, zoo, tmp_path, "state.safetensors")


def test_checksums_that_were_edited_are_refused(zoo, state, file, tmp_path):
    rewritten(file, lambda about, _: about.update(checksums="0" * 32 + about["checksums"][32:]))
    refused(state, zoo, tmp_path, "state.safetensors")


def test_no_state_is_not_a_state(tmp_path):
    with pytest.raises(TwinmergeError, match="is no continual state: it has no state.safetensors.*continual init"):
        Continual(tmp_path)
    with pytest.raises(TwinmergeError, match="is no continual state"):
        Continual(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "state.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(TwinmergeError, match="state.safetensors"):
        Continual(tmp_path)


def test_a_copy_goes_on_where_the_original_stood(zoo, state, started, kept, tmp_path):
    copy = Continual(shutil.copytree(state.folder, tmp_path / "copy"), progress=False)
    copy.add("c", zoo.paths["c"])
    assert copy.about.names == ("a", "b", "c") and Continual(state.folder).about.names == ("a", "b")


# ------------------------------------------------------------------------------- a disk that is full


@pytest.mark.parametrize(
    "where, number",
    [
        ("begin", errno.ENOSPC),
        ("write", errno.ENOSPC),
        ("finish", errno.EDQUOT),
        ("commit", errno.ENOSPC),
        ("write", errno.EIO),
    ],
)
def test_a_disk_that_fails_leaves_the_old_state(zoo, state, file, monkeypatch, where, number):
    advice = "Look at the disk" if number == errno.EIO else "Free some space"
    before = file.read_bytes()
    left = [7]

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    def later(original):
        def write(self, *args):
            left[0] -= 1
            return original(self, *args) if left[0] else fail()

        return write

    with monkeypatch.context() as broken:
        if where == "begin":
            broken.setattr("twinmerge.store.checkpoint_writer._begin", fail)
        elif where == "write":
            broken.setattr(CheckpointWriter, "write", later(CheckpointWriter.write))
        elif where == "finish":
            broken.setattr(CheckpointWriter, "sync", fail)
        else:
            broken.setattr("os.replace", fail)
        with pytest.raises(TwinmergeError, match=f"could not be written.*It is as before. {advice}"):
            state.add("c", zoo.paths["c"])
    assert file.read_bytes() == before
    assert sorted(x.name for x in state.folder.iterdir()) == ["state.safetensors"]
    state.add("c", zoo.paths["c"])
    assert Continual(state.folder).about.names == ("a", "b", "c")


def test_an_interrupt_leaves_the_old_state(zoo, state, file, monkeypatch):
    before = file.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(StateWriter, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            state.add("c", zoo.paths["c"])
    assert file.read_bytes() == before and sorted(x.name for x in state.folder.iterdir()) == ["state.safetensors"]


# ------------------------------------------------------------------------------- killed, and two


KILLED = """
    import json, os, signal, sys
    import twinmerge.continual.state as state
    from twinmerge.continual.continual import Continual
    from twinmerge.store.artefact import ArtefactWriter
    from twinmerge.store.checkpoint_writer import CheckpointWriter

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def later(original):
        left = [5]
        def write(self, *args):
            original(self, *args)
            left[0] -= 1
            if not left[0]:
                die()
        return write

    def run(where, folder, model):
        if where == "write":
            CheckpointWriter.write = later(CheckpointWriter.write)
        elif where == "finish":
            ArtefactWriter.finish = die
        elif where == "replace":
            state.os.replace = die
        elif where == "renamed":
            state.disk.sync_path = die
        Continual(folder, progress=False).add("c", model)

    ends = {}
    for where, folder in json.loads(sys.argv[1]).items():
        child = os.fork()
        if not child:
            run(where, folder, sys.argv[2])
            os._exit(0)
        ends[where] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ends))
"""
HELD = """
    import sys
    from pathlib import Path
    from twinmerge.store.partial import alone_in

    with alone_in(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def python(code, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed, which this system cannot")
def test_killed_at_any_moment_it_is_the_old_or_the_new_state(zoo, started):
    """While tensors are written, before and after the header, and after the rename."""
    states = {where: started("opcm", "ab", where) for where in ("write", "finish", "replace", "renamed")}
    before = {where: (state.folder / "state.safetensors").read_bytes() for where, state in states.items()}
    whole = (started("opcm", "abc", "whole").folder / "state.safetensors").read_bytes()
    folders = json.dumps({where: str(state.folder) for where, state in states.items()})
    told, error = python(KILLED, folders, zoo.paths["c"]).communicate(timeout=200)
    assert json.loads(told) == dict.fromkeys(states, -signal.SIGKILL), error
    for where, state in states.items():
        file = state.folder / "state.safetensors"
        if where != "renamed":
            assert file.read_bytes() == before[where]
            assert (state.folder / "state.safetensors.partial").is_file()
            assert Continual(state.folder, progress=False).canonical_state()
            Continual(state.folder, progress=False).add("c", zoo.paths["c"])
            assert sorted(x.name for x in state.folder.iterdir()) == ["state.safetensors"]
        assert file.read_bytes() == whole


def test_what_a_killed_run_left_is_no_part_of_another_expert(zoo, state, started, kept):
    """The same header, and other tensors under it."""
    (state.folder / "state.safetensors.partial").write_bytes(
        b"\xff" * (state.folder / "state.safetensors").stat().st_size
    )
    (state.folder / "heads").mkdir()
    for name in ("c.0123456789abcdef.safetensors", "c.partial"):
        (state.folder / "heads" / name).write_text("{}")
    state.add("c", zoo.paths["c"])
    whole = started("iso_c", "abc", "whole")
    assert all(torch.equal(x, kept(state)[name]) for name, x in kept(whole).items()) and state.heads() == {}
    assert not (state.folder / "heads").exists()


def test_a_link_in_the_place_of_the_next_state_is_not_followed(zoo, state, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (state.folder / "state.safetensors.partial").symlink_to(tmp_path / "mine.txt")
    state.add("c", zoo.paths["c"])
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_two_at_once_are_refused(zoo, state, file):
    before = file.read_bytes()
    with alone_in(state.folder):
        for attempt in (lambda: state.add("c", zoo.paths["c"]), lambda: state.remove("a")):
            with pytest.raises(TwinmergeError, match="is being written by another process"):
                attempt()
        state.canonical_state()  # reading goes on
    assert file.read_bytes() == before
    state.add("c", zoo.paths["c"])
    assert not (state.folder / "lock").exists()


def test_beside_another_process_it_is_refused(zoo, state, file):
    before = file.read_bytes()
    other = python(HELD, state.folder)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TwinmergeError, match="is being written by another process"):
            state.add("c", zoo.paths["c"])
        assert file.read_bytes() == before
    finally:
        _, error = other.communicate("", timeout=60)
    assert other.returncode == 0, error
    state.add("c", zoo.paths["c"])


def test_a_lock_that_a_killed_process_left_is_free(zoo, state):
    (state.folder / "lock").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.add("c", zoo.paths["c"])
    assert not (state.folder / "lock").exists()


# ------------------------------------------------------------------------------------ small pieces


def test_long_names_and_labels_fit_the_room_that_is_kept(zoo, started, tmp_path):
    name = "x" * 120
    where = shutil.copytree(zoo.paths["a"], tmp_path / "ünïcödé — 模型")
    state = started("opcm", "b")
    state.add(name, where)
    again = Continual(state.folder, progress=False)
    assert again.about.names == ("b", name) and again.about.experts[1].model == str(where)
    assert seen_of(again.about) == seen_of(state.about)


def test_ranges_of_a_part(state, kept):
    with StateFile(state.folder) as found:
        key = max(found.specs, key=lambda k: found.specs[k].numel)
        out = np.empty(5 * 8, np.uint8)
        found.read_range(key, 7, out)
    assert out.view(np.float64).tolist() == kept(state)[key].reshape(-1)[7:12].tolist()
