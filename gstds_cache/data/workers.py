"""Processes that fill memory with pixels: each has a pipe of its own, and memory that it shares with its parent.

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
"""Batches that each worker has been asked for: one it works on, one that waits."""
SILENCE = 60.0
"""Seconds without a word from a worker, after which the user is told; it is waited for all the same."""
PATIENCE = 600.0
"""Seconds without a word from a worker after which it is given up."""
_GRACE = 5.0

Fill = Callable[[Sequence[int], UInt8[torch.Tensor, "B ..."]], Any]
"""Fills memory with the pixels of some rows, and returns what else there is to say of them."""

_log = logging.getLogger(__name__)


class Pool:
    """Workers that fill memory with pixels of rows, batch after batch, in order.

    Attributes:
        size: Number of workers.
    """

    def __init__(self, prepare: Callable[[], Fill], shape: tuple[int, ...], size: int) -> None:
        """Start the workers.

        Args:
            prepare: Called in each worker, for what it is to do.
            shape: Shape of one row's pixels.
            size: Number of workers.

        Raises:
            IncompleteError: The system has no room for so many processes or open files.
        """
        self.size, self._shape = size, shape
        self._owner = os.getpid()
        self._workers: list[_Worker] = []
        self._asked: deque[tuple[_Worker, Sequence[int]]] = deque()
        self._number = 0
        files = OpenFiles.now()
        try:
            for _ in range(size):
                self._workers.append(_Worker(prepare, shape, self._workers, files))
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
        """Whether another batch can be asked for."""
        return len(self._asked) < AHEAD * self.size

    def ask(self, rows: Sequence[int]) -> None:
        """Ask for a batch. The workers take turns, so that whose it is needs no lock and no queue for all.

        Args:
            rows: Its rows.
        """
        worker = self._workers[self._number % self.size]
        with suppress(OSError):  # Its end is told when it is waited for.
            worker.pipe.send((self._number // self.size % AHEAD, rows))
        self._number += 1
        self._asked.append((worker, rows))

    @property
    def pending(self) -> list[Sequence[int]]:
        """Rows of the batches that were asked for and not taken."""
        return [rows for _, rows in self._asked]

    def take(self, *, pin: bool) -> tuple[Sequence[int], UInt8[torch.Tensor, "B ..."], Any]:
        """Wait for the batch that was asked for first.

        Args:
            pin: Whether the pixels go into page-locked memory, for a GPU.

        Returns:
            Its rows, its pixels [B, ...], and what else the worker says of them.

        Raises:
            IncompleteError: A worker has ended, or its memory ran out.
            NotCopiedError: A worker has no data set object of its own.
        """  # noqa: DOC501
        worker, rows = self._asked[0]
        turn = (self._number - len(self._asked)) // self.size % AHEAD
        reply = self._receive(worker)
        if isinstance(reply, _Failed):
            raise _explained(reply.error, worker, rows) from None
        try:
            # Copied out at once: the worker may write there again as soon as it is asked for more.
            pixels = torch.empty((len(rows), *self._shape), dtype=torch.uint8, pin_memory=pin)
            pixels.view(-1).copy_(worker.memories[turn].bytes(pixels.numel()))
        except (OSError, RuntimeError, MemoryError) as error:
            raise _explained(error, worker, rows) from error
        self._asked.popleft()
        return rows, pixels, reply

    def close(self) -> None:
        """End the workers: each after the batch it is at, and what does not end within seconds is killed."""
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

    def _receive(self, worker: _Worker) -> Any:
        silent = 0.0
        ends = {other.process.sentinel: other for other in self._workers}
        while True:
            ready = connection.wait([worker.pipe, *ends], SILENCE)
            if worker.pipe in ready:
                with suppress(EOFError, OSError):
                    return worker.pipe.recv()
                raise self._ended(worker)
            for end in ready:
                raise self._ended(ends[end])  # type: ignore[index]
            silent += SILENCE
            rows = self._asked[0][1]
            if silent >= PATIENCE:
                raise IncompleteError(
                    f"the process {worker.process.pid}, which decodes rows {_span(rows)}, has said nothing for "
                    f"{silent:.0f} seconds",
                    hint="a file system that does not answer, or a lock that was held when the process was forked: "
                    "pass `workers=0`. Nothing committed is lost: the same command goes on",
                )
            _log.warning(
                "warning: the process %d, which decodes rows %s, has said nothing for %.0f seconds (a file system that "
                "does not answer? a stopped process? a lock that was held when it was forked? `workers=0` shares "
                "none); waiting for it, Ctrl-C ends this",
                worker.process.pid,
                _span(rows),
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
        rows = [_span(rows) for other, rows in self._asked if other is worker]
        at = f", which was to decode rows {' and '.join(rows)}," if rows else ""
        return IncompleteError(
            f"a process that decodes images (pid {worker.process.pid}){at} {how}",
            hint=f"{hint or 'look for what it said above'}. Nothing committed is lost: the same command goes on",
        )


class _Worker:
    """A worker as its parent sees it."""

    def __init__(
        self, prepare: Callable[[], Fill], shape: tuple[int, ...], others: Sequence[_Worker], files: OpenFiles
    ) -> None:
        # What is open already is closed by the garbage collector where the rest does not come about.
        fork = multiprocessing.get_context("fork")
        self.memories = [_Memory() for _ in range(AHEAD)]
        self.pipe, theirs = fork.Pipe()
        try:
            self.process = fork.Process(
                target=_serve, args=(prepare, shape, theirs, self, tuple(others), files), daemon=True
            )
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


def _serve(
    prepare: Callable[[], Fill],
    shape: tuple[int, ...],
    pipe: Connection,
    this: _Worker,
    others: Sequence[_Worker],
    files: OpenFiles,
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
    fill: Fill | None = None
    with suppress(EOFError, ConnectionError):  # The parent has gone: go, without a word.
        while (asked := pipe.recv()) is not None:
            turn, rows = asked
            try:
                if fill is None:
                    files.open_anew()
                    fill = prepare()
                size = len(rows) * torch.Size(shape).numel()
                reply = fill(rows, this.memories[turn].bytes(size).view(len(rows), *shape))
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # Panics of libraries written in Rust are no Exception.
                reply = _Failed(_portable(error))
            pipe.send(reply)


def _portable(error: BaseException) -> Exception:
    """The error with its trace as a note, or, where it does not pickle, another that says the same."""
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, Exception):
        return RuntimeError(f"in a process that decodes images: {trace}")
    if not isinstance(error, GstdsError):
        error.add_note(f"In a process that decodes images:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"in a process that decodes images: {trace}")
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
