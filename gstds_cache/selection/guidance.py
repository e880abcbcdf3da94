"""Guidance: a difficulty for every sample, without another forward pass; kept beside the store.

The kinds are in :mod:`gstds_cache.selection.guidance_spec`. What nobody asked for by name (``auto``) is tried out
first, and left out where it does not help (:mod:`gstds_cache.selection.trial`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.errors import UsageError
from gstds_cache.files.given import reading
from gstds_cache.selection.difficulty import Difficulty
from gstds_cache.selection.guidance_files import load_or_train, load_or_try
from gstds_cache.selection.guidance_spec import PROBED, SAVE_SCORES, GuidanceKey, GuidanceSpec
from gstds_cache.selection.rule import Rule
from gstds_cache.selection.rules import RULES
from gstds_cache.selection.trial import TrialSettings
from gstds_cache.store.layout import OK
from gstds_cache.store.reader import EmbeddingStore

DEFAULT = "uncertainty"  # as good as the probe's loss, and blind to a row's own wrong label (docs/results.md)


@dataclass(frozen=True, eq=False)
class Guidance:
    """A difficulty for every row of a store.

    Attributes:
        kind: As in :class:`~gstds_cache.selection.guidance_spec.GuidanceSpec`.
        digest: As in :class:`~gstds_cache.selection.guidance_spec.GuidanceKey`.
        of_rows: Of every row, >= 0, rows without a label at the median; None where it is found batch by batch
            (``disagreement``) or uniform (``none``, or a trial said that it does not help).
        columns: What the probe found, [N] of :data:`~gstds_cache.selection.linear_probe.COLUMNS`, mapped from its file;
            its ``loss`` is the reference loss of RHO-LOSS and JEST. None for other kinds.
        seconds: What computing it took; 0 where it was found.
        note: A sentence on where it came from.
    """

    kind: str
    digest: str
    of_rows: Difficulty | None = None
    columns: np.ndarray | None = None
    seconds: float = 0.0
    note: str = ""

    def of(
        self,
        rows: Int64[np.ndarray, " B"],
        labels: Int64[np.ndarray, " B"],
        neighbors: Int64[np.ndarray, "B K"] | None,
    ) -> Float64[np.ndarray, " B"]:
        """The difficulty of a batch's rows, float64 [B]."""
        if self.of_rows is not None:
            return self.of_rows.of(rows)
        if self.kind == "disagreement" and neighbors is not None:
            return disagreement(labels, neighbors)
        return np.ones(len(rows))


def disagreement(labels: Int64[np.ndarray, " B"], neighbors: Int64[np.ndarray, "B K"]) -> Float64[np.ndarray, " B"]:
    """Share of each row's labelled neighbours whose label is another one; 0 where there is nothing to compare."""
    theirs = np.where(neighbors >= 0, labels[neighbors], -1)
    comparable = (theirs >= 0) & (labels[:, None] >= 0)
    other = (comparable & (theirs != labels[:, None])).sum(axis=1)
    return np.asarray(other / np.maximum(comparable.sum(axis=1), 1), np.float64)


def guidance_for(spec: GuidanceSpec, rule: Rule, labels: LabelCounts, *, share: float, epochs: int) -> GuidanceSpec:
    """What ``auto`` is for a run; a kind that was asked for by name stays.

    Args:
        spec: What was asked for.
        rule: The run's rule.
        labels: The store's labels.
        share: Share of the rows that stays, over the whole run.
        epochs: Epochs of the run.

    Returns:
        A specification that is not ``auto``.

    Raises:
        UsageError: Guidance was asked for by name, and the rule does not look at it.
    """
    if rule.needs_guidance:
        if spec.kind != "auto":
            return spec
        if labels.different < 2 or labels.one_each:
            return replace(spec, kind="none")
        return replace(spec, kind=DEFAULT, trial=TrialSettings(rule.power, round(share, 2), epochs))
    if spec.kind not in {"auto", "none"}:
        guided = [name for name, other in RULES.items() if other.needs_guidance]
        offers = rule.name.startswith("draw ")
        blind = rule.name if offers else f"rule {rule.name}"
        raise UsageError(
            f"`guidance`: got {spec.kind}, but {blind} does not look at guidance",
            hint="leave `guidance` out" + ("" if offers else f", or take a rule that does: {', '.join(guided)}"),
        )
    return replace(spec, kind="none")


