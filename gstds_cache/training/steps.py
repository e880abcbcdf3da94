"""The steps of a selection, one after the other, from any position: what the sampler and the data set are built on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from gstds_cache.config import as_type
from gstds_cache.errors import FingerprintMismatchError, StreamError, UsageError
from gstds_cache.runtime.notify import log
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.stream.reader import SelectionStream, open_selection, selection_name
from gstds_cache.stream.repack import REMAINDER, PackedBatch, Remainder, packed_per_epoch, repack
from gstds_cache.stream.schema import Header
from gstds_cache.stream.source import AGAIN
from gstds_cache.training.feedback import Feedback

REMEMBERED = 4096  # positions kept for state_dict(step): more than any DataLoader prefetches
STATE_FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where a reader is: the next step, and what was read up to it.

    Attributes:
        step: The next step of the run, from 0.
        epoch: Its epoch.
        batch: Its position in the epoch.
        next_seq: The record of the selection that is read next.
        sha256: Running hash over the records read.
    """

    step: int
    epoch: int
    batch: int
    next_seq: int
    sha256: str


class StepReader:
    """Gives the global batch of each step of a run.

    A selection that was given as a path or an address is opened again whenever an earlier position is asked for, and in
    a process this object was pickled to. One that was given as an open stream (a pipe) goes forward only.

    Attributes:
        header: What the selection says of itself.
        per_epoch: Steps of each epoch.
        total: Steps of the whole run.
        batch_size: Rows of every batch where they are re-packed, else None.
        position: Where it is.
        feedback: Draws the rows of candidates; None where the selection's rows are kept ones.
    """

    position: Position
    _passed: deque[Position]
    _read_before: dict[int, str]  # running hash by step, of steps that were read before it was opened again
    _batches: Iterator[SelectedBatch | PackedBatch]

    def __init__(
        self,
        selection: str | os.PathLike[str] | SelectionStream,
        *,
        batch_size: int | None = None,
        remainder: Remainder = REMAINDER,
        feedback: Callable[[Header], Feedback] | None = None,
    ) -> None:
        """Open a selection and read its header.

        Args:
            selection: A file, an address, or a stream that is open already.
            batch_size: Re-pack into batches of this many rows; None leaves the selection's own.
            remainder: What happens to the rows left at an epoch's end when re-packing; of candidates they are dropped.
            feedback: Makes what draws the rows of candidates; None where nobody can report losses.

        Raises:
            UsageError: There is no such selection, or what was given is none; or not one batch of that size would be
                full; or it offers candidates, and they cannot be drawn so.
            StreamError: It is no selection.
        """
        batch_size = as_type("batch_size", batch_size, int | None)
        self._where = None if isinstance(selection, SelectionStream) else selection_name(selection)
        self._stream: SelectionStream | None = selection if isinstance(selection, SelectionStream) else None
        if self._stream is not None and self._stream.next_seq:
            raise UsageError(
                f"the stream was read up to record {self._stream.next_seq} already",
                hint="give a stream that was just opened, or the selection's path",
            )
        self.batch_size, self.remainder, self._read_before = batch_size, remainder, {}
        self._failed = False
        self.header = self._open().header
        self.feedback = self._new_feedback(feedback)
        if batch_size is None:
            self.per_epoch = [self.header.batches_per_epoch] * self.header.epochs
        else:
            self.per_epoch = packed_per_epoch(self.header.kept_per_epoch, batch_size, remainder)
        self.total = sum(self.per_epoch)
        self._start()

    def _new_feedback(self, make: Callable[[Header], Feedback] | None) -> Feedback | None:
        if not self.header.candidates:
            return None
        if make is None:
            raise UsageError(
                "the selection offers candidates, whose rows are drawn by losses that are reported while training",
                hint="use SelectedBatchSampler, and call sampler.report(losses) after each step",
            )
        if self.batch_size is not None and self.remainder != "drop":
            raise UsageError(
                f"`remainder`: got {self.remainder!r}, but candidates are drawn epoch by epoch",
                hint="pass `remainder='drop'`: rows that fill no batch at an epoch's end are left out",
            )
        return make(self.header)

    @property
    def reopens(self) -> bool:
        """Whether the selection can be opened again, by anyone who knows where it is."""
        return self._where is not None and self._where != "-"

    def __iter__(self) -> Iterator[SelectedBatch | PackedBatch]:
        return self

    def __next__(self) -> SelectedBatch | PackedBatch:
        """The global batch of the next step.

        With the last one the selection has been read to its end, so that a truncated one is never used up.

        Raises:
            StopIteration: All steps were given.
            StreamError: The selection is damaged or truncated.
            FingerprintMismatchError: It was replaced by another one since it was opened.
        """
        if self.position.step == self.total:
            raise StopIteration
        if self._failed:
            raise StreamError(
                f"the selection comes through a stream that failed at step {self.position.step}, and cannot be read on",
                hint="give the selection's path or address in place of a stream, and go on at this step",
            )
        if self._stream is None or self._owner != os.getpid():
            # Closed, pickled or forked: a forked copy would share the file's place with its parent.
            self._reopen(self.position.step)
        try:
            return self._read()
        except BaseException:
            # What was read may be ahead of the position, and a generator that failed gives no more.
            self._failed = not self.reopens
            if self.reopens:
                self.close()  # the next read opens it again
            raise

    def _read(self) -> SelectedBatch | PackedBatch:
        batch = next(self._batches, None)
        if batch is None:
            raise StreamError(f"the selection ends after {self.position.step} of {self.total} steps", hint=AGAIN)
        step = self.position.step + 1
        epoch, position = batch.epoch, batch.batch_id + 1
        while epoch < len(self.per_epoch) and position >= self.per_epoch[epoch]:
            epoch, position = epoch + 1, 0
        if step == self.total:
            self._read_out()
        assert self._stream is not None
        sha256 = self._stream.running_sha256
        self._require_same(self._read_before.get(step, sha256) == sha256)
        self._read_before.pop(step, None)  # from now on it is in `_passed`
        self.position = Position(step, epoch, position, self._stream.next_seq, sha256)
        self._passed.append(self.position)
        if step == self.total:
            self.close()
        return batch

    def close(self) -> None:
        """Close the selection; where it can be opened again, reading on does that."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __del__(self) -> None:
        """A file this object opened is closed with it; a stream it was given is its giver's."""
        if getattr(self, "_stream", None) is not None and self.reopens:
            self.close()

    def seek(self, step: int, sha256: str = "") -> None:
        """Go to a step, so that it is the next. Where that fails nothing has changed, but a stream was read on.

        Args:
            step: The step, from 0 to ``total``.
            sha256: Running hash the selection must have there; empty for any.

        Raises:
            UsageError: There is no such step, or it lies behind in a stream that cannot be opened again.
            FingerprintMismatchError: The batches before it are not those whose hash was given.
        """
        if not 0 <= step <= self.total:
            raise UsageError(f"the selection has {self.total} steps, there is no step {step}")
        with self._or_back():
            closed = self._stream is None and self.position.step < self.total
            if step < self.position.step or closed:
                self._reopen(step)
            while self.position.step < step:
                next(self)
            if sha256 and self.position.sha256 != sha256:
                raise FingerprintMismatchError(
                    f"the selection's first {step} batches are not those that were trained on before",
                    hint="resume with the same selection",
                )

    def step_of(self, epoch: int, batch: int = 0) -> int:
        """The step that is batch ``batch`` of ``epoch``.

        Raises:
            UsageError: There is none.
        """
        if not (0 <= epoch < len(self.per_epoch) and 0 <= batch <= self.per_epoch[epoch]):
            steps = self.per_epoch[epoch] if 0 <= epoch < len(self.per_epoch) else 0
            raise UsageError(
                f"there is no batch {batch} of epoch {epoch}: the selection has {len(self.per_epoch)} epochs, and "
                f"{steps} batches in this one"
            )
        return sum(self.per_epoch[:epoch]) + batch

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where to go on, JSON-able.

        Args:
            step: Steps that were trained, where more were read ahead; None for all that were read.

        Raises:
            UsageError: That step was not read, or too long ago.
        """
        passed = [p for p in self._passed if p.step == step] if step is not None else [self.position]
        if not passed:
            raise UsageError(
                f"state after step {step}: steps {self._passed[0].step} to {self.position.step} can be saved"
            )
        return {
            "format": STATE_FORMAT,
            "selection_digest": self.header.selection_digest,
            "cache_fingerprint": self.header.cache_fingerprint,
            "batch_size": self.batch_size,
            "remainder": self.remainder,
            **asdict(passed[-1]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            UsageError: This is no state at all.
            StreamError: It is of something else.
            FingerprintMismatchError: It is of another selection, or of other batches.
        """
        self.check_state(state)
        self.seek(state["step"], state["sha256"])

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` would refuse, before anything is changed.

        Raises:
            UsageError: This is no state at all.
            StreamError: It is of something else.
            FingerprintMismatchError: It is of another selection.
        """
        if not isinstance(state, Mapping):
            raise UsageError(f"`state`: got {state!r:.80}, expected what state_dict() returned")
        mine = self.state_dict()
        for name in ("selection_digest", "cache_fingerprint", "batch_size", "remainder"):
            if state.get(name, mine[name]) != mine[name]:
                raise FingerprintMismatchError(
                    f"the state was saved with another {name}: it has {state[name]!r}, this sampler {mine[name]!r}",
                    hint="load it with the selection and the batch size it was saved with",
                )
        if state.keys() != mine.keys() or state["format"] != STATE_FORMAT:
            raise StreamError(f"this is no sampler's state: got the keys {sorted(state)}, expected {sorted(mine)}")
        if type(state["step"]) is not int or not isinstance(state["sha256"], str):
            raise UsageError(f"`state`: got the step {state['step']!r:.80}, expected what state_dict() returned")

    def __getstate__(self) -> dict[str, Any]:
        """An open file stays behind: whoever gets the copy opens the selection anew.

        Raises:
            UsageError: The selection cannot be opened anew.
        """
        if not self.reopens:
            raise UsageError(
                "a selection that comes through a stream belongs to the process that opened it",
                hint="give the selection's path or address in place of an open stream, or load data with num_workers=0",
            )
        return self.__dict__ | {"_stream": None, "_batches": None}

    def _open(self) -> SelectionStream:
        if self._stream is None:
            assert self._where is not None
            self._stream = open_selection(self._where)
        self._owner = os.getpid()
        return self._stream

    def _require_same(self, same: bool) -> None:
        if not same:
            raise FingerprintMismatchError(
                f"the selection at {self._where} was replaced since it was opened: its batches are others",
                hint="put the selection back that training began with, or open this one anew and start over",
            )

    def _reopen(self, step: int) -> None:
        if not self.reopens:
            raise UsageError(
                f"the selection comes through a stream that process {self._owner} read to step {self.position.step}: "
                f"no other process can read it, and it cannot go back to step {step}",
                hint="give the selection's path or address in place of a stream, or use num_workers=0",
            )
        self.close()
        with self._or_back():
            self._require_same(self._open().header == self.header)
            self._read_before |= {place.step: place.sha256 for place in self._passed}
            self._start()
            while self.position.step < step:
                next(self)

    @contextmanager
    def _or_back(self) -> Iterator[None]:
        """Where what is done inside fails, the next read opens the selection again and goes on from where it was."""
        before = self.position, self._passed.copy(), self._read_before.copy()
        try:
            yield
        except BaseException:
            if self.reopens:
                self.close()
                self.position, self._passed, self._read_before = before
            raise

    def _start(self) -> None:
        assert self._stream is not None
        batches = iter(self._stream) if self.feedback is None else _drawn(self._stream, self.feedback)
        self._batches = batches if self.batch_size is None else repack(batches, self.batch_size, self.remainder)
        first = next((epoch for epoch, steps in enumerate(self.per_epoch) if steps), 0)
        self.position = Position(0, first, 0, 0, self._stream.running_sha256)
        self._passed = deque([self.position], maxlen=REMEMBERED)

    def _read_out(self) -> None:
        if next(self._batches, None) is not None:
            raise StreamError("the selection goes on after its last epoch")


def _drawn(batches: Iterator[SelectedBatch] | SelectionStream, feedback: Feedback) -> Iterator[SelectedBatch]:
    """Yields each batch of candidates as the rows that are drawn of it."""
    for batch in batches:
        yield replace(batch, kept=feedback.rows_of(batch), candidates=None)


def remainder_of(header: Header) -> Remainder:
    """What happens to the rows left at an epoch's end when a selection is re-packed, unless it is said."""
    return "drop" if header.candidates else REMAINDER


def require_items(expected: int, dataset: Sized) -> None:
    """Refuse a data set with another number of items than the selection's.

    Raises:
        UsageError: It has no number of items.
        FingerprintMismatchError: It has another number.
    """
    if not isinstance(dataset, Sized):
        raise UsageError(f"`dataset`: got {dataset!r:.80}, expected a data set with a length")
    count = len(dataset)
    if count != expected:
        raise FingerprintMismatchError(
            f"the selection was made from a data set of {expected} items, this one has {count}: row i would be "
            "another item",
            hint="give the data set that was embedded, in the same order and with every item",
        )
    _note_order(getattr(dataset, "samples", None))


def _note_order(samples: object) -> None:
    """Say so where files, as torchvision's ImageFolder lists them, are not in the order of ``imagefolder:``."""
    if not (isinstance(samples, list) and samples and isinstance(samples[0], tuple) and isinstance(samples[0][0], str)):
        return
    for (first, *_), (second, *_) in pairwise(samples):
        if os.fsencode(first) > os.fsencode(second):
            log(
                f"note: `dataset` has {second} behind {first}, `imagefolder:` lists files by path: row i is another "
                "item unless the store was made from such an object (gstds_cache.embed(dataset))"
            )
            return
