"""Labels in doubt: what a cross-fitted probe says of each label, counted and ranked as confident learning does.

A row is *doubted* where, among the classes whose probability reaches the mean probability that rows of that class have
for it, the most probable one is not the row's label (C. Northcutt, L. Jiang and I. Chuang, *Confident learning*, JAIR
2021; the counts are its joint). We differ from cleanlab in two things: where several classes reach their threshold it
takes the most probable of all classes, we the most probable of those; and we look only at a row's :data:`CLASSES_KEPT`
most probable classes, it at all of them.

How far the doubts can be trusted is measured: some labels are flipped on purpose, the probe learns again, and it is
counted how many of the flipped ones are found, and how many others are doubted.

What grows with the rows: 13 bytes, and 8 for each of up to :data:`CLASSES_KEPT` classes, in mapped files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, Int32, Int64
from torch import Tensor

from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.files import mapped
from gstds_cache.runtime.progress import Counted
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import PIECE
from gstds_cache.selection.linear_probe import ProbeSettings, count_classes, probe_columns, rows_to_learn
from gstds_cache.store.reader import EmbeddingStore

CLASSES_KEPT = 10
"""Most probable classes that are kept of each row."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Held-out predictions of every row; rows without a label have NaN and class -1.

    Attributes:
        own: Probability of the row's label, float32 [N].
        label: The most probable classes, int32 [N, m].
        probability: Their probabilities, float32 [N, m].
    """

    own: Float32[np.ndarray, " N"]
    label: Int32[np.ndarray, "N m"]
    probability: Float32[np.ndarray, "N m"]


@dataclass(frozen=True, eq=False)
class Doubts:
    """Labels in doubt.

    Attributes:
        row: Every labelled row, the most doubtful first, int64 [R].
        score: What they are ranked by, float32 [R].
        own: Probability of the row's label, float32 [R].
        suggested: Class that the probe finds most probable besides, int32 [R].
        probability: Its probability, float32 [R].
        doubted: Whether confident learning counts the row for another class than its label.
        joint: Rows by (label, class that they are counted for), largest first; of those that are counted.
    """

    row: Int64[np.ndarray, " R"]
    score: Float32[np.ndarray, " R"]
    own: Float32[np.ndarray, " R"]
    suggested: Int32[np.ndarray, " R"]
    probability: Float32[np.ndarray, " R"]
    doubted: Bool[np.ndarray, " R"]
    joint: list[tuple[int, int, int]]


@dataclass(frozen=True)
class FlipTest:
    """What was found of labels that were flipped on purpose.

    Attributes:
        flipped: Labels flipped.
        found: Of these, doubted.
        first: Of as many of the first in the ranking as were flipped, those that were.
        left: Labels left as they were.
        doubted: Of these, doubted; some may be wrong in truth.
    """

    flipped: int
    found: int
    first: int
    left: int
    doubted: int

    @property
    def recall(self) -> float:
        """Share of the flipped labels that are doubted."""
        return self.found / max(1, self.flipped)

    @property
    def precision(self) -> float:
        """Share of flipped labels among the first of the ranking, as many as were flipped."""
        return self.first / max(1, self.flipped)

    @property
    def false_positive_rate(self) -> float:
        """Share of the labels left as they were that are doubted: too high where labels are wrong in truth."""
        return self.doubted / max(1, self.left)


def why_no_labels(store: EmbeddingStore, folds: int) -> str:
    """Why a store's labels cannot be judged; empty where they can."""
    rows = rows_to_learn(store)
    if not len(rows):
        return "the store has no labels"
    names, counts = count_classes(store.labels, rows)
    if len(names) < 2:
        return f"all {len(rows):,} labelled rows have the same label"
    if LabelCounts(len(rows), len(names), int(names[-1])).one_each:
        return f"{len(names):,} different labels for {len(rows):,} rows: they look like ids, not classes"
    if len(rows) < max(4, folds):
        return f"{len(rows)} labelled rows are fewer than {max(4, folds)}"
    return ""


def predict(
    store: EmbeddingStore,
    settings: ProbeSettings,
    *,
    labels: Int[np.ndarray, " N"] | None = None,
    threads: int,
    device: torch.device,
    progress: Counted | None = None,
) -> Predictions:
    """Held-out predictions of a probe.

    Args:
        store: Where embeddings and labels are.
        settings: How the probe is trained.
        labels: Labels to learn in the place of the store's.
        threads: CPU threads.
        device: Where products are computed.
        progress: Called with passes over the rows done, and in all.

    Returns:
        The predictions.
    """
    labels = store.labels if labels is None else labels
    rows = rows_to_learn(store, labels)
    names, _ = count_classes(labels, rows)
    count, most = len(store), min(CLASSES_KEPT, len(names))
    own = mapped.zeros((count,), np.float32)
    named, probability = mapped.zeros((count, most), np.int32), mapped.zeros((count, most), np.float32)
    own[:], named[:], probability[:] = np.nan, -1, np.nan

    def judged(here: Int64[np.ndarray, " b"], y: Int64[Tensor, " b"], log: Float32[Tensor, "b C"]) -> None:
        top = log.topk(most, dim=1)
        own[here] = log.gather(1, y[:, None])[:, 0].exp().cpu().numpy()
        probability[here], named[here] = top.values.exp().cpu().numpy(), names[top.indices.cpu().numpy()]

    columns = mapped.zeros((count,), np.dtype([("loss", "<f4"), ("entropy", "<f4"), ("predicted", "<i4")]))
    probe_columns(
        store,
        settings,
        threads=threads,
        device=device,
        out=columns,
        labels=labels,
        judged=judged,
        progress=progress,
    )
    return Predictions(own, named, probability)


