"""Connected components, and the bridges that make one graph of several."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Float32, Int64
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gstds_cache.errors import UsageError
from gstds_cache.graph.laplacian import SparseGraph, affinity
from gstds_cache.graph.neighbors import check_rows, unit_rows

# A bridge between components that point away from each other (or hold zero rows) would weigh max(0, cos) = 0 and
# connect nothing. The floor is small beside the affinities of near neighbours (0.1 to 1), so that the bridge stays the
# place where the Fiedler vector cuts, and large beside rounding, so that the eigenvalue it makes can be solved for.
BRIDGE_FLOOR = 1e-3


def label_components(graph: SparseGraph) -> tuple[Int64[Tensor, " G"], Int64[np.ndarray, "G B"]]:
    """Find the connected components of every stacked graph, on the host.

    Args:
        graph: G graphs of B nodes.

    Returns:
        Components of each graph, ``[G]`` int64 on the graph's device; and each node's component, ``[G, B]`` int64
        NumPy, numbered from 0 in each graph by lowest node.
    """
    total = graph.graphs * graph.nodes
    parts = (graph.weight.cpu().numpy(), graph.col.cpu().numpy(), graph.crow.cpu().numpy())
    _, label = connected_components(scipy.sparse.csr_array(parts, shape=(total, total)), directed=False)
    _, first, position = np.unique(label, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[position].astype(np.int64).reshape(graph.graphs, graph.nodes)
    rank -= rank[:, :1]  # node 0 of a graph has the lowest rank in it
    return torch.from_numpy(rank.max(axis=1) + 1).to(graph.crow.device), rank


def spanning_bridges(
    similarity: Float32[np.ndarray, "B B"], label: Int64[np.ndarray, " B"]
) -> list[tuple[int, int, float]]:
    """A maximum spanning tree over the components of one graph, by Prim's algorithm.

    The tree grows from the component of node 0. ``best[j]`` is the largest similarity of node j to any node inside the
    tree; the next edge goes to the largest ``best`` outside, and takes in the whole component it leads to. Each edge
    is thereby the strongest pair between what is inside and what is not. Ties go to the lowest outside node, then to
    the lowest inside node.

    Args:
        similarity: Cosine similarities, ``[B, B]`` float32.
        label: Component of every node, ``[B]`` int64.

    Returns:
        (inside node, outside node, similarity) of each of the components - 1 tree edges, in the order they were taken.
    """
    nodes = len(label)
    best = np.full(nodes, -np.inf, dtype=np.float32)
    nearest = np.full(nodes, nodes, dtype=np.int64)
    outside = np.ones(nodes, dtype=np.bool_)
    entering = np.flatnonzero(label == label[0])
    bridges: list[tuple[int, int, float]] = []
    while True:
        outside[entering] = False
        if not outside.any():
            return bridges
        to_entering = similarity[entering]
        winner = to_entering.argmax(axis=0)  # the first, hence the lowest, of equals
        reach, candidate = to_entering[winner, np.arange(nodes)], entering[winner]
        better = (reach > best) | ((reach == best) & (candidate < nearest))
        best[better], nearest[better] = reach[better], candidate[better]
        j = int(np.argmax(np.where(outside, best, -np.inf)))
        bridges.append((int(nearest[j]), j, float(best[j])))
        entering = np.flatnonzero(label == label[j])


def bridge_components(graph: SparseGraph, x: Float[Tensor, "G B D"]) -> tuple[SparseGraph, Int64[Tensor, " G"]]:
    """Connect every disconnected graph with a maximum spanning tree over its components.

    Each tree edge is the strongest cosine similarity between two components, weighing ``max(affinity, 1e-3)``. The
    ``[B, B]`` similarities are computed for one disconnected graph at a time; connected graphs are left as they are.

    Args:
        graph: G graphs of B nodes.
        x: The embeddings they were made from, ``[G, B, D]``, any float dtype.

    Returns:
        The connected graphs (the argument itself where all were), and how many components each had, ``[G]`` int64.

    Raises:
        UsageError: If the embeddings are not those of the graphs' nodes.
        SolverError: If a row holds NaN or Inf.
    """
    if x.shape[:2] != graph.degree.shape:
        raise UsageError(f"embeddings to bridge with: got {list(x.shape)}, expected [{graph.graphs}, {graph.nodes}, D]")
    check_rows(x)
    components, label = label_components(graph)
    near: list[int] = []
    far: list[int] = []
    cosine: list[float] = []
    for g in (components > 1).nonzero().flatten().tolist():
        rows = unit_rows(x[g])
        for i, j, value in spanning_bridges((rows @ rows.T).clamp(-1, 1).cpu().numpy(), label[g]):
            near.append(g * graph.nodes + i)
            far.append(g * graph.nodes + j)
            cosine.append(value)
    if not near:
        return graph, components
    device = graph.weight.device
    weight = affinity(torch.tensor(cosine, dtype=torch.float32, device=device)).clamp(min=BRIDGE_FLOOR)
    bridged = SparseGraph.from_edges(
        torch.cat([graph.row, torch.tensor(near, device=device)]),
        torch.cat([graph.col, torch.tensor(far, device=device)]),
        torch.cat([graph.weight, weight]),
        (graph.graphs, graph.nodes),
    )
    return replace(bridged, component=torch.from_numpy(label).to(device)), components
