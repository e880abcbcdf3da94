"""The path of a batch where all of it runs on a GPU: rows, products, graph, eigenvectors, and the default rule.

Batches go in stacks, whose kernels are queued without a wait. Two stacks are in flight, on two streams: while the host
plans the next stack and hands over the one before, the device computes, and where the last graphs of a stack leave
processors idle the next stack begins. What comes back is copied to pinned memory; an event tells when it is there.

Where memory runs short, stacks become smaller; a batch that has no room even alone is computed on the CPU.

Graphs that do not converge, and only those, are solved on the CPU. So are the last batches of epochs, which are of
another size: a stack of one graph would keep a GPU waiting. Spectra are not kept for later epochs: computing them takes
less time than writing and reading them would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int64
from threadpoolctl import threadpool_limits
from torch import Tensor

from gstds_cache.config import SelectConfig
from gstds_cache.cuda.build import log_fallback
from gstds_cache.errors import SolverError, in_words
from gstds_cache.graph.cuda import GraphStack, graph_stack, unsigned
from gstds_cache.graph.neighbors import require_finite
from gstds_cache.runtime.devices import free_memory
from gstds_cache.runtime.resources import out_of_memory
from gstds_cache.seeding import keys_for
from gstds_cache.selection.counts import SelectionCounts
from gstds_cache.selection.cuda_rule import Draws, finish, keep_of_cells
from gstds_cache.selection.device_results import InFlight, SolvedStack, of_spectra
from gstds_cache.selection.device_rows import Rows, new_event, picked, stream_of, upload
from gstds_cache.selection.guidance import Guidance
from gstds_cache.selection.plan import PlannedStack, SelectionPlan
from gstds_cache.selection.rule import Rule
from gstds_cache.selection.spectra import Spectra, Spectrum
from gstds_cache.selection.strata import GOLDEN
from gstds_cache.spectral.block import BlockRitz, fiedler_of_stack, solve_stack
from gstds_cache.spectral.result import FiedlerResult

IN_FLIGHT = 2
GRAPHS_A_PROCESSOR = (
    4  # of a stack: fewer leave the device less to wait for at both ends of a run, but cost the host more
)
WITHOUT_DEVICE = 64  # graphs of a stack where kernels are emulated
SHARE = 0.4  # of the memory that is free beside the rows, for stacks in flight

Flight = InFlight | tuple[PlannedStack, Future[list[Spectrum]]]
"""A stack that is being computed: on the device, or on the CPU."""


class DevicePath:
    """Stacks of batches through one device, in order."""

    def __init__(
        self,
        config: SelectConfig,
        plan: SelectionPlan,
        counts: SelectionCounts,
        rows: Rows,
        on_cpu: Spectra,
        *,
        rule: Rule,
        labels: np.ndarray,
        dim: int,
        device: torch.device,
    ) -> None:
        """Compute nothing yet.

        Args:
            config: How to make graphs and to solve them.
            plan: The run's batches.
            counts: Where time and iterations are counted.
            rows: Where rows come from.
            on_cpu: Computes the batches of another size.
            rule: The run's rule.
            labels: Label of each row of the store, -1 where there is none.
            dim: Numbers of a row.
            device: Where all of it runs.
        """
        self._config, self._plan, self._counts, self._rows, self._on_cpu = config, plan, counts, rows, on_cpu
        self._rule, self._labels, self._dim, self._device = rule, labels, dim, device
        self._vectors, self._cuda = max(1, rule.vectors), device.type == "cuda"
        self._streams = [stream_of(device, number) for number in range(IN_FLIGHT)] if self._cuda else []
        self._turn = 0
        self._difficulty: Tensor | None = None
        self._labels_on_device: Tensor | None = None

    def solved(
        self, start: int, guidance: Guidance | None, *, end: int | None = None, at_once: int | None = None
    ) -> Generator[SolvedStack, None, None]:
        """Compute batches from ``start`` on.

        Args:
            start: First ``seq``.
            guidance: With it the rule runs on the device, which has to be one of ``SQUARED``; None leaves rules to the
                CPU, which then gets all spectra.
            end: One past the last ``seq``; the run's end by default.
            at_once: Batches of a stack; as many as fit the device by default.

        Yields:
            Stacks, in order.

        Raises:
            SolverError: A row holds NaN or Inf.
        """
        if guidance is not None:
            self._place(guidance)
        if self._cuda:
            torch.cuda.synchronize(self._device)  # what was uploaded on one stream both use
        most, flying = at_once or self._at_once(), deque[Flight]()
        with ThreadPoolExecutor(1, initializer=threadpool_limits, initargs=(1, "openmp")) as beside:
            for stack in self._plan.stacks(start, most, end):
                left = deque(stack.parts(most))
                while left:
                    flight = self._begin(left[0], guidance, beside, alone=not flying)
                    if flight is not None:
                        flying.append(flight)
                        left.popleft()
                    else:  # what is in flight gives its memory back, and the next stacks take less
                        most = max(1, len(left[0]) // 2)
                        left = deque(part for planned in left for part in planned.parts(most))
                    # The stack after next is queued before one is waited for.
                    while len(flying) > (IN_FLIGHT if flight is not None else 0):
                        yield self._arrived(flying.popleft())
            while flying:
                yield self._arrived(flying.popleft())

    def _begin(
        self, planned: PlannedStack, guidance: Guidance | None, beside: ThreadPoolExecutor, *, alone: bool
    ) -> Flight | None:
        """Begin to compute a stack; None where the device has no memory for it, but may have for a smaller one.

        Args:
            planned: The stack.
            guidance: As :meth:`solved` takes it.
            beside: Computes on the CPU.
            alone: Whether no other stack is in flight.

        Raises:
            RuntimeError: Something else than memory fails there.
        """
        if planned.indices.shape[1] == self._plan.batch_size:
            try:
                return self._queue(planned, guidance)
            except RuntimeError as error:  # of torch, of page-locked memory, of the driver that loads a kernel
                if not out_of_memory(error):
                    raise
                if len(planned) > 1 or not alone:
                    return None
                log_fallback(self._device, in_words(error))
        return planned, beside.submit(self._on_cpu.of, list(planned))

    def _at_once(self) -> int:
        if not self._cuda:
            return WITHOUT_DEVICE
        # A stack that fills the device, and no more memory than there is.
        nodes, knn, dim = self._plan.batch_size, self._config.knn, self._dim
        each = nodes * (4 * dim + 32 * knn + 16 * self._vectors + 64)
        free = free_memory(self._device)
        processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        fit = int(free * SHARE) // (each * (IN_FLIGHT + 1))
        return max(1, min(int(GRAPHS_A_PROCESSOR * processors), fit, self._rows.most(nodes)))

    def _place(self, guidance: Guidance) -> None:
        """Put what the rule looks at on the device."""
        if guidance.of_rows is not None:
            self._difficulty = torch.from_numpy(guidance.of_rows.all()).to(self._device)
        if guidance.kind == "disagreement":
            self._labels_on_device = torch.from_numpy(np.asarray(self._labels, np.int64)).to(self._device)

    def _on_stream(self) -> AbstractContextManager[object]:
        if not self._cuda:
            return nullcontext()
        self._turn = (self._turn + 1) % len(self._streams)
        return torch.cuda.stream(self._streams[self._turn])

    def _mark(self, marks: list[torch.cuda.Event]) -> None:
        if self._cuda:
            marks.append(new_event())
            marks[-1].record()

    def _queue(self, planned: PlannedStack, guidance: Guidance | None) -> InFlight:
        config, marks = self._config, list[torch.cuda.Event]()
        with self._on_stream():
            self._mark(marks)
            which = upload(planned.indices.astype(np.int32), self._device)
            rows, inverse = self._rows.of(planned.indices, which)
            self._mark(marks)
            graphs = graph_stack(rows, config.knn, inverse=inverse)
            self._mark(marks)
            solved = solve_stack(
                graphs,
                self._vectors,
                laplacian=config.laplacian,
                tolerance=config.tolerance,
                max_iterations=config.max_iterations,
                seed=config.seed,
            )
            self._mark(marks)
            finish(solved.basis)
            found = {f.name: getattr(solved, f.name) for f in fields(BlockRitz) if f.name != "basis"}
            found |= {"components": graphs.components, "finite": graphs.finite}
            if guidance is None:
                found |= {"basis": solved.basis, "neighbors": graphs.neighbors, "similarities": graphs.similarities}
            else:
                kept = keep_of_cells(self._rule, solved.basis, solved.values, self._draws(planned, graphs, which))
                found |= {"positions": kept.positions, "score": kept.score}
                if config.min_per_class:
                    found["vector"] = solved.basis[:, 0]
            host = {name: self._download(tensor) for name, tensor in found.items()}
            self._mark(marks)
        return InFlight(planned, graphs, solved, host, marks)

    def _download(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return host.copy_(tensor, non_blocking=True)

    def _draws(self, planned: PlannedStack, graphs: GraphStack, which: Tensor) -> Draws:
        plan, device = self._plan, self._device
        difficulty = None
        if self._difficulty is not None:
            difficulty = picked(self._difficulty, which).double()
        elif self._labels_on_device is not None:
            difficulty = _disagreement(picked(self._labels_on_device, which), unsigned(graphs.neighbors))
        repeat = planned.epoch // plan.batch_assignments if plan.batch_assignments else np.zeros_like(planned.epoch)
        return Draws(
            guidance=difficulty,
            keys=upload(keys_for(plan.seed, "steady", planned.assignment, planned.group).view(np.int64), device),
            turned=upload(repeat * GOLDEN, device),
            keeps=upload(planned.keep.astype(np.int32), device),
            most=int(planned.keep.max()),
        )

    def _arrived(self, item: Flight) -> SolvedStack:
        if not isinstance(item, InFlight):
            planned, computed = item
            return of_spectra(planned, computed.result())
        if item.marks:
            item.marks[-1].synchronize()
            spans = [a.elapsed_time(b) / 1e3 for a, b in pairwise(item.marks)]
            self._counts.spent(dict(zip(("gather", "graph", "solve", "rule"), spans, strict=True)))
        if not bool(item.host["finite"]):
            self._refuse(item.planned)
        with self._counts.timed("solve", torch.device("cpu")):
            solved = item.arrived(self._again)
        self._counts.solved(item.host["iterations"].tolist())
        return solved

    def _again(self, item: InFlight, graphs: list[int]) -> FiedlerResult:
        """Some of a stack's graphs solved on the CPU."""
        planned = item.planned.indices[graphs]
        some = torch.tensor(graphs, device=self._device)
        part = {f.name: getattr(item.graphs, f.name) for f in fields(GraphStack)}
        stack = GraphStack(**{name: x if name == "finite" else x[some] for name, x in part.items()})
        ritz = BlockRitz(**{f.name: getattr(item.solved, f.name)[some] for f in fields(BlockRitz)})
        ritz.converged.zero_()
        rows, _ = self._rows.of(planned, upload(planned.astype(np.int32), self._device))
        config = self._config
        result = fiedler_of_stack(
            stack,
            ritz,
            rows,
            laplacian=config.laplacian,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            seed=config.seed,
        )
        return FiedlerResult(**{f.name: getattr(result, f.name).cpu() for f in fields(FiedlerResult)})

    def _refuse(self, planned: PlannedStack) -> None:
        """Name the rows that hold NaN or Inf.

        Raises:
            SolverError: They do.
        """
        rows, _ = self._rows.of(planned.indices, upload(planned.indices.astype(np.int32), self._device))
        require_finite(rows)
        raise SolverError("a row of the store holds NaN or Inf", hint="check the store: gstds-cache verify STORE")


def _disagreement(labels: Int64[Tensor, "G B"], neighbors: Int64[Tensor, "G B k"]) -> Tensor:
    """:func:`gstds_cache.selection.guidance.disagreement` of a stack, ``[G, B]`` float64.

    Args:
        labels: ``[G, B]`` int64.
        neighbors: ``[G, B, k]`` int64.
    """
    theirs = labels.gather(1, neighbors.flatten(1)).view(neighbors.shape)
    comparable = (theirs >= 0) & (labels[:, :, None] >= 0)
    other = (comparable & (theirs != labels[:, :, None])).sum(dim=2)
    return other.double() / comparable.sum(dim=2).clamp(min=1).double()
