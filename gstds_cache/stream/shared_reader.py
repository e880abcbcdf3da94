"""Reading a selection that is being computed: from its file, waiting for what is not written yet."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from gstds_cache.errors import ProducerFailedError
from gstds_cache.stream.writer import partial_of

WAKE = 0.2  # seconds after which a waiting reader looks whether its own client is still there


class Stopped(Exception):
    """A reader's client is gone, or the service stops."""


class Growing:
    """How far a selection is that one thread writes and others read.

    Attributes:
        path: Where it will be when it is finished.
        begun: Whether its file is there.
        size: Bytes of the file that hold whole record batches.
        done: Whether these are all.
        error: What ended the writing before its end; None where nothing did.
        changed: Notified of every change.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is written yet."""
        self.path, self.begun, self.size, self.done = path, False, 0, False
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    def grown(self, size: int, *, done: bool = False) -> None:
        """So many bytes are written."""
        with self.changed:
            self.begun, self.size, self.done = True, size, done
            self.changed.notify_all()

    def failed(self, error: BaseException) -> None:
        """No more will be written."""
        with self.changed:
            self.error = error
            self.changed.notify_all()


class GrowingFile(io.RawIOBase):
    """The file of a selection that is being computed; reading waits for what is not there yet."""

    def __init__(self, shared: Growing, wanted: Callable[[], bool]) -> None:
        """Wait until there is a file, and open it.

        Raises:
            Stopped: Nobody wants it any more.
            ProducerFailedError: The computation failed.
        """
        self._shared, self._wanted, self._position = shared, wanted, 0
        self._wait(lambda: shared.begun)
        self._whole = False
        try:
            self._file = partial_of(shared.path).open("rb")
        except FileNotFoundError:  # just now it was finished. One that is open already is read on without its name.
            self._file, self._whole = shared.path.open("rb"), True

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read what there is, up to the size of ``buffer``; at least one byte, or 0 at the end."""
        if self._whole:
            return self._file.readinto(buffer)
        self._wait(lambda: self._shared.size > self._position or self._shared.done)
        count = min(len(buffer), self._shared.size - self._position)
        got = self._file.readinto(buffer[:count]) if count else 0
        self._position += got
        return got

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _wait(self, ready: Callable[[], bool]) -> None:
        shared = self._shared
        with shared.changed:
            while not shared.changed.wait_for(lambda: ready() or shared.error is not None, timeout=WAKE):
                if not self._wanted():
                    raise Stopped
            if not ready():
                if isinstance(shared.error, Stopped):
                    raise Stopped
                raise ProducerFailedError(f"the selection failed: {type(shared.error).__name__}: {shared.error}")


class SharedReader:
    """One reader's record batches. Its part in a computation ends with the last batch, or when it is closed or dropped.

    A generator would not do: one that is dropped before its first batch runs nothing, not even its ``finally``.
    """

    def __init__(
        self,
        reader: pa.RecordBatchReader,
        file: io.BufferedIOBase,
        start: int,
        wanted: Callable[[], bool],
        leave: Callable[[], None],
    ) -> None:
        """Begin with batch ``start``; ``leave`` is called once, at the end."""
        self._reader, self._file, self._start, self._wanted = reader, file, start, wanted
        self._leave: Callable[[], None] | None = leave

    def __iter__(self) -> SharedReader:
        return self

    def __next__(self) -> pa.RecordBatch:
        """The next record batch.

        Raises:
            StopIteration: There is none.
            Stopped: Nobody wants it any more.
            ProducerFailedError: The computation failed.
        """
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> pa.RecordBatch:
        while True:
            batch = self._reader.read_next_batch()
            if not self._wanted():
                raise Stopped
            seq = batch.column(0).to_numpy()
            if seq[-1] >= self._start:  # the epoch end before batch `start` has its number, and comes along
                return batch.slice(int(np.searchsorted(seq, self._start)))

    def close(self) -> None:
        """Leave; what was computed stays."""
        leave, self._leave = self._leave, None
        if leave is not None:
            self._file.close()
            leave()

    def __del__(self) -> None:
        self.close()
