"""Bytes at positions: short reads and writes, the end of a file, and a bounded number of open files."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.store import ranges
from twinmerge.store.ranges import OpenFile, bytes_of, read_into, write_from


@pytest.fixture
def three_at_a_time(monkeypatch):
    """A system that reads and writes at most three bytes a call."""
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [memoryview(buffers[0])[:3]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [memoryview(buffers[0])[:3]], offset))


@pytest.fixture
def file(tmp_path):
    with (tmp_path / "file").open("w+b") as file:
        yield file


def test_there_and_back(file):
    write_from(file.fileno(), b"cdef", 2)
    write_from(file.fileno(), bytearray(b"ab"), 0)
    got = bytearray(4)
    read_into(file.fileno(), got, 1)
    assert got == b"bcde" and file.tell() == 0


def test_short_reads_and_writes(file, three_at_a_time):
    numbers = torch.arange(1000)
    write_from(file.fileno(), bytes_of(numbers), 5)
    got = torch.zeros_like(numbers)
    read_into(file.fileno(), bytes_of(got), 5)
    assert torch.equal(got, numbers)


def test_any_format_and_nothing(file):
    write_from(file.fileno(), memoryview(torch.arange(3).numpy()), 0)
    got = torch.zeros(3, dtype=torch.int64)
    read_into(file.fileno(), got.numpy(), 0)
    assert got.tolist() == [0, 1, 2]
    for nothing in (b"", bytes_of(torch.empty(0)), memoryview(torch.empty(0).numpy())):
        write_from(file.fileno(), nothing, 100)
        read_into(file.fileno(), bytearray(nothing), 100)
    assert os.fstat(file.fileno()).st_size == 24


def test_end_of_the_file(file, three_at_a_time):
    write_from(file.fileno(), b"abcd", 0)
    with pytest.raises(EOFError, match="it ends at byte 4, 2 bytes too early"):
        read_into(file.fileno(), bytearray(5), 1)


def test_write_without_progress_is_an_error_and_no_loop(file, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="Input/output error") as error:
        write_from(file.fileno(), b"abc", 0)
    assert error.value.errno == errno.EIO


def test_bytes_of_is_no_copy_and_of_every_dtype():
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool):
        flat = torch.zeros(3, dtype=dtype)
        view = bytes_of(flat)
        view[0] = 1
        assert len(view) == 3 * dtype.itemsize and bool(flat.view(torch.uint8)[0] == 1)
    assert bytes_of(torch.ones(2, requires_grad=True)).nbytes == 8


@pytest.mark.parametrize("tensor", [torch.ones(2, 2), torch.ones(4)[::2], torch.tensor(1.0), torch.ones(1).to("meta")])
def test_bytes_of_another_kind_of_tensor(tensor):
    with pytest.raises(ValueError, match="expected a contiguous 1-D tensor on the CPU"):
        bytes_of(tensor)


# ---------------------------------------------------------------------------------------- OpenFile


def files(folder: Path, count: int) -> list[OpenFile]:
    for i in range(count):
        (folder / str(i)).write_bytes(bytes([i]))
    return [OpenFile(folder / str(i)) for i in range(count)]


def first_byte(file: OpenFile) -> int:
    with file.use() as fd:
        return os.pread(fd, 1, 0)[0]


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_descriptor_is_kept_and_the_idlest_makes_room(tmp_path, monkeypatch):
    gc.collect()  # files that other tests left are no longer counted
    monkeypatch.setattr(ranges, "MAX_OPEN", len(OpenFile._opened) + 2)
    a, b, c = files(tmp_path, 3)
    assert [first_byte(f) for f in (a, b, a)] == [0, 1, 0]
    before = descriptors()
    assert first_byte(a) == 0 and first_byte(c) == 2
    assert descriptors() == before and a._fd is not None and b._fd is None
    with a.use() as held:
        assert [first_byte(f) for f in (b, c, b)] == [1, 2, 1]
        assert a._fd == held


def test_many_threads_and_few_descriptors(tmp_path, monkeypatch):
    gc.collect()
    monkeypatch.setattr(ranges, "MAX_OPEN", len(OpenFile._opened) + 3)
    many = files(tmp_path, 40)
    most = 0

    def read(i: int) -> bool:
        nonlocal most
        most = max(most, len(OpenFile._opened))
        return first_byte(many[i % 40]) == i % 40

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(2000)))
    assert most <= ranges.MAX_OPEN


def test_waits_where_all_are_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "MAX_OPEN", len(OpenFile._opened) + 1)
    a, b = files(tmp_path, 2)
    got = []
    thread = threading.Thread(target=lambda: got.append(first_byte(b)))
    with a.use():
        thread.start()
        time.sleep(0.05)
        assert got == []
    thread.join()
    assert got == [1]


def test_close_waits_for_its_users_and_use_opens_again(tmp_path):
    (file,) = files(tmp_path, 1)
    thread = threading.Thread(target=file.close)
    with file.use() as fd:
        thread.start()
        time.sleep(0.05)
        assert os.pread(fd, 1, 0) == b"\0"
    thread.join()
    assert file._fd is None and first_byte(file) == 0


def test_descriptor_goes_with_its_object(tmp_path):
    before = descriptors()
    held = files(tmp_path, 5)
    assert sum(map(first_byte, held)) == 10 and descriptors() == before + 5
    del held
    gc.collect()
    assert descriptors() == before


def test_a_file_that_outlives_its_module_says_nothing_at_exit(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"abcd")
    script = (
        "import sys, pathlib\n"  # which loses its names after those that were imported later
        "from twinmerge.store import ranges\n"
        f"pathlib.kept = ranges.OpenFile(pathlib.Path({str(path)!r}))\n"
        "sys.kept = pathlib, ranges\n"
        "with pathlib.kept.use(): pass"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_file_that_changed_between_two_openings(tmp_path):
    (file,) = files(tmp_path, 1)
    first_byte(file)
    file.close()
    file.path.write_bytes(b"another")
    with pytest.raises(OSError, match="it changed since it was opened first"):
        first_byte(file)
    assert file._fd is None and not file._users


def test_writable_file_may_change(tmp_path):
    file = OpenFile(tmp_path / "0", writable=True)
    file.path.write_bytes(b"")
    for text in (b"ab", b"abcd"):
        with file.use() as fd:
            write_from(fd, text, 0)
        file.close()
    assert file.path.read_bytes() == b"abcd"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda file: pickle.loads(pickle.dumps(file))])
def test_a_copy_has_a_descriptor_of_its_own(tmp_path, duplicate):
    (file,) = files(tmp_path, 1)
    with file.use() as fd:
        other = duplicate(file)
        assert other._fd is None and not other._users
    with file.use() as own, other.use() as its:
        assert own == fd and its != own
    del other
    gc.collect()
    (tmp_path / "stranger").write_bytes(b"!")
    strangers = [(tmp_path / "stranger").open("rb") for _ in range(3)]  # they take the numbers that are free
    assert first_byte(file) == 0
    for stranger in strangers:
        stranger.close()


def test_a_copy_that_fails_half_way_closes_nothing(tmp_path):
    (file,) = files(tmp_path, 1)
    assert first_byte(file) == 0
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy([file, threading.Lock()])
    gc.collect()
    with (tmp_path / "0").open("rb"):
        assert first_byte(file) == 0


def test_a_copy_finds_out_that_the_file_changed(tmp_path):
    (file,) = files(tmp_path, 1)
    first_byte(file)
    other = copy.deepcopy(file)
    file.close()
    file.path.write_bytes(b"another")
    with pytest.raises(OSError, match="it changed since it was opened first"):
        first_byte(other)


def test_what_is_written_is_not_copied(tmp_path):
    with pytest.raises(TypeError, match="is being written: what writes it cannot be copied"):
        copy.deepcopy(OpenFile(tmp_path / "x", writable=True))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(TwinmergeError, match="x is a pipe, where a file is expected"):
        first_byte(OpenFile(tmp_path / "x"))
