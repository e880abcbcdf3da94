"""The trackers by name, and what each needs to be installed. None of their libraries is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, cast

from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.trackers.tracker import TrackedRun, Tracker

NAMES = ("tensorboard", "wandb", "mlflow")
"""Each is also the name of the library, and of the extra that installs it."""


def tracker_names(log: object) -> tuple[str, ...]:
    """Parse what a user wants to log to.

    Args:
        log: Names joined by commas, or a sequence of names; empty for none.

    Returns:
        The names, each once.

    Raises:
        UsageError: One is unknown, or its library is not installed.
    """  # noqa: DOC501
    words: list[Any] = log.split(",") if isinstance(log, str) else list(log) if isinstance(log, Sequence) else [log]
    if not all(isinstance(word, str) for word in words):
        raise UsageError(f"`log`: got {log!r}, expected names of trackers, such as 'tensorboard,wandb'")
    names = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    for name in names:
        if name not in NAMES:
            raise unknown_name("tracker", name, NAMES)
        if not _installed(name):
            raise UsageError(f"`log`: {name} is not installed", hint=f"pip install 'gstds-cache[{name}]'")
    return names


def open_tracker(name: str) -> Callable[[TrackedRun], Tracker]:
    """What begins a run in this tracker, or goes on with it; loading the library is part of the call."""

    def begin(run: TrackedRun) -> Tracker:
        if name == "tensorboard":
            from gstds_cache.trackers.tensorboard import TensorBoard as Kind
        elif name == "wandb":
            from gstds_cache.trackers.wandb import WeightsAndBiases as Kind  # type: ignore[assignment]
        else:
            from gstds_cache.trackers.mlflow import MLflow as Kind  # type: ignore[assignment]
        return cast("Tracker", Kind(run))

    return begin


def _installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name, which wandb leaves, is no library
