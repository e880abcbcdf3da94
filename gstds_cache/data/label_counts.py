"""Are labels classes, or the ids of something? A network has an output for each number up to the largest label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from gstds_cache.files import mapped

UNUSED = 10
"""Outputs for each class that items have, up to which labels are class indices: of ImageNet, a tenth is fine."""
SPARE = 100
MANY = 1000
"""Different labels from which on each needs two items; fewer cost little, whatever they mean."""

_PIECE = 1 << 18


@dataclass(frozen=True)
class LabelCounts:
    """What labels a data set has.

    Attributes:
        labelled: Items with a label.
        different: Different labels.
        largest: The largest; -1 where there is none.
    """

    labelled: int
    different: int
    largest: int

    @classmethod
    def of(cls, labels: Int[np.ndarray, " N"]) -> LabelCounts:
        """Count labels; what is held is one piece of them, and the different ones."""
        labelled, seen = 0, np.empty(0, np.int64)
        for start in range(0, len(labels), _PIECE):
            part = labels[start : start + _PIECE]
            part = part[part >= 0]
            labelled, seen = labelled + len(part), np.union1d(seen, part)
            mapped.release(labels)
        return cls(labelled, len(seen), int(seen.max(initial=-1)))

    @property
    def one_each(self) -> bool:
        """Whether labels are many, and on average fewer than two items have the same: nothing can be learnt of them."""
        return self.different > MANY and self.labelled < 2 * self.different

    def doubt(self, named: int) -> str:
        """Why the labels are hardly classes; empty where they may be.

        Args:
            named: How many classes have a name: as many may be, whether items have them or not.
        """
        if self.largest >= max(named, UNUSED * self.different + SPARE):
            return f"labels up to {self.largest:,}, but only {self.different:,} different"
        if self.one_each:
            return f"{self.different:,} different labels for {self.labelled:,} items, which is hardly two items a class"
        return ""


def label_notes(labels: Int[np.ndarray, " N"], named: int) -> tuple[str, ...]:
    """What a user should be told of a data set's labels before they are built on.

    Args:
        labels: Of every item, -1 where there is none.
        named: How many classes have a name.

    Returns:
        No note, one or two.
    """
    counts = LabelCounts.of(labels)
    if not counts.labelled:
        return ("labels: none; selection goes by the images alone, and gstds-train needs labels",)
    doubt, without = counts.doubt(named), len(labels) - counts.labelled
    notes = [f"labels: {without:,} of {len(labels):,} items have none"] if without else []
    return (*notes, *([f"{doubt}: they look like ids, which gstds-train refuses as classes"] if doubt else []))
