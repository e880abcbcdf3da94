"""A training run's data, selection and settings, opened and checked against each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gstds_cache.config import TrainConfig, TrainSettings
from gstds_cache.costs.records import Cost, recall, recall_store, selection_costs
from gstds_cache.data.decode import Decoding, decoding_as
from gstds_cache.data.hash_cache import HashCache
from gstds_cache.data.manifest import DatasetManifest
from gstds_cache.data.repeatable import why_items_differ
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_sources
from gstds_cache.embedding.mismatch import explained
from gstds_cache.errors import FingerprintMismatchError, GstdsError, UsageError
from gstds_cache.files.location import Location, LocationLike, local_file
from gstds_cache.runtime.notify import Notify, log
from gstds_cache.runtime.progress import Progress, showing
from gstds_cache.runtime.threads import limited_threads
from gstds_cache.store.grown import read_metadata
from gstds_cache.store.metadata import StoreMetadata
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.reader import SelectionStream, is_service, open_selection, require_manifest, require_store
from gstds_cache.stream.schema import Header
from gstds_cache.training.classes import count_classes
from gstds_cache.training.distributed import Ranks, process_group
from gstds_cache.training.feedback import Feedback
from gstds_cache.training.flops import flops_per_sample, step_threads
from gstds_cache.training.identity import resolve_auto


@dataclass(frozen=True)
class OpenedRun:
    """What a run is made of, opened.

    Attributes:
        source: The training set.
        evaluation: The evaluation set.
        stream: The selection, its header read.
        where: The selection: a file, ``-`` or an address.
        config: The settings, with nothing left to the data set.
        ranks: This process among those that train together.
        flops: FLOPs of a sample's forward and backward pass; None where they cannot be counted.
        store: Where the store is, or was when it was selected from; None where that is not known.
        embed_cost: What the store cost; None where no record of it was found.
        select_cost: What the selection cost; None where no record of it was found.
        progress: Called with progress.
        notify: Called with lines for the user.
    """

    source: ImageSource
    evaluation: ImageSource | None
    stream: SelectionStream
    where: str
    config: TrainConfig
    ranks: Ranks
    flops: float | None
    store: str | None
    embed_cost: Cost | None
    select_cost: Cost | None
    progress: Progress
    notify: Notify

    def require_items(self, manifest: DatasetManifest) -> None:
        """Refuse a selection from other items than those of ``manifest``, the training set's.

        Raises:
            FingerprintMismatchError: It is from others: which, where the store is still there.
        """
        header, source = self.stream.header, self.source
        try:
            require_manifest(header, manifest, uri=source.uri)
        except FingerprintMismatchError:
            stored = self._stored()
            if stored is None:
                require_manifest(header, manifest, uri=source.uri, why=why_items_differ(source))
                raise
            with explained(stored, manifest, source):
                raise

    def _stored(self) -> StoreMetadata | None:
        try:
            if self.store is None:
                return None
            found = read_metadata(Location.parse(self.store), state=self.stream.header.cache_fingerprint)
            # Another store may have taken its place.
            return found if found.spec.fingerprint == self.stream.header.cache_fingerprint else None
        except (GstdsError, OSError):
            return None


@contextmanager
def open_run(
    dataset: Any,
    selection: str | os.PathLike[str],
    *,
    evaluation: Any,
    cache: EmbeddingStore | LocationLike | None,
    settings: TrainSettings,
    hash_cache: HashCache,
    hash_items: bool,
    progress: Progress | bool | None,
    notify: Notify | None,
) -> Iterator[OpenedRun]:
    """Open data sets and selection; refuse what does not fit together, before every item is hashed.

    Args:
        dataset: As for :func:`gstds_cache.train`, as are the others but for two.
        selection: The selection.
        evaluation: The evaluation set.
        cache: The store.
        settings: Fields of :class:`gstds_cache.TrainConfig`.
        hash_cache: Hashes of files from before.
        hash_items: Whether files may be read to decide which items are in a part of a data set.
        progress: Called with progress.
        notify: Called with lines for the user.

    Yields:
        The run. While the block lasts, this process is one of its ranks, and CPU threads are limited.

    Raises:
        UsageError: Several ranks were to read one stdin.
    """
    config, where = TrainConfig(**settings), _location_of(selection)
    with ExitStack() as held:
        held.enter_context(limited_threads(config.threads))
        held.enter_context(decoding_as(Decoding(max_pixels=config.max_pixels)))
        ranks = held.enter_context(process_group(config.device))
        if where == "-" and ranks.world_size > 1:
            raise UsageError(
                f"`selection`: got -, but {ranks.world_size} ranks cannot share one stdin",
                hint="give a file, or the address of a service (gstds_cache.serve)",
            )
        show = held.enter_context(
            showing(progress if ranks.first else None, "steps", hash="items", load="images", norms="batches")
        )
        hashing = partial(show_hashing, show)
        datasets = (dataset,) if evaluation is None else (dataset, evaluation)
        source, *rest = open_sources(datasets, hash_cache=hash_cache, progress=hashing, read=hash_items)
        other = rest[0] if rest else None
        classes = count_classes(source, other)
        stream = held.enter_context(open_selection(where))
        _check_draws(config, stream.header)
        store = _checked_store(cache, stream.header)
        config = resolve_auto(config, source)
        flops = flops_per_sample(config.arch, classes=classes, side=config.image_size)
        held.enter_context(limited_threads(_step_threads(config, ranks, stream.header, flops)))
        select_cost = None if is_stream(where) else recall(selection_costs(Path(where)), stream.header.selection_digest)
        store = store or (select_cost.store if select_cost else None)
        embed_cost = recall_store(store, stream.header.cache_fingerprint) if store else None
        tell = (notify or log) if ranks.first else _tell_nobody
        costs = (embed_cost, select_cost)
        yield OpenedRun(source, other, stream, where, config, ranks, flops, store, *costs, show, tell)


def _check_draws(config: TrainConfig, header: Header) -> None:
    """Refuse settings for candidates where the selection keeps rows, and draws that cannot be made, early.

    Raises:
        UsageError: It keeps rows; or its draw is unknown here.
    """
    if header.candidates:
        Feedback(header, draw=config.draw)
    elif config.draw is not None or config.importance_weights:
        name = "`importance_weights`" if config.draw is None else "`draw`"
        raise UsageError(
            f"{name}: the selection keeps rows, and draws none by losses",
            hint="leave it out, or select candidates: `draw='loss-minus-reference'` when selecting",
        )


def _checked_store(cache: EmbeddingStore | LocationLike | None, header: Header) -> str | None:
    """Where the store is, which the selection has to be from."""
    if cache is None:
        return None
    if isinstance(cache, EmbeddingStore):
        opened: EmbeddingStore | StoreMetadata = cache
    else:
        opened = read_metadata(Location.parse(cache, "`cache`"), state=header.cache_fingerprint)
    require_store(header, fingerprint=opened.spec.fingerprint, where=str(opened.location))
    return str(opened.location)


def _step_threads(config: TrainConfig, ranks: Ranks, header: Header, flops: float | None) -> int:
    """The threads that were asked for; where none were, what a step on a CPU is worth. 0 leaves what there is."""
    if config.threads or ranks.device.type != "cpu":
        return config.threads
    samples = (config.repack or header.total_kept / max(header.total_batches, 1)) / ranks.world_size
    return step_threads(flops, samples)


def _location_of(selection: str | os.PathLike[str]) -> str:
    """Where a selection is: a path as it is meant; stdin and services stay."""
    text = os.fspath(selection)
    return text if is_stream(text) else str(local_file(text, "`selection`"))


def is_stream(where: str) -> bool:
    """Whether a selection comes through stdin or from a service, and is no file."""
    return where == "-" or is_service(where)


def show_hashing(show: Progress, done: int, total: int) -> None:
    """Show that so many items are hashed."""
    show("hash", done, total, {})


def _tell_nobody(_line: str) -> None:
    """The first rank speaks for all."""
