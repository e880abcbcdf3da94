"""Graphs and eigenvectors of batches: computed once, and found again when the same batch comes again.

With P fixed batch assignments (:mod:`gstds_cache.selection.plan`) a batch comes again in every P-th epoch. What a rule
draws from it differs from epoch to epoch; its graph does not, and the graph is what takes time. So the spectra of the
first P epochs are written to a file, some 150 bytes a row, and read back from then on. It is a temporary file without a
name (in ``TMPDIR``): it takes no memory of the process, and is gone with the run. What is not in it, after a resume or
where the disk is full, and what does not come back as it was written, is computed: the file decides how long a run
takes, never what it selects.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields, replace
from typing import IO, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Float64

from gstds_cache.config import SelectConfig
from gstds_cache.files import mapped
from gstds_cache.graph.components import bridge_components
from gstds_cache.graph.knn import nearest
from gstds_cache.graph.laplacian import symmetrise
from gstds_cache.graph.neighbors import KnnGraph, normalized_rows
from gstds_cache.selection.counts import SelectionCounts
from gstds_cache.selection.plan import BatchPlan, SelectionPlan
from gstds_cache.selection.rule import round_ties
from gstds_cache.spectral.fiedler import fiedler_of_graph
from gstds_cache.spectral.result import FiedlerResult
from gstds_cache.spectral.status import Status
from gstds_cache.store.reader import EmbeddingStore

R = TypeVar("R", KnnGraph, FiedlerResult)
Gather = Callable[[np.ndarray, np.ndarray], object]  # rows of the store, and where they go


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is known of one batch's graph.

    Attributes:
        basis: The lowest Q eigenvectors above the trivial one, ties rounded, float64 [B, Q].
        values: Their eigenvalues, ascending, float64 [Q].
        residual: Relative residual of the first.
        status: How solving it ended.
        neighbors: Positions of each row's nearest neighbours, nearest first, int32 [B, K]; K is B - 1 at most.
        similarities: Their cosines, float32 [B, K].
    """

    basis: Float64[np.ndarray, "B Q"]
    values: Float64[np.ndarray, " Q"]
    residual: float
    status: Status
    neighbors: np.ndarray
    similarities: Float32[np.ndarray, "B K"]


