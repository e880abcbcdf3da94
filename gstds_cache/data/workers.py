"""Processes that fill memory with what rows hold: each has a pipe of its own, and memory shared with its parent.

PyTorch's DataLoader hands tensors over as files in /dev/shm, from a thread whose errors are printed and forgotten:
where there is no room (64 MB are Docker's default), its reader waits for ever. Here nothing lies in /dev/shm, neither
pixels nor semaphores; what a worker has to say is one message; and a worker that ends, however it does, closes its
pipe, which its parent sees at once.
"""

from __future__ import annotations

import errno
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch
from jaxtyping import UInt8

from gstds_cache.data.copies import OpenFiles
from gstds_cache.errors import GstdsError, IncompleteError

AHEAD = 2
"""Parts that each worker has been asked for: one it works on, one that waits."""
SILENCE = 60.0
"""Seconds without a word from any worker, after which the user is told; they are waited for all the same."""
PATIENCE = 600.0
"""Seconds without a word from any worker after which the one whose part is the oldest is given up."""
_GRACE = 5.0

Room = Callable[[int], UInt8[torch.Tensor, " size"]]
"""Gives memory of so many bytes, which is the parent's to read once the work on a part is done. Called once at most."""
Fill = Callable[[Sequence[int], Room], Any]
"""Fills memory with what some rows hold, and returns what else there is to say of them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Rows that one worker is asked for.

    Attributes:
        number: How many parts were asked for before.
        rows: The rows.
        tag: Whatever the one who asks wants to know when the part is filled.
    """

    number: int
    rows: Sequence[int]
    tag: Any


@dataclass(frozen=True)
class Filled:
    """What a worker made of a part. The memory is the worker's again once it is released (:meth:`Pool.release`).

    Attributes:
        part: The part.
        memory: What the worker wrote.
        reply: What it says besides.
        error: What it, or reading its memory, raised; then there is no reply.
    """

    part: Part
    memory: UInt8[torch.Tensor, " size"]
    reply: Any
    error: Exception | None
    worker: _Worker
    turn: int


