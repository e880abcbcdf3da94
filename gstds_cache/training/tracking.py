"""What experiment trackers are told about a run: which points, when, and how a resumed run goes on with them.

A point is a function of the step alone: one every tenth step, one at each epoch's end, and one after training. So a
resumed run has the same points at the same places, and a tracker gets each once. They are appended to
``RUN_DIR/trackers/points.jsonl`` before a checkpoint that holds their step is saved; the trackers' threads read them
there (``trackers/feed.py``). Rank 0 tracks, the others do not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gstds_cache.files.digest import digest_of
from gstds_cache.runtime.notify import Notify
from gstds_cache.trackers.credentials import without_credentials
from gstds_cache.trackers.feed import Feed
from gstds_cache.trackers.names import open_tracker
from gstds_cache.trackers.points_file import PointsFile
from gstds_cache.trackers.tracker import Outcome, Point, TrackedRun

EVERY = 10  # steps between points
SECONDS = 1.0  # between writes of points
PATIENCE = 60.0  # seconds that a finished run waits for all its trackers together
IMPATIENCE = 10.0  # seconds that an interrupted or failed one waits

FOLDER = "trackers"
"""In a run's directory."""


class Tracking:
    """Collects a run's points and hands them to its trackers; ``with tracking:`` around the run.

    Without names it loads no tracker, and does nothing unless an earlier session of the run had some: then points are
    written all the same, for the next session that has them.
    """

    def __init__(
        self, names: tuple[str, ...] = (), *, run_dir: Path | None = None, config: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None, notify: Notify | None = None,
    ) -> None:  # fmt: skip
        """Nothing is written or begun before :meth:`begin`.

        Args:
            names: The trackers, from :func:`~gstds_cache.trackers.names.tracker_names`.
            run_dir: The run's directory; None on other ranks than 0, and nothing is done.
            config: What the trackers are told about the run, nested as it may be.
            identity: What decides the run's outcome.
            notify: Called with lines for the user.
        """
        self._names = names if run_dir is not None else ()
        self._points: PointsFile | None = None
        self._recording = False
        if run_dir is not None:
            self._folder = run_dir / FOLDER
            self._points = PointsFile(self._folder / "points.jsonl")
            self._run = TrackedRun(run_dir.name, self._folder, flat(config or {}), digest_of(dict(identity or {})))
        self._notify = notify or (lambda _line: None)
        self._feeds: list[Feed] = []
        self._waiting: list[Point] = []  # to be written
        self._taken: deque[tuple[int, dict[str, int | float], bool]] = deque()  # steps whose loss is to come
        self._ending: Point | None = None  # an epoch's last step, whose epoch's loss is to come
        self._count, self._written_at, self._spent = 0, 0.0, 0.0

    def __enter__(self) -> Tracking:
        """Hold it for the run."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is left, and let the trackers send it."""
        self.flush()
        outcome: Outcome = "finished"
        if kind is not None:
            outcome = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        until = time.monotonic() + (PATIENCE if outcome == "finished" else IMPATIENCE)
        for feed in self._feeds:
            feed.close(outcome, max(0.1, until - time.monotonic()))
        self._show_notes()

    def begin(self, step: int) -> None:
        """Begin, or go on after ``step`` steps with what an earlier session has written.

        The run's directory is held, and what it takes for its own is decided.
        """
        if self._points is None or not (self._names or self._points.path.exists()):
            return
        try:
            self._folder.mkdir(exist_ok=True)
            self._count, last = self._points.keep(step)
        except OSError as error:
            self._give_up(error)
            return
        self._recording = True
        self._spent = (last.values.get("core_seconds", 0.0) if last else 0.0) - time.process_time()
        for name in self._names:
            assert self._points is not None
            run = TrackedRun(self._run.name, self._folder / name, self._run.config, self._run.identity)
            feed = Feed(name, open_tracker(name), run, self._points, self._folder / f"{name}.json")
            self._feeds.append(feed)
            feed.tell(self._count)

    def step(self, step: int, *, lr: float, gradient_samples: int, epoch_end: bool) -> None:
        """A step was taken, whose loss is not known yet.

        Args:
            step: Steps taken with it.
            lr: Its learning rate.
            gradient_samples: Samples whose gradient was computed, with its own.
            epoch_end: Whether it is an epoch's last.
        """
        if self._recording and (epoch_end or step % EVERY == 0):
            self._taken.append((step, {"lr": lr, "gradient_samples": gradient_samples}, epoch_end))

    def loss(self, step: int, loss: float) -> None:
        """The loss of a step became known; steps come in order."""
        if self._taken and self._taken[0][0] == step:
            _, values, epoch_end = self._taken.popleft()
            spent = self._spent + time.process_time() - sum(feed.core_seconds() for feed in self._feeds)
            point = Point(step, {"loss": loss, **values, "core_seconds": spent})
            if epoch_end:
                self._ending = point
            else:
                self._add(point)

    def epoch(self, step: int, epoch: int, loss: float) -> None:
        """The mean loss of an epoch became known, after that of its last step."""
        if self._ending is not None:
            self._add(Point(step, {**self._ending.values, "epoch": epoch, "epoch_loss": loss}))
            self._ending = None

    def final(self, step: int, accuracy: float | None) -> None:
        """What was measured after the last step."""
        if self._recording and accuracy is not None:
            self._add(Point(step, {"test_accuracy": accuracy}, final=True))

    def flush(self) -> None:
        """Write the points that wait; before a checkpoint that holds their steps."""
        self._show_notes()
        if self._points is None or not self._waiting:
            return
        try:
            self._points.append(self._waiting)
        except OSError as error:
            self._give_up(error)
            return
        self._count += len(self._waiting)
        self._waiting, self._written_at = [], time.monotonic()
        for feed in self._feeds:
            feed.tell(self._count)

    def _add(self, point: Point) -> None:
        self._waiting.append(point)
        if time.monotonic() - self._written_at >= SECONDS:
            self.flush()

    def _give_up(self, error: OSError) -> None:
        self._notify(f"note: `log`: {self._folder} cannot be written ({error}); training goes on without trackers")
        for feed in self._feeds:
            feed.close("failed", 0.1)
        self._feeds, self._waiting, self._names, self._recording = [], [], (), False

    def _show_notes(self) -> None:
        for feed in self._feeds:
            for note in feed.notes():
                self._notify(note)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level, names joined by dots, without credentials."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float) or value is None
            values[prefix + name] = value if plain else without_credentials(str(value))
    return values
