"""``gstds_cache.append_to_store``: a store that grows in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gstds_cache.config import DEVICE, EmbedConfig, as_type
from gstds_cache.costs.energy import EnergyMeter
from gstds_cache.costs.records import Cost, added, keep_record, recall_store, store_costs
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.append import AppendReport, append_dataset
from gstds_cache.embedding.decoding import keep_streams_apart
from gstds_cache.errors import UsageError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.devices import describe_device, resolve_devices
from gstds_cache.runtime.notify import Notify, log
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.grown import read_metadata


def append_to_store(
    store: LocationLike,
    dataset: Any,
    *,
    model: str | None = None,
    device: str = DEVICE,
    workers: int | None = None,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
) -> AppendReport:
    """Embed what is new in ``dataset`` and append it to a store, in place.

    Items are found by their ids. One that the store has with the same bytes and label is passed over; new ones become
    the last rows, in the data set's order. Nothing that was there is touched: a kill at any point leaves the old store
    or the new one, and the same call goes on. Selections made before stay valid: the store can still be opened as it
    was (``EmbeddingStore(store, state=FINGERPRINT)``).

    Where the data set begins with the store's items, in their order, the grown store has the rows and the fingerprint
    of a store of the whole data set that was made at once. Else its order is its own.

    Args:
        store: Its location: a directory, or ``s3://BUCKET/PREFIX``. It has to be complete.
        dataset: As for :func:`gstds_cache.embed`: the grown data set, or new items alone.
        model: Where the model is now; None is where it was when the store was made.
        device: Where the model runs.
        workers: Processes that decode images; None fits the machine and the data set.
        progress: As for :func:`gstds_cache.embed`.
        notify: Called with each line for the user. None logs them as warnings.

    Returns:
        What was done.

    Raises:
        UsageError: An argument cannot be meant, the rows of the store were imported, or it does not say where its model
            is.
        StoreNotFoundError: There is no store.
        DatasetError: The data set cannot be read.
        FingerprintMismatchError: The model is not the store's, or an item or class is another than in the store;
            nothing was changed.
        ChunkCorruptError: The store is damaged.
        IncompleteError: It is not complete, another process writes it, or what it takes ran out; the same call goes on.
        IntegrityError: A file changed, or came back, since it was hashed.
    """
    model, device = as_type("model", model, str | None), as_type("device", device, str)
    workers = as_type("workers", workers, int | None)
    where, notify = Location.parse(store, "`store`").absolute(), notify or log
    metadata = read_metadata(where)
    model = model or metadata.model_uri
    if not model and not metadata.spec.imported:
        raise UsageError(f"{where} does not say where its model is", hint="give `model`")
    config = EmbedConfig(
        model=model or "",
        device=device,
        workers=workers,
        dtype=metadata.spec.dtype,
        decoder=metadata.spec.encoder.get("preprocessing", {}).get("decoder", "pillow"),
        cuda_graphs=False,  # there is little to embed, and no argument to do without if it fails
    )
    hash_cache = HashCache(hashes_folder())
    before = recall_store(where, metadata.spec.fingerprint)
    keep_streams_apart(config.decoder)
    devices = resolve_devices(config.device)
    meter = EnergyMeter(*devices)
    with showing(progress, "images", check="shards") as show:

        def report_progress(phase: str, done: int, total: int, shares: Mapping[str, float]) -> None:
            meter.add("embed")
            show(phase, done, total, shares)

        source = open_source(
            dataset, hash_cache=hash_cache, progress=lambda done, total: report_progress("hash", done, total, {})
        )
        report = append_dataset(where, source, config, progress=report_progress, notify=notify, hash_cache=hash_cache)
    meter.add("embed")
    if report.appended and before is not None and before.of == report.fingerprint_before:
        _record_cost(report, before, meter, describe_device(devices[0]), notify)
    return report


def _record_cost(report: AppendReport, before: Cost, meter: EnergyMeter, device: str, notify: Notify) -> None:
    """Add to what the store cost what the new rows did; where that is not known, the sum is not."""
    cost = Cost(
        of=report.fingerprint,
        samples=report.embedded,
        reused=report.reused,
        seconds=report.seconds["total"],
        joules=meter.total,
        device=device,
        joules_from=meter.source,
    )
    if note := keep_record(store_costs(report.location), added(before, cost)):
        notify(f"note: {note}")
