"""Rows of candidates drawn by the losses that training reports; and those losses.

The rows of an epoch are drawn by the losses as they were at the end of the epoch before. So what is drawn depends
neither on how far a DataLoader reads ahead, nor on the order in which ranks report, nor on whether a run was resumed in
the middle of an epoch and draws its first half again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from gstds_cache.config import BALANCED
from gstds_cache.errors import FingerprintMismatchError, IntegrityError, StreamError, UsageError
from gstds_cache.runtime.notify import log
from gstds_cache.seeding import keys_for
from gstds_cache.selection.draws import Draw, draw_rows, find_draw, importance_weights, is_own
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.schema import Header

Reported = tuple[int, Int64[np.ndarray, " _"], Float32[np.ndarray, " _"]]
Gather = Callable[[list[Reported]], list[list[Reported]]]
"""Gives each rank's value, in order, to every rank; all ranks have to ask."""
BLOCK = 256  # batches whose keys of random numbers are made at once


@dataclass(frozen=True, eq=False)
class _Report:
    """What was reported of one step; the losses stay where they are until the epoch's end."""

    step: int
    rows: Int64[np.ndarray, " n"]
    losses: torch.Tensor


class Feedback:
    """Draws the rows of each batch of candidates, and keeps the losses that it draws by.

    Attributes:
        draw: How rows are scored, and drawn by their scores.
        epoch: The epoch whose rows are drawn.
        losses: Loss of each row when it was last trained on before that epoch, float32 [N]; NaN where it never was.
    """

    def __init__(self, header: Header, *, draw: str | None = None, importance: bool = False) -> None:
        """Begin without any loss.

        Args:
            header: The selection's.
            draw: Its own draw function, which it names and cannot have run; None for a draw that has a name.
            importance: Whether :meth:`weights_of` will be asked.

        Raises:
            UsageError: The selection's draw is unknown here, or a function that has to be named as well; or weights are
                asked for, and it takes the largest scores.
            FingerprintMismatchError: ``draw`` is another one than the selection's, or was changed since.
            StreamError: The header is damaged.
        """
        self.draw, self._seed, self._items = _draw_of(header, draw), header.seed, header.items
        if importance and self.draw.largest:
            raise UsageError(
                f"`importance_weights`: {self.draw.name} takes the rows of the largest scores, and no weight makes up "
                "for rows that cannot be drawn",
                hint="select with a draw that is in proportion to scores, `draw='damped-loss'` for one",
            )
        if importance and header.settings.get("order") == BALANCED:
            raise UsageError(
                f"`importance_weights`: with `order={BALANCED!r}` a row may come several times in an epoch, each time "
                "with another weight",
                hint="leave them out, or select with `order='permutation'`",
            )
        self._weights = np.ones(header.items, np.float32) if importance else None
        self._chance = _chance_of(header)
        self._block = (-1, -1)  # epoch and block of batches that self._keys are of
        self.reset()

    def reset(self) -> None:
        """Forget every loss, and begin with epoch 0."""
        self.epoch, self.losses = 0, np.full(self._items, np.nan, np.float32)
        self._known: list[Reported] = []  # of this epoch, of all ranks
        self._own: list[_Report] = []  # of this epoch, of this rank since the ranks last shared
        self._text = ""

    def held(self) -> dict[str, Any]:
        """All that drawing and reporting change, for :meth:`go_back`."""
        weights = None if self._weights is None else self._weights.copy()
        return vars(self) | {"_weights": weights, "_known": [*self._known], "_own": [*self._own]}

    def go_back(self, held: dict[str, Any]) -> None:
        """Be as :meth:`held` found it."""
        vars(self).update(held)

    def rows_of(self, batch: SelectedBatch) -> Int64[np.ndarray, " M"]:
        """The rows of a batch to train on, in the batch's order.

        Args:
            batch: Candidates of :attr:`epoch`. Of an earlier one, which is passed over, the number is right alone.

        Raises:
            StreamError: The batch offers no candidates.
            UsageError: It is of a later epoch: the losses to draw by are not all there.
        """
        offered = batch.candidates
        if offered is None:
            raise StreamError(f"batch {batch.seq} offers no candidates")
        if batch.epoch < self.epoch:
            first: Int64[np.ndarray, " M"] = batch.kept[: offered.keep]
            return first
        if batch.epoch > self.epoch:
            raise UsageError(f"epoch {batch.epoch} cannot be drawn before epoch {self.epoch} has ended")
        last, numbers = self.losses[batch.kept], self._numbers(batch.epoch, batch.batch_id)
        scores = self.draw.scores(offered, last, self._chance)
        drawn = draw_rows(offered, scores, numbers, largest=self.draw.takes_largest(offered, last, self._chance))
        rows: Int64[np.ndarray, " M"] = batch.kept[drawn]
        if self._weights is not None:
            self._weights[rows] = importance_weights(offered, scores, drawn)
        return rows

    def _numbers(self, epoch: int, batch: int) -> np.random.Generator:
        """``rng_for(seed, "draw", epoch, batch)``: the keys of many batches are made at once, for half of the time."""
        block, place = divmod(batch, BLOCK)
        if self._block != (epoch, block):
            batches = np.arange(block * BLOCK, (block + 1) * BLOCK)
            self._keys, self._block = keys_for(self._seed, "draw", np.full(BLOCK, epoch), batches), (epoch, block)
        return np.random.Generator(np.random.Philox(key=self._keys[place]))

    def weights_of(self, rows: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, " m"]:
        """Importance weights of rows that were drawn in this epoch, float32 [m]: of mean 1 in each batch drawn from.

        Raises:
            UsageError: They were not asked for.
        """
        if self._weights is None:
            raise UsageError("there are no importance weights", hint="pass `importance_weights=True`")
        weights: Float32[np.ndarray, " m"] = self._weights[rows]
        return weights

    def report(self, step: int, rows: Int64[np.ndarray, " n"], losses: torch.Tensor) -> None:
        """Take the losses of a step, on any device; they are copied there, and looked at when the epoch ends.

        Args:
            step: Steps trained with this one, over all epochs.
            rows: Rows of the data set, int64 [n].
            losses: The loss of each, [n].
        """
        self._own.append(_Report(step, rows, losses.detach().to(torch.float32, copy=True)))

    @property
    def reported(self) -> int:
        """Steps of this epoch that this rank reported."""
        return len({step for step, _, _ in self._known} | {report.step for report in self._own})

    @property
    def unshared(self) -> bool:
        """Whether there are losses that other ranks do not know."""
        return bool(self._own)

    def drop_from(self, step: int) -> None:
        """Forget what was reported of steps after ``step``: they are trained again."""
        self._known = [known for known in self._known if known[0] <= step]
        self._own = [report for report in self._own if report.step <= step]

    def share(self, gather: Gather | None) -> None:
        """Give every rank the losses of all; without ``gather`` there is one rank.

        Raises:
            UsageError: The ranks have reported different steps.
        """
        mine = self._collected()
        every = [mine] if gather is None else gather(mine)
        steps = [[step for step, _, _ in part] for part in every]
        if any(part != steps[0] for part in steps):
            raise UsageError(
                f"the ranks reported the losses of {sorted(set(map(len, steps)))} batches in epoch {self.epoch}",
                hint="every rank calls sampler.report(losses) after each of its steps, or none does",
            )
        self._known += [report for part in every for report in part]
        self._own = []

    def end_epoch(self, epoch: int | None = None) -> None:
        """Draw the next epoch, or ``epoch``, by what was reported up to now; ranks have shared it."""
        # By step, whichever rank it was of: of a row that came several times the last loss counts.
        rows, losses = _joined(sorted([*self._known, *self._collected()], key=lambda report: report[0]))
        finite = np.isfinite(losses)
        if not finite.all():
            log(
                f"note: {(~finite).sum():,} of {len(losses):,} losses reported in epoch {self.epoch} are NaN or "
                "infinite: these rows keep the losses they had"
            )
        if len(rows):
            self.losses = self.losses.copy()  # states that were taken hold the one before
            self.losses[rows[finite]] = losses[finite]
            self._text = ""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        self._known, self._own = [], []

    def state(self, step: int | None = None) -> dict[str, Any]:
        """The losses, JSON-able: those before this epoch, and those of it up to ``step``, or of all that is known."""
        self._text = self._text or _encoded(self.losses)
        reports = [*self._known, *self._collected()]
        rows, losses = _joined([report for report in reports if step is None or report[0] <= step])
        return {
            "epoch": self.epoch,
            "losses": self._text,
            "sha256": sha256(self.losses.tobytes()).hexdigest(),
            "steps": [[number, len(part)] for number, part, _ in reports if step is None or number <= step],
            "rows": _encoded(rows),
            "reported": _encoded(losses),
        }

    def load(self, state: object, epoch: int | None = None) -> None:
        """Go on where :meth:`state` was taken.

        Args:
            state: The state.
            epoch: The latest epoch that its losses can draw, if it is known.

        Raises:
            UsageError: This is no such state, or one of another data set.
            IntegrityError: The losses in it are damaged.
        """
        expected = self.state().keys()
        if not isinstance(state, Mapping) or state.keys() != expected:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else f"{state!r:.80}"
            raise UsageError(f"`state`: got {got} for its losses, expected {sorted(expected)}")
        table, rows = _decoded(state["losses"], "<f4"), _decoded(state["rows"], "<i8")
        losses = _decoded(state["reported"], "<f4")
        if len(table) != self._items:
            raise UsageError(f"`state`: got the losses of {len(table)} rows, the data set has {self._items}")
        steps = state["steps"]
        fits = len(rows) == len(losses) and not ((rows < 0) | (rows >= self._items)).any()
        if sha256(table.tobytes()).hexdigest() != state["sha256"] or not fits or not _lengths(steps, len(rows)):
            raise IntegrityError("`state`: the losses in it are damaged", hint="load an earlier state, or start over")
        if type(state["epoch"]) is not int or state["epoch"] < 0:
            raise UsageError(f"`state`: got the epoch {state['epoch']!r:.80}, expected a number from 0 on")
        if epoch is not None and state["epoch"] > epoch:
            raise IntegrityError(
                f"`state`: it goes on in epoch {epoch}, and holds the losses that epoch {state['epoch']} is drawn by",
                hint="load an earlier state, or start over",
            )
        self.epoch, self.losses, self._text, self._own = state["epoch"], table, "", []
        ends = np.cumsum([length for _, length in steps]).tolist()
        self._known = [
            (number, rows[end - length : end], losses[end - length : end])
            for (number, length), end in zip(steps, ends, strict=True)
        ]

    def _collected(self) -> list[Reported]:
        """What this rank reported, on the CPU: one copy from its device, and the one wait for it."""
        if not self._own:
            return []
        places = {report.losses.device for report in self._own}
        parts = [report.losses for report in self._own]
        joined = torch.cat(parts if len(places) == 1 else [part.cpu() for part in parts]).cpu().numpy()
        ends = np.cumsum([len(report.rows) for report in self._own]).tolist()
        return [
            (report.step, report.rows, joined[end - len(report.rows) : end])
            for report, end in zip(self._own, ends, strict=True)
        ]


