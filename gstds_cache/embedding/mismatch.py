"""Why a store is not this data set's: which items differ, where only their bytes do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from gstds_cache.data.files import NEWER_EXTENSIONS
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.repeatable import why_items_differ
from gstds_cache.data.source import ImageSource
from gstds_cache.errors import FingerprintMismatchError, IntegrityError
from gstds_cache.store.metadata import StoreMetadata


@contextmanager
def explained(stored: StoreMetadata, manifest: DatasetManifest, source: ImageSource) -> Iterator[None]:
    """Add to a mismatch in the block what is known of the items.

    Args:
        stored: The store's metadata.
        manifest: The data set's items, as they are now.
        source: The data set.

    Yields:
        Once.

    Raises:
        FingerprintMismatchError: It was raised in the block.
    """
    try:
        yield
    except FingerprintMismatchError as error:
        lines = _what_differs(stored, manifest, source)
        raise FingerprintMismatchError("\n    ".join([error.message, *lines]), hint=error.hint) from error


def _what_differs(stored: StoreMetadata, manifest: DatasetManifest, source: ImageSource) -> list[str]:
    if stored.spec.items_root == manifest.root:
        return []
    if stored.spec.items != len(manifest):
        newer = sum(name.lower().endswith(NEWER_EXTENSIONS) for name in manifest.ids)
        return [f"{newer:,} of the items are AVIF or HEIC files, which are items now and were not"] if newer else []
    try:
        before = stored.manifest()
    except IntegrityError:  # a damaged list of items is verify's to tell
        return []
    row = _first_difference(before.ids, manifest.ids)
    if row is not None:
        return [
            "the items have other ids, or another order: the first that differs is item "
            f"{row}, {manifest.ids[row]!r}, and was {before.ids[row]!r}"
        ]
    # Of vectors that were imported without their data set no hash is known: zeros.
    known = before.sha256.any(axis=1)
    other_bytes = np.flatnonzero(known & (before.sha256 != manifest.sha256).any(axis=1))
    labels = np.flatnonzero(before.labels != manifest.labels)
    differ = f"{len(other_bytes):,} have other bytes, {len(labels):,}" if known.any() else f"{len(labels):,} have"
    lines = [
        f"of {len(manifest):,} items {differ} another label; the ids are the same",
        *(f"the first with {what}: item {rows[0]}, {manifest.ids[int(rows[0])]!r}"
          for what, rows in (("other bytes", other_bytes), ("another label", labels)) if len(rows)),
    ]  # fmt: skip
    why = why_items_differ(source)
    return [*lines, why] if why and len(other_bytes) else lines


def _first_difference(before: Sequence[str], now: Sequence[str]) -> int | None:
    """The first row whose ids differ, of as many; None where all are the same."""
    if before == now:
        return None
    return next(row for row, (one, other) in enumerate(zip(before, now, strict=True)) if one != other)
