"""A selector's run on a device: whether there is one, where its rows are, and its batches in lists."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from gstds_cache.errors import UsageError, in_words
from gstds_cache.graph.cuda import room_for_edges
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.selection.cuda_rule import why_not_ruled
from gstds_cache.selection.device_batches import Choose, HoldFloor, count_labels_into, selections_of
from gstds_cache.selection.device_path import DevicePath
from gstds_cache.selection.device_rows import DeviceRows, Rows, StreamedRows, choose_rows
from gstds_cache.selection.guidance import Guidance
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.selection.spectra import Spectra
from gstds_cache.spectral.block import why_not_solved
from gstds_cache.spectral.fiedler import DENSE_BY_DESIGN

if TYPE_CHECKING:
    from gstds_cache.selection.run import BatchSelector


class DeviceRun:
    """What of a selector's run happens on a device from rows to results."""

    def __init__(self, selector: BatchSelector, *, count_labels: bool) -> None:
        """Upload nothing yet.

        Args:
            selector: The selector.
            count_labels: Whether its rows are counted by label.

        Raises:
            UsageError: Rows were asked for on a device, and the run does not happen there.
        """
        # The selector holds this: the other way round as well, neither would be gone before a garbage collection.
        self._selector, self._count_labels = weakref.ref(selector), count_labels
        if selector.store.access_asked == "device" and self.why_not:
            raise UsageError(f"`access='device'`: {self.why_not}", hint="leave `access` out")

    @property
    def _of(self) -> BatchSelector:
        selector = self._selector()
        assert selector is not None
        return selector

    @cached_property
    def why_not(self) -> str:
        """Why not all of a batch's path but its rule runs on the device, in words; empty where it does."""
        of = self._of
        if not of.rule.vectors and not of.guidance_looks_at_graphs:
            return f"rule {of.rule.name} makes no graph"
        if of.knn_backend != "cuda" or of.solver != of.device:
            return f"neighbours are found by {of.knn_backend}, and graphs solved on {of.solver}"
        if of.plan.batch_size <= DENSE_BY_DESIGN:
            return f"graphs of up to {DENSE_BY_DESIGN} rows are solved on the CPU"
        nodes = of.plan.batch_size
        return why_not_solved(of.device, nodes, max(1, of.rule.vectors), room_for_edges(nodes, of.config.knn))

    @cached_property
    def has_rule(self) -> bool:
        """Whether the rule runs there as well."""
        of = self._of
        if self.why_not or of.draw is not None:  # candidates are all rows of a batch
            return False
        return not why_not_ruled(of.device, of.rule, of.plan.batch_size, of.plan.most_kept)

    @cached_property
    def _choice(self) -> tuple[bool, str]:
        return choose_rows(self._of.store, self._of.device)

    @property
    def has_rows(self) -> bool:
        """Whether all rows of the store are there, or will be."""
        return not self.why_not and self._choice[0]

    @property
    def rows_reason(self) -> str:
        """Where rows are while batches are selected, and why, in words."""
        return self._of.store.access_reason if self.why_not else self._choice[1]

    @cached_property
    def rows(self) -> Rows:
        """The store's rows; they stay for the next run."""
        counts, begun = self._of.counts, time.perf_counter()
        rows: Rows | None = self._all_rows() if self.has_rows else None
        if rows is None:
            rows = StreamedRows(self._of.store, self._of.device, threads=self._of.cpu_threads)
        counts.seconds["gather"] += time.perf_counter() - begun
        counts.elapsed += time.perf_counter() - begun
        return rows

    def _all_rows(self) -> DeviceRows | None:
        """All rows there; None where memory ran out, and it is not said that they have to be there.

        Raises:
            UsageError: It ran out, and they have to.
            RuntimeError: Something else than memory fails there.
        """
        of = self._of
        try:
            return DeviceRows(of.store, of.device, threads=of.cpu_threads)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if of.store.access_asked == "device":
                raise UsageError(
                    f"`access='device'`: {in_words(error)}",
                    hint="leave `access` out: rows are then copied there batch by batch",
                ) from error
            reason = f"{of.store.access_reason}; copied to {of.device} batch by batch, since {in_words(error)}"
        self._choice = False, reason
        return None

    def spectra_on_cpu(self, *, keep: bool = True) -> Spectra:
        """What computes the spectra of the batches that are left to the CPU; ``keep`` as :class:`Spectra` takes it."""
        of, cpu = self._of, torch.device("cpu")
        return Spectra(
            of.store,
            of.config,
            of.plan,
            of.counts,
            vectors=max(1, of.rule.vectors),
            device=cpu,
            solver=cpu,
            backend="torch",
            gather=self.rows.gather,
            keep=keep,
        )

    def path(self, on_cpu: Spectra) -> DevicePath:
        """The way of stacks through the device.

        Args:
            on_cpu: Computes the spectra of batches that are left to the CPU.
        """
        of = self._of
        return DevicePath(
            of.config,
            of.plan,
            of.counts,
            self.rows,
            on_cpu,
            rule=of.rule,
            labels=of.store.labels,
            dim=of.store.spec.dim,
            device=of.device,
        )

    def selections(
        self, start: int, guidance: Guidance, choose: Choose, hold: HoldFloor
    ) -> Iterator[list[SelectedBatch]]:
        """Select from batch ``start`` on, the rule on the device as well.

        Args:
            start: First ``seq``.
            guidance: The rows' difficulty.
            choose: Selects from a batch by its spectrum, where the device did not.
            hold: Makes positions hold the floor of classes.

        Yields:
            The batches in order, those of a stack together.
        """
        counts, labels = self._of.counts, self._of.store.labels
        places = int(labels.max(initial=-1)) + 2
        # The path ends first: a thread of its asks for spectra, and would write to a file that is closed.
        with closing(self.spectra_on_cpu()) as spectra, closing(self.path(spectra).solved(start, guidance)) as stacks:
            while True:
                begun = time.perf_counter()
                stack = next(stacks, None)
                if stack is None:
                    return
                floor = self._of.config.min_per_class
                ready = selections_of(stack, choose, labels=labels, floor=floor, hold=hold)
                seen, kept = np.zeros((2, places), np.int64)
                if self._count_labels:
                    count_labels_into(labels, stack.planned.indices.ravel(), seen)
                    count_labels_into(labels, np.concatenate([batch.kept for batch in ready]), kept)
                counts.add_stack(ready, seen, kept)
                counts.elapsed += time.perf_counter() - begun
                yield ready
