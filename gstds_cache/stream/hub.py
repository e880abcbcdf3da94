"""Selections shared by many readers: each computed once, written ahead to disk, and read from there by every reader.

A reader that is slow, or stands still, holds up nobody and costs no memory: what it has not read yet is in the file.
A computation nobody reads any more is stopped; what it had is kept, and the next request goes on from there.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from gstds_cache.errors import IncompleteError, UsageError
from gstds_cache.stream.record_writer import computed
from gstds_cache.stream.schema import Header
from gstds_cache.stream.shared_reader import WAKE, Growing, GrowingFile, SharedReader, Stopped
from gstds_cache.stream.writer import header_of, stored_header, storing

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector

Selector = Callable[[], "BatchSelector"]


class Shared(Growing):
    """One selection that is being computed, and those who read it.

    Attributes:
        header: What the selection says of itself.
        readers: How many read it.
        stopping: Whether it is to stop.
    """

    def __init__(
        self,
        selector: BatchSelector,
        path: Path,
        turn: threading.Semaphore,
        log: Callable[..., None],
        ended: Callable[[Shared], None],
    ) -> None:
        """Begin computing, in a thread, once it is this selection's turn; ``ended`` is told when that is over."""
        super().__init__(path)
        self.header, self.readers, self.stopping = header_of(selector), 0, False
        self._turn, self._log, self._ended = turn, log, ended
        # The thread alone holds the selector: a slow reader holds this object long after the computation's end.
        self.thread = threading.Thread(target=self._compute, args=(selector,), name="selection", daemon=True)
        self.thread.start()

    def _compute(self, selector: BatchSelector) -> None:
        try:
            self._write(selector)
            self._log("computed", selection=self.header.selection_digest, batches=self.header.total_batches)
        except BaseException as error:
            if not isinstance(error, Stopped):
                self._log("failed", selection=self.header.selection_digest, error=f"{type(error).__name__}: {error}")
            self.failed(error)
        finally:
            self._ended(self)

    def _write(self, selector: BatchSelector) -> None:
        while not self._turn.acquire(timeout=WAKE):
            if self.stopping:
                raise Stopped
        try:
            with storing(self.header, self.path) as stored:
                self.grown(stored.size)
                with closing(computed(selector, stored.taken_over)) as batches:  # type: ignore[type-var]
                    for ready in batches:
                        stored.write(*ready)
                        self.grown(stored.size)
                        if self.stopping:
                            raise Stopped
                stored.end()
                self.grown(stored.size, done=True)
        finally:
            self._turn.release()


class Hub:
    """The selections of one store: finished ones on disk, and those being computed."""

    def __init__(
        self, folder: Path, *, also: Sequence[Path] = (), log: Callable[..., None] = lambda _event, **_fields: None
    ) -> None:
        """Nothing is computed yet.

        Args:
            folder: Where selections are computed, and finished ones are.
            also: Other folders in which finished ones are.
            log: Told of events.
        """
        self.folder, self.stopping = folder, False
        self._folders = list(dict.fromkeys([folder, *also]))
        self._log, self._lock = log, threading.Lock()
        self._running: dict[str, Shared] = {}
        self._turn = threading.Semaphore(1)  # selections are computed one after the other: each uses all threads

    def stored(self) -> Iterator[tuple[Path, Header]]:
        """Yields finished selections and their headers."""
        seen: set[str] = set()
        for folder in self._folders:
            for path in sorted(folder.glob("[0-9a-f]*.arrow")):
                header = stored_header(path) if path.name not in seen else None
                if header is not None:
                    seen.add(path.name)
                    yield path, header

    def path_of(self, digest: str) -> Path:
        """Where the selection of this digest is, or will be."""
        paths = [folder / f"{digest[:16]}.arrow" for folder in self._folders]
        return next((path for path in paths if os.path.isfile(path)), paths[0])  # noqa: PTH113 - Path's may raise

    def find(self, prefix: str) -> str:
        """The whole digest of a stored or running selection.

        Raises:
            UsageError: None, or several, begin so.
        """
        known = {header.selection_digest for _, header in self.stored()} | set(self._running)
        matching = [digest for digest in sorted(known) if digest.startswith(prefix)]
        if len(matching) != 1:
            raise UsageError(
                f"{len(matching)} selections of this store begin with {prefix}", hint="list them, or give more"
            )
        return matching[0]

    def batches(
        self, digest: str, make: Selector | None, start: int, wanted: Callable[[], bool]
    ) -> tuple[pa.Schema, SharedReader]:
        """Record batches of a selection, from a batch on; computed if need be, together with whoever else wants it.

        Args:
            digest: The selection.
            make: Makes its selector; None where it is only to be found.
            start: First ``seq``.
            wanted: Asked from time to time whether the reader is still there.

        Returns:
            The schema, and the record batches.

        Raises:
            UsageError: It is not stored, and ``make`` is None.
            IncompleteError: The service is stopping.
        """
        path = self.path_of(digest)
        with self._lock:
            shared = self._running.get(digest)
            if shared is not None and (shared.error is not None or shared.stopping):
                shared = None  # this request tries again
            if shared is None and not path.is_file():
                if make is None:
                    raise UsageError(f"selection {digest[:12]} is not stored, and its settings are not known")
                if self.stopping:
                    raise IncompleteError("the service is stopping", hint="ask again when it is back")
                shared = self._running[digest] = Shared(make(), path, self._turn, self._log, self._ended)
                self._log("computing", selection=digest)
            if shared is not None:
                shared.readers += 1
        try:
            file = path.open("rb") if shared is None else io.BufferedReader(GrowingFile(shared, wanted), 1 << 18)
            reader = pa.ipc.open_stream(file)
        except BaseException:
            self._leave(digest, shared)
            raise
        return reader.schema, SharedReader(reader, file, start, wanted, lambda: self._leave(digest, shared))

    def stop(self) -> None:
        """Stop computing after the batch in hand; what was computed is kept."""
        self.stopping = True
        with self._lock:
            running = list(self._running.values())
        for shared in running:
            shared.stopping = True
        for shared in running:
            shared.thread.join(timeout=30)

    def _leave(self, digest: str, shared: Shared | None) -> None:
        if shared is None:
            return
        with self._lock:
            shared.readers -= 1
            if shared.readers == 0 and not shared.done and shared.error is None:
                shared.stopping = True
                self._log("stopped: its last reader left", selection=digest)

    def _ended(self, shared: Shared) -> None:
        with self._lock:
            digest = shared.header.selection_digest
            if self._running.get(digest) is shared:
                del self._running[digest]

    @property
    def running(self) -> int:
        """Selections being computed, or waiting for their turn."""
        return len(self._running)