def find_doubts(predictions: Predictions, labels: Int[np.ndarray, " N"], rank: str) -> Doubts:
    """Count and rank labels.

    Args:
        predictions: Held-out predictions.
        labels: The labels that they were made from.
        rank: ``normalized-margin`` or ``self-confidence``.

    Returns:
        Every labelled row, ranked.
    """
    rows = np.flatnonzero(np.isfinite(predictions.own))
    names, thresholds = _thresholds(predictions, labels, rows)
    score, other, chance = (np.empty(len(rows), kind) for kind in (np.float32, np.int32, np.float32))
    doubted, pairs = np.zeros(len(rows), bool), np.empty(len(rows), np.int64)
    for first in range(0, len(rows), PIECE):
        part, here = rows[first : first + PIECE], slice(first, first + PIECE)
        label, probability = predictions.label[part], predictions.probability[part]
        given, at = labels[part].astype(np.int64), np.arange(len(part))
        best = (label == given[:, None])[:, 0].astype(np.int64) % label.shape[1]  # the first that is not the label
        other[here], chance[here] = label[at, best], probability[at, best]
        reaches = probability >= thresholds[np.searchsorted(names, label)] - 1e-6
        counted = np.where(reaches.any(axis=1), label[at, reaches.argmax(axis=1)], -1)
        doubted[here] = (counted >= 0) & (counted != given)
        pairs[here] = np.where(
            counted >= 0, np.searchsorted(names, given) * len(names) + np.searchsorted(names, counted), -1
        )
        score[here] = predictions.own[part] - (chance[here] if rank == "normalized-margin" else 0)
    codes, many = np.unique(pairs[pairs >= 0], return_counts=True)
    cells = zip(names[codes // len(names)].tolist(), names[codes % len(names)].tolist(), many.tolist(), strict=True)
    order = np.lexsort((rows, score))
    return Doubts(
        rows[order],
        score[order],
        predictions.own[rows[order]],
        other[order],
        chance[order],
        doubted[order],
        sorted(cells, key=lambda cell: (-cell[2], cell[0], cell[1])),
    )


def _thresholds(
    predictions: Predictions, labels: Int[np.ndarray, " N"], rows: Int64[np.ndarray, " R"]
) -> tuple[Int64[np.ndarray, " C"], Float64[np.ndarray, " C"]]:
    """The classes, and the mean probability that rows of each have for it."""
    names = np.unique(np.concatenate([np.unique(labels[rows[at : at + PIECE]]) for at in range(0, len(rows), PIECE)]))
    total, count = np.zeros(len(names)), np.zeros(len(names))
    for at in range(0, len(rows), PIECE):
        code = np.searchsorted(names, labels[rows[at : at + PIECE]])
        total += np.bincount(code, predictions.own[rows[at : at + PIECE]], len(names))
        count += np.bincount(code, minlength=len(names))
    return names.astype(np.int64), total / np.maximum(count, 1)


def flip_labels(
    labels: Int[np.ndarray, " N"], rows: Int64[np.ndarray, " R"], share: float, seed: int
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " F"]]:
    """Give some rows another label, any of the others with the same chance.

    Args:
        labels: All labels.
        rows: Rows that may be flipped.
        share: How many of them are.
        seed: Seed.

    Returns:
        The new labels, and the rows that were flipped, ascending.
    """
    rng = rng_for(seed, "audit-flips")
    names = np.unique(labels[rows])
    flipped = np.sort(rng.choice(rows, max(1, round(share * len(rows))), replace=False))
    changed = mapped.zeros(labels.shape, np.int64)
    changed[:] = labels
    code = np.searchsorted(names, labels[flipped])
    changed[flipped] = names[(code + rng.integers(1, len(names), len(flipped))) % len(names)]
    return changed, flipped


def flip_test(doubts: Doubts, flipped: Int64[np.ndarray, " F"]) -> FlipTest:
    """Count what was found of flipped labels.

    Args:
        doubts: Of the labels with flips.
        flipped: The rows that were flipped.

    Returns:
        The counts.
    """
    was = np.isin(doubts.row, flipped)
    return FlipTest(
        flipped=len(flipped),
        found=int((was & doubts.doubted).sum()),
        first=int(was[: len(flipped)].sum()),
        left=int((~was).sum()),
        doubted=int((~was & doubts.doubted).sum()),
    )