class Pool:
    """Workers that fill memory with what rows hold, part after part: whichever worker is free gets the next part.

    Attributes:
        size: Number of workers.
    """

    def __init__(self, prepare: Callable[[], Fill], size: int) -> None:
        """Start the workers.

        Args:
            prepare: Called in each worker at its start, for what it is to do.
            size: Number of workers.

        Raises:
            IncompleteError: The system has no room for so many processes or open files.
        """
        self.size = size
        self._owner = os.getpid()
        self._workers: list[_Worker] = []
        self._waiting: deque[Part] = deque()  # for a worker
        self._ready: deque[_Worker] = deque()  # have answered, and were not read
        self._number = 0
        files = OpenFiles.now()
        try:
            for _ in range(size):
                self._workers.append(_Worker(prepare, self._workers, files))
        except OSError as error:
            refused = len(self._workers) + 1
            self.close()
            raise IncompleteError(
                f"starting {size} processes that decode images: the system refused number {refused}: "
                f"{error.strerror or error}",
                hint=f"use fewer `workers`, or `workers=0`, or raise the limit ({_limit(error)})",
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def has_room(self) -> bool:
        """Whether a worker would have nothing to go on with unless another part is asked for."""
        return len(self._waiting) + sum(len(worker.asked) for worker in self._workers) < AHEAD * self.size

    def ask(self, rows: Sequence[int], tag: Any = None) -> None:
        """Ask for a part.

        Args:
            rows: Its rows.
            tag: Comes back with it.
        """
        self._waiting.append(Part(self._number, rows, tag))
        self._number += 1
        self._deal()

    def ask_rest(self, part: Part, rows: Sequence[int], tag: Any) -> None:
        """Ask for what a worker had no room for, ahead of all that waits."""
        self._waiting.appendleft(Part(part.number, rows, tag))
        self._deal()

    def wait(self, *, block: bool = True) -> Filled | None:
        """The next part that is filled, whichever it is.

        Args:
            block: Whether to wait for one.

        Returns:
            It, or None where there is none yet.

        Raises:
            IncompleteError: A worker has ended, or none says a word.
        """
        if not self._ready:
            self._listen(block)
        if not self._ready:
            return None
        worker = self._ready.popleft()
        try:
            size, reply = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._ended(worker) from None
        turn, part = worker.asked.popleft()
        nothing = torch.empty(0, dtype=torch.uint8)
        if isinstance(reply, _Failed):
            return Filled(part, nothing, None, _explained(reply.error, worker, part.rows), worker, turn)
        try:
            memory = worker.memories[turn].bytes(size) if size else nothing
            return Filled(part, memory, reply, None, worker, turn)
        except (OSError, RuntimeError, MemoryError) as error:
            return Filled(part, nothing, None, _explained(error, worker, part.rows), worker, turn)

    def release(self, filled: Filled) -> None:
        """Let the worker write again to the memory of a part, and give it another."""
        filled.worker.free.append(filled.turn)
        self._deal()

    def close(self) -> None:
        """End the workers: each after the part it is at, and what does not end within seconds is killed."""
        if os.getpid() != self._owner:  # A worker has a copy of this, and is not to end the others.
            return
        workers, self._workers = self._workers, []
        for worker in workers:
            with suppress(OSError):
                worker.pipe.send(None)
            worker.pipe.close()
        until = time.monotonic() + _GRACE
        for worker in workers:
            worker.end(until)

    def __del__(self) -> None:
        self.close()

    def _deal(self) -> None:
        """Give parts that wait to workers that have memory for them, those with the least to do first."""
        while self._waiting:
            worker = min((worker for worker in self._workers if worker.free), key=lambda w: len(w.asked), default=None)
            if worker is None:
                return
            part, turn = self._waiting.popleft(), worker.free.popleft()
            worker.asked.append((turn, part))
            with suppress(OSError):  # Its end is told when it is waited for.
                worker.pipe.send((turn, part.rows))

    def _listen(self, block: bool) -> None:
        """Note which workers have answered."""
        silent = 0.0
        pipes = {worker.pipe: worker for worker in self._workers}
        ends = {worker.process.sentinel: worker for worker in self._workers}
        while True:
            ready = connection.wait([*pipes, *ends], SILENCE if block else 0)
            self._ready.extend(pipes[pipe] for pipe in ready if pipe in pipes)
            for end in ready:
                if not self._ready and end in ends:
                    raise self._ended(ends[end])
            if self._ready or not block:
                return
            silent += SILENCE
            self._complain(silent)

    def _complain(self, silent: float) -> None:
        asked = [(worker.asked[0][1], worker) for worker in self._workers if worker.asked]
        part, worker = min(asked, key=lambda pair: pair[0].number)
        if silent >= PATIENCE:
            raise IncompleteError(
                f"the process {worker.process.pid}, which decodes rows {_span(part.rows)}, has not answered for "
                f"{silent:.0f} seconds",
                hint="a file system that does not answer, or a lock that was held when the process was forked: "
                "pass `workers=0`. Nothing committed is lost: the same command goes on",
            )
        _log.warning(
            "warning: the process %d, which decodes rows %s, has not answered for %.0f seconds (a file system that "
            "does not answer? a stopped process? a lock that was held when it was forked? `workers=0` shares "
            "none); waiting for it, Ctrl-C ends this",
            worker.process.pid,
            _span(part.rows),
            silent,
        )

    def _ended(self, worker: _Worker) -> IncompleteError:
        worker.process.join(_GRACE)
        code = worker.process.exitcode
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        hint = ""
        if code is not None and code < 0:
            with suppress(ValueError):
                how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                hint = "if it was the system, memory ran out: use fewer `workers`, or `workers=0`"
            elif -code == signal.SIGBUS:
                hint = "a file that it had mapped was cut short, or memory ran out (in a container, its shm size)"
            else:
                hint = "a library that reads or decodes images crashed: `workers=0` shows where"
        rows = [_span(part.rows) for _, part in worker.asked]
        at = f", which was to decode rows {' and '.join(rows)}," if rows else ""
        return IncompleteError(
            f"a process that decodes images (pid {worker.process.pid}){at} {how}",
            hint=f"{hint or 'look for its last message above'}. Nothing committed is lost: the same command goes on",
        )


class _Worker:
    """A worker as its parent sees it."""

    def __init__(self, prepare: Callable[[], Fill], others: Sequence[_Worker], files: OpenFiles) -> None:
        # What is open already is closed by the garbage collector where the rest does not come about.
        fork = multiprocessing.get_context("fork")
        self.memories = [_Memory() for _ in range(AHEAD)]
        self.free = deque(range(AHEAD))  # memories that no part is in
        self.asked: deque[tuple[int, Part]] = deque()  # memory and part, in the order of their answers
        self.pipe, theirs = fork.Pipe()
        try:
            self.process = fork.Process(target=_serve, args=(prepare, theirs, self, tuple(others), files), daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of fork in a process with threads. Workers decode and do nothing else.
                warnings.filterwarnings(
                    "ignore", message=".*fork\\(\\) may lead to deadlocks", category=DeprecationWarning
                )
                self.process.start()
        finally:
            theirs.close()

    def forget(self) -> None:
        """In another worker: let go of this one's pipe and memory."""
        self.pipe.close()
        for memory in self.memories:
            memory.close()

    def end(self, until: float) -> None:
        """Wait for its end until then, and no longer."""
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(_GRACE)  # One that waits for a dead file system cannot even be killed.
        for memory in self.memories:
            memory.close()


class _Memory:
    """Memory that a worker fills and its parent reads: a file without a name or place, bounded by memory alone."""

    _file: int
    _map: mmap.mmap | None

    def __init__(self) -> None:
        self._file, self._map = -1, None
        self._file = os.memfd_create("gstds-pixels")

    def bytes(self, size: int) -> UInt8[torch.Tensor, " size"]:
        """The first ``size`` bytes; it grows to hold them.

        Raises:
            OSError: There is no memory for them.
        """
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file).st_size < size:
                # Set aside first: a write to a page for which there is no memory would end the process.
                os.posix_fallocate(self._file, 0, size)
            self._map = mmap.mmap(self._file, max(size, 1))
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size)

    def close(self) -> None:
        """Give it back, once nothing looks at it any more."""
        self._map = None
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class _Failed:
    error: Exception


