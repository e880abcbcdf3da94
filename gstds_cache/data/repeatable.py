"""Are a data set's items the same each time they are read? A cache of images that nobody sees again is of no use."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from gstds_cache.data.labels import described
from gstds_cache.data.mapstyle import MapStyleSource, spread
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import DatasetError

ITEMS = 32
READS = 128
"""Of up to ``ITEMS`` items. A data set that flips every other image passes with a chance below 1e-28, one that changes
every tenth with 2e-6."""
SECONDS = 5.0
"""Items that take long are read no more after this, but for the first ``_GROUP`` of them, which are read twice."""
_GROUP = 4


def require_repeatable(source: MapStyleSource) -> None:
    """Refuse a data set that augments, or whose labels are drawn anew.

    Some items, spread over the data set, are read several times, other items in between. Those that cannot be read are
    passed over. What is different only in another process, or after more readings, is found later, by its hash.

    Args:
        source: The data set.

    Raises:
        DatasetError: An item was not the same in two readings; names the item.
    """
    rows = spread(len(source), ITEMS)
    seen: dict[int, tuple[bytes, int | str]] = {}
    begun = time.monotonic()
    for number, row in enumerate(_turns(rows, max(2, READS // len(rows)))):
        if number >= 2 * _GROUP and time.monotonic() - begun > SECONDS:
            return
        found = source.reading(row)
        if found is None:
            continue
        before = seen.setdefault(row, found)
        if found != before:
            what, each = "images", ""
            if found[0] == before[0]:
                what, each = "labels", f", {described(before[1])} and {described(found[1])}"
            raise DatasetError(
                f"data set {source.uri!r}, {source.name_of(row)}: got two different {what} for it{each}, expected the "
                "same each time",
                hint="take random transforms out of the dataset: augmentation comes after the cache"
                if what == "images"
                else "give each item the label it has: one that is drawn at random cannot be looked up again",
            )


def why_items_differ(source: ImageSource) -> str:
    """What may be behind items that are others now; empty for kinds of data sets whose items are files or arrays."""
    source = getattr(source, "base", source)
    if not isinstance(source, MapStyleSource):
        return ""
    return (
        f"the items of {source.uri} may be random: a transform that draws, an order that is shuffled or not sorted, "
        "files that changed. Read one twice, in two processes, and compare"
    )


def _turns(rows: Sequence[int], reads: int) -> Iterator[int]:
    """Rows in the order in which they are read: a few of them twice, the next few twice, then all again and again.

    So a data set that keeps the last image is found out, and the first comparisons come early.

    Yields:
        A row.
    """
    for start in range(0, len(rows), _GROUP):
        yield from 2 * list(rows[start : start + _GROUP])
    for _ in range(reads - 2):
        yield from rows
