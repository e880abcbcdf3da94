"""Runs that stop at an exact step: ``python kill_driver.py`` has torch and zarr loaded, and forks a child per run.

The steps are the calls with which a store or mirror is changed: opening a file for writing, writing (also half of it),
fsync, rename, link, unlink, mkdir. They are counted where Python hands them to the system, so that whatever way leads
there is counted, and nothing of the package knows of it. The child kills itself, or is told of an error, before or
after one of them. In a bucket the steps are the requests that change it, PUT and DELETE, each of which the service does
whole or not at all.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import ALWAYS, FORKS

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
GROWING = ("open", "write", "mkdir", "link")  # what a full disk refuses, from the first time on


class Stopped(BaseException):
    """Stands for a kill where the process has to live on: no step after it has any effect."""


class Steps:
    """Counts the steps on files whose path begins with ``root``, and stops at the one numbered ``stop``.

    Attributes:
        labels: All steps so far, in words.
    """

    def __init__(self, root: str, stop: int | None, how: str) -> None:
        self.root, self.stop, self.how = root, stop, how
        self.labels: list[str] = []
        self._lock = threading.Lock()

    def point(self, when: str, operation: str, path: str) -> None:
        if not path.startswith(self.root):
            return
        with self._lock:
            number = len(self.labels)
            name = re.sub(r"\.\d+-[0-9a-f]{8}\.tmp$", ".PID.tmp", path.removeprefix(self.root).lstrip("/"))
            self.labels.append(f"{when} {operation} {name}")
        late = self.stop is not None and number > self.stop
        full = late and self.how == "ENOSPC" and operation in GROWING
        if number == self.stop or full or (late and self.how == "stop"):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stop":
                raise Stopped
            raise OSError(ERRORS[self.how], os.strerror(ERRORS[self.how]), path)

    def around(self, operation: str, call: Callable[..., Any], which: int) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.point("before", operation, _path(args[which]))
            result = call(*args, **options)
            self.point("after", operation, _path(args[which]))
            return result

        return counted

    @contextmanager
    def counted(self) -> Iterator[Steps]:
        """Count, and stop, what the block does."""
        before = {name: getattr(os, name) for name in ("replace", "link", "unlink", "mkdir", "fsync")}
        opened = io.open
        for name, call in before.items():
            setattr(os, name, self.around("rename" if name == "replace" else name, call, name in {"replace", "link"}))

        def counted_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            path = _path(file)
            if not set(mode) & set("wax+") or not path.startswith(self.root):
                return opened(file, mode, *args, **options)
            self.point("before", "open", path)
            there = opened(file, mode, *args, **options)
            try:
                self.point("after", "open", path)
            except BaseException:
                there.close()
                raise
            return _Writes(there, self, path)

        io.open = counted_open
        try:
            yield self
        finally:
            io.open = opened
            for name, call in before.items():
                setattr(os, name, call)

    @contextmanager
    def counted_requests(self) -> Iterator[Steps]:
        """Count, and stop, what the block changes in a bucket; steps name the object, wherever the store is."""
        import obstore

        before = {name: getattr(obstore, name) for name in ("put", "delete")}
        for name, call in before.items():
            setattr(obstore, name, self._around_request(name, call))
        try:
            yield self
        finally:
            for name, call in before.items():
                setattr(obstore, name, call)

    def _around_request(self, operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(store: Any, key: str, *args: Any, **options: Any) -> Any:
            path = f"{self.root}/{re.sub('[0-9a-f]{32}', 'UUID', key)}"
            self.point("before", operation, path)
            try:
                return call(store, key, *args, **options)
            finally:
                self.point("after", operation, path)

        return counted


class _Writes:
    """A file whose every ``write`` is three steps."""

    def __init__(self, file: Any, steps: Steps, path: str) -> None:
        self._file, self._steps, self._path = file, steps, path

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._steps.point("before", "write", self._path)
        self._file.write(view[: len(view) // 2])
        self._file.flush()
        self._steps.point("in the middle of", "write", self._path)
        self._file.write(view[len(view) // 2 :])
        self._file.flush()
        self._steps.point("after", "write", self._path)
        return len(view)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writes:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _path(file: Any) -> str:
    return str(Path(f"/proc/self/fd/{file}").readlink()) if isinstance(file, int) else os.fspath(file)


def _act(action: str, store: Path | str) -> dict[str, Any]:
    import numpy as np
    import real_store

    from gstds_cache.store.reader import EmbeddingStore

    if action == "mirror":
        rows = [row for row in range(real_store.ITEMS) if row != real_store.BAD]
        return {"rows": EmbeddingStore(store, access="mirror").gather(np.array(rows)).tolist()}
    if action == "append":
        with real_store.shards_written() as shards:
            grown = real_store.append(store, real_store.Images(real_store.GROWN))
        return {"images": grown.embedded, "shards": shards, "fingerprint": grown.fingerprint}
    with real_store.shards_written() as shards:
        report: Any = (real_store.embed if action == "embed" else real_store.repair)(store)
    images = report.images if action == "repair" else report.embedded
    return {"images": images, "shards": shards}


def _child(job: dict[str, Any], answer: int) -> None:
    import torch

    torch.set_num_threads(1)
    store, steps = job["store"], Steps(job["store"], job["stop"], job["how"])
    bucket = store.startswith("s3://")
    try:
        with steps.counted_requests() if bucket else steps.counted():
            result = _act(job["action"], store if bucket else Path(store))
    except Exception as error:  # The parent judges what kind it is.
        system = error if isinstance(error, OSError) else error.__cause__
        codes = {"errno": system.errno} if isinstance(system, OSError) else {}
        result = {"error": type(error).__name__, "message": str(error), **codes}
    with os.fdopen(answer, "w") as pipe:
        json.dump({**result, "steps": steps.labels}, pipe)


def serve() -> None:
    import real_store  # noqa: F401  # everything that a child needs, imported once

    assert threading.active_count() == 1, "a fork would lose the other threads"
    for line in sys.stdin:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            _child(json.loads(line), writable)
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "answer": answer}), flush=True)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: Exit code, or minus the signal.
        result: What it says it did, or its error; empty if it was killed.
        steps: The steps it took; empty if it was killed.
    """

    code: int
    result: dict[str, Any]
    steps: tuple[str, ...]

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Driver:
    """The driver process, seen from a test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [FORKS.executable(), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ALWAYS,
        )

    def run(self, action: str, store: Path | str, stop: int | None = None, how: str = "kill") -> Outcome:
        """Run ``action`` (embed, repair, mirror, append) on ``store``, and stop at step ``stop``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"action": action, "store": str(store), "stop": stop, "how": how}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], 120)[0], "the run hangs"
        answer = json.loads(self.process.stdout.readline())
        result = json.loads(answer["answer"] or "{}")
        return Outcome(answer["code"], result, tuple(result.pop("steps", ())))

    def close(self) -> None:
        self.process.communicate(timeout=30)


def kinds(labels: Sequence[str]) -> set[str]:
    """The kinds of steps, without the files' names."""
    return {label.rpartition(" ")[0] for label in labels}


if __name__ == "__main__":
    serve()
