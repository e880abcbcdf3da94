"""TensorBoard: event files in the run's directory, so that TensorBoard shows every run of a folder of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gstds_cache.errors import command_line
from gstds_cache.trackers.tracker import Outcome, Point, TrackedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files through torch's own writer."""

    def __init__(self, run: TrackedRun) -> None:
        """Nothing is written before the first points: they say from where on earlier ones are void."""
        from torch.utils.tensorboard import SummaryWriter  # loads tensorboard

        self._open, self._run = SummaryWriter, run
        self.run_id, self.where = run.name, command_line("tensorboard", "--logdir", run.folder)
        self._writer: SummaryWriter | None = None

    def send(self, first: int, points: Sequence[Point]) -> None:
        """See :class:`~gstds_cache.trackers.tracker.Tracker`."""
        writer = self._writer or self._begin(first, points[0])
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step)
        writer.flush()

    def close(self, outcome: Outcome) -> None:  # noqa: ARG002 - event files have no place for it
        """See :class:`~gstds_cache.trackers.tracker.Tracker`."""
        if self._writer is not None:
            self._writer.close()

    def _begin(self, first: int, point: Point) -> SummaryWriter:
        # Readers drop what an earlier session, killed before it wrote down how far it was, had from this step on.
        # A final point shares its step with one that has to stay.
        purge = point.step if first and not point.final else None
        if first == 0:  # what another run left that had no checkpoint
            for file in self._run.folder.glob("events.out.tfevents.*"):
                file.unlink()
        self._writer = writer = self._open(self._run.folder, purge_step=purge)
        if first == 0:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self._run.config.items())
            writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}")
        return writer
