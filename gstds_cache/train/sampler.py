"""A PyTorch batch sampler over a selection, for anyone's own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import Sampler

from gstds_cache.errors import StreamError
from gstds_cache.selection.selected import Selection
from gstds_cache.stream.reader import SelectionStream, open_selection


class SelectedBatchSampler(Sampler[list[int]]):
    """Yields the kept rows of each batch, an epoch of the selection per iteration.

    ::

        sampler = SelectedBatchSampler("selection.arrow")
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(sampler.epochs):
            for images, labels in loader: ...

    ``dataset[i]`` has to be item i of the data set that was embedded. Do not make the DataLoader again for each epoch
    with ``shuffle`` or a ``batch_size``: order and batches are the selection's.

    Attributes:
        header: What the selection says of itself.
        epochs: Epochs in it: how often it can be iterated.
    """

    def __init__(self, selection: str | Path | SelectionStream) -> None:
        """Open a selection.

        Args:
            selection: A file, or a stream that is open already (a pipe, say).

        Raises:
            UsageError: There is no such file.
            StreamError: It is no selection.
        """
        stream = selection if isinstance(selection, SelectionStream) else open_selection(Path(selection))
        self.header, self.epochs = stream.header, stream.header.epochs
        self._stream = stream
        self._batches: Iterator[Selection] = iter(stream)
        self._epoch = 0

    def close(self) -> None:
        """Close the selection before its end. At the end, it closes itself."""
        self._stream.close()

    def __len__(self) -> int:
        """Batches of one epoch."""
        return self.header.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the kept rows of each batch of the next epoch.

        Yields:
            Rows of the data set.

        Raises:
            StreamError: All epochs were used up, or the epoch before was left in the middle, or the stream is damaged.
            TruncatedStreamError: The selection ends before it is whole.
        """
        if self._epoch >= self.epochs:
            raise StreamError(
                f"the selection has {self.epochs} epochs, and all were used",
                hint="select more: gstds-select STORE --epochs N",
            )
        for done in range(len(self)):
            batch = next(self._batches)
            if batch.epoch != self._epoch or batch.batch_id != done:
                raise StreamError(
                    f"epoch {self._epoch} was started again at batch {batch.batch_id} of epoch {batch.epoch}: a "
                    "selection is read once, in order",
                    hint="iterate each epoch to its end; open the selection again to start over",
                )
            if done == len(self) - 1:
                self._epoch += 1
                if self._epoch == self.epochs:
                    # The stream-end record comes with the last batch, so that a truncated selection is never used up.
                    if next(self._batches, None) is not None:
                        raise StreamError("the selection goes on after its last epoch")
                    self.close()
            yield batch.kept.tolist()
