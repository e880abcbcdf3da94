"""What comes back of a stack of batches from a device, and what the CPU adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int8, UInt16
from torch import Tensor

from gstds_cache.graph.cuda import GraphStack
from gstds_cache.selection.plan import PlannedStack
from gstds_cache.selection.rule import round_ties
from gstds_cache.selection.spectra import Spectrum
from gstds_cache.spectral.block import BlockRitz
from gstds_cache.spectral.result import FiedlerResult, Ritz, status_of
from gstds_cache.spectral.status import Status


@dataclass(frozen=True, eq=False)
class SolvedStack:
    """What came back of a stack of batches of one size.

    Attributes:
        planned: The batches.
        value: Lowest nontrivial eigenvalue of each, ``[G]``.
        residual: Relative residual of its eigenvector, ``[G]``.
        status: Flags of each, int8 [G].
        positions: What the rule keeps of each, from the start, ``[G, M]``; None where the rule runs on the CPU.
        score: Their Fiedler coordinates, float32 [G, M].
        vector: Fiedler coordinates of all rows, ``[G, B]``; only with a floor for classes.
        spectra: What the CPU computed or is to look at, by the batch's place in the stack: of all batches where the
            rule runs there, else of those whose graph did not converge.
    """

    planned: PlannedStack
    value: Float64[np.ndarray, " G"]
    residual: Float64[np.ndarray, " G"]
    status: Int8[np.ndarray, " G"]
    positions: UInt16[np.ndarray, "G M"] | None
    score: np.ndarray | None
    vector: np.ndarray | None
    spectra: dict[int, Spectrum]


@dataclass(frozen=True, eq=False)
class InFlight:
    """A stack that is being computed.

    Attributes:
        planned: The batches.
        graphs: Their graphs, on the device.
        solved: Their eigenvectors, on the device.
        host: What is copied to the host, by name; there once the last of ``marks`` has been passed.
        marks: Events on the device before, between and after its parts.
    """

    planned: PlannedStack
    graphs: GraphStack
    solved: BlockRitz
    host: dict[str, Tensor]
    marks: list[torch.cuda.Event]

    def arrived(self, solve_again: Callable[[InFlight, list[int]], FiedlerResult]) -> SolvedStack:
        """The results, which have arrived on the host.

        Args:
            solve_again: Solves some of the graphs on the CPU: those that did not converge.
        """
        host, graphs = self.host, len(self.planned)
        ok = (host["converged"] == 1) & (host["components"] > 0)
        status = self._status(ok)
        again: list[int] = (~ok).nonzero().flatten().tolist()
        exact: dict[int, np.ndarray] = {}
        if again:
            solved = solve_again(self, again)
            for name in ("values", "residual", "iterations", "components"):
                host[name][again] = getattr(solved, name).to(host[name].dtype)
            status[again] = solved.status
            exact = {graph: round_ties(basis.numpy()) for graph, basis in zip(again, solved.basis, strict=True)}
        wanted = range(graphs) if "basis" in host else again
        return SolvedStack(
            planned=self.planned,
            value=host["values"][:, 0].numpy(),
            residual=host["residual"][:, 0].numpy(),
            status=status.numpy(),
            positions=host["positions"].numpy().view(np.uint16) if "positions" in host else None,
            # A copy: whoever keeps a batch would keep a whole stack's page-locked memory.
            score=host["score"].numpy().copy() if "score" in host else None,
            vector=host["vector"].numpy() if "vector" in host else None,
            spectra={graph: self._spectrum(graph, status, exact.get(graph)) for graph in wanted},
        )

    def _status(self, ok: Tensor) -> Tensor:
        host = self.host
        ritz = Ritz(
            values=host["values"],
            basis=host["values"].new_zeros(len(ok), 0, host["values"].shape[1]),
            residual=host["residual"],
            second=host["second"],
            iterations=host["iterations"].long(),
            converged=ok,
        )
        return status_of(ritz, torch.zeros_like(ok), host["components"].long(), self.planned.indices.shape[1])

    def _spectrum(self, graph: int, status: Tensor, basis: np.ndarray | None) -> Spectrum:
        host = self.host
        neighbors, similarities = (
            host[name][graph] if name in host else getattr(self.graphs, name)[graph].cpu()
            for name in ("neighbors", "similarities")
        )
        return Spectrum(
            basis=np.ascontiguousarray(host["basis"][graph].numpy().T) if basis is None else basis,
            values=host["values"][graph].numpy(),
            residual=float(host["residual"][graph, 0]),
            status=Status(int(status[graph])),
            neighbors=neighbors.numpy().view(np.uint16).astype(np.int32),
            similarities=similarities.numpy(),
        )


def of_spectra(planned: PlannedStack, spectra: list[Spectrum]) -> SolvedStack:
    """A stack that was computed on the CPU.

    Args:
        planned: The batches.
        spectra: The spectrum of each.
    """
    return SolvedStack(
        planned=planned,
        value=np.array([spectrum.values[0] for spectrum in spectra]),
        residual=np.array([spectrum.residual for spectrum in spectra]),
        status=np.array([int(spectrum.status) for spectrum in spectra], np.int8),
        positions=None,
        score=None,
        vector=None,
        spectra=dict(enumerate(spectra)),
    )
