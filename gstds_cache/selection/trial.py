"""Does guidance help on this data set? The probe tries it on itself before a run relies on it.

Hard rows first is the better choice where there is plenty to learn from, and the worse one where there is little (B.
Sorscher et al., Beyond neural scaling laws, NeurIPS 2022, section 3). Which of the two a data set is can be asked of
the cached embeddings: linear probes learn from a quarter of the rows, drawn anew each epoch, once in proportion to the
weights that the rule draws by and once all alike, and are judged on rows they never saw. Where the first is right less
often, guidance is left out: all rows count the same. That takes seconds, and no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64

from gstds_cache.devices import in_threads
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.permutation import Permutation
from gstds_cache.selection.probe import Features, FoldProbe, ProbeSettings, Window, rows_to_learn
from gstds_cache.selection.spread import FLOOR
from gstds_cache.store.reader import EmbeddingStore

ROWS = 1 << 15  # rows that are tried on, at most
SHARE = 0.25  # of the rows learned from, in each epoch
EPOCHS = 8
BATCH = 64  # rows of a step
IDENTITY = (ROWS, SHARE, EPOCHS, BATCH)


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        guided: Share of held-out rows that probes predict rightly which learned from rows drawn by guidance.
        alike: The same for rows drawn all alike.
    """

    guided: float
    alike: float

    @property
    def helps(self) -> bool:
        """Whether guidance is to be relied on."""
        return self.guided >= self.alike

    def __str__(self) -> str:
        shares = f"a probe on rows drawn by it is right on {self.guided:.1%}, on rows drawn at random {self.alike:.1%}"
        return f"guidance is {'used' if self.helps else 'left out, all rows count alike'}: {shares}"


def try_out(
    store: EmbeddingStore,
    difficulty: Difficulty,
    *,
    power: float,
    settings: ProbeSettings,
    threads: int = 1,
    device: torch.device | None = None,
) -> Trial:
    """Try guidance on up to ``ROWS`` labelled rows, each half learning for the other.

    Args:
        store: Where embeddings and labels are.
        difficulty: Of every row.
        power: Power to which the rule raises weights.
        settings: The probe's; batches are of ``BATCH`` rows.
        threads: CPU threads; their number changes nothing.
        device: Where the products are computed; the CPU by default.

    Returns:
        Both shares.
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
    weight = (hard + FLOOR * hard.mean()) ** power if hard.any() else np.ones(count)

    def right(job: tuple[int, bool]) -> int:
        """Rows of one half that a probe of the other predicts rightly."""
        half, guided = job
        others = np.flatnonzero(fold != half)
        keep = max(1, int(SHARE * len(others)))
        probe = FoldProbe(half, torch.zeros(store.spec.dim + 1, len(names), device=device), settings, EPOCHS * keep)
        for epoch in range(EPOCHS):
            rng = rng_for(settings.seed, "trial-draws", half, epoch)
            drawn = others[_drawn(weight[others] if guided else np.ones(len(others)), keep, rng)]
            part = torch.from_numpy(drawn)
            probe.learn_window(Window(rows[drawn], held[part], fold[drawn], y[drawn], features), rng)
        mine = np.flatnonzero(fold == half)
        window = Window(rows, held, fold, y, features)
        return sum(probe.right(window, part) for part in np.array_split(mine, max(1, len(mine) // 1024)))

    jobs = [(half, guided) for half in (0, 1) for guided in (True, False)]
    found = dict(zip(jobs, in_threads(right, jobs, threads if device.type == "cpu" else 1), strict=True))
    return Trial(*(sum(found[half, guided] for half in (0, 1)) / count for guided in (True, False)))


def _drawn(weight: Float64[np.ndarray, " n"], keep: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of ``keep`` rows drawn in proportion to weight (the Gumbel-max trick)."""
    return np.argsort(-(np.log(weight) + rng.gumbel(size=len(weight))), kind="stable")[:keep]
