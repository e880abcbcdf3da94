"""Nearest-neighbour graphs as a checked type, and the unit rows they are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from gstds_cache.errors import SolverError, UsageError

ROWS_NAMED = 10


@dataclass(frozen=True)
class KnnGraph:
    """The K nearest neighbours of every row of G stacked graphs, nearest first, ties by index, self excluded.

    Attributes:
        neighbors: Row numbers within the same graph, ``[G, B, K]`` int64; -1 where there is no neighbour.
        similarities: Cosine similarities in [-1, 1], ``[G, B, K]`` float32; 0 where there is no neighbour.
    """

    neighbors: Int64[Tensor, "G B K"]
    similarities: Float32[Tensor, "G B K"]


def check_rows(x: Float[Tensor, "G B D"]) -> None:
    """Refuse embeddings that have no cosine.

    Args:
        x: Embeddings, ``[G, B, D]``, any float dtype and device.

    Raises:
        UsageError: If there are no graphs, no rows or no dimensions.
        SolverError: If a row holds NaN or Inf; the first such graph and its rows are named.
    """
    if 0 in x.shape:
        raise UsageError(f"embeddings [G, B, D]: got shape {list(x.shape)}, expected every axis to be at least 1")
    bad: Bool[Tensor, "G B"] = ~torch.isfinite(x).all(dim=-1)
    if not bool(bad.any()):
        return
    graph = int(bad.any(dim=1).nonzero()[0])
    rows: list[int] = bad[graph].nonzero().flatten().tolist()
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    raise SolverError(
        f"rows {rows[:ROWS_NAMED]}{more} of graph {graph} hold NaN or Inf; expected finite embeddings",
        hint="check the store the embeddings came from: gstds-cache verify STORE",
    )


def unit_rows(x: Float[Tensor, "B D"]) -> Float32[Tensor, "B D"]:
    """Scale rows to unit length in float32; zero rows stay zero.

    The largest entry is divided out first, so that no finite row overflows or vanishes when it is squared. The
    result is a fresh tensor for each graph, so that its alignment, and with it the last bit of a BLAS product, does
    not depend on the stack the graph came in.

    Args:
        x: Finite embeddings of one graph, ``[B, D]``, any float dtype and device.

    Returns:
        Rows of length 1 (or 0), ``[B, D]`` float32 on the device of ``x``.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = torch.where(largest > 0, x / largest, 0).to(torch.float32)
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return (scaled / torch.where(length > 0, length, 1)).contiguous()
