"""Which batch a report of losses belongs to: the earliest that was yielded and is not reported yet."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import distributed

from gstds_cache.config import as_type
from gstds_cache.errors import UsageError
from gstds_cache.runtime.notify import log
from gstds_cache.training.feedback import Feedback, Reported

Losses = torch.Tensor | np.ndarray | Sequence[float | torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Yielded:
    """A batch that was yielded.

    Attributes:
        step: Steps of the run with this one.
        rows: This rank's rows, int64 [m].
        own: How many of them count; the others are repeated from other ranks.
    """

    step: int
    rows: Int64[np.ndarray, " m"]
    own: int


class BatchReports:
    """Matches reports to batches, and ends epochs.

    A DataLoader reads ahead, so several batches may wait for their report; they are trained in the order in which they
    were yielded. It never reads past the epoch's end, so the last report of an epoch comes before the next is drawn.
    """

    def __init__(self, feedback: Feedback, *, rank: int, world_size: int) -> None:
        """Nothing was yielded yet."""
        self.feedback, self._rank, self._world_size = feedback, rank, world_size
        self._waiting: deque[_Yielded] = deque()
        self._told, self._told_lacking, self._weighted = False, False, 0
        self._lacking = 0  # batches of this epoch that the state that was loaded has no losses of
        self._silent = False  # whether nothing was reported since an epoch was trained without reports

    @contextmanager
    def or_back(self) -> Iterator[None]:
        """Where what is done inside fails, reports and losses are left as they were."""
        mine, losses = vars(self) | {"_waiting": self._waiting.copy()}, self.feedback.held()
        try:
            yield
        except BaseException:
            vars(self).update(mine)
            self.feedback.go_back(losses)
            raise

    def yielded(self, step: int, rows: Int64[np.ndarray, " m"], own: int) -> None:
        """Count a batch that is yielded now."""
        self._waiting.append(_Yielded(step, rows, own))

    def begin(self, epoch: int) -> None:
        """Draw the rows of ``epoch`` from now on; what was reported of the one before is complete.

        Raises:
            UsageError: A part of the batches was reported, so that it is not known which; or another part than on other
                ranks.
        """
        feedback = self.feedback
        if epoch <= feedback.epoch:
            return
        missing = len(self._waiting)
        if missing or feedback.unshared:  # other ranks may wait for this one at the end of their epoch
            self._share(wanted=self._world_size > 1 and _joined())
        if missing and feedback.reported:
            raise UsageError(
                f"{missing} of {missing + feedback.reported} batches of epoch {feedback.epoch} were not reported: "
                "losses may have been taken for other rows'",
                hint="call sampler.report(losses) after every step, or never; if the epoch was left early: "
                f"sampler.seek({feedback.epoch}, K), K being how many of its batches were trained on, and then "
                f"sampler.seek({epoch})",
            )
        if not feedback.reported:
            self._note_unreported(missing, epoch)
            self._silent = self._silent or missing > 0
        feedback.end_epoch(epoch)
        self._lacking = 0
        self._waiting.clear()
        self._weighted = 0

    def _note_unreported(self, missing: int, epoch: int) -> None:
        blind = bool(np.isnan(self.feedback.losses).all())
        if self._told or not self.feedback.draw.needs_losses or not (missing or blind):
            return
        self._told = True
        log(
            f"note: no losses were reported before epoch {epoch}: its rows are drawn as if all had the same loss"
            if blind
            else f"note: no losses were reported in epoch {epoch - 1}: epoch {epoch} is drawn by earlier ones"
        )

    def report(self, losses: Losses, step: int | None, *, last: bool) -> None:
        """Take the losses of the earliest batch that waits for them.

        Args:
            losses: The loss of each of this rank's rows, [m].
            step: Steps trained with this one, which is checked; None for no check.
            last: Whether the epoch's last batch was yielded.

        Raises:
            UsageError: No batch waits, or it has another number of rows, or is another one; or the state that was
                loaded lacks losses of this epoch.
        """
        if not self._waiting:
            raise UsageError(
                "`losses`: got a report, but every batch that was yielded is reported already",
                hint="call sampler.report(losses) once after each step",
            )
        _require_none_lacking(self._lacking)
        batch, values, step = self._waiting[0], _as_tensor(losses), as_type("step", step, int | None)
        if step is not None and step != batch.step:
            raise UsageError(
                f"`step`: got the losses of step {step}, expected those of step {batch.step}",
                hint="report each step once, in the order of the batches",
            )
        if values.shape != (len(batch.rows),):
            raise UsageError(
                f"`losses`: got {list(values.shape)}, expected [{len(batch.rows)}]: one for each row of the batch of "
                f"step {batch.step}",
                hint="losses = cross_entropy(logits, labels, reduction='none'); where another library slices batches, "
                "gather them from all processes first",
            )
        if self._world_size > 1 and not _joined():
            raise UsageError(
                f"`losses`: {self._world_size} ranks cannot share losses without a process group",
                hint="call torch.distributed.init_process_group before training",
            )
        self.feedback.report(batch.step, batch.rows[: batch.own], values[: batch.own])
        self._waiting.popleft()
        self._silent = False
        if last and not self._waiting:
            self._share(wanted=self._world_size > 1)
            self.feedback.end_epoch()

    def share(self) -> None:
        """Give every rank the losses that all reported in this epoch so far; all ranks have to ask."""
        self._share(wanted=self._world_size > 1)

    def weights(self) -> Float32[torch.Tensor, " m"]:
        """Importance weights of the batch that :meth:`report` comes for next, float32 [m] on the CPU.

        Raises:
            UsageError: No batch waits, or weights were not asked for, or those of this batch were given already.
        """
        if not self._waiting:
            raise UsageError(
                "there are no importance weights: no batch waits for its report",
                hint="call sampler.weights() in each step, before sampler.report(losses)",
            )
        batch = self._waiting[0]
        weights = self.feedback.weights_of(batch.rows)
        if self._weighted == batch.step:
            raise UsageError(
                f"`importance_weights`: those of step {batch.step} were given already, and its losses are not "
                "reported: the next step's rows would be weighted by them",
                hint="call sampler.report(losses) after each step, whatever the selection draws by; to use weights "
                "twice in a step, keep them",
            )
        self._weighted = batch.step
        return torch.from_numpy(weights)

    def state(self, step: int | None, first: int) -> dict[str, Any]:
        """The losses for a state after ``step`` steps.

        Args:
            step: Steps trained; None for all that were yielded.
            first: Steps before the epoch that is drawn.

        Returns:
            JSON-able values. Where other ranks hold losses besides, it says which rank may load it; and of how many
            batches before it the losses were not reported yet, or that the run reports none any more.

        Raises:
            UsageError: The losses at that step are not known any more, or not yet.
        """
        feedback = self.feedback
        if step is not None and step < first:
            raise UsageError(
                f"state after step {step}: epoch {feedback.epoch} began after step {first}, and earlier losses are gone"
            )
        if step is None and self._waiting and self._expected:
            self._note_lacking()
        unreported = [batch.step for batch in self._waiting if step is None or batch.step <= step]
        if unreported and step is not None and self._expected:
            raise UsageError(
                f"state after step {step}: the losses of step {unreported[0]} are not reported yet",
                hint="call sampler.report(losses) before sampler.state_dict(step=...)",
            )
        alone = self._world_size > 1 and feedback.unshared
        state = feedback.state(step) | {"rank": [self._rank, self._world_size] if alone else None}
        if self._silent:  # neither is in states that lack nothing, nor in those of before they were saved
            state["silent"] = True
        elif unreported:
            state["unreported"] = len(unreported)
        return state

    @property
    def _expected(self) -> bool:
        """Whether reports are being made, so that a batch without one is still to be reported."""
        return bool(self.feedback.reported) or not (self._silent or np.isnan(self.feedback.losses).all())

    def _note_lacking(self) -> None:
        """Say once that a state is after batches that are not reported; torchdata's loader means it so."""
        if self._told_lacking or "torchdata.stateful_dataloader" in sys.modules:
            return
        self._told_lacking = True
        first, last = self._waiting[0].step, self._waiting[-1].step
        log(
            f"warning: state_dict() is after step {last}, and the losses of step{f's {first} to' * (last > first)} "
            f"{last} are not reported: it will be refused when it is loaded. Call sampler.report(losses) before "
            f"state_dict(); where a DataLoader's workers read ahead, say how many steps were trained: "
            f"state_dict(step={first - 1})"
        )

    def load(self, state: object, epoch: int, *, here: bool) -> None:
        """Go on where :meth:`state` was taken.

        A loader whose workers read ahead takes its state before the batches in it are reported. Where losses are known
        that state would lose some; so it is refused, or passed over where these reports are of the same step and more.

        Args:
            state: The state.
            epoch: Epochs that are over there: its losses draw the next, or an earlier one that is still to be ended.
            here: Whether it is of the step where the sampler stands.

        Raises:
            UsageError: This is no such state, or that of one rank among others, or it lacks losses.
            IntegrityError: The losses in it are damaged, or of a later epoch.
        """
        told = state if isinstance(state, dict) else {}
        unreported, silent = told.get("unreported", 0), told.get("silent", False)
        if (
            not isinstance(state, dict)
            or "rank" not in state
            or type(unreported) is not int
            or type(silent) is not bool
        ):
            raise UsageError(f"`state`: got {state!r:.80} for its losses, expected what state_dict() returned")
        if state["rank"] not in (None, [self._rank, self._world_size]):
            raise UsageError(
                f"the state holds the losses of rank {state['rank']} alone (rank, ranks), this is rank {self._rank} of "
                f"{self._world_size}",
                hint="save at an epoch's end, or call sampler.share_losses() on every rank before state_dict()",
            )
        feedback, held = self.feedback, self.feedback.held()
        mine = feedback.epoch, feedback.reported
        besides = {"rank", "unreported", "silent"}
        feedback.load({name: value for name, value in state.items() if name not in besides}, epoch)
        self._lacking, before, self._silent = 0, self._silent, silent
        if unreported and here and mine > (feedback.epoch, feedback.reported):
            feedback.go_back(held)
            self._silent = before
        elif feedback.reported or not np.isnan(feedback.losses).all():
            _require_none_lacking(unreported)
        else:  # that losses are reported at all shows later
            self._lacking = unreported
        self._waiting.clear()
        self._weighted = 0

    def go_to(self, epoch: int, step: int) -> None:
        """Go to the step after ``step``, in ``epoch``.

        Raises:
            UsageError: The losses that the epoch was drawn by are not known any more.
        """
        feedback = self.feedback
        if epoch > feedback.epoch:
            self.begin(epoch)
        elif epoch < feedback.epoch and epoch:
            raise UsageError(
                f"epoch {epoch} cannot be drawn again: the losses are those at the beginning of epoch {feedback.epoch}",
                hint="load the state that was saved then, or start over: sampler.seek(0)",
            )
        elif epoch < feedback.epoch:
            feedback.reset()
        feedback.drop_from(step)
        self._lacking = 0
        self._waiting.clear()
        self._weighted = 0

    def _share(self, *, wanted: bool) -> None:
        self.feedback.share(_gather if wanted else None)


