"""Forked workers: in order, errors and deaths reported, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.maths.threads import OMP
from twinmerge.maths.workers import CAN_FORK, forked
from twinmerge.store.ranges import OpenFile

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="forks on Linux only")


@pytest.fixture(autouse=True)
def _three_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def children() -> list[str]:
    """Processes of this one, but for what multiprocessing leaves behind for as long as this one lives."""
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        found = file.read().split()
    return [pid for pid in found if b"resource_tracker" not in command(pid)]


def command(pid: str) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:  # it has ended
        return b""


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 100])
def test_results_come_in_order_from_other_processes(count):
    found = list(forked(lambda n: (n, os.getpid(), torch.get_num_threads()), range(count)))
    assert [n for n, *_ in found] == list(range(count))
    assert len({pid for _, pid, _ in found} - {os.getpid()}) == min(3, count)
    assert not children()


def test_large_results_do_not_block():
    total = sum(len(x) for x in forked(lambda n: torch.zeros(300_000 + n), range(12)))
    assert total == 12 * 300_000 + 66


def test_an_error_is_raised_here_and_ends_all():
    def work(n):
        if n == 4:
            raise TwinmergeError("the fifth is bad")
        return n

    got = []
    with pytest.raises(TwinmergeError, match="the fifth is bad"):
        got.extend(forked(work, range(1000)))
    assert got == [0, 1, 2, 3] and not children()


def test_a_killed_worker_is_an_error():
    with pytest.raises(MemoryError, match="ended from outside"):
        list(forked(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == 1 else n, range(5)))
    assert not children()


def test_a_worker_that_crashes_is_another_error():
    with pytest.raises(RuntimeError, match="a worker process ended by SIGSEGV"):
        list(forked(lambda n: os.kill(os.getpid(), signal.SIGSEGV) if n == 1 else n, range(5)))
    assert not children()


def test_an_error_that_no_pipe_can_carry():
    class LocalError(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def work(n):
        raise LocalError(n, "x")

    with pytest.raises(RuntimeError, match="LocalError: 0 and x") as error:
        list(forked(work, range(3)))
    assert "in work" in error.value.__notes__[0] and not children()


def test_files_that_other_threads_use_do_not_stop_a_worker(tmp_path):
    """A thread that is not there in the fork neither holds the lock of open files nor uses one of them."""
    (tmp_path / "a").write_bytes(b"a")
    held, done = OpenFile(tmp_path / "a"), threading.Event()
    began = threading.Event()

    def hold():
        with held.use():
            began.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    began.wait()

    def work(n):
        with held.use() as fd:
            found = os.pread(fd, 1, 0)
        held.close()
        return found

    try:
        assert list(forked(work, range(3))) == [b"a"] * 3
    finally:
        done.set()
        thread.join()


def test_workers_end_with_an_iterator_that_is_dropped():
    work = forked(lambda n: time.sleep(0.01), range(10_000))
    next(work)
    assert children()
    work.close()
    assert not children()


def test_workers_die_with_their_parent():
    program = (
        "import os, time, torch; torch.set_num_threads(2)\n"
        "from twinmerge.maths.workers import forked\n"
        "for n in forked(lambda n: (os.getpid(), time.sleep(0.2 if n < 2 else 600))[0], range(8)):\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(min(2, os.cpu_count() or 1))]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_worker_imports_gets_one_thread(monkeypatch):
    """torch, imported by a worker for the first time, would otherwise take all cores in each of them."""
    monkeypatch.setenv(OMP, "2")
    assert list(forked(lambda _: os.environ[OMP], [0, 1, 2])) == ["1", "1", "1"]
    assert os.environ[OMP] == "2"
