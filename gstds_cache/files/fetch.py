"""Parts of objects, asked for ahead, several at a time: by threads of this process, or by a process of its own.

obstore's threads do not live in a forked child, and processes that decode are forked. A forked child therefore starts a
fresh Python process, which reads for it and answers through a pipe (:class:`ProcessFetcher`); it ends when its pipe
closes, so when the child does, however that ends.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol, runtime_checkable

from gstds_cache.errors import IncompleteError
from gstds_cache.files.bucket import Bucket, usable_here

AT_ONCE = 16
"""Requests that are under way at a time."""

_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from gstds_cache.files.fetch import serve; "
    "serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Part:
    """Bytes of an object.

    Attributes:
        path: The object.
        start: The first of them.
        size: How many, one at least.
        etag: The version that is meant; empty for any.
    """

    path: str
    start: int
    size: int
    etag: str = ""


@runtime_checkable
class Fetcher(Protocol):
    """Reads parts of a bucket's objects."""

    def submit(self, part: Part) -> Future[bytes]:
        """Ask for a part; errors are those of :meth:`gstds_cache.files.bucket.Bucket.get_range`."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def open_fetcher(bucket: Bucket) -> Fetcher:
    """What reads a bucket in this process."""
    return ThreadFetcher(bucket) if usable_here() else ProcessFetcher(bucket)


class ThreadFetcher:
    """Reads in threads of this process."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch")

    def submit(self, part: Part) -> Future[bytes]:
        """Ask for a part."""
        return self._pool.submit(self._bucket.get_range, part.path, part.start, part.size, part.etag)

    def close(self) -> None:
        """Let go of what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class ProcessFetcher:
    """Reads in a process of its own."""

    def __init__(self, bucket: Bucket) -> None:
        self._where = str(bucket.location)
        self._pipe, theirs = Pipe()
        words = [sys.executable, "-P", "-c", _CODE, str(theirs.fileno()), json.dumps(sys.path)]
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        finally:
            theirs.close()
        self._lock = threading.Lock()
        self._asked: dict[int, Future[bytes]] = {}
        self._number = 0
        self._ended = False
        self._pipe.send_bytes(pickle.dumps(bucket))
        threading.Thread(target=self._listen, name="fetch", daemon=True).start()

    def submit(self, part: Part) -> Future[bytes]:
        """Ask for a part."""
        future: Future[bytes] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._ended:
                future.set_exception(self._gone())
                return future
            self._number += 1
            self._asked[self._number] = future
            with suppress(OSError):  # its end is told by the thread that listens
                self._pipe.send_bytes(pickle.dumps((self._number, part)))
        return future

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, error = pickle.loads(self._pipe.recv_bytes())
                data = b"" if error else self._pipe.recv_bytes()
                with self._lock:
                    future = self._asked.pop(number)
                if error is None:
                    future.set_result(data)
                else:
                    future.set_exception(error)
        with self._lock:
            self._ended = True
            left, self._asked = self._asked, {}
        for future in left.values():
            future.set_exception(self._gone())

    def _gone(self) -> IncompleteError:
        code = self._process.poll()
        return IncompleteError(
            f"{self._where}: the process that reads it has ended"
            + (f" with exit code {code}" if code is not None else ""),
            hint="look for its last message above, and whether memory ran out. Nothing committed is lost: the same "
            "command goes on",
        )


def serve(descriptor: int) -> None:
    """What the process does: read what it is asked for, until nobody is left to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the affair of those who ask
    pipe, lock = Connection(descriptor), threading.Lock()
    bucket: Bucket = pickle.loads(pipe.recv_bytes())

    def answer(number: int, part: Part) -> None:
        error, data = None, b""
        try:
            data = bucket.get_range(part.path, part.start, part.size, part.etag)
        except Exception as failed:
            error = _portable(failed)
        with lock, suppress(OSError):
            pipe.send_bytes(pickle.dumps((number, error)))
            if error is None:
                pipe.send_bytes(data)

    pool = ThreadPoolExecutor(AT_ONCE)
    with suppress(EOFError, OSError):
        while True:
            pool.submit(answer, *pickle.loads(pipe.recv_bytes()))
    os._exit(0)  # whoever asked has gone: what is under way is for nobody


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