def _draw_of(header: Header, given: str | None) -> Draw:
    """The selection's draw. What it names is code: a user's own is run only where the user names it as well.

    Raises:
        UsageError: It is unknown here, or one's own and not named.
        FingerprintMismatchError: Another one was given, or its file was changed.
        StreamError: The header names none, or its numbers cannot be.
    """
    settings: Any = header.settings
    name = settings.get("draw") if isinstance(settings, dict) else None
    if not isinstance(name, str) or type(header.seed) is not int or header.seed < 0 or header.items < 1:
        raise StreamError("the selection's header is damaged: it offers candidates, and says not how to draw them")
    if given is None and is_own(name):
        raise UsageError(
            f"the selection draws by {name}, a function of your own, which a selection cannot have run by itself",
            hint=f"pass `draw={name!r}` as well",
        )
    if given not in {None, name}:
        raise FingerprintMismatchError(
            f"`draw`: got {given!r}, the selection was made for {name!r}",
            hint=f"pass `draw={name!r}`, or select again with the other"
            if is_own(name)
            else "leave it out, or select again with it",
        )
    draw = find_draw(name)
    if draw.source != settings.get("draw_source", ""):
        raise FingerprintMismatchError(
            f"`draw={name!r}`: its file was changed since the selection was made", hint="select again with it"
        )
    return draw


