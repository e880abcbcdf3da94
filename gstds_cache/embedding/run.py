"""Embedding a data set once: plan, skip what is committed, embed the rest, finish."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.data.decoders import Workers
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.hashed import as_hashed
from gstds_cache.data.label_counts import label_notes
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.source import ImageSource
from gstds_cache.embedding.clock import Clock
from gstds_cache.embedding.decoding import decode_by, start_workers, try_decoder
from gstds_cache.embedding.elsewhere import Anywhere
from gstds_cache.embedding.estimate import disk_bytes, estimate_run, require_disk, workers_for
from gstds_cache.embedding.job import (
    EmbedJob,
    check_determinism,
    embed_command,
    find_store,
    require_fit,
    resolve_spec,
    resolve_store,
)
from gstds_cache.embedding.part import finish_if_last, parse_part
from gstds_cache.embedding.reuse import KnownRows
from gstds_cache.embedding.settle import SIZE_BY, Settled, Settling
from gstds_cache.embedding.several import DeviceSetup, SeveralDevices
from gstds_cache.embedding.shard import EmbedTask
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.encoders.preprocessing import Preprocessing
from gstds_cache.errors import ChunkCorruptError
from gstds_cache.files.digest import digest_of
from gstds_cache.files.location import Location, LocationLike
from gstds_cache.runtime.devices import describe_device, resolve_devices
from gstds_cache.runtime.executor import Executor, LocalExecutor
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.progress import Progress
from gstds_cache.store.commit_record import counts_of
from gstds_cache.store.embed_report import EmbedReport, Estimate
from gstds_cache.store.factory import open_transport
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.spec import CacheSpec, require_same
from gstds_cache.store.writer import StoreWriter, open_writer

ESTIMATE_FROM = 1000
"""Images from which on a run is estimated before it begins."""
NOTHING_TO_REUSE = (
    "note: `reuse`: none of these items has a row there. Rows are found by the hash of an item's bytes: those of its "
    "file, or, of a data set that is a Python object, those of its pixels. One does not find the other"
)


def embed_dataset(
    source: ImageSource,
    config: EmbedConfig,
    *,
    where: LocationLike | None = None,
    root: Path | None = None,
    reuse: Sequence[LocationLike] = (),
    executor: Executor | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
    hash_cache: HashCache | None = None,
) -> EmbeddingStore:
    """Embed ``source`` into a store, or find that this was done already.

    Args:
        source: The data set.
        config: How to embed it.
        where: The store: a directory, or a URL; None makes a name from data set, model and fingerprint under ``root``.
        root: The folder of stores that are named by their contents; needed where ``where`` is None.
        reuse: Other stores, complete or not; rows of the same bytes by the same encoder are taken over.
        executor: Where shards run; in this process by default, and in others where ``config`` names several devices.
        progress: Called with phase, images done, images in all, and shares of the time (:meth:`Clock.shares`; empty
            while hashing).
        notify: Called with lines for the user before the work begins: an estimate, a batch size that did not fit.
        hash_cache: Hashes of files remembered from earlier runs.

    Returns:
        The store; its ``report`` says what was done. Where ``config`` names a part of it, other shards may be missing.

    Raises:
        ValueError: Neither ``where`` nor ``root`` is given.
        UsageError: ``where`` is no place for a store, the model does not fit the device, or there is no such decoder.
        EncoderError: The model cannot be built, or its rows mean nothing.
        FingerprintMismatchError: The store holds something else, or a store of ``reuse`` was made in another way.
        ChunkCorruptError: A store is damaged.
        IncompleteError: The disk is too small; or memory or the disk ran out on the way, or a process that decodes was
            killed, and the same call goes on from what is committed.
        IntegrityError: A file is another than when it was hashed.
        DatasetError: So is an item of a user's own data set.
    """
    if where is None and root is None:
        raise ValueError("where or root is needed")
    begun = time.perf_counter()
    parse_part(config.shard)
    progress = progress or (lambda _phase, _done, _total, _shares: None)
    device = resolve_devices(config.device)[0]

    def check(done: int, total: int) -> None:
        progress("check", done, total, {})

    manifest = build_manifest(
        source,
        hash_cache=hash_cache,
        progress=lambda done, total: progress("hash", done, total, {}),
        executor=executor,
    )
    hashed = time.perf_counter()
    encoder = open_encoder(config.model, allow_untrained=config.allow_untrained)
    decode_by(encoder, config.decoder, device)
    settling = Settling(encoder, config, source)
    name = partial(_default_name, source, encoder, manifest, config)
    if where is None and root is not None:
        where = _store_by_name(root, settling, name)
    stored = None if where is None else find_store(Location.parse(where, "`cache`").absolute())
    settled = _settle(settling, stored, reuse, notify)
    config = settled.config
    job = EmbedJob(
        as_hashed(source, manifest.sha256), config, device, encoder, notify or (lambda _line: None), settled.looks_at
    )
    job.seconds = {"hash": hashed - begun, "model": time.perf_counter() - hashed}
    if where is None:
        assert root is not None
        where = root / name(encoder.spec.preprocessing)
    location = Location.parse(where, "`cache`").absolute()
    if reuse and (stored is None or stored.complete() is None):
        job.known = KnownRows(reuse, manifest.sha256, encoder.spec.to_dict(), config.dtype, job.notify)
        if not job.known.count and not job.known.of_unknown_code:
            job.notify(NOTHING_TO_REUSE)
    with nullcontext() if executor is not None else _workers_ahead(job, stored) as workers:
        try_decoder(encoder, device)
        spec, hit = resolve_store(job, stored, manifest)
        if hit is not None:
            job.seconds["total"] = time.perf_counter() - begun
            hit.report = _report(job, hit, before=spec.items, clock=Clock(started=0.0), estimate=None)
            return hit
        estimating = time.perf_counter()
        estimate = _estimate_rest(job, location, stored, spec, here=executor is None)
        job.seconds["estimate"] = job.seconds.pop("fit", 0.0) + time.perf_counter() - estimating
        attributes = {
            "kind": manifest.kind,
            "classes": list(manifest.classes),
            "provenance": provenance_of(source.uri, config, job.devices)
            | ({SIZE_BY: settled.by} if settled.by else {}),
        }
        if stored is not None and job.part is not None and not job.missing(stored, spec):
            # Another process may hold the lock to finish the store; there is nothing to wait for.
            metadata, before, clock = stored, sum(map(len, map(spec.rows_of, job.shards(spec)))), Clock(started=0.0)
        else:
            items, shared = manifest.to_arrow(), job.part is not None
            with open_writer(
                location, spec, labels=manifest.labels, items=items, attributes=attributes, shared=shared
            ) as writer:
                del items
                anywhere = None if executor is None else Anywhere(executor, manifest.sha256, reuse)
                task, before = fill(job, writer, workers, anywhere, progress)
                metadata, clock, finishing = writer.metadata, task.clock, time.perf_counter()
                if not shared:
                    writer.finish(check)
    if job.part is not None:  # without the lock, which others may share
        finishing = time.perf_counter()
        metadata = finish_if_last(metadata, check, job.notify)
    # A part may end while another process writes COMPLETE: no shard is left then, and the store is not complete yet.
    complete = job.part is None or metadata.complete() is not None
    store = EmbeddingStore(metadata, allow_partial=not complete, among=None if complete else job.shards(metadata.spec))
    job.seconds |= {"finish": (ended := time.perf_counter()) - finishing, "total": ended - begun}
    left = 0 if complete else metadata.spec.shards - len(metadata.committed())
    report = _report(job, store, before=before, clock=clock, estimate=estimate)
    store.report = replace(report, shards_left=left, complete=complete)
    return store


def estimate_dataset(
    source: ImageSource,
    config: EmbedConfig,
    *,
    where: LocationLike | None = None,
    root: Path | None = None,
    notify: Notify | None = None,
) -> Estimate:
    """What :func:`embed_dataset` would need. Hashes nothing and writes nothing.

    Args:
        source: The data set.
        config: How to embed it.
        where: The store. None, which is named by the data set's hashes, is taken for a store that is not there yet.
        root: The folder of stores that are named by their contents.
        notify: Called with lines for the user.

    Returns:
        The estimate.

    Raises:
        UsageError: The model does not fit the device.
        EncoderError: The model cannot be built, or its rows mean nothing.
        FingerprintMismatchError: The store at ``where`` holds something else, as far as can be seen without hashing.
    """
    device = resolve_devices(config.device)[0]
    encoder = open_encoder(config.model, allow_untrained=config.allow_untrained)
    decode_by(encoder, config.decoder, device)
    try_decoder(encoder, device)
    location = None if where is None else Location.parse(where)
    stored = None if location is None else find_store(location)
    settled = _settle(Settling(encoder, config, source), stored, notify=notify)
    config = settled.config
    job = EmbedJob(source, config, device, encoder, notify or (lambda _line: None), settled.looks_at)
    # The part of a data set whose files are not hashed has about as many items.
    items = stored.spec.items if stored is not None and getattr(source, "estimated", False) else len(source)
    spec = resolve_spec(job, items, "" if stored is None else stored.spec.items_root, stored)
    if stored is not None:
        require_same(stored.spec, spec, where=stored.location)
        require_fit(job, stored)
    check_determinism(job, spec)
    folder = location or (None if root is None else Location(root))
    return _estimate(job, spec, folder, stored)


def _settle(
    settling: Settling, stored: StoreMetadata | None, reuse: Sequence[LocationLike] = (), notify: Notify | None = None
) -> Settled:
    """Settle what the user left open: as the store does, else as the first of ``reuse`` does, else by the images."""
    if stored is not None:
        settling.take_code(stored.spec.encoder, notify)
    others = [] if stored is not None else [find_store(Location.parse(where, "`reuse`")) for where in reuse]
    for known in (stored, *others):
        settled = None if known is None else settling.as_stored(known.spec.encoder)
        if settled is not None:
            return settled
    return settling.by_images()


def _store_by_name(root: Path, settling: Settling, name: Callable[[Preprocessing], str]) -> Path | None:
    """The store that the same command made before, whatever was settled then: a complete one, else one begun; or None.

    One that was made with a size somebody named is only taken where that is the model's own.
    """
    begun, own = None, None
    for way in settling.ways():
        own = own or way
        path = root / name(way)
        stored = find_store(Location(path))
        if stored is None or (way.crop != own.crop and stored.provenance.get(SIZE_BY) != "images"):
            continue
        with suppress(ChunkCorruptError):
            if stored.complete() is not None:
                return path
        begun = begun or path
    return begun


@contextmanager
def _workers_ahead(job: EmbedJob, stored: StoreMetadata | None) -> Iterator[Workers | None]:
    """Start the processes that decode, unless the store is complete: none is needed to find it.

    They start while the model goes to its device and warms up, and before there is a CUDA context: forking 14 processes
    took 0.9 s of a process with one model's memory, and more with a GPU's mapped as well.

    Yields:
        The processes, which have ended when the block ends.
    """
    complete = None
    with suppress(ChunkCorruptError):
        complete = None if stored is None else stored.complete()
    if complete is not None:
        yield None
        return
    with closing(start_workers(job.source, job.encoder, _workers_of_a_device(job))) as workers:
        yield workers


def _workers_of_a_device(job: EmbedJob) -> int:
    """Processes that decode for one device: an equal share of all."""
    workers = workers_for(job.source, job.encoder, job.config.workers, job.device)
    return min(workers, max(1, workers // len(job.devices)))


def _estimate_rest(
    job: EmbedJob, location: Location, stored: StoreMetadata | None, spec: CacheSpec, *, here: bool
) -> Estimate | None:
    """Refuse what cannot fit the disk; where much is left to do in this process, say what it will take."""
    missing = job.missing(stored, spec)
    left = sum(map(len, missing))
    known = 0 if job.known is None else sum(map(job.known.count_in, missing))
    transport = open_transport(location)
    need = disk_bytes(job.source, left, spec.shard_rows, job.row_bytes())
    require_disk(need, transport.free_bytes(), location=str(location))
    if left - known <= ESTIMATE_FROM or not here:
        return None
    estimate = _estimate(job, spec, location, stored, known)
    for line in estimate.lines():
        job.notify(line)
    return estimate


def _estimate(
    job: EmbedJob, spec: CacheSpec, location: Location | None, stored: StoreMetadata | None, known: int = 0
) -> Estimate:
    return estimate_run(
        job.source,
        job.encoder,
        job.config,
        job.device,
        sum(map(len, job.missing(stored, spec))),
        batch_size=spec.batch_size,
        shard_rows=spec.shard_rows,
        known_rows=known,
        committed_rows=0 if stored is None else sum(len(stored.spec.rows_of(shard)) for shard in stored.committed()),
        disk_free=None if location is None else open_transport(location).free_bytes(),
        looks_at=job.looks_at,
    )


def _report(
    job: EmbedJob, store: EmbeddingStore, *, before: int, clock: Clock, estimate: Estimate | None
) -> EmbedReport:
    worked = clock.ended > 0
    inside = ("decode", "forward", "commit", "commit_wait", "waiting")
    parts = {name: getattr(clock, name) for name in inside} | {"embed": clock.elapsed() if worked else 0.0}
    order = ("hash", "model", "estimate", "embed", "finish", "total", *inside)
    times = dict.fromkeys(order, 0.0) | job.seconds | parts
    return EmbedReport(
        location=str(store.location),
        fingerprint=store.fingerprint,
        model=job.encoder.spec.model,
        items=store.spec.items,
        ok=counts_of(store.spec, store.commits)[0],
        quarantined=tuple(store.quarantined),
        embedded=clock.images,
        reused=clock.reused,
        committed_before=before,
        shards=store.spec.shards,
        batch_size=store.spec.batch_size,
        workers=clock.workers,
        seconds={phase: round(times[phase], 3) for phase in order},
        shares={name: round(share, 4) if worked else 0.0 for name, share in clock.shares().items()},
        notes=(*job.source.notes, *label_notes(job.source.labels, len(job.source.classes)), *job.encoder.notes),
        estimate=estimate,
        looks_at=job.looks_at,
        shard=job.config.shard,
        part_shards=len(job.shards(store.spec)),
    )


def fill(
    job: EmbedJob, writer: StoreWriter, workers: Workers | None, anywhere: Anywhere | None, progress: Progress
) -> tuple[EmbedTask, int]:
    """Embed the shards that are not committed; returns the task, with its clock, and the rows committed before."""
    spec, mine = writer.spec, job.shards(writer.spec)
    committed = writer.recover(None if job.part is None else mine)
    total = sum(len(spec.rows_of(shard)) for shard in mine)
    before = sum(len(spec.rows_of(shard)) for shard in committed)
    count = _workers_of_a_device(job)
    several = _several_devices(job, spec, count) if anywhere is None and len(job.devices) > 1 else None
    clocks = [] if several is None else several.clocks

    def on_batch(clock: Clock) -> None:
        done = sum(one.images + one.reused for one in (clock, *clocks))
        progress("embed", before + done, total, clock.shares())

    task = EmbedTask(
        job.source,
        job.encoder,
        writer,
        device=job.device,
        workers=count if workers is None else workers,
        cuda_graphs=job.config.cuda_graphs,
        known=job.known,
        on_batch=on_batch,
    )
    shards = [shard for shard in mine if shard not in committed]
    if anywhere is not None:
        commits = anywhere.run(job, task, writer, shards)
    else:
        commits = (several or LocalExecutor()).run(task, shards)
    for _commit in commits:
        pass
    for clock in clocks:
        task.clock.add(clock)
    if job.config.decoder != "pillow" and task.clock.on_device < task.clock.images:
        job.notify(
            f"note: `decoder={job.config.decoder}` decoded {task.clock.on_device:,} of {task.clock.images:,} images; "
            "Pillow had the others, which are no JPEGs of a kind that a device decodes"
        )
    return task, before


def _several_devices(job: EmbedJob, spec: CacheSpec, workers: int) -> SeveralDevices:
    config = job.config
    setup = DeviceSetup(
        source=job.source,
        model=config.model,
        allow_untrained=config.allow_untrained,
        decoder=config.decoder,
        cuda_graphs=config.cuda_graphs,
        spec=spec,
        workers=workers,
        knows=job.known is not None,
    )
    return SeveralDevices(setup, job.devices[1:])


def _default_name(
    source: ImageSource,
    encoder: Encoder,
    manifest: DatasetManifest,
    config: EmbedConfig,
    preprocessing: Preprocessing,
) -> str:
    # Batch size and shard size are left out, so that the same command finds its store on a CPU and on a GPU.
    spec = replace(encoder.spec, preprocessing=preprocessing)
    identity = digest_of([manifest.root, spec.to_dict(), config.dtype])[:12]
    words = [
        re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-") for word in (source.kind, encoder.spec.model.split(":")[-1])
    ]
    return f"{words[0][:20]}-{words[1][:28]}-{identity}"


def provenance_of(dataset: str, config: EmbedConfig, devices: tuple[torch.device, ...]) -> dict[str, Any]:
    """How rows are made; no identity."""
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "pillow", "zarr", "numpy")}
    return {
        "dataset": dataset,
        "model": config.model,
        "command": embed_command(dataset, config),
        "device": ", ".join(map(describe_device, devices)),
        "python": platform.python_version(),
        **versions,
    }
