"""Connected components, and the bridges that make one graph of several."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from gstds_cache.errors import UsageError
from gstds_cache.graph.compiled import components_into
from gstds_cache.graph.laplacian import SparseGraph, affinity

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
    label, count = np.empty((graph.graphs, graph.nodes), np.int64), np.empty(graph.graphs, np.int64)
    components_into(graph.crow.cpu().numpy(), graph.col.cpu().numpy(), label, count)
    return torch.from_numpy(count).to(graph.crow.device), label


def spanning_bridges(
    similarity: Float32[np.ndarray, "M B"], small: Int64[np.ndarray, " M"], label: Int64[np.ndarray, " B"]
) -> list[tuple[int, int, float]]:
    """A maximum spanning tree over the components of one graph, by Prim's algorithm.

    The tree grows from the component that has no row in ``small``. ``best[m]`` is the largest similarity of row m to
    any node inside the tree; the next edge goes to the largest ``best`` outside, and takes in the whole component it
    leads to. Each edge is thereby the strongest pair between what is inside and what is not. Ties go to the lowest
    outside node, then to the lowest inside node.

    Args:
        similarity: Cosine similarities of the rows ``small`` to all, ``[M, B]`` float32.
        small: All nodes but those of one component, ascending, ``[M]`` int64.
        label: Component of every node, ``[B]`` int64.

    Returns:
        (inside node, outside node, similarity) of each of the components - 1 tree edges, in the order they were taken.
    """
    best = np.full(len(small), -np.inf, dtype=np.float32)
    nearest = np.full(len(small), len(label), dtype=np.int64)
    outside = np.ones(len(small), dtype=np.bool_)
    entering = np.setdiff1d(np.arange(len(label)), small)
    bridges: list[tuple[int, int, float]] = []
    while outside.any():
        to_entering = similarity[:, entering]
        winner = to_entering.argmax(axis=1)  # the first, hence the lowest, of equals
        reach, candidate = to_entering[np.arange(len(small)), winner], entering[winner]
        better = (reach > best) | ((reach == best) & (candidate < nearest))
        best[better], nearest[better] = reach[better], candidate[better]
        m = int(np.argmax(np.where(outside, best, -np.inf)))
        bridges.append((int(nearest[m]), int(small[m]), float(best[m])))
        entering = np.flatnonzero(label == label[small[m]])
        outside &= label[small] != label[small[m]]
    return bridges


def bridge_components(graph: SparseGraph, rows: Float32[Tensor, "G B D"]) -> tuple[SparseGraph, Int64[Tensor, " G"]]:
    """Connect every disconnected graph with a maximum spanning tree over its components.

    Each tree edge is the strongest cosine similarity between two components, weighing ``max(affinity, 1e-3)``. For it
    the rows outside the largest component are compared with all; connected graphs are left as they are.

    Args:
        graph: G graphs of B nodes.
        rows: The unit rows they were made from, ``[G, B, D]`` float32, as :func:`~.neighbors.normalized_rows` makes
        them.

    Returns:
        The connected graphs (the argument itself where all were), and how many components each had, ``[G]`` int64.

    Raises:
        UsageError: If the embeddings are not those of the graphs' nodes.
    """
    if rows.shape[:2] != graph.degree.shape:
        got = list(rows.shape)
        raise UsageError(f"embeddings to bridge with: got {got}, expected [{graph.graphs}, {graph.nodes}, D]")
    components, label = label_components(graph)
    near: list[int] = []
    far: list[int] = []
    cosine: list[float] = []
    for g in (components > 1).nonzero().flatten().tolist():
        small = np.flatnonzero(label[g] != np.bincount(label[g]).argmax())
        similarity = (rows[g, torch.from_numpy(small).to(rows.device)] @ rows[g].T).clamp(-1, 1)
        for i, j, value in spanning_bridges(similarity.cpu().numpy(), small, label[g]):
            near.append(g * graph.nodes + i)
            far.append(g * graph.nodes + j)
            cosine.append(value)
    if not near:
        return graph, components
    device = graph.weight.device
    weight = affinity(torch.tensor(cosine, dtype=torch.float32, device=device)).clamp(min=BRIDGE_FLOOR)
    bridged = graph.with_edges(torch.tensor(near, device=device), torch.tensor(far, device=device), weight)
    return replace(bridged, component=torch.from_numpy(label).to(device)), components
