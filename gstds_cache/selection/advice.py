"""What selection is likely to give on a data set, tried out on its cached embeddings before any network is trained.

Linear probes learn from as large a share of the rows, in as many epochs, as a run would train on, drawn in several
ways, and are judged on rows that they never saw: what :mod:`gstds_cache.selection.trial` does for one way of drawing,
for several and at several ratios. A probe on good embeddings learns faster than a network from pixels, and forgets
less, so what it tells of is the sign of a difference, and not its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from gstds_cache.runtime.threads import in_threads
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.draws import DRAWS, draw_rows
from gstds_cache.selection.linear_probe import Features, FoldProbe, ProbeSettings, Window, rows_to_learn
from gstds_cache.selection.permutation import Permutation
from gstds_cache.selection.selected_batch import Candidates
from gstds_cache.store.reader import EmbeddingStore

ROWS = 1 << 14  # rows that are tried on, at most
BATCH = 64  # rows of a step
INTERVAL = 1.96  # standard errors
FULL, RANDOM, RULE = "full", "random", "default"
USUAL = "damped-loss"  # what is preferred unless something else is clearly ahead of it
WAYS = (FULL, RANDOM, RULE, "loss-minus-reference", "damped-loss", "loss-squared")
"""Ways to draw: all rows, at random, by the default rule's weights, and by three draws that look at training losses."""
PARTS = ("loss-minus-reference", "damped-loss")  # of the adaptive draw


@dataclass(frozen=True)
class Forecast:
    """How a probe did that learned from rows drawn in one way.

    Attributes:
        way: ``full``, ``random``, ``default`` (the default rule's weights) or the name of a draw.
        ratio: Share of the rows that is left out in each epoch.
        accuracy: Share of held-out rows that it predicts rightly.
        over_random: How much more that is than of random rows at the same ratio.
        margin: Half of the 95 % interval of that difference, for these held-out rows (McNemar).
        over_usual: The same difference from rows drawn by :data:`USUAL`; 0 where that was not tried.
        usual_margin: Half of its interval.
    """

    way: str
    ratio: float
    accuracy: float
    over_random: float
    margin: float
    over_usual: float = 0.0
    usual_margin: float = 0.0

    @property
    def is_part(self) -> bool:
        """Whether it is one of the two that the adaptive draw is made of."""
        return self.way in PARTS

    @property
    def draw(self) -> str | None:
        """The draw to select with; None where the default rule is to keep rows.

        It is the adaptive one where a probe was taught by either of its parts: which of them is better depends on
        whether the network passes the reference model, and a probe on the same embeddings is as good as that at once.
        """
        return None if self.way == RULE else "adaptive" if self.is_part else self.way

    @property
    def helps(self) -> bool:
        """Whether it is ahead of random by more than its interval."""
        return self.over_random > self.margin


def preferred(found: Iterable[Forecast]) -> Forecast | None:
    """The way to draw that is preferred; None where none is clearly ahead of random rows.

    Of the ratios at which one is, the one that leaves out least: at higher ones ways differ more, and all are further
    behind all rows. There it is the one that is furthest ahead by its interval's lower end, unless :data:`USUAL` is
    ahead too and that one is not clearly ahead of it.
    """
    ahead = [forecast for forecast in found if forecast.helps]
    least = min((forecast.ratio for forecast in ahead), default=0.0)
    ahead = [forecast for forecast in ahead if forecast.ratio == least]
    best = max(ahead, key=lambda forecast: forecast.over_random - forecast.margin, default=None)
    if best is None or best.over_usual > best.usual_margin:
        return best
    return next((other for other in ahead if other.way == USUAL), best)


