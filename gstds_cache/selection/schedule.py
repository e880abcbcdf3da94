"""The filter ratio (the fraction of a batch that is **removed**) over a run, known before the run begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gstds_cache.errors import UsageError, unknown_name

USAGE = {"constant": "constant:RATIO", "linear": "linear:FIRST:LAST"}


@dataclass(frozen=True)
class Schedule:
    """A filter ratio for every batch of a run.

    Attributes:
        text: As the user gave it, e.g. ``constant:0.75``.
        at: Progress through the run, 0.0 (first batch) to 1.0 (last), to the filter ratio there.
    """

    text: str
    at: Callable[[float], float]

    def ratio(self, seq: int, total: int) -> float:
        """Filter ratio of batch ``seq`` out of ``total``, in [0, 1)."""
        return self.at(seq / (total - 1) if total > 1 else 0.0)


def parse_schedule(text: str) -> Schedule:
    """Parse ``constant:RATIO`` or ``linear:FIRST:LAST``.

    Args:
        text: The schedule. ``linear`` goes evenly from the first batch of the run to the last.

    Returns:
        The schedule.

    Raises:
        UsageError: The name is unknown, a number is missing, or a ratio is outside [0, 1).
    """  # noqa: DOC501
    name, *arguments = text.split(":")
    if name not in USAGE:
        raise unknown_name("schedule", name, USAGE)
    wanted = USAGE[name].count(":")
    if len(arguments) != wanted:
        raise UsageError(
            f"--schedule {text!r}: got {len(arguments)} values, expected {USAGE[name]}",
            hint="e.g. --schedule " + name + ":0.25:0.75"[: 5 * wanted],
        )
    ratios = [_ratio(text, argument) for argument in arguments]
    if name == "constant":
        return Schedule(text, lambda _progress: ratios[0])
    first, last = ratios
    return Schedule(text, lambda progress: first + (last - first) * progress)


def _ratio(text: str, argument: str) -> float:
    try:
        ratio = float(argument)
    except ValueError as error:
        raise UsageError(f"--schedule {text!r}: got {argument!r}, expected a number in [0, 1)") from error
    if not 0 <= ratio < 1:
        raise UsageError(
            f"--schedule {text!r}: filter ratio {argument} is outside [0, 1)",
            hint="the filter ratio is the fraction removed: 0 keeps everything, 0.75 keeps a quarter",
        )
    return ratio
