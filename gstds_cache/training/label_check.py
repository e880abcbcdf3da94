"""Is item i of a user's data set row i of the store? Where both have labels, these tell.

A selection names its rows by number alone. A data set that was shuffled, or is another part of the same folder, has as
many items, trains without an error, and on the wrong rows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from torch.utils.data import ConcatDataset, Subset

from gstds_cache.costs.records import recall, selection_costs
from gstds_cache.data.labels import may_be_labels
from gstds_cache.data.mapstyle import LABEL_ATTRIBUTES
from gstds_cache.errors import GstdsError
from gstds_cache.files.location import Location
from gstds_cache.runtime.notify import log
from gstds_cache.stream.schema import Header

AGREES = 0.5
"""Cohen's kappa below which the labels are those of other items, or another labelling."""


def note_other_labels(selection: object, header: Header, dataset: Any) -> None:
    """Say so where a data set's labels are hardly those of the rows that were selected from.

    Nothing is said where one has no labels, or the store cannot be found: of a stream, in a bucket, or moved.

    Args:
        selection: What a sampler was given.
        header: Of the selection.
        dataset: The user's, with as many items as the store.
    """
    labels = labels_of(dataset)
    stored = None if labels is None else _stored_labels(selection, header)
    if labels is None or stored is None or len(labels) != len(stored):
        return
    rows = np.flatnonzero(stored >= 0)
    mine, theirs = labels[rows], stored[rows]
    if max(len(np.unique(mine)), len(np.unique(theirs))) > len(rows) / 2:
        return  # hardly two rows have the same: they are no classes
    # One of them may be finer: species beside genera.
    share, kappa, first = max(agreement(mine, theirs), agreement(theirs, mine), key=lambda found: found[1])
    if kappa < AGREES:
        log(
            f"note: the labels of `dataset` go with the store's on {share:.1%} of the rows alone, and first differ on "
            f"row {rows[first]}. Item i has to be the item i that was embedded: is it shuffled, or another part? (If "
            "it is labelled in another way, all is well.)"
        )


def agreement(labels: Shaped[np.ndarray, " N"], others: Shaped[np.ndarray, " N"]) -> tuple[float, float, int]:
    """How far labels are a function of others, whatever their numbers.

    Args:
        labels: [N] labels, numbers or text.
        others: [N] the others.

    Returns:
        The share of rows whose label is the commonest of those with the same other label; how far that is from what
        the commonest label alone has (0) to 1, as Cohen's kappa; and the first row that has not.
    """
    if not len(labels):
        return 1.0, 1.0, 0
    _, mine = np.unique(labels, return_inverse=True)
    _, theirs = np.unique(others, return_inverse=True)
    pairs, place, counts = np.unique(theirs * (mine.max() + 1) + mine, return_inverse=True, return_counts=True)
    best = np.zeros(theirs.max() + 1, np.int64)
    np.maximum.at(best, pairs // (mine.max() + 1), counts)
    commonest = np.bincount(mine).max() / len(mine)
    share = float(best.sum() / len(mine))
    differs = np.flatnonzero(counts[place] < best[theirs])
    kappa = 1.0 if commonest == 1 else float((share - commonest) / (1 - commonest))
    return share, kappa, int(differs[0]) if len(differs) else 0


def labels_of(dataset: Any) -> Shaped[np.ndarray, " N"] | None:
    """The labels of a map-style data set, numbers or text; None where it shows none without its items being read."""
    try:
        return _labels_of(dataset)
    except Exception:  # a property of the user's own that fails, keys for indices: whatever it is, it is not for us
        return None


def _labels_of(dataset: Any) -> Shaped[np.ndarray, " N"] | None:
    if isinstance(dataset, Subset):
        labels, rows = _labels_of(dataset.dataset), _plain(dataset.indices)
        return labels[rows] if labels is not None and rows.ndim == 1 and rows.dtype.kind in "iu" else None
    if isinstance(dataset, ConcatDataset):
        parts = [_labels_of(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    for name in LABEL_ATTRIBUTES:
        values = getattr(dataset, name, None)
        if values is not None and may_be_labels(values, len(dataset)):
            array = _plain(values)
            return array if array.ndim == 1 and array.dtype.kind in "iubU" else None
    return None


def _plain(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _stored_labels(selection: object, header: Header) -> Int[np.ndarray, " N"] | None:
    """Labels of the store that a selection file was made from, where it is on this machine still."""
    if not isinstance(selection, (str, os.PathLike)) or "://" in os.fspath(selection):
        return None
    from gstds_cache.store.grown import read_metadata  # zarr: a sampler without it starts sooner

    try:
        cost = recall(selection_costs(Path(os.fspath(selection))), header.selection_digest)
        where = None if cost is None or cost.store is None else Location.parse(cost.store)
        if where is None or where.path is None:
            return None
        found = read_metadata(where, state=header.cache_fingerprint)
        return found.labels() if found.spec.fingerprint == header.cache_fingerprint else None  # or another is there now
    except (GstdsError, OSError):
        return None
