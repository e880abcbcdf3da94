"""``gstds_cache.advise``: is selection likely to pay on this data, and which one?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gstds_cache.config import ADVICE_EPOCHS, ADVICE_RATIOS, DEVICE, MOST_EPOCHS, as_tuple, as_type
from gstds_cache.costs.records import recall_store
from gstds_cache.errors import UsageError, command_line
from gstds_cache.files.location import LocationLike
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.runtime.threads import cores, limited_threads
from gstds_cache.selection.advice import FULL, RANDOM, Forecast, forecasts, preferred
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.guidance import load_or_make_guidance
from gstds_cache.selection.guidance_spec import GuidanceSpec, key_of
from gstds_cache.selection.rows import count_labels
from gstds_cache.store.reader import EmbeddingStore

PROBE_ENOUGH = 0.9  # held-out accuracy of a linear probe from which it is advised to train that before a network
UNEVEN = 10  # times as many rows as the smallest class, from which on the largest is worth a note
FEW_SAMPLES = 50_000  # rows times epochs; below, networks fine-tuned in the study did far better on everything
FEWEST = 1000  # rows with a label; the smallest set of the study has 1,437 and selection does not pay there


@dataclass(frozen=True, kw_only=True, repr=False)
class Advice:
    """What selection is likely to give, by small probes on the cached embeddings; nothing was trained besides.

    Attributes:
        store: Where the store is.
        rows: Labelled rows with an embedding.
        classes: Classes among them.
        class_rows: Rows of the smallest class, and of the largest.
        probe_accuracy: Share of held-out rows that a linear probe on all embeddings predicts rightly.
        forecasts: ``full`` first, then each way of drawing at each ratio.
        epochs: Passes over the data set that the run would make.
        embedding_seconds: What embedding the store took, once for all runs; None where it is not written down.
        seconds: What this took.
    """

    store: str
    rows: int
    classes: int
    class_rows: tuple[int, int]
    probe_accuracy: float
    forecasts: tuple[Forecast, ...]
    epochs: int
    embedding_seconds: float | None
    seconds: float

    def __repr__(self) -> str:
        return f"Advice({self.store!r}, rows={self.rows}, {self.verdict!r})"

    @property
    def best(self) -> Forecast | None:
        """What probes learned most from, and its ratio; its ``draw`` is what is advised.

        None where rows are few, or no way is clearly ahead of random ones.
        """
        return None if self.rows < FEWEST else preferred(self.forecasts)

    @property
    def verdict(self) -> str:
        """What to do, in a sentence or two."""
        best = self.best
        if self.rows < FEWEST:
            words = f"do not select: {self.rows:,} labelled rows are too few to leave any out; train on all of them"
        elif best is None:
            words = "do not select: from no draw that was tried a probe learned clearly more than from random rows"
        else:
            part = f"; {best.way}, a part of it," if best.is_part else ""
            words = (
                f"select: {best.draw or best.way} at a filter ratio of {best.ratio:g}{part} is ahead of random rows "
                f"by {best.over_random:.1%} (+- {best.margin:.1%}){self._beside_all(best)}"
            )
        if self.probe_accuracy < PROBE_ENOUGH:
            return words
        return (
            f"{words}. Try a linear classifier on the cached embeddings first: it is right on "
            f"{self.probe_accuracy:.1%} of held-out rows, and trains in seconds"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What probes on the embeddings cannot tell, and the study has found; empty where nothing applies."""
        smallest, largest = self.class_rows
        notes = []
        if self.best is not None and self.rows * self.epochs < FEW_SAMPLES:
            notes.append(
                f"{self.rows:,} rows in {self.epochs} epochs are few: networks fine-tuned on all of so few were 7 to "
                "28 points ahead of a quarter, however it was chosen; train on all of them, or in more epochs"
            )
        if largest >= UNEVEN * smallest:
            notes.append(
                f"the largest class has {largest // smallest} times the rows of the smallest; if every class counts "
                f"alike in your test, select with {command_line('--order', 'class-balanced')} (at 100 times it "
                "mattered more than any draw, fewer were not measured); if the test's classes are as rare, do not"
            )
        return tuple(notes)

    def _beside_all(self, best: Forecast) -> str:
        """How far a way is from all rows."""
        ahead = next((one.accuracy - best.accuracy for one in self.forecasts if one.way == FULL), None)
        if ahead is None:
            return ""
        return f"; all rows are {ahead:.1%} ahead of it" if ahead > 0 else f"; it is {-ahead:.1%} ahead of all rows"

    def gradient_samples(self, forecast: Forecast) -> int:
        """What a network would train on in such a run: rows times epochs; about, as batches of a few rows round it."""
        return round(self.rows * self.epochs * (1 - forecast.ratio))

    @property
    def cost(self) -> str:
        """What selecting takes beside training, in words."""
        seconds = self.embedding_seconds
        embedding = "not written down" if seconds is None else f"{seconds:,.1f} s, once for all runs"
        return f"embedding {embedding}; this advice {self.seconds:.1f} s"

    @property
    def command(self) -> str:
        """What to type: the selection that is advised, or training on everything."""
        best = self.best
        if best is None:
            return command_line("gstds-select", self.store, "--rule", "random", "--schedule", "constant:0")
        if best.draw is None:
            return command_line("gstds-select", self.store, "--keep", f"{1 - best.ratio:g}")
        return command_line("gstds-select", self.store, "--keep", f"{1 - best.ratio:g}", "--draw", best.draw)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values, the draw that is advised (None for none), and the verdict."""
        best = self.best
        return asdict(self) | {
            "draw": None if best is None else best.draw,
            "verdict": self.verdict,
            "notes": list(self.notes),
            "command": self.command,
        }


def advise(
    store: LocationLike | EmbeddingStore,
    *,
    ratios: Sequence[float] = ADVICE_RATIOS,
    epochs: int = ADVICE_EPOCHS,
    device: str = DEVICE,
    threads: int = 0,
    progress: Progress | bool | None = True,
) -> Advice:
    """Say before anything is trained whether selection is likely to pay on this data, and which one.

    Linear probes learn from the cached embeddings of up to 16,384 rows: from all of them, and from as many as stay at
    each ratio, drawn at random and in other ways; they are judged on rows that they never saw. They tell the sign of a
    difference, not its size: docs/results.md has how it agreed with networks.

    Args:
        store: A store, or its location.
        ratios: Shares of each epoch that are left out, each above 0 and below 1.
        epochs: Passes over the data set that the run would make.
        device: Where products are computed.
        threads: CPU threads; 0 for all there are. Their number changes nothing.
        progress: As for :func:`gstds_cache.select`; counts probes.

    Returns:
        The advice.

    Raises:
        UsageError: An argument cannot be meant, or the store has no labels that a probe could learn.
        StoreNotFoundError: There is no store.
        IncompleteError: The store is not complete.
    """
    begun = time.perf_counter()
    shares = tuple(as_type("ratios", ratio, float) for ratio in as_tuple("ratios", ratios, "shares from 0 to 1"))
    epochs, threads = as_type("epochs", epochs, int), as_type("threads", threads, int)
    if not shares or not all(0 < share < 1 for share in shares) or len(set(shares)) != len(shares):
        raise UsageError(f"`ratios`: got {ratios!r}, expected different shares above 0 and below 1")
    if not 1 <= epochs <= MOST_EPOCHS or threads < 0:
        raise UsageError(f"`epochs`, `threads`: got {epochs} and {threads}, expected 1 or more, and 0 or more")
    opened = store if isinstance(store, EmbeddingStore) else EmbeddingStore(store)
    labels = count_labels(opened)
    if labels.different < 2 or labels.one_each:
        raise UsageError(
            f"{opened.location} has no labels that a probe could learn", hint="give a store of images with classes"
        )
    where = resolve_device(device)
    with limited_threads(threads), showing(progress, "probes") as show:
        probe = load_or_make_guidance(
            opened, key_of(opened, GuidanceSpec("probe")), threads=threads or cores(), device=where
        )
        assert probe.columns is not None
        known = np.isfinite(probe.columns["loss"])
        found = forecasts(
            opened,
            Difficulty(probe.columns["entropy"]),
            Difficulty(probe.columns["loss"]),
            ratios=shares,
            epochs=epochs,
            threads=threads or cores(),
            device=where,
            progress=lambda done, total: show("advise", done, total, {}),
        )
    _, sizes = np.unique(opened.labels[known], return_counts=True)
    return Advice(
        store=str(opened.location.path or opened.location),
        rows=int(known.sum()),
        classes=labels.different,
        class_rows=(int(sizes.min()), int(sizes.max())),
        probe_accuracy=float((probe.columns["predicted"] == opened.labels)[known].mean()),
        forecasts=tuple(found),
        epochs=epochs,
        embedding_seconds=None if (cost := recall_store(opened.location, opened.fingerprint)) is None else cost.seconds,
        seconds=round(time.perf_counter() - begun, 3),
    )


def table(advice: Advice) -> list[tuple[str, ...]]:
    """The forecasts as rows of words, a heading first."""
    rows: list[tuple[str, ...]] = [
        ("ratio", "drawn", "gradient samples", "held-out accuracy", "minus random, 95 % interval")
    ]
    for forecast in advice.forecasts:
        low, high = forecast.over_random - forecast.margin, forecast.over_random + forecast.margin
        versus = "" if forecast.way in {FULL, RANDOM} else f"{forecast.over_random:+.2%} [{low:+.2%}, {high:+.2%}]"
        samples = f"{advice.gradient_samples(forecast):,}"
        rows.append((f"{forecast.ratio:g}", forecast.way, samples, f"{forecast.accuracy:.2%}", versus))
    return rows
