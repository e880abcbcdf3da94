"""Weights & Biases. With ``WANDB_MODE=offline`` it writes a folder that ``wandb sync`` sends later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from uuid import uuid4

from gstds_cache.errors import UsageError, command_line
from gstds_cache.trackers.tracker import Outcome, Point, TrackedRun

PROJECT = "gstds-cache"


class WeightsAndBiases:
    """One run, which a resumed session goes on with. W&B's step is a point's place; charts have ``step`` as their axis.

    W&B takes no second row for a step it has, so a point that was sent before is never doubled on the server.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it. Never asks for a key.

        Raises:
            UsageError: There is no key, and it is not offline.
        """
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise UsageError("nobody is logged in; type 'wandb login', or set WANDB_MODE=offline")
        here = None if "WANDB_DIR" in os.environ else str(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        self.run_id = run.run_id or os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run_id,
            name=os.environ.get("WANDB_NAME", run.name),
            config=run.config,
            dir=here,
            resume="allow",
            reinit="create_new",  # a run that the caller has open stays theirs
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")
        self.where = self._run.url or command_line("wandb", "sync", self._run.settings.sync_dir)

    def send(self, first: int, points: Sequence[Point]) -> None:
        """See :class:`~gstds_cache.trackers.tracker.Tracker`."""
        known = self._run.starting_step  # rows that the server has; offline 0
        for place, point in enumerate(points, first):
            if place >= known:
                self._run.log({"step": point.step, **point.values}, step=place)

    def close(self, outcome: Outcome) -> None:
        """See :class:`~gstds_cache.trackers.tracker.Tracker`."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