class _Claimed:
    """The room of one part, and how much of it was asked for."""

    def __init__(self, memory: _Memory) -> None:
        self._memory, self.size = memory, 0

    def __call__(self, size: int) -> UInt8[torch.Tensor, " size"]:
        self.size = size
        return self._memory.bytes(size)


def _serve(
    prepare: Callable[[], Fill], pipe: Connection, this: _Worker, others: Sequence[_Worker], files: OpenFiles
) -> None:
    """What a worker does: fill memory as it is asked to, until its parent says so or has gone.

    Raises:
        SystemExit: The data set's code ends the process.
        KeyboardInterrupt: So it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its parent's affair.
    torch.set_num_threads(1)  # Also since OpenMP's threads do not survive a fork.
    this.pipe.close()
    for other in others:
        other.forget()
    failed = fill = None
    try:
        files.open_anew()
        fill = prepare()  # At once: the first part may be asked for only when the model is ready.
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # Panics of libraries written in Rust are no Exception.
        failed = _Failed(portable_error(error))
    with suppress(EOFError, ConnectionError):  # The parent has gone: go, without a word.
        while (asked := pipe.recv()) is not None:
            turn, rows = asked
            room, reply = _Claimed(this.memories[turn]), failed
            try:
                if fill is not None:
                    reply = fill(rows, room)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                reply = _Failed(portable_error(error))
            pipe.send((room.size, reply))


def portable_error(error: BaseException, where: str = "in a process that decodes images") -> Exception:
    """The error with its trace as a note, or, where it does not pickle, another that says the same."""
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, Exception):
        return RuntimeError(f"{where}: {trace}")
    if not isinstance(error, GstdsError):
        error.add_note(f"{where[0].upper()}{where[1:]}:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{where}: {trace}")
    return error


def _explained(error: Exception, worker: _Worker, rows: Sequence[int]) -> Exception:
    text = str(error).partition("\n")[0][:200]
    system = {errno.ENOMEM: "memory", errno.ENOSPC: "memory", errno.EMFILE: "open files", errno.ENFILE: "open files"}
    short = system.get(error.errno or 0) if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        short = "memory"
    if short is None:
        return error
    return IncompleteError(
        f"a process that decodes images (pid {worker.process.pid}) ran out of {short} at rows {_span(rows)}: "
        f"{text or type(error).__name__}",
        hint="use fewer `workers`, or `workers=0`, or a smaller batch. Nothing committed is lost: the same command "
        "goes on",
    )


def _span(rows: Sequence[int]) -> str:
    return f"{min(rows)} to {max(rows)}" if len(rows) > 1 else str(rows[0] if rows else "none")


def _limit(error: OSError) -> str:
    """Where the limit is that an error tells of."""
    return {errno.EMFILE: "open files: ulimit -n", errno.ENFILE: "open files of the system: fs.file-max"}.get(
        error.errno or 0, "processes: ulimit -u, or the container's pids limit; memory"
    )