class Spectra:
    """The spectra of one run's batches; any number of threads may ask."""

    def __init__(
        self,
        store: EmbeddingStore,
        config: SelectConfig,
        plan: SelectionPlan,
        counts: SelectionCounts,
        *,
        vectors: int,
        device: torch.device,
        solver: torch.device,
        backend: str,
        gather: Gather | None = None,
        keep: bool = True,
    ) -> None:
        """Compute nothing yet.

        Args:
            store: Where the embeddings are.
            config: How to make graphs and to solve them.
            plan: The run's batches.
            counts: Where time and iterations are counted.
            vectors: Eigenvectors that are wanted (Q).
            device: Where neighbours are found.
            solver: Where graphs are solved: there, or on the CPU.
            backend: The kNN backend, never ``auto``.
            gather: Where rows come from; from the store by default.
            keep: Whether a batch that comes again will be asked for again.
        """
        self._read = gather or store.gather
        self._store, self._config, self._counts = store, config, counts
        self._vectors, self._device, self._solver, self._backend = vectors, device, solver, backend
        # One search at a time: each takes hundreds of megabytes of a GPU.
        self._searching = threading.Lock() if device.type == "cuda" else nullcontext()
        self._buffers = threading.local()
        again = keep and 0 < plan.batch_assignments < plan.epochs
        self._kept = _SpectrumFile(plan, vectors, config.knn) if again else None

    @property
    def note(self) -> str:
        """Why spectra are computed again that could have been kept; empty where there is nothing to say."""
        return self._kept.note if self._kept is not None else ""

    def close(self) -> None:
        """Let go of what was kept; when no thread asks any more."""
        if self._kept is not None:
            self._kept.close()

    def of(self, batches: Sequence[BatchPlan]) -> list[Spectrum]:
        """The spectra of batches of one size.

        Raises:
            SolverError: A row's embedding holds NaN or Inf.
        """
        kept = self._kept
        earlier = [None if kept is None else kept.get(batch) for batch in batches]
        missing = [batch for batch, spectrum in zip(batches, earlier, strict=True) if spectrum is None]
        self._counts.reuse(len(batches) - len(missing))
        computed = iter(self._compute(missing) if missing else [])
        spectra = []
        for batch, spectrum in zip(batches, earlier, strict=True):
            if spectrum is None:
                spectrum = next(computed)  # noqa: PLW2901 - in its place
                if kept is not None:
                    kept.put(batch, spectrum)
            spectra.append(spectrum)
        return spectra

    def _compute(self, batches: Sequence[BatchPlan]) -> list[Spectrum]:
        config, counts = self._config, self._counts
        with counts.timed("gather", torch.device("cpu")):
            rows = self._gather(batches)
        with self._searching, counts.timed("knn", self._device):
            rows_on_device = rows.to(self._device)
            neighbours = nearest(rows_on_device, config.knn, backend=self._backend)
            if self._solver != self._device:
                neighbours, rows_on_device = _on_cpu(neighbours), rows
        with counts.timed("graph", self._solver):
            graph, _ = bridge_components(symmetrise(neighbours), rows_on_device)
        with counts.timed("solve", self._solver):
            result = fiedler_of_graph(
                graph,
                q=self._vectors,
                laplacian=config.laplacian,
                tolerance=config.tolerance,
                max_iterations=config.max_iterations,
                seed=config.seed,
                threads=1,
            )
            near, solved = _on_cpu(neighbours), _on_cpu(result)
        counts.solved(solved.iterations.tolist())
        return [
            Spectrum(
                basis=round_ties(solved.basis[graph].numpy()),
                values=solved.values[graph].numpy(),
                residual=float(solved.residual[graph, 0]),
                status=Status(int(solved.status[graph])),
                neighbors=near.neighbors[graph].numpy().astype(np.int32),
                similarities=near.similarities[graph].numpy(),
            )
            for graph in range(len(batches))
        ]

    def _gather(self, batches: Sequence[BatchPlan]) -> Float32[torch.Tensor, "G B D"]:
        """Unit rows of the batches, in a buffer that the thread's next stack overwrites."""
        size, dim = len(batches[0].indices), self._store.spec.dim
        stored = self._buffer("stored", (1, size, dim), getattr(torch, self._store.spec.dtype))
        rows = self._buffer("rows", (len(batches), size, dim), torch.float32)
        for graph, batch in enumerate(batches):
            self._read(batch.indices, stored[0].numpy())
            normalized_rows(stored, out=rows[graph : graph + 1])
        return rows

    def _buffer(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of this thread's own: touching new pages takes as long as filling them."""
        count = shape[0] * shape[1] * shape[2]
        buffer = getattr(self._buffers, name, None)
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(count, dtype=dtype)
            setattr(self._buffers, name, buffer)
        return buffer[:count].view(shape)


class _SpectrumFile:
    """A slot for each batch of each fixed assignment, in a temporary file; any number of threads may read and write.

    When something fails it is left alone from then on, and emptied. It stays open, since other threads may be at it: to
    them a file that was opened just then could have its number.
    """

    def __init__(self, plan: SelectionPlan, vectors: int, knn: int) -> None:
        self.note = ""
        self._plan, self._vectors, self._knn = plan, vectors, knn
        largest = max(plan.rows_in(0), plan.rows_in(plan.batches_per_epoch - 1))
        self._slot_bytes = self._record(largest).itemsize
        self._sums = np.full(plan.batch_assignments * plan.batches_per_epoch, -1, np.int64)  # CRC-32; -1: none yet
        self._file: IO[bytes] | None = None
        try:
            self._file = mapped.temporary_file()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """The file is gone."""
        if self._file is not None:
            self._file.close()

    def get(self, batch: BatchPlan) -> Spectrum | None:
        """What an earlier epoch wrote for this batch; None where it wrote nothing, or it does not read back whole."""
        slot, record = self._slot(batch), self._record(len(batch.indices))
        if self._file is None or self.note or self._sums[slot] < 0:
            return None
        try:
            data = os.pread(self._file.fileno(), record.itemsize, slot * self._slot_bytes)
        except OSError as error:
            self._give_up(error)
            return None
        if len(data) != record.itemsize or zlib.crc32(data) != self._sums[slot]:
            return None
        held = np.frombuffer(data, record)[0]
        return Spectrum(
            basis=held["basis"],
            values=held["values"],
            residual=float(held["residual"]),
            status=Status(int(held["status"])),
            neighbors=held["neighbors"],
            similarities=held["similarities"],
        )

    def put(self, batch: BatchPlan, spectrum: Spectrum) -> None:
        """Write what a later epoch will ask for."""
        if self._file is None or self.note or batch.epoch + self._plan.batch_assignments >= self._plan.epochs:
            return
        held = np.empty(1, self._record(len(batch.indices)))
        for field in fields(spectrum):
            held[field.name] = getattr(spectrum, field.name)
        slot, data = self._slot(batch), held.tobytes()
        try:
            written = os.pwrite(self._file.fileno(), data, slot * self._slot_bytes)
        except OSError as error:
            self._give_up(error)
            return
        if written == len(data):
            self._sums[slot] = zlib.crc32(data)

    def _record(self, rows: int) -> np.dtype[np.void]:
        knn = min(self._knn, rows - 1)
        return np.dtype(
            [
                ("residual", np.float64),
                ("status", np.int64),
                ("values", np.float64, (self._vectors,)),
                ("basis", np.float64, (rows, self._vectors)),
                ("neighbors", np.int32, (rows, knn)),
                ("similarities", np.float32, (rows, knn)),
            ]
        )

    def _slot(self, batch: BatchPlan) -> int:
        return batch.assignment * self._plan.batches_per_epoch + batch.group

    def _give_up(self, error: OSError) -> None:
        self.note = (
            f"graphs are computed anew in each epoch: cannot keep them in {mapped.folder() or 'a temporary file'} "
            f"({error.strerror}); set TMPDIR to a folder with room"
        )
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), 0)  # others may need the room, the selection's own file first


def _on_cpu(result: R) -> R:
    return replace(result, **{f.name: getattr(result, f.name).cpu() for f in fields(result)})
