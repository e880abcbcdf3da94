"""``gstds_cache.serve``: a store's selections for any number of trainers, over Arrow Flight."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

from gstds_cache.api.select_batches import config_of, open_store, with_batch_fitting, with_draw_chosen
from gstds_cache.config import MEMORY_BUDGET, SelectConfig, SelectSettings, require_settings
from gstds_cache.files import mapped
from gstds_cache.files.derived import SELECTIONS, derived_paths, first_writable
from gstds_cache.runtime.notify import Notify
from gstds_cache.runtime.threads import limited_threads
from gstds_cache.store.access import Kind
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.security import Access, parse_address
from gstds_cache.stream.serve import event_line, stop_on_signals
from gstds_cache.stream.serve import serve as serve_until


def serve(
    store: EmbeddingStore | str | Path,
    address: str,
    *,
    keep: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
    access: Kind = "auto",
    mirror: str | Path | None = None,
    metrics_port: int | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    token_file: Path | None = None,
    client_ca: Path | None = None,
    stop: threading.Event | None = None,
    notify: Notify | None = None,
    **settings: Unpack[SelectSettings],
) -> int:
    """Serve a store's selections until told to stop. Trainers name them ``grpc://HOST:PORT``.

    Each selection is computed once, whoever asks for it, and kept beside the store. When the service stops, no
    computation goes on past the batch in hand, readers get what was sent to them, and a service that is started again
    goes on from there. By default one thread computes.

    Args:
        store: A store, or its location.
        address: ``HOST:PORT``; port 0 takes a free one. Other hosts than loopback need TLS and a token.
        keep: As for :func:`~gstds_cache.select`.
        memory_budget: As for :func:`~gstds_cache.select`.
        access: As for :func:`~gstds_cache.select`.
        mirror: As for :func:`~gstds_cache.select`.
        metrics_port: Port on loopback for metrics in Prometheus' text format.
        tls_cert: PEM certificate chain of the service.
        tls_key: Its PEM private key.
        token_file: File with the token that clients must show.
        client_ca: PEM certificates by which clients' certificates must be signed.
        stop: Ends the service when it is set. By default SIGTERM and SIGINT do, whose handlers are set for as long as
            the call lasts, which has to be in the main thread.
        notify: Told of events, a JSON line each; by default they are logged.
        settings: The selection that is served where a reader asks for none in particular.

    Returns:
        Readers that were cut off since they took nothing: the process does not end before they go away, unless by
        ``os._exit``.

    Raises:
        UsageError: A setting or the address cannot be meant, or needs more protection than was given; or ``stop`` is
            missing outside the main thread.
    """
    require_settings(serve, SelectConfig, settings)
    settings.setdefault("threads", 1)
    config = config_of(keep, settings)
    host, port = parse_address(address)
    protection = Access.from_files(host, certificate=tls_cert, key=tls_key, token=token_file, client_ca=client_ca)
    tell = notify or logging.getLogger("gstds_cache").warning
    with limited_threads(config.threads or 0), ExitStack() as stack:
        opened = open_store(store, memory_budget, access, mirror)
        if "batch_size" not in settings:
            config = with_batch_fitting(opened, config)
        config = with_draw_chosen(opened, config, lambda text: tell(event_line("note", selection=text)))
        folders = derived_paths(opened.location, SELECTIONS)
        writable = first_writable(folders)
        folder = writable.path
        if folder is None:  # readers read what is written, so there has to be a file while they read
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gstds-selections-", dir=mapped.folder())))
        if writable.note:
            tell(event_line("note", selections=folder, kept=writable.path is not None, why=writable.note))
        return serve_until(
            opened,
            config,
            host=host,
            port=port,
            folder=folder,
            also=folders,
            access=protection,
            stop=stop or stack.enter_context(stop_on_signals()),
            notify=tell,
            metrics_port=metrics_port,
        )
