"""From a location to the objects that are there."""

from __future__ import annotations

from gstds_cache.files.location import Location
from gstds_cache.store.local import LocalTransport
from gstds_cache.store.objects import ObjectTransport
from gstds_cache.store.transport import Transport


def open_transport(location: Location, *, shared: bool = False) -> Transport:
    """The objects of the store at ``location``, which need not exist yet. A bucket is not asked anything yet.

    Args:
        location: The store.
        shared: Whether a directory's lock lets other writers in that share it; a bucket's always does.

    Returns:
        The objects.
    """
    return ObjectTransport(location) if location.path is None else LocalTransport(location.path, shared=shared)
