"""An approximate inverse of graph Laplacians: the diagonal, and for clustered graphs the clusters as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gstds_cache.graph.components import label_components
from gstds_cache.graph.laplacian import Laplacian, SparseGraph

STRONG = 0.5  # an edge is strong from this share of the geometric mean of its ends' heaviest edges
LARGEST_COARSE = 1024  # clusters beyond which the coarse problem is left out: it is solved densely


class Preconditioner:
    """``T = diag(A)^-1 + F F^T``, Jacobi and a coarse correction.

    A graph of c clusters that hang together by a few edges, as bridged graphs do and batches with tight classes, has
    c - 1 eigenvalues close to 0, whose eigenvectors are all but constant on each cluster. Jacobi does not see them, and
    hundreds of iterations go by. The second term inverts A on the span C of the clusters' indicators (times the null
    vector): ``F F^T = C (C^T A C)^+ C^T``. This is the coarse space of R. A. Nicolaides, Deflation of conjugate
    gradients with applications to boundary value problems, SIAM J. Numer. Anal. 24 (1987), added to Jacobi as in a
    two-level Schwarz method; clusters are found by strength of connection, as in algebraic multigrid. Graphs of one
    cluster have no second term. A poor choice of clusters costs iterations, never accuracy.

    Attributes:
        inverse_diagonal: ``[G, B]`` float64.
        coarse: F of every graph of several clusters, ``[B, c - 1]`` float64, by its position in the stack.
    """

    def __init__(self, inverse_diagonal: Float64[Tensor, "G B"], coarse: dict[int, Float64[Tensor, "B _"]]) -> None:
        self.inverse_diagonal = inverse_diagonal
        self.coarse = coarse

    @classmethod
    def of(cls, A: Laplacian) -> Preconditioner:
        """Build the preconditioner of connected graphs with at least 2 nodes."""
        counts, label = label_components(strong_part(A.graph))
        clustered = [g for g, count in enumerate(counts.tolist()) if 1 < count <= LARGEST_COARSE]
        coarse = {g: coarse_factor(A.subset([g]), torch.from_numpy(label[g]).to(A.diagonal.device)) for g in clustered}
        return cls(1 / A.diagonal, coarse)

    def subset(self, keep: Sequence[int]) -> Preconditioner:
        """The preconditioner of some of the stacked graphs, in the order given."""
        coarse = {n: self.coarse[g] for n, g in enumerate(keep) if g in self.coarse}
        return Preconditioner(self.inverse_diagonal[list(keep)], coarse)

    def __call__(self, R: Float64[Tensor, "M G B"]) -> Float64[Tensor, "M G B"]:
        """``T R``, graph by graph where there is a coarse term, so that no sum depends on the stack."""
        out = self.inverse_diagonal * R
        for g, F in self.coarse.items():
            out[:, g] += (R[:, g].contiguous() @ F) @ F.T
        return out


def strong_part(graph: SparseGraph) -> SparseGraph:
    """Leave only the strong edges: ``w_ij >= STRONG sqrt(max_i max_j)``, and no bridges.

    Args:
        graph: G graphs of B nodes.

    Returns:
        The same nodes with fewer edges.
    """
    row, col, weight = graph.row, graph.col, graph.weight
    heaviest = torch.zeros(graph.degree.numel(), dtype=torch.float64, device=weight.device)
    heaviest = heaviest.scatter_reduce(0, row, weight, "amax")
    component = graph.component.flatten()
    strong = (weight >= STRONG * (heaviest[row] * heaviest[col]).sqrt()) & (component[row] == component[col])
    return SparseGraph.from_edges(row[strong], col[strong], weight[strong], (graph.graphs, graph.nodes))


def coarse_factor(A: Laplacian, cluster: Int64[Tensor, " B"]) -> Float64[Tensor, "B _"]:
    """``F`` with ``F F^T = C (C^T A C)^+ C^T`` for a stack of one connected graph.

    Args:
        A: Laplacian of one graph.
        cluster: Cluster of every node, ``[B]`` int64, numbered from 0 without gaps.

    Returns:
        ``[B, c - 1]`` float64: the null vector, which lies in the span of C, is left out of the inverse.
    """
    C = torch.nn.functional.one_hot(cluster).to(torch.float64) * A.null_vector[0, :, None]
    C = C / torch.linalg.vector_norm(C, dim=0)
    values, vectors = torch.linalg.eigh(C.T @ (A @ C[None])[0])
    # A value lost in rounding must not become a huge factor: the floor leaves such a direction to the iteration.
    floor = torch.finfo(torch.float64).eps * values[-1]
    factor: Tensor = C @ (vectors[:, 1:] / values[1:].clamp(min=floor).sqrt())
    return factor
