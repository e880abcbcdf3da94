"""The kernels' texts, compiled by g++: what they find, and that threads and their order change no bit of it."""

from __future__ import annotations

import torch


def test_a_kernel_runs_on_cpu_tensors(emulated_kernels):
    graph = emulated_kernels("graph.cu", "graph_block", ("KNN=10",))
    rows = torch.nn.functional.normalize(torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    products = rows @ rows.mT
    neighbors, similarities = torch.empty(2, 40, 4, dtype=torch.int16), torch.empty(2, 40, 4)
    crow, col, weight = (
        torch.empty(2, 41, dtype=torch.int32),
        torch.empty(2, 320, dtype=torch.int16),
        torch.empty(2, 320),
    )
    parts, label = torch.empty(2, dtype=torch.int32), torch.empty(2, 40, dtype=torch.int16)
    ends, bridges = torch.empty(2, 40, 2, dtype=torch.int32), torch.empty(2, 40)
    graph(2, 64, graph.library.graph_bytes(40), 40, 4, 320, 40, products, None, neighbors, similarities, crow, col,
          weight, parts, label, ends, bridges)  # fmt: skip
    products[:, range(40), range(40)] = -2
    assert torch.equal(neighbors.long(), products.topk(4, dim=2).indices)
