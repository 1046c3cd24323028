"""Work spread over processes that are forked from this one: Python's lock is not shared, so small steps run side by
side.

Only for a process that is known to be alone: a fork keeps no thread but the one that forks. The command is, a library
call may not be.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO, TypeVar

from twinmerge.maths.threads import OMP, one_thread_each, thread_count

Item = TypeVar("Item")
Result = TypeVar("Result")

CAN_FORK = sys.platform == "linux"  # elsewhere system libraries do not survive a fork


def forked(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in order, in `thread_count` processes, with one torch thread each.

    The processes see everything as it is now; what they change, but for files, stays theirs. Results and errors are
    pickled. They end with the iterator, and with this process.

    Raises:
        MemoryError: a process was killed, as systems do that run out of memory; RuntimeError: it crashed; what
            `function` raises.

    Example:
        >>> list(forked(lambda n: n * n, [1, 2, 3]))
        [1, 4, 9]
    """
    count = min(thread_count(), len(items))
    children: list[tuple[int, BinaryIO]] = []
    try:
        for first in range(count):
            children.append(_fork(function, items[first::count], [pipe for _, pipe in children]))
        for i in range(len(items)):
            pipe = children[i % count][1]
            try:
                good, answer = pickle.load(pipe)
            except (EOFError, pickle.UnpicklingError) as error:
                raise _end_of(*children.pop(i % count)) from error
            if not good:
                raise answer
            yield answer
    finally:
        for process, pipe in children:
            pipe.close()
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _end_of(process: int, pipe: BinaryIO) -> Exception:
    """Why a process ended before its work did."""
    pipe.close()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code == -signal.SIGKILL:
        return MemoryError("a worker process was ended from outside, most likely for lack of memory")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return RuntimeError(f"a worker process ended by {name}")


def _fork(
    function: Callable[[Item], Result], items: Sequence[Item], others: Sequence[BinaryIO]
) -> tuple[int, BinaryIO]:
    read_end, write_end = os.pipe()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are left behind: a progress bar's
        process = os.fork()
    if process:
        os.close(write_end)
        return process, os.fdopen(read_end, "rb")
    try:
        _die_with(parent)
        for pipe in others:
            os.close(pipe.fileno())
        os.close(read_end)
        with os.fdopen(write_end, "wb") as out:
            _serve(function, items, out)
    finally:
        os._exit(0)  # nothing of the parent's is to be cleaned up twice


def _serve(function: Callable[[Item], Result], items: Sequence[Item], out: BinaryIO) -> None:
    os.environ[OMP] = "1"  # of what is imported here
    one_thread_each()  # the threads of torch's pool were not forked
    with suppress(BrokenPipeError):
        for item in items:
            try:
                answer = True, function(item)
            except BaseException as error:
                pickle.dump((False, _portable(error)), out)
                return
            pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note; one that cannot be pickled as a RuntimeError of the same words."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        other = RuntimeError(f"{type(error).__name__}: {error}")
        other.__notes__ = error.__notes__
        return other
    return error


def _die_with(parent: int) -> None:
    """Be killed when the parent is, even with kill -9."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
