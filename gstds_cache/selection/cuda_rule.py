"""The default rule by CUDA kernels (cuda/rule.cu), one thread block a graph; nothing waits for the device.

What is kept equals what :mod:`gstds_cache.selection.strata` keeps for the same eigenvectors, guidance and random
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int16, Int32, Int64
from torch import Tensor

from gstds_cache.cuda import build, launch
from gstds_cache.errors import KernelError
from gstds_cache.selection.rule import Rule
from gstds_cache.selection.rules import RULES

SQUARED = {RULES["cells"]: 0, RULES["cells-squared"]: 1}  # the rules that there is a kernel for
THREADS = 256
CHUNKS = 32  # as in cuda/block.cuh


@dataclass(frozen=True)
class Draws:
    """What the rule needs to know of each batch beside its eigenvectors, on the device.

    Attributes:
        guidance: Difficulty of each row, >= 0, ``[G, B]`` float64; None where all are alike.
        keys: Philox keys of the batches' ``per_batch_rng``, the bits of uint64, ``[G, 2]``.
        turned: How far along its cell a draw has gone on since the batch first came, ``[G]`` float64.
        keeps: Rows that stay, ``[G]`` int32.
        most: The most of ``keeps``.
    """

    guidance: Float64[Tensor, "G B"] | None
    keys: Int64[Tensor, "G 2"]
    turned: Float64[Tensor, " G"]
    keeps: Int32[Tensor, " G"]
    most: int


@dataclass(frozen=True)
class KeptRows:
    """Positions that stay, and their Fiedler coordinates; those from a batch's ``keep`` on are undefined.

    Attributes:
        positions: Ascending, the bits of uint16, ``[G, M]``.
        score: ``[G, M]`` float32.
    """

    positions: Int16[Tensor, "G M"]
    score: Float32[Tensor, "G M"]


def why_not_ruled(device: torch.device, rule: Rule, nodes: int, most: int) -> str:
    """Why the kernel cannot run a rule on a device, in words; empty where it can. It is compiled, if need be.

    Args:
        device: Any device.
        rule: Any rule.
        nodes: Rows of a batch, B.
        most: Rows that stay of a batch, at most.
    """
    if rule not in SQUARED:
        return f"rule {rule.name} runs on the CPU"
    reason = build.why_not(device)
    if reason:
        return reason
    try:
        limit, needed = launch.shared_memory_limit(device), cells_bytes(nodes, max(1, rule.vectors), most, far=True)
        if needed > limit:
            return f"a block has {limit:,} bytes of shared memory here, and {most:,} of {nodes:,} rows need {needed:,}"
        build.kernel("rule.cu", "finish_block", device=device)
        build.kernel("rule.cu", "cells_block", device=device)
    except KernelError as error:
        return error.message
    return ""


def finish(basis: Float64[Tensor, "G Q B"]) -> None:
    """Give eigenvectors the sign of ``canonical_sign`` and round their ties as ``round_ties`` does, in place."""
    graphs, vectors, nodes = basis.shape
    kernel = build.kernel("rule.cu", "finish_block", device=basis.device)
    kernel(graphs, THREADS, finish_bytes(vectors), nodes, vectors, basis)


def keep_of_cells(
    rule: Rule, basis: Float64[Tensor, "G Q B"], values: Float64[Tensor, "G Q"], draws: Draws
) -> KeptRows:
    """The rows that ``cells`` or ``cells-squared`` keeps of each batch.

    Args:
        rule: One of ``SQUARED``.
        basis: Finished eigenvectors, ``[G, Q, B]``.
        values: Their eigenvalues, ``[G, Q]``.
        draws: The rest that it depends on.

    Returns:
        What stays. Graphs whose numbers are NaN keep any rows of the batch.
    """
    graphs, vectors, nodes = basis.shape
    device = basis.device
    shared = cells_bytes(nodes, vectors, draws.most, far=False)
    far = None
    if shared > launch.shared_memory_limit(device):
        shared = cells_bytes(nodes, vectors, draws.most, far=True)
        far = torch.empty(graphs, vectors, nodes + 1 + draws.most, dtype=torch.float64, device=device)
    kept = KeptRows(
        positions=torch.zeros(graphs, draws.most, dtype=torch.int16, device=device),
        score=torch.zeros(graphs, draws.most, device=device),
    )
    kernel = build.kernel("rule.cu", "cells_block", device=device)
    kernel(
        graphs,
        THREADS,
        shared,
        nodes,
        vectors,
        draws.most,
        SQUARED[rule],
        basis,
        values,
        draws.guidance,
        draws.keys,
        draws.turned,
        draws.keeps,
        far,
        kept.positions,
        kept.score,
    )
    return kept


def finish_bytes(vectors: int) -> int:
    """Bytes of shared memory of a block that finishes so many eigenvectors (cuda/rule.cu: finish_bytes)."""
    return vectors * CHUNKS * 12


def cells_bytes(nodes: int, vectors: int, most: int, *, far: bool) -> int:
    """Bytes of shared memory of a block (cuda/rule.cu: cells_bytes).

    Args:
        nodes: Rows of a batch, B.
        vectors: Eigenvectors, Q.
        most: Rows that stay, at most.
        far: Whether points and their spreads lie in global memory.
    """
    sizes = [nodes * 8, (nodes + 1) * 8, (most + 1) * 4, -(-most // 4) * 32, most * 4]
    sizes += [*[nodes * 2] * 3, (nodes // CHUNKS + 2) * 4, 8, *([] if far else [vectors * (nodes + 1 + most) * 8])]
    return sum(-(-size // 16) * 16 for size in sizes)


def unsigned(positions: np.ndarray) -> np.ndarray:
    """The uint16 whose bits an int16 array holds."""
    return positions.view(np.uint16)