def forecasts(
    store: EmbeddingStore,
    difficulty: Difficulty,
    reference: Difficulty,
    *,
    ratios: Sequence[float],
    epochs: int,
    ways: Sequence[str] = WAYS,
    threads: int = 1,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Forecast]:
    """Try each way of drawing at each ratio on up to ``ROWS`` labelled rows, each half learning for the other.

    Args:
        store: Where embeddings and labels are.
        difficulty: Of every row: what the default rule draws by.
        reference: Held-out loss of every row.
        ratios: Shares that are left out.
        epochs: Passes over the rows.
        ways: Ways to draw, ``random`` among them.
        threads: CPU threads; their number changes nothing.
        device: Where the products are computed; the CPU by default.
        progress: Called with probes that are done and probes in all.

    Returns:
        Each way at each ratio; ``full``, where it is among the ways, once and first.
    """
    device, settings = device or torch.device("cpu"), ProbeSettings(batch_size=BATCH)
    every = rows_to_learn(store)
    count = min(len(every), ROWS)
    rows = np.sort(every.at(Permutation(len(every), rng_for(settings.seed, "advice-rows")).at(0, count)))
    stored = np.empty((count, store.spec.dim), store.spec.dtype)
    store.gather(rows, stored)
    names, y = np.unique(store.labels[rows], return_inverse=True)
    half = (rng_for(settings.seed, "advice-halves").permutation(count) % 2).astype(np.int8)
    held = torch.from_numpy(stored)
    window = Window(rows, held, half, y, Features.of(held, device))
    hard, loss = difficulty.of(rows), reference.of(rows).astype(np.float32)

    def right(job: tuple[int, str, float]) -> Bool[np.ndarray, " n"]:
        """Which rows of one half a probe of the other predicts rightly."""
        number, way, ratio = job
        others, mine = np.flatnonzero(half != number), np.flatnonzero(half == number)
        keep = max(1, int((1 - ratio) * len(others)))
        weight = torch.zeros(store.spec.dim + 1, len(names), device=device)
        probe = FoldProbe(number, weight, settings, epochs * keep)
        offered = Candidates(keep, np.zeros(len(others), np.int16), loss[others], np.ones(len(others), np.float32))
        last = np.full(len(others), np.nan)
        for epoch in range(epochs):
            rng = rng_for(settings.seed, "advice-draws", number, way, round(1000 * ratio), epoch)
            drawn = draw_rows(offered, _scores(way, offered, last, hard[others], math.log(len(names))), rng)
            chosen = others[drawn]
            probe.learn_window(_part(window, chosen), rng)
            if way in DRAWS:
                last[drawn] = _losses(probe, window, chosen)
        parts = np.array_split(mine, max(1, len(mine) // 1024))
        return np.concatenate([probe.right(window, part) for part in parts])

    tried = [
        *([(FULL, 0.0)] if FULL in ways else []),
        *((way, float(ratio)) for ratio in ratios for way in ways if way != FULL),
    ]
    jobs = [(number, way, ratio) for way, ratio in tried for number in (0, 1)]
    found: dict[tuple[int, str, float], Bool[np.ndarray, " n"]] = {}
    done = in_threads(right, jobs, threads if device.type == "cpu" else 1)
    for job, outcome in zip(jobs, done, strict=True):
        found[job] = outcome
        progress(len(found), len(jobs))
    joined = {(way, ratio): np.concatenate([found[number, way, ratio] for number in (0, 1)]) for way, ratio in tried}
    return [
        compared(way, ratio, right, joined.get((RANDOM, ratio), right), joined.get((USUAL, ratio), right))
        for (way, ratio), right in joined.items()
    ]


def compared(
    way: str,
    ratio: float,
    right: Bool[np.ndarray, " n"],
    random: Bool[np.ndarray, " n"],
    usual: Bool[np.ndarray, " n"],
) -> Forecast:
    """The accuracy of one way, and its differences from random and usual draws, each with McNemar's interval."""
    return Forecast(way, ratio, float(right.mean()), *difference(right, random), *difference(right, usual))


def difference(right: Bool[np.ndarray, " n"], other: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """How much more often one is right than another on the same rows, and half of the 95 % interval (McNemar)."""
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    more, count = gained - lost, len(right)
    return more / count, INTERVAL * math.sqrt(max(gained + lost - more**2 / count, 0.0)) / count


def _scores(
    way: str,
    offered: Candidates,
    last: Float64[np.ndarray, " n"],
    hard: Float64[np.ndarray, " n"],
    chance: float,
) -> Float64[np.ndarray, " n"]:
    if way in DRAWS:
        return DRAWS[way].scores(offered, last, chance)
    return hard**2 if way == RULE else np.ones(len(hard))


def _part(window: Window, chosen: Int64[np.ndarray, " m"]) -> Window:
    """Some rows of a window."""
    return Window(
        window.rows[chosen],
        window.stored[torch.from_numpy(chosen)],
        window.fold[chosen],
        window.y[chosen],
        window.features,
    )


def _losses(probe: FoldProbe, window: Window, chosen: Int64[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
    """The cross-entropy of rows under a probe, float64 [m]."""
    losses = []
    for part in np.array_split(chosen, max(1, len(chosen) // 1024)):
        x, target = window.batch(part)
        losses.append(-torch.log_softmax(x @ probe.weight, dim=1).gather(1, target[:, None])[:, 0].cpu().numpy())
    return np.concatenate(losses).astype(np.float64)
