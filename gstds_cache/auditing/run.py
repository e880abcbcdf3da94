"""One audit from a store to its tables, and what the page shows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from gstds_cache.auditing import tables
from gstds_cache.auditing.duplicates import Groups, Pairs, around, group_rows, pairs_above
from gstds_cache.auditing.faiss_index import require_faiss
from gstds_cache.auditing.labels import Doubts, FlipTest, find_doubts, flip_labels, flip_test, predict, why_no_labels
from gstds_cache.auditing.search import NOTHING, Nearest, find_nearest
from gstds_cache.config import AuditConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.runtime.executor import Executor
from gstds_cache.runtime.progress import Progress
from gstds_cache.runtime.threads import cores
from gstds_cache.selection.difficulty import PIECE
from gstds_cache.selection.linear_probe import ProbeSettings, rows_to_learn
from gstds_cache.selection.unit_rows import UnitRows
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec, differences

DUPLICATES, LEAKS, LABELS, JOINT, OUTLIERS = (
    f"{name}.parquet" for name in ("duplicates", "leaks", "labels", "joint", "outliers")
)
FILES = (DUPLICATES, LEAKS, LABELS, JOINT, OUTLIERS)


@dataclass
class Findings:
    """What an audit found.

    Attributes:
        rows: The rows that were looked at.
        found: Their nearest rows.
        pairs: Pairs of near-duplicates.
        groups: Their groups.
        mean: Mean cosine of each row to its nearest ones, float32 [M].
        outliers: Their order, the farthest row first.
        doubts: Labels in doubt; None where there are no classes.
        no_doubts: Why there are none.
        test: What was found of flipped labels; None where that was not measured.
        no_test: Why it was not measured, where labels are in doubt.
        others: Rows of the other store that was searched for, where one was given.
        leaked: Their nearest rows in this store.
        leaks: Pairs: ``one`` of the other store, ``other`` of this one.
        examples: Pairs just above the threshold, and just below it.
        leak_examples: Pairs of the two stores just below the threshold.
        files: What was written.
    """

    rows: UnitRows
    found: Nearest
    pairs: Pairs
    groups: Groups
    mean: Float32[np.ndarray, " M"]
    outliers: Int64[np.ndarray, " M"]
    doubts: Doubts | None = None
    no_doubts: str = ""
    test: FlipTest | None = None
    no_test: str = "`flipped` is 0"
    others: UnitRows | None = None
    leaked: Nearest | None = None
    leaks: Pairs | None = None
    examples: tuple[Pairs, Pairs] | None = None
    leak_examples: Pairs | None = None
    files: list[Path] = field(default_factory=list)


def require_same_model(store: EmbeddingStore, other: EmbeddingStore) -> None:
    """Refuse to compare embeddings of two models.

    Raises:
        FingerprintMismatchError: The stores' models or preprocessing differ; the fields are named.
    """
    ours, theirs = (replace(spec, encoder=_model_of(spec)) for spec in (store.spec, other.spec))
    same = replace(theirs, encoder=ours.encoder, dim=ours.dim)
    lines = [
        line.replace("the store has", f"{store.location} has").replace("this run has", f"{other.location} has")
        for line in differences(replace(same, encoder=ours.encoder), replace(same, encoder=theirs.encoder,
                                                                           dim=theirs.dim))
    ]  # fmt: skip
    if lines:
        raise FingerprintMismatchError(
            "the two stores hold embeddings of different models, whose cosines mean nothing:\n    "
            + "\n    ".join(lines),
            hint="embed both data sets with the same model, size and weights",
        )


def _model_of(spec: CacheSpec) -> dict[str, Any]:
    """What made the rows: an import's digest of the rows themselves is left out, which differs between data sets."""
    return {name: value for name, value in spec.encoder.items() if not (spec.imported and name == "vectors")}


