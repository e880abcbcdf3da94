"""One run on several devices of a machine: this process works on the first, and a process of its own on each other.

A process and not a thread, since a device's decoder is one for a process, and Python's lock would be one for all. Each
takes the next shard as it is done with one; what it embeds comes back through a pipe, and this process commits it, so
that a store has one writer and no device need know what is committed or known already.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float

from gstds_cache.data.source import ImageSource
from gstds_cache.data.workers import portable_error
from gstds_cache.embedding.clock import Clock
from gstds_cache.embedding.decoding import keep_streams_apart, start_workers, try_decoder
from gstds_cache.embedding.elsewhere import open_same_encoder
from gstds_cache.embedding.plan import Known
from gstds_cache.embedding.shard import EmbedTask
from gstds_cache.errors import IncompleteError, UsageError
from gstds_cache.store.commit_record import CommitRecord, Quarantined
from gstds_cache.store.spec import CacheSpec

START = "spawn"  # A CUDA context does not survive a fork.
GRACE = 5.0
"""Seconds that a process has to end in."""


@dataclass(frozen=True)
class DeviceSetup:
    """What another process needs to embed shards of a store.

    Attributes:
        source: The data set.
        model: The model's URI.
        allow_untrained: Whether it may have random weights.
        decoder: What decodes.
        cuda_graphs: Whether forward passes are recorded.
        spec: What the store holds.
        workers: Processes that decode for each device.
        knows: Whether some rows are known already.
    """

    source: ImageSource
    model: str
    allow_untrained: bool
    decoder: Literal["pillow", "nvjpeg"]
    cuda_graphs: bool
    spec: CacheSpec
    workers: int
    knows: bool


class _Shards(Iterator[int]):
    """Shards, dealt one by one to whoever asks."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._shards, self._lock, self._total = iter(shards), threading.Lock(), len(shards)

    def __len__(self) -> int:
        return self._total

    def __next__(self) -> int:
        with self._lock:
            return next(self._shards)

    def stop(self) -> None:
        """Deal no more."""
        with self._lock:
            self._shards = iter(())


class SeveralDevices:
    """Runs an :class:`EmbedTask` on its own device and on others: an :class:`Executor` for that task.

    Attributes:
        clocks: The clock of each other process, as it was at its last commit.
    """

    def __init__(self, setup: DeviceSetup, others: Sequence[torch.device]) -> None:
        """Take what the other processes need.

        Args:
            setup: What they need.
            others: The devices but the first, which is the task's own.

        Raises:
            UsageError: The data set cannot be handed to another process.
        """
        try:
            pickle.dumps(setup.source)
        except Exception as error:  # Anything: an object's own code says how it is pickled.
            raise UsageError(
                f"`device`: got {len(others) + 1} devices, but the data set {setup.source.uri!r} cannot be handed to "
                f"another process: {str(error) or type(error).__name__}",
                hint="give one `device`, or a data set that can be pickled",
            ) from error
        self._setup, self._others = setup, others
        self.clocks = [Clock() for _ in others]

    def run(self, task: EmbedTask, shards: Sequence[int]) -> Iterator[CommitRecord]:
        """Embed and commit ``shards``, each on the device that is free.

        Args:
            task: Whose device, writer and known rows are used.
            shards: Shards to embed.

        Yields:
            The commit record of each shard, in the order in which they are durable.

        Raises:
            IncompleteError: One of the processes has ended.
            Exception: What was raised in one of them.
        """
        dealt, results = _Shards(shards), SimpleQueue[CommitRecord | Exception]()
        helpers = [
            _Helper(self._setup, device, task, dealt, results, clock)
            for device, clock in zip(self._others, self.clocks, strict=True)
        ]
        try:
            for helper in helpers:
                helper.start()
            for commit in task(dealt):
                yield commit
                yield from _drained(results)
            for helper in helpers:
                helper.finish()
            yield from _drained(results)
        finally:
            dealt.stop()
            for helper in helpers:
                helper.end()


def _drained(results: SimpleQueue[CommitRecord | Exception]) -> Iterator[CommitRecord]:
    with suppress(Empty):
        while True:
            result = results.get_nowait()
            if isinstance(result, Exception):
                raise result
            yield result