def load_or_make_guidance(
    store: EmbeddingStore,
    guidance: GuidanceKey,
    *,
    threads: int = 1,
    device: torch.device | None = None,
) -> Guidance:
    """A store's guidance: the one kept beside it, or computed now and kept.

    Args:
        store: Where embeddings and labels are.
        guidance: What was asked for, with its digests.
        threads: CPU threads.
        device: Where a probe is trained.

    Returns:
        The guidance.

    Raises:
        UsageError: The store has no labels to learn from, or a file does not fit the store.
    """
    spec, digest = guidance.spec, guidance.digest
    if spec.path is not None:
        return Guidance("file", digest, Difficulty(_own_scores(store, spec.path)), note=f"read from {spec.path}")
    if spec.kind == "none":
        return Guidance("none", digest)
    if spec.kind == "disagreement":
        if store.labels.max(initial=-1) < 0:
            raise UsageError(f"`guidance='disagreement'`: {store.location} has no labels", hint="use `guidance='none'`")
        return Guidance("disagreement", digest)
    columns, seconds, note = load_or_train(store, guidance, threads, device)
    difficulty = columns[PROBED[spec.kind]]
    if spec.cutoff:
        difficulty = np.array(difficulty)
        known = np.isfinite(difficulty)
        hardest = np.argsort(-difficulty[known], kind="stable")[: int(spec.cutoff * known.sum())]
        difficulty[np.flatnonzero(known)[hardest]] = 0.0
    of_rows = Difficulty(difficulty)
    if spec.trial is None:
        return Guidance(spec.kind, digest, of_rows, columns, seconds, note)
    begun = time.perf_counter()
    trial = load_or_try(store, guidance, of_rows, threads, device)
    seconds += time.perf_counter() - begun
    return Guidance(spec.kind, digest, of_rows if trial.helps else None, columns, seconds, f"{trial}; {note}")


def _own_scores(store: EmbeddingStore, path: Path) -> Float32[np.ndarray, " N"]:
    """The numbers of a user's file as difficulty.

    Raises:
        UsageError: They are not one finite number >= 0 for each row, or float32 cannot hold them.
    """
    argument = f"`guidance='file:{path}'`"
    scores = _array(path)
    if scores.shape != (len(store),) or scores.dtype.kind not in "fiu":
        raise UsageError(
            f"{argument}: got {scores.dtype!s:.80} {list(scores.shape)}, expected {len(store)} numbers, one for "
            "each row of the store",
            hint=SAVE_SCORES,
        )
    ok = store.valid == OK
    ok[store.hidden] = False
    bad = np.flatnonzero(ok & ~(np.isfinite(scores) & (scores >= 0)))
    if bad.size:
        raise UsageError(f"{argument}: row {bad[0]}: got {scores[bad[0]]}, expected a finite number >= 0")
    known = np.where(ok, scores, 0)
    largest, limits = known.max(initial=0), np.finfo(np.float32)
    if largest > limits.max or 0 < largest < limits.tiny:
        raise UsageError(
            f"{argument}: the largest is {largest}, expected {limits.tiny:.1e} to {limits.max:.1e} (float32)",
            hint="only their relation counts: divide them all by the largest",
        )
    return known.astype(np.float32)


def _array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic != np.lib.format.MAGIC_PREFIX:
        got = "an archive, as of np.savez," if magic.startswith(b"PK") else "something else,"
        raise UsageError(
            f"`guidance='file:{path}'`: does not read as .npy: got {got} expected one array, as of np.save",
            hint=SAVE_SCORES,
        )
    with reading(path, "one array of numbers (.npy)", hint=SAVE_SCORES):
        array: np.ndarray = np.load(path, allow_pickle=False)
    return array
