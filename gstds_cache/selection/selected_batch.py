"""What stays of a batch. Apart from the code that computes it, so that a trainer loads neither faiss nor zarr."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int16, Int64

from gstds_cache.spectral.status import Status


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a trainer needs to draw rows of a batch by the losses it has seen; in the order of the batch's rows.

    Attributes:
        keep: How many rows are to be drawn (M).
        stratum: Stratum of each row, from 0, int16 [B].
        reference: Reference loss of each row, the reference model's held-out one, as it is or relative to its class
            (selection/reference.py), float32 [B]; NaN where it is not known.
        prior: How much a row counts before its loss is known, relative to the others, >= 0, float32 [B].
    """

    keep: int
    stratum: Int16[np.ndarray, " B"]
    reference: Float32[np.ndarray, " B"]
    prior: Float32[np.ndarray, " B"]

    def problem(self, rows: Int64[np.ndarray, " B"]) -> str:
        """What does not fit together, or does not fit the batch's ``rows``; empty where all does."""
        lengths = {len(self.stratum), len(self.reference), len(self.prior)}
        if lengths != {len(rows)}:
            return f"{len(rows)} rows have {sorted(lengths)} strata, reference losses and priors"
        if not 1 <= self.keep <= len(rows):
            return f"{self.keep} of {len(rows)} rows are to be drawn"
        # Once a batch in training: reductions that are called directly, and a sort, take a third of the time of
        # any(), all() and unique().
        lowest, highest = np.minimum.reduce(self.prior), np.maximum.reduce(self.prior)  # NaN if one is
        if np.minimum.reduce(self.stratum) < 0 or np.isinf(self.reference).any() or not highest < np.inf:
            return "a stratum is below 0, or a reference loss or a prior is no number"
        if lowest < 0:
            return "a prior is below 0"
        ordered = np.sort(rows)
        return "a row is there twice" if (ordered[1:] == ordered[:-1]).any() else ""


@dataclass(frozen=True)
class SelectedBatch:
    """What stays of one batch; or, with ``candidates``, all of it, of which a trainer draws what it trains on.

    Attributes:
        seq: Position in the whole run, from 0.
        epoch: Epoch, from 0.
        batch_id: Position in the epoch, from 0.
        n_in: Rows before selection (B).
        kept: Rows of the store that stay, int64 [M], in the batch's order; with ``candidates`` all of them, [B].
        score: Their Fiedler coordinates, float32 [M]; None where no spectrum was computed, and with ``candidates``.
        status: How the batch's Fiedler vector was found.
        value: Algebraic connectivity of the batch's graph; NaN where no spectrum was computed.
        residual: Relative residual of the Fiedler pair; NaN where no spectrum was computed.
        candidates: What rows are drawn by; None where ``kept`` is what stays.
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
    candidates: Candidates | None = None

    @property
    def count(self) -> int:
        """Rows that a trainer trains on: those that stay, or those that it draws."""
        return len(self.kept) if self.candidates is None else self.candidates.keep
