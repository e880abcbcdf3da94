"""A linear probe on cached embeddings: how hard is each sample for a reference model that never saw its label?

Multinomial logistic regression, cross-fitted: the labelled rows are assigned to folds, each fold is judged by a probe
that was trained on the others, and the held-out cross-entropy is the sample's difficulty (the "irreducible holdout
loss" of RHO-LOSS, S. Mindermann et al., ICML 2022, with a probe in the place of their small model). No image is opened
and no forward pass of the reference model is made.

Rows are read shard by shard, a window of shards at a time, in an order that the seed and the store alone decide: the
result does not depend on how much memory there is. Each fold's probe is trained in a thread of its own, so neither
does it depend on the number of threads. What is held of each row is its fold, in a byte (and 8 bytes of each row that
has no label or no embedding); what was found may go to a file.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64
from torch import Tensor
from torch.optim.adamw import adamw

from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.errors import UsageError
from gstds_cache.graph.neighbors import normalized_rows
from gstds_cache.runtime.progress import Counted
from gstds_cache.runtime.threads import in_threads
from gstds_cache.seeding import rng_for
from gstds_cache.selection.difficulty import PIECE, pieces
from gstds_cache.selection.permutation import Permutation
from gstds_cache.selection.rows import EligibleRows, rows_left_out
from gstds_cache.store.layout import OK
from gstds_cache.store.reader import EmbeddingStore

WINDOW = 1 << 14  # rows held at a time, at least one shard
COLUMNS = np.dtype([("loss", "<f4"), ("entropy", "<f4"), ("predicted", "<i4")])
FASTEST = 0.05  # learning rate, however few dimensions there are
Judged = Callable[[Int64[np.ndarray, " b"], Int64[Tensor, " b"], Float32[Tensor, "b C"]], None]
"""Called with rows, their classes (from 0) and their held-out log-probabilities, from several threads."""
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's (D. P. Kingma and J. Ba, ICLR 2015)


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is trained; all of it is identity.

    Attributes:
        folds: Parts that the rows are assigned to; each is judged by the probe of the others.
        epochs: Passes over the rows, at least.
        steps: Steps of each probe, at least: small data sets get more epochs.
        batch_size: Rows of a step.
        lr_scale: Adam's first learning rate times D, so that logits change as much in any dimension; it falls along a
            cosine.
        decay: Share of the weights that a first step takes away (decoupled weight decay); falls with the
            learning rate.
        seed: Seed of the folds and of the order.
    """

    folds: int = 2
    epochs: int = 3
    steps: int = 200
    batch_size: int = 256
    lr_scale: float = 2.5
    decay: float = 4e-3
    seed: int = 0


def rows_to_learn(store: EmbeddingStore, labels: Int[np.ndarray, " N"] | None = None) -> EligibleRows:
    """The rows that have an embedding and a label, the store's or of ``labels``, and are not hidden."""
    labels = store.labels if labels is None else labels
    bare = [first + np.flatnonzero(labels[first : first + PIECE] < 0) for first in range(0, len(labels), PIECE)]
    return EligibleRows(len(labels), np.union1d(rows_left_out(store), np.concatenate(bare)))


def count_classes(
    labels: Int[np.ndarray, " N"], rows: EligibleRows
) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
    """The classes that ``rows`` have, ascending, and how many rows each has."""
    names, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for first in range(0, len(rows), PIECE):
        part = labels[rows.at(np.arange(first, min(first + PIECE, len(rows))))]
        classes, new = np.unique(part, return_counts=True)
        names, place = np.unique(np.concatenate([names, classes]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, new])).astype(np.int64)  # exact up to 2^53
    return names.astype(np.int64), counts


def assign_folds(labels: Int[np.ndarray, " N"], rows: EligibleRows, folds: int, seed: int) -> np.ndarray:
    """Assign ``rows`` to folds, class by class in random order, so that folds differ by at most one row a class.

    Rows are gone through in random order, and each class counts its own: the next class begins with the fold after the
    one that the class before it ends with.

    Returns:
        Fold of each of the N rows, int8; -1 for those not in ``rows``.
    """
    names, counts = count_classes(labels, rows)
    turn = np.cumsum(counts) - counts
    shuffled = Permutation(len(rows), rng_for(seed, "probe-folds"))
    fold = np.full(rows.items, -1, np.int8)
    for first in range(0, len(rows), PIECE):
        here = rows.at(shuffled.at(first, min(first + PIECE, len(rows))))
        code = np.searchsorted(names, labels[here])
        new = np.bincount(code, minlength=len(names))
        by_class = here[np.argsort(code, kind="stable")]
        fold[by_class] = (np.arange(len(here)) + np.repeat(turn - (np.cumsum(new) - new), new)) % folds
        turn += new
    return fold


