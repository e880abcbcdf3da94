"""How many classes a network is trained on, and whether the evaluation set has the same."""

from __future__ import annotations

from gstds_cache.data.label_counts import LabelCounts
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import UsageError


def count_classes(source: ImageSource, evaluation: ImageSource | None) -> int:
    """How many outputs the network needs.

    Args:
        source: What is trained on.
        evaluation: What accuracy is measured on.

    Returns:
        The number of classes.

    Raises:
        UsageError: There are no labels, or labels that are no classes, or the evaluation set has other classes.
    """
    counts = LabelCounts.of(source.labels)
    if not counts.labelled:
        raise UsageError(f"{source.uri} has no labels; training needs them")
    doubt, outputs = counts.doubt(len(source.classes)), max(len(source.classes), counts.largest + 1)
    if doubt:
        raise UsageError(
            f"{source.uri} has {doubt}, and the network would need {outputs:,} outputs: they look like ids",
            hint="number the classes from 0, e.g. by np.unique(labels, return_inverse=True), or, where all of them are "
            "classes, give the data set their names in an attribute 'classes'",
        )
    if evaluation is not None:
        _require_same_classes(source, evaluation, outputs)
    return outputs


def _require_same_classes(source: ImageSource, evaluation: ImageSource, outputs: int) -> None:
    largest = int(evaluation.labels.max(initial=-1))
    if largest < 0:
        raise UsageError(f"`evaluation` {evaluation.uri} has no labels; accuracy needs them")
    if largest >= outputs:
        raise UsageError(
            f"`evaluation` {evaluation.uri} has labels up to {largest:,}, and the network {outputs:,} outputs, as "
            f"{source.uri} has so many classes",
            hint="number the classes of both data sets alike",
        )
    if list(evaluation.classes) != list(source.classes):
        raise UsageError(
            f"`evaluation` {evaluation.uri} has other classes than {source.uri}: {len(evaluation.classes)} and "
            f"{len(source.classes)}, first {list(evaluation.classes)[:3]} and {list(source.classes)[:3]}",
            hint="where labels are text, give both data sets the same attribute 'classes'"
            if source.classes and evaluation.classes
            else "",
        )
