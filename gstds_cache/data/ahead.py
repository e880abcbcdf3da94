"""Reading ahead: rows that will be asked for soon are fetched from a bucket meanwhile, several requests at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gstds_cache.files.bucket import Bucket
from gstds_cache.files.fetch import AT_ONCE, Fetcher, Part, open_fetcher

MOST_BYTES = 32 << 20
"""Bytes that a thread asks for ahead."""
REQUEST = 4 << 20
"""Bytes up to which what lies side by side in one object is one request."""
GAP = 64 << 10
"""Bytes between two members up to which it is faster to read them as well."""


def expect_rows(source: object, rows: Sequence[int]) -> None:
    """Tell a source which rows this thread will read next, in order; those that read ahead make use of it."""
    expect = getattr(source, "expect", None)
    if expect is not None:
        expect(rows)


@dataclass(eq=False)
class _Request:
    start: int
    size: int
    answer: Future[bytes]
    left: int


@dataclass
class _Ahead:
    """What one thread has asked for."""

    rows: deque[int] = field(default_factory=deque)
    under_way: dict[int, tuple[_Request, Part]] = field(default_factory=dict)
    size: int = 0
    requests: int = 0


class ReadAhead:
    """The bytes of rows that lie in a bucket's objects.

    Each thread reads ahead for itself. In a forked process it begins anew.
    """

    def __init__(self, bucket: Bucket, part: Callable[[int], Part]) -> None:
        """Prepare it; nothing is read.

        Args:
            bucket: Where the objects are.
            part: Where a row's bytes are; of size 0 where it has none.
        """
        self._bucket, self._part = bucket, part
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._fetcher: Fetcher | None = None
        self._threads = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"_bucket": self._bucket, "_part": self._part}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def expect(self, rows: Sequence[int]) -> None:
        """Ask for ``rows`` in order, as far as there is room; what was asked for before is dropped."""
        ahead = self._ahead()
        for request, _ in ahead.under_way.values():
            request.answer.cancel()
        ahead.under_way.clear()
        ahead.rows, ahead.size, ahead.requests = deque(rows), 0, 0
        self._ask(ahead)

    def take(self, row: int) -> bytes:
        """The bytes of a row; those that come next are asked for.

        Raises:
            FileNotFoundError: Its object is gone.
            ChangedError: Its object is another version now.
        """
        ahead = self._ahead()
        if row not in ahead.under_way:
            part = self._part(row)
            return self._submit(part).result() if part.size else b""
        request, part = ahead.under_way.pop(row)
        request.left -= 1  # also where there is no answer: its room is for others
        if not request.left:
            ahead.size, ahead.requests = ahead.size - request.size, ahead.requests - 1
        self._ask(ahead)
        data = request.answer.result()
        return data[part.start - request.start :][: part.size]

    def _ahead(self) -> _Ahead:
        if self._process != os.getpid():
            self._begin()
        ahead: _Ahead | None = getattr(self._threads, "ahead", None)
        if ahead is None:
            ahead = self._threads.ahead = _Ahead()
        return ahead

    def _submit(self, part: Part) -> Future[bytes]:
        with self._lock:
            if self._fetcher is None:
                self._fetcher = open_fetcher(self._bucket)
        return self._fetcher.submit(part)

    def _ask(self, ahead: _Ahead) -> None:
        """Ask for the next rows, while there is room."""
        while ahead.rows and ahead.size < MOST_BYTES and ahead.requests < AT_ONCE:
            rows = [(ahead.rows.popleft())]
            parts = [self._part(rows[0])]
            if not parts[0].size or rows[0] in ahead.under_way:
                continue
            while ahead.rows and len(rows) < AT_ONCE:
                part, end = self._part(ahead.rows[0]), parts[-1].start + parts[-1].size
                beside = part.size and part.path == parts[0].path and 0 <= part.start - end <= GAP
                if not beside or part.start + part.size - parts[0].start > REQUEST:
                    break
                rows.append(ahead.rows.popleft())
                parts.append(part)
            start = parts[0].start
            size = parts[-1].start + parts[-1].size - start
            whole = Part(parts[0].path, start, size, parts[0].etag)
            request = _Request(start, size, self._submit(whole), len(rows))
            ahead.size, ahead.requests = ahead.size + size, ahead.requests + 1
            ahead.under_way.update({row: (request, part) for row, part in zip(rows, parts, strict=True)})