def _chance_of(header: Header) -> float | None:
    """Loss that stands for that of rows before any is known; None in selections that were made without it.

    Raises:
        StreamError: It is no loss.
    """
    chance = header.settings.get("chance")
    if chance is None or (type(chance) is float and 0 < chance < np.inf):
        return chance
    raise StreamError(f"the selection's header is damaged: its loss of a network that knows nothing is {chance!r:.80}")


def _joined(reports: list[Reported]) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    rows = np.concatenate([np.empty(0, np.int64), *(rows for _, rows, _ in reports)])
    losses = np.concatenate([np.empty(0, np.float32), *(losses for _, _, losses in reports)])
    return rows, losses


def _lengths(steps: object, total: int) -> bool:
    """Whether ``steps`` are pairs of a step and a number of rows, that many in all."""
    pairs = isinstance(steps, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in steps)
    if not isinstance(steps, list) or not pairs:
        return False
    return all(type(number) is int and number >= 0 for pair in steps for number in pair) and (
        sum(length for _, length in steps) == total
    )


def _encoded(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).decode()


def _decoded(text: object, kind: str) -> np.ndarray:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), kind)  # type: ignore[arg-type]
    except (binascii.Error, TypeError, ValueError) as error:
        raise IntegrityError(
            f"`state`: the losses in it are damaged: {error}", hint="load an earlier state, or start over"
        ) from error
    return values.astype(values.dtype.newbyteorder("="))
