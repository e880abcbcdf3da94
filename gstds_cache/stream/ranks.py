"""Which rows of a global batch each rank takes: equally many on every rank, whatever the batch holds.

A collective waits for every rank, so a rank with one step or one row fewer than the others is a hang or a wrong mean.
Here the *global* batch is fixed and each rank cuts its own contiguous slice out of it. All ranks therefore take the
same number of steps, and the world size may change between two sessions of one run: step 17 trains on the same rows.

What is left when a batch does not divide by the world size is subject to the tail policy, never left to chance:

- ``drop`` leaves the last ``M % W`` rows of the batch out (they are random rows: a batch's order is a permutation).
- ``pad`` repeats the batch's first rows until it divides, as PyTorch's ``DistributedSampler`` does. Nothing is left
  out; the repeated rows count twice unless the loss gives them no weight (:func:`real_rows` says which they are).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int64

from gstds_cache.errors import UsageError

Tail = Literal["drop", "pad"]
TAILS: tuple[Tail, ...] = ("drop", "pad")
TAIL: Tail = "drop"
"""What is done unless another policy is asked for."""


def rank_slice(kept: Int64[np.ndarray, " M"], rank: int, world_size: int, tail: Tail) -> Int64[np.ndarray, " m"]:
    """The rows of a global batch that one rank takes.

    Args:
        kept: Rows of the global batch, int64 [M].
        rank: This rank, from 0.
        world_size: Ranks (W).
        tail: What happens when M does not divide by W: ``drop`` (m = M // W) or ``pad`` (m = ceil(M / W)).

    Returns:
        int64 [m]; m is the same on every rank.

    Raises:
        UsageError: The rank or the policy is not one there is, or ``drop`` would leave no row at all (M < W).
    """
    mine: Int64[np.ndarray, " m"] = kept[rank_positions(len(kept), rank, world_size, tail)]
    return mine


def rank_positions(count: int, rank: int, world_size: int, tail: Tail) -> Int64[np.ndarray, " m"]:
    """Positions in a global batch of ``count`` rows that one rank takes; arguments as in :func:`rank_slice`.

    Returns:
        int64 [m].

    Raises:
        UsageError: The rank or the policy is not one there is, or ``drop`` would leave no row at all.
    """
    require_rank(rank, world_size, tail)
    if tail == "drop" and count < world_size:
        raise UsageError(
            f"a batch of {count} kept rows cannot be sliced over {world_size} ranks without leaving all of it out",
            hint='use tail="pad", a larger batch (re-packing: batch_size=N), or fewer ranks',
        )
    share = slice_size(count, world_size, tail)
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64) % max(count, 1)


def slice_size(count: int, world_size: int, tail: Tail) -> int:
    """Rows each rank takes of a global batch of ``count`` rows."""
    return count // world_size if tail == "drop" else -(-count // world_size)


def real_rows(count: int, rank: int, world_size: int) -> int:
    """How many rows at the head of a rank's ``pad`` slice are its own; the others are repeated from other ranks.

    Over all ranks these sum to ``count``, so a loss summed over them alone counts every row of the batch once.
    """
    share = slice_size(count, world_size, "pad")
    return min(max(count - rank * share, 0), share)


def require_rank(rank: int, world_size: int, tail: str) -> None:
    """Refuse a rank that is not one of ``world_size``, and an unknown tail policy.

    Raises:
        UsageError: It is not.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of {world_size}: expected a rank from 0 to world size - 1")
    if tail not in TAILS:
        raise UsageError(f"tail: got {tail!r}, expected one of {', '.join(TAILS)}")
