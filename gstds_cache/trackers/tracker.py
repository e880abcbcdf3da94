"""What a tracker is: a run's points go in, in order, once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Outcome = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Point:
    """Values of a run after a step. Of one run, the n-th point is the same in every session.

    Attributes:
        step: Optimiser steps taken, from 1.
        values: Numbers by name.
        final: Whether it is what was measured after training; then another point may have the same step.
    """

    step: int
    values: dict[str, int | float]
    final: bool = False


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run before its points.

    Attributes:
        name: The run's name, that of its directory.
        folder: Where a tracker that writes files writes them, a folder in the run's directory.
        config: What decided the run, by names joined by dots; numbers, texts, booleans and None, without credentials.
        identity: Digest of what decides the run's outcome.
        run_id: The tracker's own name of this run, where an earlier session began it there.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    identity: str = ""
    run_id: str | None = None


@runtime_checkable
class Tracker(Protocol):
    """One run in one tracker. All methods are called from one thread; each may raise whatever its library raises.

    Attributes:
        run_id: The tracker's name of the run.
        where: Where a person finds it, in words; may hold credentials.
    """

    run_id: str
    where: str

    def send(self, first: int, points: Sequence[Point]) -> None:
        """Log points; when this returns they are written, or on their way in a process that outlives this one.

        A killed session may have sent some of them before: those are left out where the tracker can tell.

        Args:
            first: The place of the first among all points of the run, from 0.
            points: Consecutive points.
        """
        ...

    def close(self, outcome: Outcome) -> None:
        """End the session, and wait until all is written."""
        ...
