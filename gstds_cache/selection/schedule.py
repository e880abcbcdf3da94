"""The filter ratio (the fraction of a batch that is **removed**) over a run, known before the run begins.

========================== ==========================================================================================
``constant:0.75``          the same for all batches
``linear:0.25:0.75``       evenly from the first batch of the run to the last
``cosine:0.25:0.75``       the same along half a cosine: slowly, quickly, slowly
``step:0.25:0.5:0.75``     one after the other, each for an equal part of the run
``file:RATIOS.txt``        one number a line, for each epoch or for each batch of the run; ``#`` begins a comment
``budget:TOTAL``           just so much removed that exactly TOTAL samples stay in the whole run, spread evenly
``...+full:0.125``         any of these, but the last eighth of the epochs keeps everything
========================== ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from gstds_cache.errors import UsageError, unknown_name
from gstds_cache.files.digest import digest_of
from gstds_cache.files.given import reading, require_file
from gstds_cache.files.location import expanded

USAGE = {
    "constant": "constant:RATIO",
    "linear": "linear:FIRST:LAST",
    "cosine": "cosine:FIRST:LAST",
    "step": "step:RATIO:RATIO...",
    "file": "file:PATH",
    "budget": "budget:TOTAL",
}
EXAMPLES = {
    "constant": "0.75",
    "linear": "0.25:0.75",
    "cosine": "0.25:0.75",
    "step": "0.25:0.5:0.75",
    "budget": "50000",
}
PIECE = 1 << 14  # batches of a run that are looked at in one go
# From batches (counted from 0), and how many there are in the run and in an epoch, to their ratios.
Ratios = Callable[[Int64[np.ndarray, " T"], int, int], Float64[np.ndarray, " T"]]


@dataclass(frozen=True)
class Schedule:
    """A filter ratio for every batch of a run.

    Attributes:
        text: As the user gave it, e.g. ``constant:0.75``.
        identity: The same for all that decide alike: ``text``, but the content of a file in the place of its path.
        ratios: From batches, and their number in the run and in an epoch, to the filter ratio of each.
        budget: Samples that are to stay in the whole run, whatever ``ratios`` says; None where ratios decide.
        full: Share of the epochs, the last ones, that keep everything.
    """

    text: str
    identity: str
    ratios: Ratios
    budget: int | None = None
    full: float = 0.0

    def over(self, sizes: Int64[np.ndarray, " E"], epochs: int) -> RunSchedule:
        """The filter ratio of every batch of a run, and how many of its rows stay.

        Args:
            sizes: Rows of each batch of an epoch before selection.
            epochs: Epochs of the run.

        Returns:
            Both, computed in pieces.

        Raises:
            UsageError: A file has another number of lines, or a budget does not fit the run.
        """
        full = self.full_epochs(epochs)
        spend = None if self.budget is None else self.budget - full * int(sizes.sum())
        run = RunSchedule(self, sizes, epochs, (epochs - full) * len(sizes), spend)
        if spend is not None:
            run.check_budget(spend)
        return run

    def full_epochs(self, epochs: int) -> int:
        """Epochs at the end that keep everything: the share, rounded; at least one, and not the first.

        Raises:
            UsageError: The run has one epoch, which cannot be both.
        """
        if not self.full:
            return 0
        if epochs < 2:
            raise UsageError(f"`schedule={self.text!r}`: got {epochs} epoch, expected 2 or more with +full:SHARE")
        return min(epochs - 1, max(1, math.floor(self.full * epochs + 0.5)))


@dataclass(frozen=True, eq=False)
class RunSchedule:
    """A schedule over the batches of one run, computed piece by piece: memory is that of one epoch's batch sizes.

    Attributes:
        schedule: The schedule.
        sizes: Rows of each batch of an epoch before selection, int64 [E].
        epochs: Epochs of the run.
        head: Batches that the schedule decides; those after them keep everything.
        budget: Samples to spread over ``head``, or None where ratios decide.
    """

    schedule: Schedule
    sizes: Int64[np.ndarray, " E"]
    epochs: int
    head: int
    budget: int | None

    @cached_property
    def kept_per_epoch(self) -> Int64[np.ndarray, " epochs"]:
        """Rows that stay in each epoch; one pass over the batches."""
        per_epoch = len(self.sizes)
        kept = np.zeros(self.epochs, np.int64)
        for first in range(0, self._total, PIECE):
            keeps = self.piece(first, first + PIECE)[1]
            epoch, last = first // per_epoch, (first + len(keeps) - 1) // per_epoch
            starts = np.maximum(np.arange(epoch, last + 1) * per_epoch - first, 0)
            kept[epoch : last + 1] += np.add.reduceat(keeps, starts)
        return kept

    @property
    def _total(self) -> int:
        return len(self.sizes) * self.epochs

    def piece(self, first: int, stop: int) -> tuple[Float64[np.ndarray, " T"], Int64[np.ndarray, " T"]]:
        """Ratios of the batches ``first`` to ``stop``, in [0, 1), and rows that stay, from 1 to the batch's size.

        The ratio's share is removed, rounded down; at least one row stays. A piece ends where the run does.
        """
        stop = min(stop, self._total)
        at = np.arange(first, stop)
        sizes = self.sizes[at % len(self.sizes)]
        ratios, keeps = np.zeros(len(at)), sizes.copy()
        scheduled = max(0, min(stop, self.head) - first)
        head = sizes[:scheduled]
        if self.budget is not None:
            keeps[:scheduled] = self._spent(self.budget, first, first + scheduled)
            ratios[:scheduled] = 1 - keeps[:scheduled] / head
        else:
            ratios[:scheduled] = self.schedule.ratios(at[:scheduled], self.head, len(self.sizes))
            # 1e-9: a ratio of 0.7 of 10 rows is 7 rows, though 0.7 * 10 is 6.999...
            keeps[:scheduled] = np.maximum(1, head - (ratios[:scheduled] * head + 1e-9).astype(np.int64))
        return ratios, keeps

    def check_budget(self, budget: int) -> None:
        """Refuse a budget that does not fit.

        Raises:
            UsageError: There are fewer samples than batches, or more than rows.
        """
        least, most = self.head, self.head // len(self.sizes) * int(self.sizes.sum())
        if not least <= budget <= most:
            rest = "" if "+full" not in self.schedule.text else " beside the epochs that keep everything"
            raise UsageError(
                f"`schedule={self.schedule.text!r}`: {budget:,} samples are left to spread over {least:,} "
                f"batches{rest}, expected from {least:,} (one of each) to {most:,} (all)",
                hint="change the budget, `epochs` or `batch_size`",
            )

    def _spent(self, budget: int, first: int, stop: int) -> Int64[np.ndarray, " T"]:
        """What a budget leaves of batches, in proportion to what each can give beyond one row; the sum is exact."""
        at = np.arange(first, stop + 1)
        room = np.append(0, np.cumsum(self.sizes - 1))
        before = at // len(self.sizes) * room[-1] + room[at % len(self.sizes)]
        whole = max(self.head // len(self.sizes) * int(room[-1]), 1)
        # Python's integers: budget times rows can pass 2^63.
        share = [r * (budget - self.head) // whole for r in before.tolist()]
        return 1 + np.diff(np.array(share, np.int64))


def is_file(text: str) -> bool:
    """Whether a schedule, as a user writes it or by its identity, is a file's."""
    return text.partition(":")[0] == "file"