class _Helper(threading.Thread):
    """This process's side of another: deals shards to it, and commits what it embeds."""

    def __init__(
        self,
        setup: DeviceSetup,
        device: torch.device,
        task: EmbedTask,
        shards: _Shards,
        results: SimpleQueue[CommitRecord | Exception],
        clock: Clock,
    ) -> None:
        super().__init__(name=f"gstds-{device}", daemon=True)
        self._task, self._shards, self._results, self._clock, self._device = task, shards, results, clock, device
        self._asking, asking = multiprocessing.Pipe()
        self._committing, committing = multiprocessing.Pipe()
        self._theirs = (asking, committing)
        self._process: BaseProcess = multiprocessing.get_context(START).Process(  # type: ignore[attr-defined]
            target=_embed_shards, args=(setup, str(device), asking, committing), name=self.name
        )
        self._ended = threading.Event()
        self._under_way = 0  # shards that it was given and has not sent back

    def run(self) -> None:
        """Start the process, and serve it until it is done."""
        try:
            self._process.start()
            for end in self._theirs:
                end.close()
            self._serve()
        except Exception as error:
            if not self._ended.is_set():
                self._results.put(error)
                self._shards.stop()

    def _serve(self) -> None:
        while True:
            ready = connection.wait([self._committing, self._asking, self._process.sentinel])
            try:
                if self._committing in ready:
                    self._commit(*self._committing.recv())
                    continue
                asked = self._asking.recv() if self._asking in ready else None
                if asked == "next":
                    self._asking.send(self._next_shard())
                    continue
            except (EOFError, ConnectionError) as error:
                raise self._gone() from error
            if isinstance(asked, Exception):
                raise asked
            if asked is None:
                raise self._gone()
            return

    def _commit(
        self, shard: int, rows: Float[np.ndarray, "R D"], quarantined: tuple[Quarantined, ...], clock: dict[str, Any]
    ) -> None:
        commit = self._task.writer.commit(shard, rows, quarantined)
        self._under_way -= 1
        self._committing.send(commit)
        vars(self._clock).update(clock)
        self._clock.shards += 1
        self._results.put(commit)

    def _next_shard(self) -> tuple[int, tuple[Bool[np.ndarray, " R"], Float[np.ndarray, "K D"]] | None] | None:
        self._under_way += 1  # before it is taken: whoever asks between the two would end this with a shard lost
        shard = next(self._shards, None)
        if shard is None:
            self._under_way -= 1
            return None
        known = self._task.known
        return shard, None if known is None else known(self._task.writer.spec.rows_of(shard))

    def _gone(self) -> IncompleteError:
        self._process.join(GRACE)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return IncompleteError(
            f"the process that embeds on {self._device} {how}",
            hint="look for its last message above; a script that calls embed() with several devices has to do so under "
            "if __name__ == '__main__'. Nothing committed is lost: the same command goes on",
        )

    def finish(self) -> None:
        """Wait until it is done with its shards; not for its start, where it has none and there are no more."""
        while self.is_alive() and self._under_way:
            self.join(0.05)

    def end(self) -> None:
        """End the process, if it has not ended."""
        self._ended.set()
        if self._process.pid is None:  # The thread did not come to start it, or is at it.
            self.join(GRACE)
        for end in (self._asking, self._committing):
            with suppress(OSError):
                end.close()
        if self._process.pid is not None:
            self._process.join(0.1 if self.is_alive() else GRACE)
            if self._process.exitcode is None:
                self._process.terminate()
            self._process.join(GRACE)
        self.join(GRACE)


class _Asked(Iterator[int]):
    """In another process: the shards it is given, one by one, with what is known of their rows."""

    def __init__(self, asking: Connection, spec: CacheSpec) -> None:
        self._asking, self._spec = asking, spec
        self._known: dict[int, Any] = {}

    def __next__(self) -> int:
        self._asking.send("next")
        given = self._asking.recv()
        if given is None:
            raise StopIteration
        shard, self._known[given[0]] = given
        return int(shard)

    def known(self, span: range) -> tuple[Bool[np.ndarray, " R"], Float[np.ndarray, "K D"]]:
        """The known rows among those of a shard that was given (:data:`gstds_cache.embedding.plan.Known`)."""
        known: tuple[Any, Any] = self._known[span.start // self._spec.shard_rows]
        return known

    def forget(self, shard: int) -> None:
        """Drop what is known of a shard."""
        self._known.pop(shard, None)


class _CommittedElsewhere:
    """A :class:`gstds_cache.embedding.commits.ShardWriter` that has the first process commit."""

    def __init__(self, committing: Connection, spec: CacheSpec, asked: _Asked) -> None:
        self._committing, self._asked = committing, asked
        self.spec = spec
        self.clock: Callable[[], Clock] = Clock

    def commit(
        self, shard: int, rows: Float[np.ndarray, "R D"], quarantined: Sequence[Quarantined] = ()
    ) -> CommitRecord:
        """Send a shard, and wait until it is committed."""
        clock = {name: value for name, value in asdict(self.clock()).items() if name != "shards"}
        self._committing.send((shard, rows, tuple(quarantined), clock))
        commit: CommitRecord = self._committing.recv()
        self._asked.forget(shard)
        return commit


def _embed_shards(setup: DeviceSetup, device: str, asking: Connection, committing: Connection) -> None:
    """What another process does: embed shards on its device until there are no more.

    Raises:
        EOFError: Never, nor a ConnectionError.
    """  # noqa: DOC501
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's affair.
    with suppress(EOFError, ConnectionError):  # It has gone: go, without a word.
        try:
            keep_streams_apart(setup.decoder)
            run_on = torch.device(device)
            encoder = open_same_encoder(
                setup.model, setup.allow_untrained, setup.decoder, setup.spec, run_on, f"the process for {device}"
            )
            workers = start_workers(setup.source, encoder, setup.workers)  # before there is a CUDA context
            if run_on.type == "cuda":
                torch.cuda.set_device(run_on)  # else page-locked memory would have a context on the first GPU as well
            try_decoder(encoder, run_on)
            asked = _Asked(asking, setup.spec)
            writer = _CommittedElsewhere(committing, setup.spec, asked)
            known: Known | None = asked.known if setup.knows else None
            task = EmbedTask(
                setup.source,
                encoder,
                writer,
                device=run_on,
                workers=workers,
                cuda_graphs=setup.cuda_graphs,
                known=known,
            )
            writer.clock = lambda: task.clock
            deque(task(asked), maxlen=0)
            asking.send("end")
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            asking.send(portable_error(error))