def audit_store(
    store: EmbeddingStore,
    other: EmbeddingStore | None,
    config: AuditConfig,
    device: torch.device,
    show: Progress,
    executor: Executor | None = None,
) -> Findings:
    """Look for near-duplicates, outliers, labels in doubt and, in two stores, leaks.

    Args:
        store: The store.
        other: Another one, whose rows are looked for in the first.
        config: What to look for.
        device: Where.
        show: Called with what is done.
        executor: Where nearest rows are searched for; None for this process. Probes of labels run here in any case.

    Returns:
        What was found.

    Raises:
        UsageError: Fewer than two rows have an embedding.
    """
    require_faiss()
    rows = UnitRows.of(store)
    if len(rows) < 2:
        raise UsageError(f"{store.location}: {len(rows)} rows have an embedding, an audit compares two at least")
    if other is not None:
        require_same_model(store, other)
        if not len(UnitRows.of(other)):
            raise UsageError(f"{other.location}: no row has an embedding")
    hashes = store.manifest().sha256
    found = find_nearest(rows, rows, config.knn, device=device, exact_rows=config.exact_rows, seed=config.seed,
                         progress=_phase(show, "nearest rows"), executor=executor)  # fmt: skip
    pairs = pairs_above(found, rows, rows, config.threshold, (hashes, hashes))
    mean = _means(found)
    findings = Findings(
        rows,
        found,
        pairs,
        group_rows(pairs, found, rows, hashes, config.threshold),
        mean,
        np.lexsort((np.arange(len(mean)), mean)),
    )
    findings.examples = around(found, rows, rows, config.threshold, pairs)
    if other is not None:
        _look_for_leaks(findings, other, hashes, config, device, show, executor)
    findings.no_doubts = why_no_labels(store, config.folds)
    if not findings.no_doubts:
        _judge_labels(findings, store, config, device, show)
    return findings


def _look_for_leaks(
    findings: Findings,
    other: EmbeddingStore,
    hashes: UInt8[np.ndarray, "N 32"],
    config: AuditConfig,
    device: torch.device,
    show: Progress,
    executor: Executor | None,
) -> None:
    rows, others = findings.rows, UnitRows.of(other)
    found = find_nearest(others, rows, config.knn, device=device, exact_rows=config.exact_rows, seed=config.seed,
                         progress=_phase(show, "rows of the other store"), executor=executor)  # fmt: skip
    leaks = pairs_above(found, others, rows, config.threshold, (other.manifest().sha256, hashes))
    findings.others, findings.leaked, findings.leaks = others, found, leaks
    findings.leak_examples = around(found, others, rows, config.threshold, leaks)[1]


def _judge_labels(
    findings: Findings, store: EmbeddingStore, config: AuditConfig, device: torch.device, show: Progress
) -> None:
    # A pass over fewer rows than a batch is one step: with a smaller batch as many passes as steps are made, no more.
    others = max(1, len(rows_to_learn(store)) * (config.folds - 1) // config.folds)
    settings = ProbeSettings(folds=config.folds, seed=config.seed, batch_size=min(ProbeSettings.batch_size, others))
    threads = config.threads or cores()
    told = _phase(show, "probe")
    predictions = predict(store, settings, threads=threads, device=device, progress=told)
    findings.doubts = find_doubts(predictions, store.labels, config.rank)
    if config.flipped:
        told = _phase(show, "probe of flipped labels")
        rows = rows_to_learn(store).all()
        changed, flipped = flip_labels(store.labels, rows, config.flipped, config.seed)
        if len(np.unique(changed[rows])) < 2:
            findings.no_test = f"with {len(flipped):,} of them flipped all {len(rows):,} labels are the same"
            return
        again = predict(store, settings, labels=changed, threads=threads, device=device, progress=told)
        findings.test = flip_test(find_doubts(again, changed, config.rank), flipped)


def _means(found: Nearest) -> Float32[np.ndarray, " M"]:
    mean = np.empty(len(found.index), np.float32)
    for first in range(0, len(mean), PIECE):
        part = found.similarity[first : first + PIECE]
        there = part > NOTHING
        mean[first : first + PIECE] = np.where(there, part, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return mean


def _phase(show: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: show(name, done, total, {})


def write_tables(findings: Findings, folder: Path) -> None:
    """Write the tables; what there is no answer to has no table.

    Args:
        findings: What was found.
        folder: Where they go.
    """
    rows, order = findings.rows, findings.outliers
    items = tables.Items(rows.store)
    tables.write_duplicates(folder / DUPLICATES, items, findings.groups)
    nearest, cosine = findings.found.index[order, 0].astype(np.int64), findings.found.similarity[order, 0]
    nearest = np.where(nearest < 0, -1, rows.rows.at(np.maximum(nearest, 0)))
    tables.write_outliers(folder / OUTLIERS, items, rows.rows.at(order), findings.mean[order], nearest, cosine)
    findings.files += [folder / DUPLICATES, folder / OUTLIERS]
    if findings.doubts is not None:
        tables.write_labels(folder / LABELS, items, findings.doubts)
        tables.write_joint(folder / JOINT, items, findings.doubts)
        findings.files += [folder / LABELS, folder / JOINT]
    if findings.leaks is not None and findings.others is not None:
        tables.write_leaks(folder / LEAKS, items, tables.Items(findings.others.store), findings.leaks)
        findings.files.append(folder / LEAKS)