def parse_schedule(text: str) -> Schedule:
    """Parse a schedule as the table at the top of this file describes them.

    Args:
        text: The schedule.

    Returns:
        The schedule.

    Raises:
        UsageError: The name is unknown, a number is missing, or a ratio is outside [0, 1).
    """  # noqa: DOC501
    body, plus, share = text.rpartition("+full:")
    if not plus:
        body, share = text, "0"
    full = _number(text, share, "share of full epochs")
    name, _, rest = body.partition(":")
    if name not in USAGE:
        raise unknown_name("schedule", name, USAGE)
    if is_file(body):
        ratios, identity = _read(expanded(rest, "`schedule` file:"))
        return Schedule(text, identity + (f"+full:{share}" if plus else ""), ratios, full=full)
    arguments = rest.split(":") if rest else []
    wanted = USAGE[name].count(":")
    if not arguments or (name != "step" and len(arguments) != wanted):
        raise UsageError(
            f"`schedule={text!r}`: got {len(arguments)} values, expected {USAGE[name]}",
            hint=f"e.g. `schedule='{name}:{EXAMPLES[name]}'`",
        )
    if name == "budget":
        return Schedule(text, text, _none, budget=_budget(text, arguments[0]), full=full)
    values = [_number(text, argument, "filter ratio") for argument in arguments]
    return Schedule(text, text, _along(name, values), full=full)


