"""From a location to the objects that are there."""

from __future__ import annotations

from gstds_cache.files.location import Location
from gstds_cache.store.local import LocalTransport
from gstds_cache.store.objects import ObjectTransport
from gstds_cache.store.transport import Transport


def open_transport(location: Location) -> Transport:
    """The objects of the store at ``location``, which need not exist yet. A bucket is not asked anything yet."""
    return ObjectTransport(location) if location.path is None else LocalTransport(location.path)