def sweep(store: EmbeddingStore, seed: int, turn: int) -> Iterator[tuple[Int64[np.ndarray, " W"], Tensor]]:
    """All rows that have an embedding, once: shards in random order, a window of them at a time.

    Yields:
        The rows of a window, and their embeddings [W, D] in the store's dtype, overwritten by the next.
    """
    spec = store.spec
    shards = rng_for(seed, "probe-shards", turn).permutation(spec.shards)
    many = max(1, WINDOW // spec.shard_rows)
    buffer = np.empty((min(many * spec.shard_rows, spec.items), spec.dim), spec.dtype)
    for first in range(0, len(shards), many):
        names, filled = [], 0
        for shard in shards[first : first + many].tolist():
            span = spec.rows_of(shard)
            rows = np.arange(span.start, span.stop, dtype=np.int64)
            rows = rows[store.valid_in(shard) == OK]
            store.gather(rows, buffer[filled : filled + len(rows)])
            names.append(rows)
            filled += len(rows)
        yield np.concatenate(names), torch.from_numpy(buffer[:filled])


@dataclass
class FoldProbe:
    """The probe of one fold: a weight [D + 1, C], the last row for the bias, and Adam's two moments."""

    number: int
    weight: Tensor
    settings: ProbeSettings
    total: int  # rows to learn from, epochs counted
    seen: int = 0
    steps: Tensor = field(init=False)  # taken, [] float32, as torch counts them
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.steps = torch.zeros((), device=self.weight.device)

    def learn(self, x: Float32[Tensor, "b D1"], y: Int64[Tensor, " b"]) -> None:
        """One step of AdamW on the mean cross-entropy of a batch.

        By torch's function: making a ``torch.optim.AdamW`` loads torch's compiler, which takes longer than most probes.
        """
        gradient = torch.softmax(x @ self.weight, dim=1)
        gradient[torch.arange(len(y), device=y.device), y] -= 1
        gradient = x.T @ gradient / len(y)
        peak = min(self.settings.lr_scale / (x.shape[1] - 1), FASTEST)
        adamw(
            [self.weight],
            [gradient],
            [self.first],
            [self.second],
            [],
            [self.steps],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=peak * 0.5 * (1 + math.cos(math.pi * self.seen / self.total)),
            weight_decay=self.settings.decay / peak,  # torch multiplies it by the rate
            eps=EPSILON,
            maximize=False,
        )
        self.seen += len(y)

    def learn_window(self, window: Window, rng: np.random.Generator) -> None:
        """Learn from the rows of a window that are not of this fold, in random order, in batches of about one size."""
        mine = np.flatnonzero((window.fold >= 0) & (window.fold != self.number))
        parts = max(1, round(len(mine) / self.settings.batch_size))
        for part in np.array_split(rng.permutation(mine), parts) if len(mine) else []:
            self.learn(*window.batch(part))

    def judge_window(
        self, window: Window, columns: np.ndarray, names: Int64[np.ndarray, " C"], judged: Judged | None = None
    ) -> None:
        """Fill the columns of this fold's rows in a window; ``names`` are the classes' labels."""
        mine = np.flatnonzero(window.fold == self.number)
        for begin in range(0, len(mine), 4 * self.settings.batch_size):
            part = mine[begin : begin + 4 * self.settings.batch_size]
            x, y = window.batch(part)
            log = torch.log_softmax(x @ self.weight, dim=1)
            here = window.rows[part]
            columns["loss"][here] = -log.gather(1, y[:, None])[:, 0].cpu().numpy()
            columns["entropy"][here] = -(log.exp() * log).sum(dim=1).cpu().numpy()
            columns["predicted"][here] = names[log.argmax(dim=1).cpu().numpy()]
            if judged is not None:
                judged(here, y, log)

    def right(self, window: Window, part: Int64[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
        """Which of some of a window's rows are predicted rightly."""
        x, y = window.batch(part)
        return ((x @ self.weight).argmax(dim=1) == y).cpu().numpy()


@dataclass(frozen=True)
class Window:
    """Some of a store's rows at once: their numbers, embeddings, folds and, where there is a fold, classes (from 0)."""

    rows: Int64[np.ndarray, " W"]
    stored: Tensor
    fold: np.ndarray
    y: Int64[np.ndarray, " W"]
    features: Features

    def batch(self, part: Int64[np.ndarray, " b"]) -> tuple[Float32[Tensor, "b D1"], Int64[Tensor, " b"]]:
        """Features and classes of some of the rows, on the device."""
        return self.features(self.stored[torch.from_numpy(part)]), torch.from_numpy(self.y[part]).to(
            self.features.device
        )


@dataclass(frozen=True)
class Features:
    """Unit rows, each dimension shifted and scaled, and a one for the bias."""

    mean: Float32[Tensor, " D"]
    scale: Float32[Tensor, " D"]
    device: torch.device

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> Features:
        """Shift and scale after the mean and spread of some rows."""
        unit = normalized_rows(rows[None])[0]
        spread, mean = torch.std_mean(unit, dim=0, correction=0)
        typical = spread.square().mean().sqrt()
        # A dimension that hardly moves is left small, not blown up.
        scale = 1 / torch.maximum(spread, 0.1 * typical).clamp_min(1e-12)
        return cls(mean.to(device), scale.to(device), device)

    def __call__(self, rows: Tensor) -> Float32[Tensor, "b D1"]:
        """The features of rows in the store's dtype."""
        unit = normalized_rows(rows[None])[0].to(self.device)
        features = torch.ones(len(unit), unit.shape[1] + 1, device=self.device)
        torch.mul(unit - self.mean, self.scale, out=features[:, :-1])
        return features


def probe_columns(
    store: EmbeddingStore,
    settings: ProbeSettings,
    *,
    threads: int = 1,
    device: torch.device | None = None,
    out: np.ndarray | None = None,
    labels: Int[np.ndarray, " N"] | None = None,
    judged: Judged | None = None,
    progress: Counted | None = None,
) -> np.ndarray:
    """Train a probe for each fold and judge every labelled row by the one that did not see it.

    Args:
        store: Where embeddings and labels are.
        settings: How.
        threads: CPU threads; more than ``folds`` are of no use, and their number changes nothing.
        device: Where the products are computed; the CPU by default.
        out: Where the result goes, [N]; a new array by default.
        labels: Labels to learn in the place of the store's, [N], -1 for none.
        judged: Called with each held-out row's log-probabilities.
        progress: Called with passes over the rows done, and in all.

    Returns:
        [N] of :data:`COLUMNS`: ``loss`` (held-out cross-entropy in nats, >= 0), ``entropy`` of the held-out prediction
        (nats) and ``predicted`` class; NaN, NaN and -1 for rows without embedding or label.

    Raises:
        UsageError: There are fewer than two classes, or fewer labelled rows than four, or labels are ids.
    """
    device = device or torch.device("cpu")
    rows = rows_to_learn(store, labels)
    labels = store.labels if labels is None else labels
    names, _ = count_classes(labels, rows)
    if len(names) < 2 or len(rows) < max(4, settings.folds):
        raise UsageError(
            f"`guidance`: a probe needs labels of two classes at least; {store.location} has {len(rows):,} labelled "
            f"rows of {len(names)} classes",
            hint="use `guidance='none'`, which makes guided rules go by the spectrum alone",
        )
    if LabelCounts(len(rows), len(names), int(names[-1])).one_each:
        raise UsageError(
            f"`guidance`: {store.location} has {len(names):,} different labels for {len(rows):,} rows; a probe learns "
            "nothing from classes of one row",
            hint="use `guidance='none'`, or embed with labels that are classes",
        )
    fold = assign_folds(labels, rows, settings.folds, settings.seed)
    others = [len(rows) - sum(int((part == number).sum()) for part in pieces(fold)) for number in range(settings.folds)]
    epochs = max(settings.epochs, -(-settings.steps * settings.batch_size // max(others)))
    probes = [
        FoldProbe(n, torch.zeros(store.spec.dim + 1, len(names), device=device), settings, max(1, epochs * others[n]))
        for n in range(settings.folds)
    ]
    columns = np.zeros(len(store), COLUMNS) if out is None else out
    stopped = threading.Event()
    columns["loss"], columns["entropy"], columns["predicted"] = np.nan, np.nan, -1

    def work(probe: FoldProbe) -> None:
        features: Features | None = None
        for turn in range(epochs + 1):
            if progress is not None and probe.number == 0:
                progress(turn, epochs + 1)
            for number, (here, stored) in enumerate(sweep(store, settings.seed, turn)):
                if stopped.is_set():
                    return
                features = features or Features.of(stored, device)
                window = Window(here, stored, fold[here], np.searchsorted(names, labels[here]), features)
                if turn < epochs:
                    probe.learn_window(window, rng_for(settings.seed, "probe-order", turn, number, probe.number))
                else:
                    probe.judge_window(window, columns, names, judged)

    for _ in in_threads(work, probes, threads if device.type == "cpu" else 1, stopped):
        pass
    return columns