def _none(at: Int64[np.ndarray, " T"], _total: int, _per_epoch: int) -> Float64[np.ndarray, " T"]:
    return np.zeros(len(at))


def _along(name: str, values: list[float]) -> Ratios:
    """Ratios that depend on progress through the run alone, from 0.0 (first batch) to 1.0 (last)."""
    first, last = values[0], values[-1]

    def ratios(at: Int64[np.ndarray, " T"], total: int, _per_epoch: int) -> Float64[np.ndarray, " T"]:
        if name == "step":
            return np.asarray(np.array(values)[at * len(values) // max(total, 1)], np.float64)
        progress = at / max(total - 1, 1)
        if name == "cosine":
            progress = (1 - np.cos(np.pi * progress)) / 2
        return np.asarray(first + (last - first) * progress, np.float64)

    return ratios


def _read(path: Path) -> tuple[Ratios, str]:
    """The ratios of a file, and the identity of its content.

    Raises:
        UsageError: The file does not read, or a line holds no ratio.
    """
    require_file(path, "`schedule` file", hint="one filter ratio a line, for each epoch or for each batch")
    with reading(path, "text", hint="save it as UTF-8: one filter ratio a line"):
        lines = path.read_text("utf-8-sig").splitlines()
    values = [
        _number(f"file:{path}, line {number}", text, "filter ratio")
        for number, line in enumerate(lines, 1)
        if (text := line.partition("#")[0].strip())
    ]

    held: Float64[np.ndarray, " L"] = np.array(values, np.float64)

    def ratios(at: Int64[np.ndarray, " T"], total: int, per_epoch: int) -> Float64[np.ndarray, " T"]:
        if len(held) == total:
            return np.asarray(held[at], np.float64)
        if len(held) * per_epoch == total:
            return np.asarray(held[at // per_epoch], np.float64)
        raise UsageError(
            f"`schedule='file:{path}'`: got {len(values)} ratios, expected {total // per_epoch} (one for each epoch) "
            f"or {total} (one for each batch)"
        )

    return ratios, f"file:sha256={digest_of(values)}"


def _budget(text: str, argument: str) -> int:
    try:
        return int(argument.replace("_", ""))
    except ValueError as error:
        raise UsageError(f"`schedule={text!r}`: got {argument!r}, expected a whole number of samples") from error


def _number(text: str, argument: str, what: str) -> float:
    try:
        ratio = float(argument)
    except ValueError as error:
        raise UsageError(f"`schedule={text!r}`: got {argument!r}, expected a number in [0, 1)") from error
    if not 0 <= ratio < 1:
        raise UsageError(
            f"`schedule={text!r}`: {what} {argument} is outside [0, 1)",
            hint="the filter ratio is the fraction removed: 0 keeps everything, 0.75 keeps a quarter",
        )
    return ratio
