"""Labels that are wrong, and classes that are rare: the same for the same data set, drawn once for all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

from gstds_cache.seeding import rng_for


def noisy(targets: Int64[np.ndarray, " N"], classes: int, share: float) -> Int64[np.ndarray, " N"]:
    """Labels of which a share is changed to another class, each of the others as likely.

    Args:
        targets: Labels, int64 [N].
        classes: Classes.
        share: From 0 to 1.

    Returns:
        int64 [N].
    """
    rng = rng_for(0, "noise")
    rows = rng.permutation(len(targets))[: round(share * len(targets))]
    changed = targets.copy()
    changed[rows] = (targets[rows] + rng.integers(1, classes, len(rows))) % classes
    return changed


def confused(targets: Int64[np.ndarray, " N"], pairs: Mapping[int, int], share: float) -> Int64[np.ndarray, " N"]:
    """Labels of which a share of some classes is changed, each to that of one other class.

    Args:
        targets: Labels, int64 [N].
        pairs: From a class to the one that it is taken for.
        share: From 0 to 1.

    Returns:
        int64 [N].
    """
    changed = targets.copy()
    for label, other in pairs.items():
        rows = np.flatnonzero(targets == label)
        changed[rng_for(0, "confused", label).permutation(rows)[: round(share * len(rows))]] = other
    return changed


def imbalanced(targets: Int64[np.ndarray, " N"], classes: int, factor: float) -> Int64[np.ndarray, " M"]:
    """Rows that are left where the most frequent class is ``factor`` times as frequent as the rarest.

    Those between fall evenly on a logarithmic scale (Cao et al. 2019, "Learning Imbalanced Datasets", section 4.1), in
    an order that is drawn.

    Args:
        targets: Labels, int64 [N].
        classes: Classes.
        factor: At least 1.

    Returns:
        Rows, ascending, int64 [M].
    """
    most = np.bincount(targets, minlength=classes).max()
    place = rng_for(0, "rank of a class").permutation(classes)
    order = rng_for(0, "imbalance").permutation(len(targets))
    kept = []
    for label in range(classes):
        wanted = max(1, round(most * factor ** (-place[label] / (classes - 1))))
        kept.append(order[targets[order] == label][:wanted])
    return np.sort(np.concatenate(kept))
