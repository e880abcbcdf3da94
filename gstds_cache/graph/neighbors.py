"""Nearest-neighbour graphs as a checked type, and the unit rows they are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from gstds_cache.errors import SolverError, UsageError
from gstds_cache.graph.compiled import normalize_half_rows_into, normalize_rows_into
from gstds_cache.runtime.devices import resolve_device

Candidates = tuple[Float32[Tensor, "G B c"], Int64[Tensor, "G B c"]]
"""What a search of a stack found for each row: similarities and row numbers, the row itself among them."""

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


def as_stack(x: Float[Tensor, "*G B D"] | Float[np.ndarray, "*G B D"], device: str | None = None) -> Tensor:
    """``[G, B, D]`` of one batch or several, from NumPy or torch, on a device.

    Args:
        x: Embeddings, ``[B, D]`` or ``[G, B, D]``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; where ``x`` is by default.

    Raises:
        UsageError: ``x`` has another number of axes, or there is no such device.
    """
    given = torch.as_tensor(x)
    if given.ndim not in {2, 3}:
        raise UsageError(f"embeddings: got shape {list(given.shape)}, expected [B, D] or [G, B, D]")
    given = given.to(given.device if device is None else resolve_device(device))
    return given if given.ndim == 3 else given[None]


def require_rows(x: Float[Tensor, "G B D"]) -> None:
    """Refuse stacks without graphs, rows or dimensions.

    Raises:
        UsageError: ``x`` is empty.
    """
    if 0 in x.shape:
        raise UsageError(f"embeddings [G, B, D]: got shape {list(x.shape)}, expected every axis to be at least 1")


def require_finite(x: Float[Tensor, "G B D"]) -> None:
    """Refuse embeddings that hold NaN or Inf.

    Raises:
        SolverError: A row does; the first such graph and its rows are named.
    """
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


def normalized_rows(
    x: Float[Tensor, "G B D"], *, out: Float32[Tensor, "G B D"] | None = None
) -> Float32[Tensor, "G B D"]:
    """Scale rows to unit length in float32; zero rows stay zero.

    No finite row overflows or vanishes when it is squared: where that could be, its largest entry is divided out first.

    Args:
        x: Embeddings, ``[G, B, D]``, any float dtype and device.
        out: Where the rows go on a CPU, contiguous; may be ``x``.

    Returns:
        Rows of length 1 (or 0), ``[G, B, D]`` float32 on the device of ``x``, contiguous.

    Raises:
        UsageError: If there are no graphs, no rows or no dimensions.
        SolverError: If a row holds NaN or Inf; the first such graph and its rows are named.
    """
    require_rows(x)
    if x.device.type == "cpu" and x.dtype != torch.float64:
        flat = x.reshape(-1, x.shape[2])
        out = torch.empty(x.shape, dtype=torch.float32) if out is None else out
        to = out.view(flat.shape).numpy()
        if x.dtype == torch.float16:
            bad = normalize_half_rows_into(flat.contiguous().numpy().view(np.uint16), to, to.view(np.uint32))
        else:
            bad = normalize_rows_into(flat.to(torch.float32).contiguous().numpy(), to)
        if bad >= 0:
            require_finite(x)
        return out
    require_finite(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(dim=2, keepdim=True)
    scaled = torch.where(largest > 0, x / largest, 0).to(torch.float32)
    length = torch.linalg.vector_norm(scaled, dim=2, keepdim=True)
    return (scaled / torch.where(length > 0, length, 1)).contiguous()
