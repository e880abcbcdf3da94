"""MLflow: to ``MLFLOW_TRACKING_URI``, or where MLflow itself writes without one (``mlflow.db`` in the folder)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from gstds_cache.trackers.tracker import Outcome, Point, TrackedRun

EXPERIMENT = "gstds-cache"
LONGEST = 500  # characters of a parameter, the limit of MLflow's older servers
MOST_PARAMETERS = 100  # of one request

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MLflow:
    """One run, through a client of its own: a run that the caller has active stays theirs."""

    def __init__(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it where this server has it.

        Raises:
            MlflowException: The server cannot be asked.
        """
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric, self._client = Metric, mlflow.MlflowClient()
        self._logged: dict[str, set[int]] = {}
        try:
            found = self._client.get_run(run.run_id) if run.run_id else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = None  # another server than before: it gets every point
        if found is None:
            self.run_id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
            params = [Param(name, str(value)[:LONGEST]) for name, value in run.config.items()]
            for begin in range(0, len(params), MOST_PARAMETERS):
                self._client.log_batch(self.run_id, params=params[begin : begin + MOST_PARAMETERS])
        else:
            self.run_id = found.info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            # A session that was killed may have sent more than it wrote down.
            for name in found.data.metrics:
                self._logged[name] = {one.step for one in self._client.get_metric_history(self.run_id, name)}
        self.where = f"run {self.run_id} in {mlflow.get_tracking_uri()}"

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if known:
            return known
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def send(self, first: int, points: Sequence[Point]) -> None:  # noqa: ARG002 - MLflow has steps, and no places
        """See :class:`~gstds_cache.trackers.tracker.Tracker`."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now, point.step)
            for point in points
            for name, value in point.values.items()
            if point.step not in self._logged.get(name, ())
        ]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, outcome: Outcome) -> None:
        """See :class:`~gstds_cache.trackers.tracker.Tracker`."""
        self._client.set_terminated(self.run_id, STATUS[outcome])
