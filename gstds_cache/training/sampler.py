"""A PyTorch batch sampler over a selection, for anyone's own training loop (docs/trainers.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import Sampler

from gstds_cache.config import as_type
from gstds_cache.errors import StreamError, UsageError
from gstds_cache.stream.ranks import TAIL, Tail, rank_slice
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.stream.repack import REMAINDER, Remainder
from gstds_cache.training.distributed import default_ranks
from gstds_cache.training.steps import StepReader, require_items


class SelectedBatchSampler(Sampler[list[int]]):
    """Yields the kept rows of each batch, an epoch of the selection per iteration.

    ::

        sampler = SelectedBatchSampler("selection.arrow")
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(sampler.epochs):
            for images, labels in loader: ...

    ``dataset[i]`` has to be item i of the data set that was embedded. Do not make the DataLoader again for each epoch
    with ``shuffle`` or a ``batch_size``: order and batches are the selection's.

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
                one of this package's image sources, by the hash of every item.

        Raises:
            UsageError: There is no such selection, or the numbers cannot be meant.
            StreamError: It is no selection.
            FingerprintMismatchError: ``dataset`` is another one.
        """
        self.rank, self.world_size = default_ranks(rank, world_size, tail)
        self.tail: Tail = tail
        self._steps = StepReader(selection, batch_size=batch_size, remainder=remainder)
        self.header = self._steps.header
        self.epochs, self.total_steps = self.header.epochs, self._steps.total
        self.epoch = 0
        self._may_start_here = True
        if dataset is not None:
            _require_dataset(self._steps, dataset)

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
        if begun == last:
            self.epoch += 1  # re-packing left this epoch without a full batch
        for _ in range(begun, last):
            batch = next(self._steps)
            if self._steps.position.step == last:
                self.epoch = epoch + 1
            yield rank_slice(batch.kept, self.rank, self.world_size, self.tail).tolist()

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
            UsageError: There is none, or it lies behind in a stream that cannot be opened again.
        """
        epoch, batch = as_type("epoch", epoch, int), as_type("batch", batch, int)
        self._steps.seek(self._steps.step_of(epoch, batch))
        self.epoch, self._may_start_here = epoch, True

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where to go on: the selection's identity, the next step, and the hash over the records before it; JSON-able.

        It counts batches that were *yielded*. A DataLoader with workers takes up to ``num_workers * prefetch_factor``
        batches ahead of the training loop, so there say how many steps were trained: ``state_dict(step=steps_done)``.
        torchdata's StatefulDataLoader knows by itself and needs no ``step``.

        The state holds no rank: it can be loaded with another world size, as long as the global batch is the same.

        Args:
            step: Steps trained so far over all epochs, where more were yielded; None for all that were yielded.

        Raises:
            UsageError: That step was not yielded, or too long ago (4,096 steps are remembered).
        """
        return self._steps.state_dict(step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: the next iteration yields the rest of that epoch.

        Raises:
            UsageError: This is no state at all.
            StreamError: It is of something else.
            FingerprintMismatchError: It is of another selection or batch size, or the records before it differ.
        """
        self._steps.load_state_dict(state)
        self.epoch, self._may_start_here = self._steps.position.epoch, True


def _require_dataset(steps: StepReader, dataset: Sized) -> None:
    from gstds_cache.data.source import ImageSource

    if isinstance(dataset, ImageSource):
        from gstds_cache.data.manifest import build_manifest
        from gstds_cache.data.repeatable import why_items_differ
        from gstds_cache.stream.reader import require_dataset

        manifest, why = build_manifest(dataset), why_items_differ(dataset)
        require_dataset(steps.header, items=len(manifest), items_root=manifest.root, uri=dataset.uri, why=why)
    require_items(steps.header.items, dataset)
