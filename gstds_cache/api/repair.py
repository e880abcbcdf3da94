"""``gstds_cache.repair_store``, and the comparison of stored rows with the model: both need data set and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gstds_cache.config import DEVICE, as_tuple, as_type
from gstds_cache.data.align import in_order
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.check import SampleReport, check_sample
from gstds_cache.embedding.decoding import decode_by, keep_streams_apart, try_decoder
from gstds_cache.embedding.repair import RepairReport, repair, require_same_data
from gstds_cache.embedding.settle import prepare_as_stored
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import UsageError
from gstds_cache.files.derived import hashes_folder
from gstds_cache.files.location import LocationLike
from gstds_cache.runtime.devices import resolve_device
from gstds_cache.runtime.notify import log
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.store.grown import GrownMetadata, read_metadata
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.reader import EmbeddingStore


def repair_store(
    store: LocationLike,
    *,
    shards: Sequence[int] = (),
    dataset: Any = None,
    model: str | None = None,
    device: str = DEVICE,
    workers: int | None = None,
    progress: Progress | bool | None = True,
) -> RepairReport:
    """Hash every object of a store, and make again what is missing or damaged, and nothing else.

    Args:
        store: Its location: a directory, or ``s3://BUCKET/PREFIX``.
        shards: Shards to make again as well, whatever their hashes.
        dataset: Where the data set is now; None is where it was when the store was made.
        model: Where the model is now; None is where it was when the store was made.
        device: Where the model runs.
        workers: Processes that decode images; None fits the machine and the data set.
        progress: As for :func:`gstds_cache.embed`.

    Returns:
        What was done.

    Raises:
        UsageError: A shard does not exist, or the store does not say where its data set or model is.
        StoreNotFoundError: There is no store.
        EncoderError: The model's rows mean nothing.
        FingerprintMismatchError: The data set or the model is not the store's; nothing was changed.
        IncompleteError: Another process is writing the store, or what it takes ran out; the same call goes on.
        IntegrityError: The specification itself is damaged; or a file changed, or came back, since it was hashed.
    """
    shards = [as_type("shards", shard, int) for shard in as_tuple("shards", shards, "whole numbers")]
    workers = as_type("workers", workers, int | None)
    model, device = as_type("model", model, str | None), as_type("device", device, str)
    hash_cache = HashCache(hashes_folder())
    metadata = read_metadata(store)
    source, encoder = _source_and_encoder(metadata, dataset, model, hash_cache, device)
    with showing(progress, "images", check="shards") as show:
        return repair(
            metadata,
            source,
            encoder,
            shards=shards,
            device=device,
            workers=workers,
            hash_cache=hash_cache,
            progress=show,
        )


def compare_sample(
    store: LocationLike, *, rows: int, seed: int, dataset: Any, model: str | None, device: str
) -> SampleReport:
    """Embed some rows of a store again and compare: ``level="sample"`` of :func:`gstds_cache.verify_store`.

    Args:
        store: The store.
        rows: How many rows.
        seed: Which.
        dataset: Where the data set is now; None is where it was when the store was made.
        model: Where the model is now; None is where it was when the store was made.
        device: Where the model runs.

    Returns:
        How they compare.

    Raises:
        FingerprintMismatchError: The data set or the model is not the store's.
        IncompleteError: A file could be read when it was hashed, and cannot now.
        IntegrityError: A file changed, or came back, since it was hashed.
    """
    metadata = read_metadata(store)
    opened = EmbeddingStore(metadata, allow_partial=True, access="window")
    hash_cache = HashCache(hashes_folder())
    source, encoder = _source_and_encoder(metadata, dataset, model, hash_cache, device)
    manifest = require_same_data(metadata, source, encoder, hash_cache)
    return check_sample(opened, as_hashed(source, manifest.sha256), encoder, rows=rows, seed=seed, device=device)


def _source_and_encoder(
    store: StoreMetadata, dataset: Any, model: str | None, hash_cache: HashCache, device: str
) -> tuple[ImageSource, Encoder]:
    """The data set and the model that a store was made with, from where they were then or where they are now.

    Raises:
        UsageError: The rows were imported; nobody says where one of the two is; or the decoder is not on this device.
    """
    if store.spec.imported:
        raise UsageError(
            f"{store.location} holds imported rows, which no model here can make again",
            hint="remove it (gstds-cache rm) and import the same vectors again: selections and guidance made from it "
            f"stay valid; it was made with: {store.finish_command}",
        )
    given = dataset is not None
    dataset = dataset if given else store.dataset_uri
    model = model or store.model_uri
    if dataset is None or not model:
        argument, what = ("dataset", "data set") if dataset is None else ("model", "model")
        raise UsageError(f"{store.location} does not say where its {what} is", hint=f"give `{argument}`")
    decoder = store.spec.encoder.get("preprocessing", {}).get("decoder", "pillow")
    keep_streams_apart(decoder)
    encoder = open_encoder(model, allow_untrained=True)
    run_on = resolve_device(device)
    decode_by(encoder, decoder, run_on)
    prepare_as_stored(encoder, store.spec.encoder, log)
    try_decoder(encoder, run_on)
    try:
        source = open_source(dataset, hash_cache=hash_cache)
    except UsageError as error:
        if given:
            raise
        raise type(error)(
            f"{error.message} (where {store.location} says that its data set is)",
            hint="if it was moved, give `dataset`, with its kind: where it is now",
        ) from error
    if isinstance(store, GrownMetadata):  # whose order may be its own
        source = in_order(source, store.manifest().ids)
    return source, encoder
