"""Floors: so many rows of every class stay in every batch, whatever the rule says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from gstds_cache.errors import UsageError


def class_name(label: int, classes: Sequence[str]) -> str:
    """A class as people call it: its name, or its number where there is none."""
    return classes[label] if 0 <= label < len(classes) else f"class {label}"


def check_floor(floor: int, labels: Int[np.ndarray, " n"], classes: Sequence[str]) -> None:
    """Refuse a floor that no batch could keep.

    Args:
        floor: Rows of each class that are to stay in a batch, >= 1.
        labels: Labels of all rows that take part, -1 where there is none.
        classes: Class names by label.

    Raises:
        UsageError: There are no labels, or a class has fewer rows in the whole data set than the floor.
    """
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    if not len(names):
        raise UsageError("`min_per_class`: this store has no labels", hint="leave `min_per_class` out")
    least = int(counts.argmin())
    if counts[least] < floor:
        raise UsageError(
            f"`min_per_class={floor}`: {class_name(int(names[least]), classes)} has {counts[least]} rows in the whole "
            f"data set, expected {floor} at least",
            hint=f"use `min_per_class={counts[least]}` or less",
        )


def hold_floor(
    kept: Int64[np.ndarray, " M"], labels: Int64[np.ndarray, " B"], floor: int, classes: Sequence[str], where: str
) -> Int64[np.ndarray, " M"]:
    """Exchange rows until every class keeps ``floor`` of them, or all it has in the batch.

    A class that is short takes its dropped rows back, the first of the batch first; for each, the class with the most
    kept rows above its own need (of equals the lowest label; rows without a label count as a class without need) gives
    up its last row in the batch. Batches are in random order, so first and last mean nothing.

    Args:
        kept: Positions that the rule keeps, ascending.
        labels: Label of each row of the batch.
        floor: Rows to keep of each class, >= 1.
        classes: Class names by label, for the error.
        where: The batch, for the error.

    Returns:
        As many positions, ascending; the same where no class was short.

    Raises:
        UsageError: All needs together are more than the batch keeps.
    """
    names, code = np.unique(labels, return_inverse=True)
    present = np.bincount(code, minlength=len(names))
    need = np.where(names >= 0, np.minimum(present, floor), 0)
    stays = np.zeros(len(labels), bool)
    stays[kept] = True
    have = np.bincount(code[kept], minlength=len(names))
    if (have >= need).all():
        return kept
    if need.sum() > len(kept):
        short = int(np.argmax(need - have))
        raise UsageError(
            f"`min_per_class={floor}`: {where} keeps {len(kept)} of {len(labels)} rows, but holds {len(names)} classes "
            f"that need {need.sum()} together ({class_name(int(names[short]), classes)} would keep {have[short]} of "
            f"{present[short]})",
            hint="lower `min_per_class` or the filter ratio, or raise `batch_size`",
        )
    for short in np.flatnonzero(have < need).tolist():
        for back in np.flatnonzero((code == short) & ~stays)[: need[short] - have[short]]:
            gives = int(np.argmax(have - need))
            stays[np.flatnonzero((code == gives) & stays)[-1]] = False
            stays[back] = True
            have[gives] -= 1
            have[short] += 1
    return np.flatnonzero(stays).astype(np.int64)
