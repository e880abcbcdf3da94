"""Does guidance help on this data set? The probe tries it on itself before a run relies on it.

Hard rows first is the better choice where there is plenty to learn from, and the worse one where there is little (B.
Sorscher et al., Beyond neural scaling laws, NeurIPS 2022, section 3). Which of the two a data set is can be asked of
the cached embeddings: linear probes learn from as large a share of the rows, in as many epochs, as the run will train
on, drawn anew each epoch, once in proportion to the weights that the rule draws by and once uniformly, and are judged
on rows they never saw. Where the first is right clearly less often, guidance is left out: all rows count the same. That
takes seconds, and no forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64

from gstds_cache.runtime.threads import in_threads
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.linear_probe import Features, FoldProbe, ProbeSettings, Window, rows_to_learn
from gstds_cache.selection.permutation import Permutation
from gstds_cache.selection.spread import FLOOR
from gstds_cache.store.reader import EmbeddingStore

ROWS = 1 << 15  # rows that are tried on, at most
DRAWN = 1 << 15  # rows that a probe learns from in all its epochs, about
BATCH = 64  # rows of a step
CLEARLY = 2.0  # standard errors (McNemar's test)


@dataclass(frozen=True)
class TrialSettings:
    """What the run is like that guidance is tried for; all of it is identity.

    Attributes:
        power: Power to which the rule raises weights.
        share: Share of each epoch's rows that stays.
        epochs: The run's epochs; so many are tried as draw about ``DRAWN`` rows, at most.
    """

    power: float
    share: float
    epochs: int


@dataclass(frozen=True)
class Trial:
    """What came of it, in held-out rows.

    Attributes:
        rows: All of them.
        guided: Rows that probes predict rightly which learned from rows drawn by guidance.
        uniform: The same for rows drawn uniformly.
        discordant: Rows on which one is right and the other is not.
    """

    rows: int
    guided: int
    uniform: int
    discordant: int

    def __post_init__(self) -> None:
        if self.rows < 1 or not all(0 <= some <= self.rows for some in (self.guided, self.uniform, self.discordant)):
            raise ValueError(f"a trial of {self.rows} rows: got {self.guided}, {self.uniform} and {self.discordant}")

    @property
    def helps(self) -> bool:
        """Whether guidance is to be relied on: it is not clearly worse."""
        return self.uniform - self.guided <= CLEARLY * math.sqrt(self.discordant)

    def __str__(self) -> str:
        guided, uniform = self.guided / self.rows, self.uniform / self.rows
        shares = (
            f"a probe that learns from rows drawn by it is right on {guided:.1%}, from rows drawn uniformly on "
            f"{uniform:.1%}"
        )
        return f"guidance is {'used' if self.helps else 'left out, all rows count the same'}: {shares}"


def try_out(
    store: EmbeddingStore,
    difficulty: Difficulty,
    *,
    run: TrialSettings,
    settings: ProbeSettings,
    threads: int = 1,
    device: torch.device | None = None,
) -> Trial:
    """Try guidance on up to ``ROWS`` labelled rows, each half learning for the other.

    Args:
        store: Where embeddings and labels are.
        difficulty: Of every row.
        run: What the run is like.
        settings: The probe's; batches are of ``BATCH`` rows.
        threads: CPU threads; their number changes nothing.
        device: Where the products are computed; the CPU by default.

    Returns:
        What both got right.
    """
    device, settings = device or torch.device("cpu"), replace(settings, batch_size=BATCH)
    every = rows_to_learn(store)
    count = min(len(every), ROWS)
    rows = np.sort(every.at(Permutation(len(every), rng_for(settings.seed, "trial-rows")).at(0, count)))
    stored = np.empty((count, store.spec.dim), store.spec.dtype)
    store.gather(rows, stored)
    names, y = np.unique(store.labels[rows], return_inverse=True)
    fold = (rng_for(settings.seed, "trial-halves").permutation(count) % 2).astype(np.int8)
    held = torch.from_numpy(stored)
    features = Features.of(held, device)
    hard = difficulty.of(rows)
    weight = (hard + FLOOR * hard.mean()) ** run.power if hard.any() else np.ones(count)

    def right(job: tuple[int, bool]) -> Bool[np.ndarray, " n"]:
        """Which rows of one half a probe of the other predicts rightly."""
        half, guided = job
        others = np.flatnonzero(fold != half)
        keep = max(1, int(run.share * len(others)))
        epochs = max(1, min(run.epochs, round(DRAWN / keep)))
        probe = FoldProbe(half, torch.zeros(store.spec.dim + 1, len(names), device=device), settings, epochs * keep)
        for epoch in range(epochs):
            rng = rng_for(settings.seed, "trial-draws", half, epoch)
            drawn = others[_drawn(weight[others] if guided else np.ones(len(others)), keep, rng)]
            part = torch.from_numpy(drawn)
            probe.learn_window(Window(rows[drawn], held[part], fold[drawn], y[drawn], features), rng)
        mine = np.flatnonzero(fold == half)
        window = Window(rows, held, fold, y, features)
        return np.concatenate([probe.right(window, part) for part in np.array_split(mine, max(1, len(mine) // 1024))])

    jobs = [(half, guided) for half in (0, 1) for guided in (True, False)]
    outcome = dict(zip(jobs, in_threads(right, jobs, threads if device.type == "cpu" else 1), strict=True))
    guided, uniform = (np.concatenate([outcome[half, way] for half in (0, 1)]) for way in (True, False))
    return Trial(count, int(guided.sum()), int(uniform.sum()), int((guided != uniform).sum()))


def _drawn(weight: Float64[np.ndarray, " n"], keep: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of ``keep`` rows drawn in proportion to weight (the Gumbel-max trick)."""
    return np.argsort(-(np.log(weight) + rng.gumbel(size=len(weight))), kind="stable")[:keep]
