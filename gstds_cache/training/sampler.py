"""A PyTorch batch sampler over a selection, for anyone's own training loop (docs/trainers.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float32
from torch.utils.data import Sampler

from gstds_cache.config import as_type
from gstds_cache.errors import StreamError, UsageError
from gstds_cache.stream.ranks import TAIL, Tail, rank_slice, real_rows
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.stream.repack import REMAINDER, Remainder
from gstds_cache.training.distributed import default_ranks
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.label_check import note_other_labels
from gstds_cache.training.reports import BatchReports, Losses
from gstds_cache.training.steps import StepReader, require_items


class SelectedBatchSampler(Sampler[list[int]]):
    """Yields the rows to train on of each batch, an epoch of the selection per iteration.

    ::

        sampler = SelectedBatchSampler("selection.arrow")
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(sampler.epochs):
            for images, labels in loader: ...

    ``dataset[i]`` has to be item i of the data set that was embedded. Do not make the DataLoader again for each epoch
    with ``shuffle`` or a ``batch_size``: order and batches are the selection's.

    Of a selection of candidates (``draw="loss-minus-reference"``, say) the rows of each epoch are drawn by the losses
    that were reported up to the end of the epoch before: call :meth:`report` after each step.

    Under several ranks the *global* batch is the selection's (or ``batch_size``), and each rank yields its slice of it,
    equally many rows and steps on every rank.

    Attributes:
        header: What the selection says of itself.
        epochs: Epochs in it.
        epoch: The epoch that the next iteration yields, or is yielding.
        total_steps: Batches of the whole run, for a learning-rate schedule.
        rank: This rank.
        world_size: Ranks the batches are sliced over.
        tail: What happens to a global batch that does not divide by ``world_size``.
    """

    def __init__(
        self,
        selection: str | os.PathLike[str] | SelectionStream,
        *,
        batch_size: int | None = None,
        remainder: Remainder = REMAINDER,
        rank: int | None = None,
        world_size: int | None = None,
        tail: Tail = TAIL,
        dataset: Sized | None = None,
        draw: str | None = None,
        importance_weights: bool = False,
    ) -> None:
        """Open a selection.

        Args:
            selection: A file, what :func:`gstds_cache.select` returned, an address (``grpc://HOST:PORT``), or a stream
                that is open already (a pipe, say), which can be read once and by this process alone.
            batch_size: Re-pack what is kept into global batches of exactly this many rows, over all ranks together;
                None leaves each batch of the selection one step.
            remainder: When re-packing, whether the rows left at an epoch's end are put at the head of the next epoch
                (``carry``) or left out (``drop``).
            rank: This rank; by default torch.distributed's, or RANK as torchrun sets it.
            world_size: Ranks to slice over; by default torch.distributed's, or WORLD_SIZE. Give ``rank=0,
                world_size=1`` where another library does the slicing.
            tail: What happens where a global batch does not divide by ``world_size``: ``drop`` leaves its last rows
                out, ``pad`` repeats its first ones.
            dataset: Checked to be the data set the selection was made from: by its number of items, or, where it is
                one of this package's image sources, by the hash of every item. Where it has labels (``targets``) and
                the store is still there, a note says if they are not those of the store's rows.
            draw: The selection's own draw function, ``module:function``: a selection names it, and cannot have it run.
            importance_weights: Whether :meth:`weights` will be asked.

        Raises:
            UsageError: There is no such selection, or what was given is none (a store, say); or the numbers cannot be
                meant, or are for candidates alone.
            StreamError: It is no selection.
            FingerprintMismatchError: ``dataset`` is another one.
        """
        draw, remainder = as_type("draw", draw, str | None), as_type("remainder", remainder, Remainder)
        self.rank, self.world_size = default_ranks(rank, world_size, tail)
        self.tail: Tail = tail
        draws = partial(Feedback, draw=draw, importance=as_type("importance_weights", importance_weights, bool))
        self._steps = StepReader(selection, batch_size=batch_size, remainder=remainder, feedback=draws)
        self.header = self._steps.header
        self._reports: BatchReports | None = None
        if self._steps.feedback is not None:
            self._reports = BatchReports(self._steps.feedback, rank=self.rank, world_size=self.world_size)
        elif draw is not None or importance_weights:
            _of_candidates(self._reports, "`importance_weights`" if draw is None else "`draw`")
        self.epochs, self.total_steps = self.header.epochs, self._steps.total
        self.epoch = 0
        self._may_start_here = True
        if dataset is not None:
            _require_dataset(self._steps, dataset)
            note_other_labels(selection, self.header, dataset)

    def __repr__(self) -> str:
        numbers = f"epochs={self.epochs}, total_steps={self.total_steps}, rank={self.rank} of {self.world_size}"
        return f"SelectedBatchSampler({self.header.selection_digest[:16]}, {numbers})"

    @property
    def step(self) -> int:
        """Batches yielded so far, over all epochs; with DataLoader workers, more than were trained on."""
        return self._steps.position.step

    @property
    def batch_size(self) -> int:
        """Rows of every global batch, where they are re-packed.

        Raises:
            AttributeError: Batches are the selection's and differ in size.
            UsageError: The batches are sliced over ranks already. Only what slices batches asks a batch sampler for
                this (Accelerate's BatchSamplerShard, Lightning's injection of a DistributedSampler); sliced twice,
                rows would be missed in silence.
        """
        if self.world_size > 1:
            raise UsageError(
                f"another library is about to slice batches that this sampler slices over {self.world_size} ranks "
                "already; rows would be missed",
                hint="Lightning: Trainer(use_distributed_sampler=False). Accelerate and Trainers built on it: do not "
                "prepare this loader, or give the sampler rank=0, world_size=1 (docs/trainers.md)",
            )
        if self._steps.batch_size is None:
            raise AttributeError("batch_size: this selection's batches differ in size; re-pack with batch_size=N")
        return self._steps.batch_size

    def close(self) -> None:
        """Close the selection before its end. At the end, it closes itself."""
        self._steps.close()

    def __len__(self) -> int:
        """Batches of the epoch that is being yielded, or of the one that comes next."""
        return self._steps.per_epoch[min(self.epoch, self.epochs - 1)]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's rows of each batch of the next epoch, or of what is left of it after a resume.

        Yields:
            Rows of the data set.

        Raises:
            StreamError: All epochs were used up, or the epoch before was left in the middle, or the stream is damaged.
            TruncatedStreamError: The selection ends before it is whole.
        """
        if self.epoch >= self.epochs:
            raise StreamError(
                f"the selection has {self.epochs} epochs, and all were used",
                hint="select more `epochs`, or start over: sampler.seek(0)",
            )
        epoch, last = self.epoch, self._steps.step_of(self.epoch, self._steps.per_epoch[self.epoch])
        begun = self._steps.position.step
        if begun != self._steps.step_of(epoch) and not self._may_start_here:
            raise StreamError(
                f"epoch {epoch} was started again at batch {self._steps.position.batch}: a selection is read in order, "
                "and nothing of it is passed over in silence",
                hint=f"iterate each epoch to its end, or say where to go on: sampler.seek({epoch})",
            )
        self._may_start_here = False
        if self._reports is not None:
            self._reports.begin(epoch)
        if begun == last:
            self.epoch += 1  # re-packing left this epoch without a full batch
        for _ in range(begun, last):
            batch = next(self._steps)
            if self._steps.position.step == last:
                self.epoch = epoch + 1
            rows = rank_slice(batch.kept, self.rank, self.world_size, self.tail)
            if self._reports is not None:
                padded = self.tail == "pad"
                own = real_rows(len(batch.kept), self.rank, self.world_size) if padded else len(rows)
                self._reports.yielded(self._steps.position.step, rows, own)
            yield rows.tolist()

    def report(self, losses: Losses, *, step: int | None = None) -> None:
        """Report the losses of the batch that was just trained on: of candidates, the next epoch is drawn by them.

        They are copied where they are, and looked at when the epoch ends, so a step does not wait for a GPU. The last
        report of an epoch ends it; under several ranks these share their losses then, so each has to report.

        - The DataLoader has to give batches in order (``in_order=True``, its default): a report belongs to the earliest
          batch that waits, and would else be taken for other rows.
        - Never reported: rows are drawn as if all had the same loss, and a note says so. Batches of an epoch that were
          reported in part: an error when the next one begins.
        - A loss that is NaN or infinite leaves its row the one that it had, and a note tells how many.
        - A selection of kept rows needs no losses, and nothing is done with them: a loop may report whatever it is
          given, as ``draw="auto"`` may settle on either.

        Args:
            losses: The loss of each row, [m], on any device; ``cross_entropy(logits, labels, reduction="none")``.
            step: Steps trained with this one, over all epochs, to be checked: it is an error where the batch that waits
                for its report is another.

        Raises:
            UsageError: All batches are reported, or the batch has another number of rows, or is another one; or the
                state that was loaded lacks losses of this epoch.
        """
        if (reports := self._reports) is None:
            return
        last = self._steps.position.step >= self._steps.step_of(self._drawn, self._steps.per_epoch[self._drawn])
        reports.report(losses, step, last=last)

    def weights(self) -> Float32[torch.Tensor, " m"]:
        """Importance weights of the batch that is trained on now: 1 / the chance of a row to be drawn, capped.

        Their mean over a batch of the selection is 1. ``loss = (losses * sampler.weights()).mean()``, before
        :meth:`report`: it is the batch whose report is next. So every step has to be reported, and each batch's weights
        are given once.

        Returns:
            float32 [m] on the CPU.

        Raises:
            UsageError: The selection has no candidates, no batch waits for its report, its weights were given already,
                or ``importance_weights`` was not set.
        """
        return _of_candidates(self._reports, "`importance_weights`").weights()

    def share_losses(self) -> None:
        """Give every rank the losses reported so far, so that any rank may save the state in the middle of an epoch.

        All ranks have to call it. At an epoch's end, the last report does it.

        Raises:
            UsageError: The selection has no candidates, or the ranks reported different numbers of batches.
        """
        _of_candidates(self._reports, "losses").share()

    @property
    def losses(self) -> Float32[torch.Tensor, " N"]:
        """The losses that the rows of this epoch are drawn by, float32 [N]; NaN for rows without one.

        Raises:
            UsageError: The selection has no candidates.
        """
        return torch.from_numpy(_of_candidates(self._reports, "losses").feedback.losses.copy())

    @property
    def _drawn(self) -> int:
        """The epoch whose rows are drawn."""
        return 0 if self._reports is None else min(self._reports.feedback.epoch, self.epochs - 1)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: epochs follow from iterating, and a state that was loaded must not be undone.

        Lightning, Accelerate and Hugging Face's Trainer call this with counters of their own, which begin at 0 in each
        process. To go to another epoch, say so with :meth:`seek`.
        """

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Go to a batch of an epoch: the next iteration begins there. Going back opens the selection again.

        Args:
            epoch: The epoch, from 0.
            batch: The batch in it, from 0.

        Raises:
            UsageError: There is none, or it lies behind in a stream that cannot be opened again; or, of candidates, the
                losses that it was drawn by are not known any more.
        """
        epoch, batch = as_type("epoch", epoch, int), as_type("batch", batch, int)
        step = self._steps.step_of(epoch, batch)
        with self._or_back():
            if self._reports is not None:
                self._reports.go_to(epoch, step)
            self._steps.seek(step)
        self.epoch, self._may_start_here = epoch, True

    @contextmanager
    def _or_back(self) -> Iterator[None]:
        """Where what is done inside fails, nothing has changed; a stream that was read on says so when iterated."""
        before = self._steps.position.step
        try:
            with self._reports.or_back() if self._reports is not None else nullcontext():
                yield
        except BaseException:
            if self._steps.position.step != before:
                self._may_start_here = False
            raise

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where to go on: the selection's identity, the next step, and the hash over the records before it; JSON-able.

        It counts batches that were *yielded*. A DataLoader with workers takes up to ``num_workers * prefetch_factor``
        batches ahead of the training loop, so there say how many steps were trained: ``state_dict(step=steps_done)``.
        The DataLoader has to give batches in order for this (``in_order=True``, its default).
        torchdata's StatefulDataLoader knows by itself and needs no ``step``; of candidates save this in its place.

        The state holds no rank: it can be loaded with another world size, as long as the global batch is the same.

        Of candidates it holds the losses as well: 6 bytes a row, and 16 for each row that was trained on in this epoch.
        Report the step before the state is taken, and say ``step=``: where losses are reported, a state that lacks some
        is refused when it is loaded, and a note says so when it is taken. Under several ranks in the middle of an
        epoch, call :meth:`share_losses` on all of them before; else the state holds one rank's losses, and can be
        loaded by this rank alone.

        Args:
            step: Steps trained so far over all epochs, where more were yielded; None for all that were yielded.

        Raises:
            UsageError: That step was not yielded, or too long ago (4,096 steps are remembered); or its losses are not
                reported yet.
        """
        step = as_type("step", step, int | None)
        state = self._steps.state_dict(step)
        if self._reports is not None:
            state |= {"feedback": self._reports.state(step, self._steps.step_of(self._drawn))}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: the next iteration yields the rest of that epoch.

        A state that is refused changes nothing. (A stream that cannot be opened again may have been read on.)

        With candidates load the sampler's own state, and not that of torchdata's loader, whose workers read ahead: it
        is taken before the batches in it are reported. Such a state is refused, or, where the sampler already stands at
        that step with more losses, changes nothing. If no loss at all is known in it, the next report is refused.

        Raises:
            UsageError: This is no state at all, or batches before it were not reported when it was taken.
            StreamError: It is of something else.
            FingerprintMismatchError: It is of another selection or batch size, or the records before it differ.
            IntegrityError: The losses in it are damaged, or of a later epoch.
        """
        with self._or_back():
            if self._reports is not None:
                if not isinstance(state, Mapping):
                    raise UsageError(f"`state`: got {state!r:.80}, expected what state_dict() returned")
                losses, state = state.get("feedback"), {name: state[name] for name in state if name != "feedback"}
                self._steps.check_state(state)
                ended = sum(state["step"] >= end for end in accumulate(self._steps.per_epoch))
                place = self._steps.position
                here = (place.step, place.sha256) == (state["step"], state["sha256"])
                self._reports.load(losses, ended, here=here)
            self._steps.load_state_dict(state)  # behind the losses, which batches on the way are drawn by
        self.epoch, self._may_start_here = self._steps.position.epoch, True


def _of_candidates(reports: BatchReports | None, what: str) -> BatchReports:
    """The reports of a selection of candidates.

    Raises:
        UsageError: The selection is one of kept rows.
    """
    if reports is None:
        raise UsageError(
            f"{what}: the selection keeps rows, and draws none by losses",
            hint="leave it out, or select candidates: `draw='loss-minus-reference'` when selecting",
        )
    return reports


def _require_dataset(steps: StepReader, dataset: Sized) -> None:
    from gstds_cache.data.source import ImageSource

    if isinstance(dataset, ImageSource):
        from gstds_cache.data.manifest import build_manifest
        from gstds_cache.data.repeatable import why_items_differ
        from gstds_cache.stream.reader import require_manifest

        manifest, why = build_manifest(dataset), why_items_differ(dataset)
        require_manifest(steps.header, manifest, uri=dataset.uri, why=why)
    require_items(steps.header.items, dataset)
