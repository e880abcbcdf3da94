"""A held-out part of any data set, decided by each item's content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashing import UNREADABLE
from gstds_cache.data.item_hashes import hash_items
from gstds_cache.data.names import AT_ONCE, Names
from gstds_cache.data.source import ImageSource
from gstds_cache.data.subset import Subset, taken
from gstds_cache.errors import DatasetError, UsageError, unknown_name
from gstds_cache.files import mapped
from gstds_cache.runtime.progress import Counted

SPLITS = ("train", "test")
DEFAULT_HOLDOUT = 0.2


def split_parameters(
    uri: str, params: dict[str, str], others: Sequence[str] = (), *, parts: bool = True
) -> tuple[str, float] | None:
    """Read ``split`` and ``holdout``.

    Args:
        uri: The data set as the user named it.
        params: Its query; ``split`` is ``train`` or ``test``, ``holdout`` the fraction held out for testing.
        others: Parameters of the data set's own kind, which are not among ``params``, for errors.
        parts: Whether ``split`` and ``holdout`` may be asked for.

    Returns:
        The part, and the fraction held out; None where no part is asked for.

    Raises:
        UsageError: A parameter is unknown, or has a value it cannot have.
    """  # noqa: DOC501
    known = (*others, "split", "holdout") if parts else tuple(others)
    for name in params:
        if name not in known:
            raise unknown_name(f"query parameter of data set {uri!r}:", name, known)
    split, given = params.get("split"), params.get("holdout")
    if split is None:
        if given is not None:
            raise UsageError(
                f"data set {uri!r}: got holdout={given} without split, which would hold nothing out",
                hint=f"say which part is meant: split=train&holdout={given}, or split=test&holdout={given}",
            )
        return None
    if split not in SPLITS:
        raise UsageError(f"data set {uri!r}: got split={split}, expected split=train or split=test")
    try:
        holdout = DEFAULT_HOLDOUT if given is None else float(given)
    except ValueError:
        holdout = -1.0
    if not 0 < holdout < 1:
        raise UsageError(f"data set {uri!r}: got holdout={given}, expected a fraction between 0 and 1, e.g. 0.2")
    return split, holdout


def split_by_content(
    source: ImageSource,
    split: str,
    holdout: float,
    *,
    uri: str = "",
    hash_cache: HashCache | None = None,
    progress: Counted | None = None,
    read: bool = True,
) -> Subset:
    """Take the training or the test part of a source.

    An item is held out if the first 8 bytes of its SHA-256, read as a fraction, are below ``holdout``. Content and not
    position decides, because web-crawled data sets are full of exact duplicates, and one on each side would let a test
    reward memory; because adding or renaming items then moves no other item across; and because it needs no file that
    records the split. The held-out share is close to ``holdout`` and not exactly it. Every item is read once, or not at
    all where ``hash_cache`` knows it.

    Args:
        source: The whole.
        split: ``train`` or ``test``.
        holdout: The fraction held out, between 0 and 1.
        uri: The part as the user named it; that of the whole by default.
        hash_cache: Digests kept from before.
        progress: Called with (items hashed, items in all).
        read: Whether files are read to be hashed. If not, the name decides for a file that ``hash_cache`` does not
            know: the part is about as large, and is marked as ``estimated``.

    Returns:
        The part.

    Raises:
        DatasetError: The part would be empty.
    """
    digests = hash_items(source, hash_cache=hash_cache, progress=progress, read=read)
    held_out, unread = mapped.zeros((len(source),), np.bool_), 0
    for start in range(0, len(source), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        held_out[part], count = _held_out(source.ids[part], digests[part], holdout)
        unread += count
    rows = np.flatnonzero(held_out if split == "test" else ~held_out).astype(np.int64)
    if not rows.size:
        raise DatasetError(
            f"data set {(uri or source.uri)!r}: got 0 of {len(source)} items in its {split} part, expected some",
            hint="use another holdout, or a larger data set",
        )
    estimated = unread > 0 and not read
    about = f"; about, as {unread:,} files are not hashed" if estimated else ""
    return Subset(
        base=source,
        uri=uri or source.uri,
        rows=rows,
        ids=Names.of((source.ids[row] for row in map(int, rows)), "strict"),
        labels=taken(source.labels, rows),
        notes=(*source.notes, f"{split} part: {len(rows)} of {len(source)} items (holdout {holdout:g}{about})"),
        estimated=estimated,
    )


def _held_out(
    ids: Sequence[str], digests: UInt8[np.ndarray, "n 32"], holdout: float
) -> tuple[Bool[np.ndarray, " n"], int]:
    """Which items are held out, and how many of them have no digest."""
    digests = digests.copy()
    unread = np.flatnonzero((digests == np.frombuffer(UNREADABLE, np.uint8)).all(axis=1)).tolist()
    for row in unread:
        # Items without a digest go by their names; else all of them would be test items.
        digests[row] = np.frombuffer(hashlib.sha256(ids[row].encode()).digest(), np.uint8)
    # int(x * 2**53) of a float is exact, so the comparison is the same on every machine.
    fractions = digests[:, :8].copy().view(">u8")[:, 0] >> np.uint64(11)
    return np.asarray(fractions < np.uint64(int(holdout * 2**53))), len(unread)
