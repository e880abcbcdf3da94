"""Removing a store: what makes it one goes first, so that an interrupted removal leaves nothing that looks whole."""

from __future__ import annotations

from contextlib import suppress

from gstds_cache.errors import UsageError, command_line
from gstds_cache.files.location import LocationLike
from gstds_cache.store import layout
from gstds_cache.store.local import LOCK
from gstds_cache.store.metadata import StoreMetadata


def remove_store(where: LocationLike) -> int:
    """Remove the store at ``where``. Files in its directory that are not its own stay, and so does the directory then.

    Args:
        where: The store.

    Returns:
        How many objects were removed.

    Raises:
        StoreNotFoundError: There is no store; nothing is touched.
        UsageError: It is a link to one; nothing is touched.
        IncompleteError: Another process is writing it.
    """
    metadata = StoreMetadata(where)
    transport, root = metadata.transport, metadata.location.path
    if root is not None and root.is_symlink():
        raise UsageError(
            f"{root} is a link to {root.resolve()}, and would be left without its store: nothing was removed",
            hint=f"to remove the store: {command_line('gstds-cache', 'rm', root.resolve())}; the link alone: "
            f"{command_line('rm', root)}",
        )
    with transport.lock():
        transport.collect_temporaries()
        own = [key for key in transport.sizes() if key.partition("/")[0] in layout.OWN_NAMES]
        first = {layout.COMPLETE: 0, layout.GROUP: 2}
        for key in sorted(own, key=lambda key: (first.get(key, 1), key)):
            transport.delete(key)
        if root is not None:
            (root / LOCK).unlink(missing_ok=True)  # while it is ours: afterwards it may be another's
    if root is not None:
        for lock in (root / layout.PARTS).glob(f"*/{LOCK}"):
            lock.unlink(missing_ok=True)
        folders = [path for path in root.rglob("*") if path.is_dir()]
        for folder in [*sorted(folders, key=lambda path: -len(path.parts)), root]:
            with suppress(OSError):  # Not empty: it holds something of somebody else's.
                folder.rmdir()
    return len(own)
