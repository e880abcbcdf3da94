"""Where embedding's time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SPENT = ("waiting", "forward", "commit_wait", "decode", "commit", "images", "shards", "reused", "on_device")


@dataclass
class Clock:
    """Seconds of each part of embedding, and images done.

    ``waiting``, ``forward`` and ``commit_wait`` follow each other in the main thread and make up nearly all of its
    time. ``decode`` and ``commit`` go on beside it.

    Attributes:
        waiting: The main thread waited for decoded images (without workers: decoded them).
        forward: The main thread ran the model, or waited for it.
        commit_wait: The main thread waited for the commit of the shard before.
        decode: Reading and decoding, summed over the workers.
        commit: The commit thread was busy.
        workers: Decoding processes.
        images: Images put through the model.
        shards: Shards committed.
        reused: Rows of the shards done so far that were known already.
        on_device: Images that the device decoded.
        started: When embedding began (``time.perf_counter``).
        ended: When it ended; 0 while it goes on.
    """

    waiting: float = 0.0
    forward: float = 0.0
    commit_wait: float = 0.0
    decode: float = 0.0
    commit: float = 0.0
    workers: int = 0
    images: int = 0
    shards: int = 0
    reused: int = 0
    on_device: int = 0
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    def elapsed(self) -> float:
        """Seconds from the start to the end, or to now."""
        return (self.ended or time.perf_counter()) - self.started

    def add(self, other: Clock) -> None:
        """Add what another process did beside this one; the time of the main thread stays this one's."""
        for name in ("decode", "commit", "workers", "images", "shards", "reused", "on_device"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, before: Clock) -> Clock:
        """What was added to ``before``; of no process, and at no time."""
        spent = {name: getattr(self, name) - getattr(before, name) for name in SPENT}
        return Clock(started=0.0, **spent)

    def shares(self) -> dict[str, float]:
        """What share of the time was spent how: of the workers' time for decode, of the wall clock for the others."""
        whole = max(self.elapsed(), 1e-9)
        return {
            "decode": self.decode / whole / max(self.workers, 1),
            "forward": self.forward / whole,
            "commit": self.commit / whole,
            "waiting": self.waiting / whole,
        }