def _require_none_lacking(unreported: int) -> None:
    if unreported:
        batches = "1 batch before it was" if unreported == 1 else f"{unreported} batches before it were"
        raise UsageError(
            f"`state`: {batches} not reported yet when it was taken: the next epoch would be drawn without the losses",
            hint="load one that was taken after the report of its last step: sampler.report(losses), then "
            "sampler.state_dict(step=...), step= being how many steps were trained where workers read ahead; and not "
            "the state of a loader, which is taken before the report",
        )


def _as_tensor(losses: Losses) -> torch.Tensor:
    if isinstance(losses, np.ndarray):
        if not losses.flags.writeable or min(losses.strides, default=0) < 0:  # torch warns of one, refuses the other
            losses = losses.copy()
    elif isinstance(losses, list | tuple):  # torch warns of losses that still have their graph
        losses = [loss.detach() if isinstance(loss, torch.Tensor) else loss for loss in losses]
    try:
        values = torch.as_tensor(losses)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"`losses`: got {losses!r:.80}, expected a tensor, one number for each row") from error
    strange = "nested, " * values.is_nested + "quantized, " * values.is_quantized
    if strange or values.is_complex() or values.is_meta or values.layout != torch.strided:
        got = f"{strange}{values.dtype}, {values.layout}, on {values.device}"
        raise UsageError(f"`losses`: got {got}, expected a dense tensor, one real number for each row")
    return values


def _joined() -> bool:
    """Whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def _gather(mine: list[Reported]) -> list[list[Reported]]:
    every: list[list[Reported]] = [mine] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    return every
