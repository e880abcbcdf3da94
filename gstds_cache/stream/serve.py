"""A service's life: it listens, says what it does in JSON lines, counts, and stops when asked to."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gstds_cache.config import SelectConfig
from gstds_cache.errors import UsageError
from gstds_cache.runtime.notify import Notify
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.flight_server import SelectionService
from gstds_cache.stream.hub import Hub
from gstds_cache.stream.security import Access

GRACE = 5.0  # seconds that readers have to take what was sent to them when the service stops


def event_line(event: str, **fields: object) -> str:
    """An event of a service as one JSON line."""
    return json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)


def serve(
    store: EmbeddingStore,
    config: SelectConfig,
    *,
    host: str,
    port: int,
    folder: Path,
    also: Sequence[Path] = (),
    access: Access,
    stop: threading.Event,
    notify: Notify,
    metrics_port: int | None = None,
) -> int:
    """Serve a store's selections until ``stop`` is set.

    Then no computation goes on past the batch in hand, readers get what was sent to them, and everything that was
    computed is kept: a service started again goes on from there, and so do readers with their tokens.

    Args:
        store: The store.
        config: The selection a ticket without settings means.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        folder: Where selections are computed, and finished ones are.
        also: Other folders in which finished ones are.
        access: Certificates and token.
        stop: Ends the service.
        notify: Told of events, in JSON lines.
        metrics_port: Port on loopback for metrics in Prometheus' text format; None for none.

    Returns:
        Readers that were cut off, as they took nothing: they hold up gRPC's own shutdown, and the end of this process.
    """

    def log(event: str, **fields: object) -> None:
        notify(event_line(event, **fields))

    hub = Hub(folder, also=also, log=log)
    scheme = "grpc+tls" if access.certificate else "grpc"
    service = SelectionService(f"{scheme}://{host}:{port}", store, config, hub, access, log=log)
    where = f"{scheme}://{host}:{service.port}"
    with _metrics(service, hub, metrics_port) as metrics:
        log("serving", location=where, store=store.fingerprint, metrics=metrics, tls=bool(access.certificate),
            token=access.token is not None, client_certificates=access.client_ca is not None)  # fmt: skip
        stop.wait()
        log("stopping", readers=service.active)
        service.stopping = True
        hub.stop()
        closing = threading.Thread(target=service.shutdown, daemon=True)
        closing.start()
        closing.join(GRACE)
        log("stopped", readers_cut_off=service.active, records=service.counts["records"])
    return max(service.active, 1) if closing.is_alive() else 0


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT, while the block lasts, set the event; handlers are the process's, of its main thread.

    Yields:
        The event.

    Raises:
        UsageError: This is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "`stop`: got None outside the main thread, where no signal can stop the service",
            hint="pass a threading.Event, and set it to stop",
        )
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def metrics_text(service: SelectionService, hub: Hub) -> str:
    """The counts in Prometheus' text exposition format, version 0.0.4."""
    rows = [
        ("gstds_records_sent_total", "counter", "Records of streams that ended.", service.counts["records"]),
        ("gstds_streams_total", "counter", "Streams that ended.", service.counts["streams"]),
        ("gstds_refused_total", "counter", "Calls that were refused.", service.counts["refused"]),
        ("gstds_streams_active", "gauge", "Streams being read.", service.active),
        ("gstds_selections_computing", "gauge", "Selections being computed or waiting.", hub.running),
        (
            "gstds_peak_memory_bytes",
            "gauge",
            "Largest resident size so far.",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        ),
    ]
    return "".join(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in rows)


@contextmanager
def _metrics(service: SelectionService, hub: Hub, port: int | None) -> Iterator[str | None]:
    if port is None:
        yield None
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer ``/metrics``."""
            known = self.path == "/metrics"
            body = metrics_text(service, hub).encode() if known else b"there is: /metrics\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_words: object) -> None:
            """Nothing: a scrape every few seconds is no event."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
