"""What stays of a batch. Apart from the code that computes it, so that a trainer loads neither faiss nor zarr."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from gstds_cache.spectral.status import Status


@dataclass(frozen=True)
class SelectedBatch:
    """What stays of one batch.

    Attributes:
        seq: Position in the whole run, from 0.
        epoch: Epoch, from 0.
        batch_id: Position in the epoch, from 0.
        n_in: Rows before selection (B).
        kept: Rows of the store that stay, int64 [M], in the batch's order.
        score: Their Fiedler coordinates, float32 [M]; None where no spectrum was computed.
        status: How the batch's Fiedler vector was found.
        value: Algebraic connectivity of the batch's graph; NaN where no spectrum was computed.
        residual: Relative residual of the Fiedler pair; NaN where no spectrum was computed.
    """

    seq: int
    epoch: int
    batch_id: int
    n_in: int
    kept: Int64[np.ndarray, " M"]
    score: Float32[np.ndarray, " M"] | None
    status: Status
    value: float
    residual: float
