"""``gstds_cache.embed``: embed a data set once, or find the store in which that was done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EACCES, EEXIST, ENOTDIR, EPERM, EROFS
from pathlib import Path
from typing import Any, Unpack

from gstds_cache.cluster.engine import Engine
from gstds_cache.config import ENGINE, EmbedConfig, EmbedSettings, as_tuple, require_settings
from gstds_cache.costs.energy import EnergyMeter
from gstds_cache.costs.records import Cost, keep_record, store_costs
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.outputs import inside_warning
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding.decoding import keep_streams_apart
from gstds_cache.embedding.part import parse_part
from gstds_cache.embedding.run import embed_dataset, estimate_dataset
from gstds_cache.errors import GstdsError, UsageError
from gstds_cache.files.derived import cache_root, find_cache_root, hashes_folder
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.devices import describe_device, resolve_devices
from gstds_cache.runtime.notify import Notify, log
from gstds_cache.runtime.progress import Progress, ProgressBar, showing
from gstds_cache.store.embed_report import EmbedReport, Estimate
from gstds_cache.store.reader import EmbeddingStore


def embed(
    dataset: Any,
    cache: LocationLike | None = None,
    *,
    reuse: LocationLike | Sequence[LocationLike] = (),
    engine: str = ENGINE,
    gpus_per_task: float | None = None,
    progress: Progress | bool | None = True,
    notify: Notify | None = None,
    **settings: Unpack[EmbedSettings],
) -> EmbeddingStore:
    """Embed every image of ``dataset`` with a frozen reference model, and return the store of their embeddings.

    The same call again finds the store and embeds nothing; after an interrupt it goes on where it stopped. The store
    can be used at once: :func:`gstds_cache.select` takes it.

    On a CPU, :func:`gstds_cache.keep_freed_memory` before the first call can halve the model's time.
    It is a setting of the whole process, so only the commands make it by themselves.

    Args:
        dataset: A data set's URI, such as ``imagefolder:PATH``, or any map-style data set object, or a
            ``datasets.Dataset``.
        cache: The store's location: a directory, or ``s3://BUCKET/PREFIX``. None: a directory named by data set, model
            and their contents, in ``$GSTDS_CACHE`` or ``~/.cache/gstds-cache``.
        reuse: Other stores, complete or not. Rows of the same images by the same model are taken over from them.
        engine: Where images are embedded: ``local``, in this process; ``ray``, on the Ray cluster of ``$RAY_ADDRESS``
            or one that is started on this machine for the call; or ``ray:HOST:PORT`` (docs/ray.md).
        gpus_per_task: With Ray: GPUs of a task, or the part of one; None is one where the model runs on a GPU.
        progress: True shows a bar on stderr, False nothing; or a function that is called with phase, images done,
            images in all, and shares of the time.
        notify: Called with each line for the user: an estimate, warnings, notes. None logs them as warnings.
        **settings: Fields of :class:`gstds_cache.EmbedConfig`.

    Returns:
        The store. Its ``report`` says what this call did. With ``shard=I/N`` it may lack shards of other parts.

    Raises:
        UsageError: An argument cannot be meant, or the default place for stores cannot be written.
        DatasetError: The data set cannot be read, or an item is another than when it was hashed.
        EncoderError: The model cannot be built, or its rows mean nothing.
        FingerprintMismatchError: The store at ``cache`` holds something else, or one of ``reuse`` was made otherwise.
        ChunkCorruptError: A store is damaged.
        IncompleteError: The disk is too small, or memory or the disk ran out on the way; the same call goes on.
        IntegrityError: A file changed, or came back, since it was hashed.
    """
    require_settings(embed, EmbedConfig, settings)
    single = isinstance(reuse, str | os.PathLike | Location | EmbeddingStore)
    others = (reuse,) if single else as_tuple("reuse", reuse, "locations of stores")
    config, notify = EmbedConfig(**settings), notify or log
    parse_part(config.shard)
    where_run = Engine.parse(engine, gpus_per_task)
    _require_suitable(where_run, config)
    _require_locations(cache, others)
    root = None if cache is not None else cache_root("`cache`")
    hash_cache = HashCache(hashes_folder())
    keep_streams_apart(config.decoder)
    devices = resolve_devices(config.device)
    meter = EnergyMeter(*devices)
    with showing(progress, "images", check="shards") as show, _default_place(root):

        def report_progress(phase: str, done: int, total: int, shares: Mapping[str, float]) -> None:
            meter.add("embed")
            show(phase, done, total, shares)

        def tell(line: str) -> None:
            if isinstance(show, ProgressBar):
                show.end()
            notify(line)

        def hashed(done: int, total: int) -> None:
            report_progress("hash", done, total, {})

        with where_run.opened(tell) as executor:
            source = open_source(dataset, hash_cache=hash_cache, progress=hashed, executor=executor)
            _warn_if_inside(source, cache or root, tell)
            store = embed_dataset(
                source,
                config,
                where=cache,
                root=root,
                reuse=others,
                executor=executor,
                progress=report_progress,
                notify=tell,
                hash_cache=hash_cache,
            )
    meter.add("embed")
    report = store.report
    assert report is not None
    notes = [*report.notes, *hash_cache.notes]
    if not report.cache_hit:
        notes += _record_cost(report, meter, ", ".join(map(describe_device, devices)))
    for note in notes:
        notify(f"note: {note}")
    return store


def estimate_embedding(
    dataset: Any, cache: LocationLike | None = None, *, notify: Notify | None = None, **settings: Unpack[EmbedSettings]
) -> Estimate:
    """What :func:`embed` would take, from a few images. Hashes, embeds and writes nothing.

    Args:
        dataset: As for :func:`embed`.
        cache: As for :func:`embed`. None is taken for a store that is not there yet: its name needs every hash.
        notify: As for :func:`embed`.
        **settings: Fields of :class:`gstds_cache.EmbedConfig`.

    Returns:
        Time, disk, memory and batch size.

    Raises:
        UsageError: An argument cannot be meant, or the model does not fit the device.
        DatasetError: The data set cannot be read.
        EncoderError: The model cannot be built, or its rows mean nothing.
        FingerprintMismatchError: The store holds something else, as far as can be seen without hashing.
    """
    require_settings(estimate_embedding, EmbedConfig, settings)
    config, notify, root = EmbedConfig(**settings), notify or log, find_cache_root()
    parse_part(config.shard)
    _require_locations(cache)
    keep_streams_apart(config.decoder)
    source = open_source(dataset, hash_cache=HashCache(hashes_folder()), read=False)
    _warn_if_inside(source, cache or root, notify)
    return estimate_dataset(source, config, where=cache, root=root, notify=notify)


def _require_suitable(engine: Engine, config: EmbedConfig) -> None:
    """Refuse several devices in each task of Ray, GPUs for a model that runs on CPUs, and a part of what Ray spreads.

    Raises:
        UsageError: They were asked for.
    """
    if not engine.ray:
        return
    if config.shard is not None:
        raise UsageError(
            "`shard` and `engine='ray'` both say how shards are spread: give one of them",
            hint="on a Ray cluster leave `shard` out: all shards are given to its workers",
        )
    if config.device == "cpu" and engine.gpus_per_task is not None:
        raise UsageError("`device='cpu'` and `gpus_per_task` contradict each other", hint="leave one of them out")
    if "," in config.device:
        raise UsageError(
            f"`device`: got {config.device!r} with `engine='ray'`, expected one device",
            hint="several GPUs of a node are used by several tasks: give `device='cuda'`, and `gpus_per_task=1`",
        )


def _require_locations(cache: LocationLike | None, reuse: Sequence[LocationLike] = ()) -> None:
    """Refuse locations that cannot be meant, before a model is loaded."""
    for argument, location in (("`cache`", cache), *(("`reuse`", other) for other in reuse)):
        if location is not None:
            Location.parse(location, argument)


def _warn_if_inside(source: ImageSource, path: LocationLike | None, notify: Notify) -> None:
    if warning := inside_warning(source, path, what="the store", argument="cache"):
        notify(warning)


@contextmanager
def _default_place(root: Path | None) -> Iterator[None]:
    """Tell of a default place for stores that cannot be written; what was committed there has other errors.

    Yields:
        Nothing.

    Raises:
        UsageError: It cannot be written.
        OSError: Any other that was raised inside.
    """
    try:
        yield
    except OSError as error:
        denied = error.errno in {EACCES, EEXIST, ENOTDIR, EPERM, EROFS} and not isinstance(error, GstdsError)
        file = Path(error.filename or root or "")  # making the folder may fail at one above it
        if root is None or not denied or not (file.is_relative_to(root) or root.is_relative_to(file)):
            raise
        raise UsageError(
            f"the default place for stores cannot be written: {error.filename or root}: {error.strerror}",
            hint="pass `cache=STORE`, or set GSTDS_CACHE to a folder that can be written",
        ) from error


def _record_cost(report: EmbedReport, meter: EnergyMeter, device: str) -> list[str]:
    """Write down beside the store what it cost, for the ledgers of the runs that use it; a note where that fails."""
    cost = Cost(
        of=report.fingerprint,
        samples=report.embedded,
        reused=report.reused,
        seconds=report.seconds["total"],
        joules=meter.total,
        device=device,
        joules_from=meter.source,
    )
    # A record that was there before the first row is of another store of the same fingerprint, that was removed; or of
    # another part of this one.
    anew = not report.committed_before and report.shard is None
    note = keep_record(store_costs(report.location), cost, anew=anew, in_turn=report.shard is not None)
    return [note] if note else []
