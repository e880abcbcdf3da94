"""Who writes a store, where the service has no lock and only a record can say so."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4


@dataclass(frozen=True)
class Holder:
    """The one writer of a store whose service ignores conditional writes.

    Attributes:
        id: Its own, and of one lock.
        host: Name of its machine, for people.
        machine: Boot and process namespace; where these are ours, ``pid`` means what it means here.
        pid: Its process.
        started: When it got the lock, ISO 8601.
    """

    id: str
    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Holder:
        """A new one: this process, now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(uuid4().hex, socket.gethostname(), _machine(), os.getpid(), now)

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        """What :meth:`to_bytes` made; anything else is a writer of whom nothing is known."""
        try:
            fields = json.loads(data)
            names = {name: str(fields[name]) for name in ("id", "host", "machine", "started")}
            return cls(pid=int(fields["pid"]), **names)
        except (ValueError, TypeError, KeyError):
            return cls(id="", host="an unknown host", machine="", pid=0, started="an unknown time")

    def to_bytes(self) -> bytes:
        """JSON and a line end."""
        return json.dumps(vars(self)).encode() + b"\n"

    def gone(self) -> bool:
        """Whether it ended for certain: it was a process of this machine, and there is none of that number."""
        return bool(self.machine) and self.machine == _machine() and not Path("/proc", str(self.pid)).exists()


def _machine() -> str:
    """The boot and the process namespace that process numbers belong to, or empty where nobody knows."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
