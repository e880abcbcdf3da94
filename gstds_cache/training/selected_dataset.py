"""A stream of kept indices as a PyTorch ``IterableDataset``: for a pipe or a service, without a sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import IterableDataset, default_collate, get_worker_info

from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.stream.ranks import TAIL, Tail, rank_slice
from gstds_cache.stream.reader import SelectionStream
from gstds_cache.stream.repack import REMAINDER, Remainder
from gstds_cache.training.distributed import default_ranks
from gstds_cache.training.label_check import note_other_labels
from gstds_cache.training.steps import StepReader, require_items


@runtime_checkable
class MapStyle(Protocol):
    """A data set with numbered items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SelectedDataset(IterableDataset[Any]):
    """The batches of a selection, with the items of a map-style data set in them.

    ::

        batches = SelectedDataset(dataset, "selection.arrow")
        for images, labels in DataLoader(batches, batch_size=None, num_workers=2): ...

    One iteration is the whole selection, all its epochs. ``batch_size=None`` tells the DataLoader that these are
    batches already.

    DataLoader workers: worker w of n makes the batches w, w + n, ... and opens the selection for itself; the DataLoader
    takes from them in turn, so the order is the selection's. A stream that is open already can be read by one process,
    so it takes ``num_workers=0``; more are refused. From a service (``grpc://...``) workers have to be spawned
    (``multiprocessing_context="spawn"``): gRPC does not survive a fork, and a forked worker says so.

    Attributes:
        header: What the selection says of itself.
        total_steps: Batches of one iteration.
    """

    def __init__(
        self,
        dataset: MapStyle,
        selection: str | os.PathLike[str] | SelectionStream,
        *,
        batch_size: int | None = None,
        remainder: Remainder = REMAINDER,
        rank: int | None = None,
        world_size: int | None = None,
        tail: Tail = TAIL,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        """Open a selection; arguments as in :class:`~gstds_cache.training.sampler.SelectedBatchSampler`.

        Item i of ``dataset`` has to be item i of the data set that was embedded: the number of its items is checked,
        and its labels, as there.
        ``collate`` makes a batch of the list of its items. The rank is read here, in the main process.

        Raises:
            UsageError: There is no such selection, or the numbers cannot be meant.
            StreamError: It is no selection.
            FingerprintMismatchError: ``dataset`` has another number of items.
        """
        self.rank, self.world_size = default_ranks(rank, world_size, tail)
        self.dataset, self.tail, self.collate = dataset, tail, collate
        self._steps = StepReader(selection, batch_size=batch_size, remainder=remainder)
        self.header, self.total_steps = self._steps.header, self._steps.total
        require_items(self.header.items, dataset)
        note_other_labels(selection, self.header, dataset)

    def __len__(self) -> int:
        """Batches of one iteration."""
        return self.total_steps

    def __repr__(self) -> str:
        numbers = f"total_steps={self.total_steps}, rank={self.rank} of {self.world_size}"
        return f"SelectedDataset({self.header.selection_digest[:16]}, {numbers})"

    def __iter__(self) -> Iterator[Any]:
        """An iterator over the batches of this process's worker; it has ``state_dict`` for torchdata's loader."""
        return SelectedBatches(self, self._steps)

    def batch_of(self, rows: Sequence[int]) -> Any:
        """The items of ``rows``, collated; by ``__getitems__`` where the data set has it, as PyTorch does."""
        many = getattr(self.dataset, "__getitems__", None)
        return self.collate(list(many(list(rows))) if many is not None else [self.dataset[row] for row in rows])


class SelectedBatches(Iterator[Any]):
    """One pass over a :class:`SelectedDataset` in one process."""

    def __init__(self, dataset: SelectedDataset, steps: StepReader) -> None:
        info = get_worker_info()
        self._worker, self._workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if self._workers > 1 and not steps.reopens:
            raise UsageError(
                f"{self._workers} DataLoader workers cannot share one open stream",
                hint="give the selection's path or address, or use num_workers=0",
            )
        self._dataset, self._steps = dataset, steps
        if steps.position.step:
            steps.seek(0)

    def __next__(self) -> Any:
        """The next batch of this worker.

        Raises:
            StopIteration: The selection is used up; it was read to its end and is whole.
            StreamError: It is damaged or truncated.
        """
        for batch in self._steps:
            if batch.seq % self._workers == self._worker:
                mine = self._dataset
                return mine.batch_of(rank_slice(batch.kept, mine.rank, mine.world_size, mine.tail).tolist())
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Where this worker is; JSON-able."""
        return self._steps.state_dict() | {"workers": self._workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there.

        Raises:
            UsageError: This is no state.
            FingerprintMismatchError: It is of another selection, or of another number of workers.
        """
        if not isinstance(state, Mapping):
            raise UsageError(f"`state`: got {state!r:.80}, expected what state_dict() returned")
        if state.get("workers") != self._workers:
            raise FingerprintMismatchError(
                f"the state was saved with {state.get('workers')} DataLoader workers, here are {self._workers}",
                hint="resume with the same num_workers, or use SelectedBatchSampler, whose state holds none",
            )
        self._steps.load_state_dict({name: value for name, value in state.items() if name != "workers"})
