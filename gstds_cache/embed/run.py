"""Embedding a data set once: plan, skip what is committed, embed the rest, finish."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gstds_cache.config import DEFAULT_MODEL, EmbedConfig
from gstds_cache.data.manifest import DatasetManifest, build_manifest
from gstds_cache.data.source import ImageSource
from gstds_cache.devices import describe_device, resolve_device
from gstds_cache.digest import digest_of
from gstds_cache.embed.unit import Clock, EmbedTask
from gstds_cache.encoders.encoder import Encoder
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import IncompleteError, StoreNotFoundError
from gstds_cache.executor import Executor, LocalExecutor
from gstds_cache.store.journal import Journal
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.store.receipt import Quarantined
from gstds_cache.store.spec import CacheSpec
from gstds_cache.store.writer import StoreWriter, open_writer

BATCH_SIZE = {"cpu": 16, "cuda": 256}
UNIT_BYTES = 4 << 20
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class EmbedReport:
    """What a run of embedding did.

    Attributes:
        path: The store.
        fingerprint: Its fingerprint.
        model: The reference model.
        items: Items in the data set; ``items == ok + len(quarantined)``.
        ok: Rows with an embedding.
        quarantined: Items that could not be decoded, with the reasons.
        embedded: Images put through the model by this run.
        committed_before: Rows that were committed already when this run began.
        units: Units of the store.
        seconds: Time by phase: hash, model, waiting (for decoded images), forward, commit, finish, total.
        notes: What the user should know.
    """

    path: Path
    fingerprint: str
    model: str
    items: int
    ok: int
    quarantined: tuple[Quarantined, ...]
    embedded: int
    committed_before: int
    units: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def cache_hit(self) -> bool:
        """Whether everything was there already."""
        return self.embedded == 0

    @property
    def images_per_second(self) -> float:
        """Images embedded over the time from the first batch to the last commit; 0 for a cache hit."""
        busy = self.seconds["waiting"] + self.seconds["forward"] + self.seconds["commit"]
        return self.embedded / busy if busy else 0.0


def embed_dataset(
    source: ImageSource,
    config: EmbedConfig,
    *,
    path: Path | None = None,
    root: Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> EmbedReport:
    """Embed ``source`` into a store, or find that this was done already.

    Args:
        source: The data set.
        config: How to embed it.
        path: The store's directory; None makes a name from data set, model and fingerprint under ``root``.
        root: Where stores without a path of their own live; needed where ``path`` is None.
        executor: Where units run; in this process by default.
        progress: Called with phase, images done, images in all, and the share of time the model waited for images.

    Returns:
        What was done.

    Raises:
        ValueError: Neither ``path`` nor ``root`` is given.
        UsageError: ``path`` is no place for a store.
        EncoderError: The model cannot be built.
        FingerprintMismatchError: The store at ``path`` holds something else.
        ChunkCorruptError: The store at ``path`` is damaged.
    """
    started = time.perf_counter()
    progress = progress or (lambda _phase, _done, _total, _waiting: None)
    device = resolve_device(config.device)
    manifest = build_manifest(source, progress=lambda done, total: progress("hash", done, total, 0.0))
    hashed = time.perf_counter()
    encoder = open_encoder(config.model, allow_untrained=config.allow_untrained)
    ready = time.perf_counter()
    if path is None:
        if root is None:
            raise ValueError("path or root is needed")
        path = root / _default_name(source, encoder, manifest, config)
    spec = _spec(manifest, encoder, config, path, device)
    hit = _finished(path, spec)
    if hit is not None:
        seconds = {"hash": hashed - started, "model": ready - hashed, "total": time.perf_counter() - started}
        return _report(hit, source, encoder, before=spec.items, clock=Clock(), seconds=seconds)
    with open_writer(
        path,
        spec,
        labels=manifest.labels,
        items=manifest.to_arrow(),
        attributes={
            "kind": manifest.kind,
            "classes": list(manifest.classes),
            "provenance": _provenance(source.uri, config, device),
        },
    ) as writer:
        task, before = _fill(writer, source, encoder, config, device, executor or LocalExecutor(), progress)
        finishing = time.perf_counter()
        writer.finish()
    store = EmbeddingStore(path)
    ended = time.perf_counter()
    seconds = {
        "hash": hashed - started,
        "model": ready - hashed,
        "finish": ended - finishing,
        "total": ended - started,
    }
    return _report(store, source, encoder, before=before, clock=task.clock, seconds=seconds)


def _finished(path: Path, spec: CacheSpec) -> EmbeddingStore | None:
    """The store at ``path`` if it is whole and holds this; a hit needs no lock, and no right to write."""
    try:
        store = EmbeddingStore(path)
    except (StoreNotFoundError, IncompleteError):
        return None
    return store if store.spec == spec else None


def _report(
    store: EmbeddingStore,
    source: ImageSource,
    encoder: Encoder,
    *,
    before: int,
    clock: Clock,
    seconds: dict[str, float],
) -> EmbedReport:
    parts = {"waiting": clock.waiting, "forward": clock.forward, "commit": clock.commit}
    order = ("hash", "model", *parts, "finish", "total")
    times = {"finish": 0.0, **seconds, **parts}
    return EmbedReport(
        path=store.path,
        fingerprint=store.fingerprint,
        model=encoder.spec.model,
        items=store.spec.items,
        ok=store.spec.items - len(store.quarantined),
        quarantined=tuple(store.quarantined),
        embedded=clock.images,
        committed_before=before,
        units=store.spec.units,
        seconds={phase: round(times[phase], 3) for phase in order},
        notes=(*source.notes, *encoder.notes),
    )


def _fill(
    writer: StoreWriter,
    source: ImageSource,
    encoder: Encoder,
    config: EmbedConfig,
    device: torch.device,
    executor: Executor,
    progress: Progress,
) -> tuple[EmbedTask, int]:
    """Embed the units that are not committed; returns the task, with its clock, and the rows committed before."""
    spec = writer.spec
    committed = writer.recover()
    before = sum(len(spec.rows_of(unit)) for unit in committed)

    def on_batch(clock: Clock) -> None:
        progress("embed", before + clock.images, spec.items, clock.waiting / max(clock.elapsed(), 1e-9))

    task = EmbedTask(source, encoder, writer, device=device, workers=config.workers, on_batch=on_batch)
    for _receipt in executor.run(task, [unit for unit in range(spec.units) if unit not in committed]):
        pass
    return task, before


def _spec(
    manifest: DatasetManifest, encoder: Encoder, config: EmbedConfig, path: Path, device: torch.device
) -> CacheSpec:
    """The specification this run asks for; sizes that were not given are the store's own where there is one."""
    batch_size, unit_rows = config.batch_size, config.unit_rows
    try:
        stored = Journal(path).spec
    except StoreNotFoundError:
        stored = None
    if stored is not None:
        batch_size, unit_rows = batch_size or stored.batch_size, unit_rows or stored.unit_rows
    batch_size = batch_size or BATCH_SIZE[device.type]
    if unit_rows is None:
        row_bytes = encoder.spec.dim * torch.tensor([], dtype=getattr(torch, config.dtype)).element_size()
        unit_rows = max(1, UNIT_BYTES // row_bytes)
    return CacheSpec(
        items=len(manifest),
        items_root=manifest.root,
        encoder=encoder.spec.to_dict(),
        dim=encoder.spec.dim,
        dtype=config.dtype,
        batch_size=batch_size,
        unit_rows=-(-unit_rows // batch_size) * batch_size,
    )


def _default_name(source: ImageSource, encoder: Encoder, manifest: DatasetManifest, config: EmbedConfig) -> str:
    # Batch size and unit size are left out, so that the same command finds its store on a CPU and on a GPU.
    identity = digest_of([manifest.root, encoder.spec.to_dict(), config.dtype])[:12]
    words = [
        re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-") for word in (source.kind, encoder.spec.model.split(":")[-1])
    ]
    return f"{words[0][:20]}-{words[1][:28]}-{identity}"


def _provenance(dataset: str, config: EmbedConfig, device: torch.device) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "pillow", "zarr", "numpy")}
    command = ["gstds-embed", dataset]
    for flag, value, default in (("--model", config.model, DEFAULT_MODEL), ("--dtype", config.dtype, "float16")):
        command += [flag, value] if value != default else []
    command += ["--allow-untrained"] if config.allow_untrained else []
    return {
        "dataset": dataset,
        "command": command,
        "device": describe_device(device),
        "python": platform.python_version(),
        **versions,
    }
