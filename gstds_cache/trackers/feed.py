"""One tracker in a thread of its own: training never waits for it, and goes on when it fails.

A tracker's library may load for seconds, and a server that is away is asked again for minutes. The thread reads points
from the run's file (``points_file.py``) and writes down how many it sent, so that the next session goes on from there:
what could not be sent, because the server was away or the process was killed, is sent then.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gstds_cache.errors import in_words
from gstds_cache.files.atomic import atomic_write
from gstds_cache.trackers.credentials import without_credentials
from gstds_cache.trackers.points_file import PointsFile
from gstds_cache.trackers.tracker import Outcome, TrackedRun, Tracker

MOST_POINTS = 100  # sent at once


class Feed:
    """Sends a run's points to one tracker.

    The thread is a daemon's: a tracker that hangs does not keep the process.
    """

    def __init__(
        self, name: str, begin: Callable[[TrackedRun], Tracker], run: TrackedRun, points: PointsFile, state: Path
    ) -> None:
        """Start the thread.

        Args:
            name: The tracker's, for notes.
            begin: Begins the run there, or goes on with it.
            run: What it is told; ``run_id`` is filled in from ``state``.
            points: The run's points.
            state: Where it is written down how far this tracker is.
        """
        self._name, self._begin, self._run, self._points, self._state = name, begin, run, points, state
        self._changed = threading.Condition()
        self._there, self._sent = 0, 0  # points
        self._outcome: Outcome | None = None
        self._abandoned = False
        self._ended_after: float | None = None  # CPU seconds
        self._notes: list[str] = []
        self._thread = threading.Thread(target=self._work, name=f"log to {name}", daemon=True)
        self._thread.start()

    def tell(self, count: int) -> None:
        """Say that so many points are in the file."""
        with self._changed:
            self._there = count
            self._changed.notify()

    def notes(self) -> list[str]:
        """Lines for the user that came up since they were asked for last."""
        with self._changed:
            notes, self._notes = self._notes, []
        return notes

    def core_seconds(self) -> float:
        """CPU seconds of the thread so far: they are no cost of training."""
        with self._changed:  # in which the thread cannot end
            if self._ended_after is not None or self._thread.ident is None:
                return self._ended_after or 0.0
            return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def close(self, outcome: Outcome, seconds: float) -> None:
        """Let it send what is left, for so many seconds at most."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify()
        try:
            self._thread.join(seconds)
        finally:
            with self._changed:
                self._abandoned = True
                left = self._there - self._sent
            if self._thread.is_alive():
                self._note(f"has not taken the last {left:,} points in {seconds:.0f} s")

    def _note(self, what: str) -> None:
        kept = f"points that it lacks are in {self._state.parent}, and `resume=True` sends them"
        line = f"note: `log`: {self._name} {what}: {kept}"
        with self._changed:
            self._notes.append(without_credentials(line))

    def _work(self) -> None:
        try:
            self._send_all()
        except BaseException as error:  # whatever a tracker's library raises, SystemExit too: training is worth more
            self._note(f"failed ({in_words(error)}), and training goes on without it")
        finally:
            with self._changed:
                self._ended_after = time.thread_time()

    def _send_all(self) -> None:
        state = self._read_state()
        tracker = self._begin(replace(self._run, run_id=state.get("run_id")))
        first = state["points"] if tracker.run_id == state.get("run_id") else 0
        with self._changed:
            self._sent = first
            self._notes.append(without_credentials(f"log: {self._name}: {tracker.where}"))
        self._write_state(tracker.run_id)
        reader = self._points.reader(first)
        while (count := self._wait()) is not None:
            points = reader.take(count)
            if not points:
                raise OSError(f"{self._points.path} has fewer points than were written")
            tracker.send(self._sent, points)
            with self._changed:
                self._sent += len(points)
            self._write_state(tracker.run_id)
        with self._changed:
            outcome = None if self._abandoned else self._outcome
        if outcome is not None:
            tracker.close(outcome)

    def _wait(self) -> int | None:
        """How many points are to be sent next; None when that was all."""
        with self._changed:
            while self._there <= self._sent and self._outcome is None:
                self._changed.wait()
            if self._abandoned or self._there <= self._sent:
                return None
            return min(self._there - self._sent, MOST_POINTS)

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state.read_text())
            same = state["identity"] == self._run.identity
            return {"run_id": str(state["run_id"]), "points": int(state["points"])} if same else {"points": 0}
        except (OSError, ValueError, KeyError, TypeError):
            return {"points": 0}

    def _write_state(self, run_id: str) -> None:
        with atomic_write(self._state, durable=False, leftovers="all") as file:
            file.write(json.dumps({"run_id": run_id, "points": self._sent, "identity": self._run.identity}).encode())
