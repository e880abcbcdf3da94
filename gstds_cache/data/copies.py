"""A data set object for each process: what a fork shares with its parent is not to be read from by both.

A file that is open when a process is forked has one position for both, a connection to a database one stream of
answers, a pool of threads no threads in the child. Whoever seeks and reads there gets what another was about to read.
"""

from __future__ import annotations

import fcntl
import io
import mmap
import os
import pickle
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from gstds_cache.errors import DatasetError

_SMALL = 1 << 10
_SHARED = frozenset(
    {np.ndarray, np.memmap, torch.Tensor, torch.nn.Parameter, mmap.mmap, memoryview, Image.Image, bytes, bytearray, str}
)
_FRESH: dict[type, Callable[[], Any]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
    threading.local: threading.local,
}


class NotCopiedError(DatasetError):
    """A data set object of which a process cannot have one of its own."""


class Copies:
    """Makes objects like one there is, in processes that are forked from this one.

    A copy is pickled now, without what lies in memory alone: arrays, tensors, long strings. Those stay where they are,
    and a forked process has them already, so that memory does not grow with the number of processes. Locks are made
    anew. What does not pickle (an open file, a database) is made as the object was made.
    """

    def __init__(self, original: Any, again: Callable[[], Any] | None) -> None:
        """Prepare the copies.

        Args:
            original: The object.
            again: Makes it once more from nothing; None where nobody knows how.

        Raises:
            NotCopiedError: It does not pickle, and ``again`` is None.
        """
        self._again = again
        self._pickled: _Pickled | None = None
        try:
            self._pickled = _Pickled.of(original)
        except Exception as error:  # Anything: an object's own code says how it is pickled.
            if again is None:
                raise NotCopiedError(f"it does not pickle: {str(error) or type(error).__name__}") from error

    def make(self, check: Callable[[Any], object]) -> Any:
        """The object of this process.

        Args:
            check: Tries an object out; one for which it raises anything is no copy.

        Returns:
            It.

        Raises:
            NotCopiedError: It can be made in no way.
        """
        failed: Exception | None = None
        if self._pickled is not None:
            try:
                copy = self._pickled.load()
                check(copy)
                return copy
            except Exception as error:  # Anything: unpickling and trying it out run the object's own code.
                failed = error
        try:
            if self._again is not None:
                another = self._again()
                check(another)
                return another
        except Exception as error:  # Anything, for the same reason.
            failed = error
        raise NotCopiedError(f"making it again failed: {str(failed) or type(failed).__name__}") from failed


@dataclass(frozen=True)
class _Pickled:
    data: bytes
    kept: list[Any]
    buffers: list[pickle.PickleBuffer]

    @classmethod
    def of(cls, original: Any) -> _Pickled:
        file, kept, buffers = io.BytesIO(), list[Any](), list[pickle.PickleBuffer]()
        _Pickler(file, kept, buffers).dump(original)
        return cls(file.getvalue(), kept, buffers)

    def load(self) -> Any:
        return _Unpickler(io.BytesIO(self.data), self.kept, self.buffers).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, kept: list[Any], buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self._kept = kept

    def persistent_id(self, obj: Any) -> int | None:
        kind = type(obj)
        if kind not in _SHARED or (kind in {bytes, bytearray, str} and len(obj) < _SMALL):
            return None
        if kind in {np.ndarray, np.memmap} and obj.dtype.hasobject:
            return None
        self._kept.append(obj)  # Twice, where it is there twice: finding it again is what takes time.
        return len(self._kept) - 1

    def reducer_override(self, obj: Any) -> Any:
        make = _FRESH.get(type(obj))
        return NotImplemented if make is None else (make, ())


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: list[Any], buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(file, buffers=buffers)
        self._kept = kept

    def persistent_load(self, pid: int) -> Any:
        return self._kept[pid]


# How a file was found or made: the link in /proc is followed, and nothing is made. (O_TMPFILE holds O_DIRECTORY.)
_NOT_AGAIN = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW | getattr(os, "O_TMPFILE", 0)


@dataclass(frozen=True)
class _OpenFile:
    number: int
    flags: int
    identity: tuple[int, int]
    position: int = 0

    @classmethod
    def at(cls, number: int) -> _OpenFile:
        status = os.fstat(number)
        return cls(number, fcntl.fcntl(number, fcntl.F_GETFL), (status.st_dev, status.st_ino))


@dataclass(frozen=True)
class OpenFiles:
    """The files this process has open to read, with where it reads; taken before a fork, to open them anew after it.

    An object of a process's own is not enough: a number from ``os.open`` pickles, and a file may be in a variable of a
    module or a class, which a fork copies. A descriptor that is opened anew keeps its number and has its own position.
    """

    files: tuple[_OpenFile, ...]

    @classmethod
    def now(cls) -> OpenFiles:
        """Those of now. Standard input, output and error stay shared, and so does what is only written to."""
        found = []
        with suppress(OSError):  # No /proc.
            for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - names, and no paths
                with suppress(OSError):  # The listing's own.
                    file = _OpenFile.at(number)
                    read = file.flags & os.O_ACCMODE != os.O_WRONLY and not file.flags & os.O_PATH
                    if number > 2 and read and stat.S_ISREG(os.fstat(number).st_mode):
                        found.append(replace(file, position=os.lseek(number, 0, os.SEEK_CUR)))
        return cls(tuple(found))

    def open_anew(self) -> None:
        """In the forked process: open each again, at the same place. One that may not be opened stays shared."""
        for file in self.files:
            with suppress(OSError):
                # Between the listing and the fork a descriptor may have been closed, and its number given to another.
                if _OpenFile.at(file.number) != replace(file, position=0):
                    continue
                own = os.open(f"/proc/self/fd/{file.number}", file.flags & ~_NOT_AGAIN)
                try:
                    os.lseek(own, file.position, os.SEEK_SET)
                    os.dup2(own, file.number, inheritable=os.get_inheritable(file.number))
                finally:
                    os.close(own)
