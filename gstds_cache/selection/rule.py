"""What a rule is given, and what it is: the interface that users' own rules are written against."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Float64, Int64

from gstds_cache.seeding import rng_for

TIE = 1e-6  # of the largest magnitude


def round_ties(vectors: Float64[np.ndarray, "B ..."]) -> Float64[np.ndarray, "B ..."]:
    """Round eigenvectors to multiples of 1e-6 of their largest magnitude, so that equals are equal.

    Duplicate images have the same neighbours and so the same coordinate, but for rounding errors. Left as they are,
    two exact solvers disagreed on 1 to 3 % of the kept rows of a batch; rounded, they agree on 99 % at least
    (benchmarks/results/accuracy.json), and ties go to the row that comes first in the batch.

    Args:
        vectors: One eigenvector, or several as columns.

    Returns:
        The rounded ones; a column of zeros stays as it is.
    """
    step = TIE * np.abs(vectors).max(axis=0, initial=0.0)
    step = np.where(step > 0, step, 1.0)
    return np.round(vectors / step) * step


@dataclass(frozen=True, eq=False)
class RuleBatch:
    """One batch as a rule sees it: B rows, of which M are to stay. Positions are 0..B-1, the batch's order.

    A run's arrays are read-only: its records tell what a rule was given, so copy what you want to change.

    Attributes:
        vector: The Fiedler coordinate of each row, ties rounded, float64 [B]; zeros where no vectors were asked for.
        keep: How many rows stay (M), from 1 to B.
        rng: Random numbers of this batch and epoch: the same in every run of the same settings.
        repeat: How many times a batch of these rows has come before (with ``batch_assignments``).
        per_batch_rng: Random numbers of this batch's rows: the same each time that they come as a batch.
        basis: The first Q eigenvectors above the trivial one, ties rounded, float64 [B, Q]; the first is ``vector``.
        values: Their eigenvalues, ascending, float64 [Q]; +inf where a small graph has fewer.
        neighbors: Positions of each row's nearest neighbours, nearest first, int64 [B, K], of which there are B - 1 at
            most; None where no graph is made.
        similarities: Their cosines, float32 [B, K].
        labels: Label of each row, int64 [B]; -1 where there is none.
        guidance: Difficulty of each row, >= 0, float64 [B]; None where the rule did not ask for it.
        ratio: The schedule's filter ratio here, the share removed.
    """

    vector: Float64[np.ndarray, " B"]
    keep: int
    rng: np.random.Generator = field(default_factory=lambda: rng_for(0))
    basis: Float64[np.ndarray, "B Q"] | None = None
    values: Float64[np.ndarray, " Q"] | None = None
    neighbors: Int64[np.ndarray, "B K"] | None = None
    similarities: np.ndarray | None = None
    labels: Int64[np.ndarray, " B"] | None = None
    guidance: Float64[np.ndarray, " B"] | None = None
    ratio: float = 0.0
    repeat: int = 0
    per_batch_rng: np.random.Generator = field(default_factory=lambda: rng_for(0))

    def __len__(self) -> int:
        return len(self.vector)

    @property
    def visit(self) -> int:
        """``repeat`` by its former name."""
        warnings.warn("RuleBatch.visit is now called repeat", FutureWarning, stacklevel=2)
        return self.repeat

    @property
    def steady_rng(self) -> np.random.Generator:
        """``per_batch_rng`` by its former name."""
        warnings.warn("RuleBatch.steady_rng is now called per_batch_rng", FutureWarning, stacklevel=2)
        return self.per_batch_rng


def read_only(batch: RuleBatch) -> RuleBatch:
    """The same batch, whose arrays cannot be written to any more."""
    for part in fields(batch):
        value = getattr(batch, part.name)
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return batch


Choose = Callable[[RuleBatch], Int64[np.ndarray, " M"]]


@dataclass(frozen=True)
class Rule:
    """A named rule.

    Attributes:
        name: What a user calls it.
        summary: What it keeps, in a few words.
        choose: From a batch to the positions that stay, int64 [M], ascending, distinct.
        vectors: Eigenvectors it looks at (Q); with 0 no graph is made.
        needs_guidance: Whether it looks at the rows' difficulty.
        power: How sharply it draws by difficulty: the power to which it raises weights.
        source: SHA-256 of the file of a user's own rule; empty for ours.
    """

    name: str
    summary: str
    choose: Choose
    vectors: int = 1
    needs_guidance: bool = False
    power: float = 1.0
    source: str = ""

    def __call__(self, batch: RuleBatch) -> Int64[np.ndarray, " M"]:
        """The positions that stay of ``batch``."""
        return self.choose(batch)
