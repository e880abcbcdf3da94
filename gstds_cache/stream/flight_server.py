"""Selections over Arrow Flight: several trainers share one computation, each as fast as it reads."""

from __future__ import annotations

import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from gstds_cache.config import SelectConfig
from gstds_cache.errors import GstdsError, ProducerFailedError
from gstds_cache.selection.rules import RULES
from gstds_cache.selection.run import BatchSelector
from gstds_cache.selection.settings import config_arguments
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.hub import Hub
from gstds_cache.stream.security import Access
from gstds_cache.stream.shared_reader import SharedReader, Stopped
from gstds_cache.stream.tickets import Ticket
from gstds_cache.stream.writer import header_of

Log = Callable[..., None]


class _CheckToken(fl.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses calls that do not carry the token."""

    def __init__(self, token: str, refused: Callable[[str], None]) -> None:
        super().__init__()
        self._wanted, self._refused = f"Bearer {token}".encode(), refused

    def start_call(self, _info: fl.CallInfo, headers: dict[str, list[str]]) -> None:
        """Compare in constant time.

        Raises:
            FlightUnauthenticatedError: No token, or another.
        """
        got = headers.get("authorization", [""])[0].encode(errors="replace")
        if not hmac.compare_digest(got, self._wanted):
            self._refused("no token" if not got else "wrong token")
            raise fl.FlightUnauthenticatedError("no token, or a wrong one")


class SelectionService(fl.FlightServerBase):  # type: ignore[misc]
    """Lists, computes and streams the selections of one store.

    Attributes:
        counts: How often what happened, for metrics.
        active: Streams being read.
    """

    def __init__(
        self, location: str, store: EmbeddingStore, config: SelectConfig, hub: Hub, access: Access, *, log: Log
    ) -> None:
        """Listen; calls are answered from now on.

        Args:
            location: ``grpc://HOST:PORT`` or ``grpc+tls://HOST:PORT``; port 0 takes a free one.
            store: The store served.
            config: The selection that a ticket without settings means; its device and threads are used for all.
            hub: Where selections are shared.
            access: Certificates and token.
            log: Told of events.
        """
        self.counts: Counter[str] = Counter()
        self.active, self.stopping = 0, False
        self._store, self._config, self._hub, self._log = store, config, hub, log
        self._lock = threading.Lock()
        self._default = BatchSelector(store, config).digest
        tls = [(access.certificate, access.key)] if access.certificate else None
        middleware = {"token": _CheckToken(access.token, self._refused)} if access.token else None
        super().__init__(
            location,
            tls_certificates=tls,
            verify_client=access.client_ca is not None,
            root_certificates=access.client_ca,
            middleware=middleware,
        )

    def list_flights(self, _context: fl.ServerCallContext, _criteria: bytes) -> Iterator[fl.FlightInfo]:
        """Yields the stored selections."""
        for _, header in self._hub.stored():
            yield _info(Ticket(digest=header.selection_digest), header.to_schema(), header.total_batches)

    def get_flight_info(self, _context: fl.ServerCallContext, descriptor: fl.FlightDescriptor) -> fl.FlightInfo:
        """What a ticket, given as the descriptor's command, will bring; nothing is computed."""
        with self._answering():
            ticket = Ticket.parse(descriptor.command or b"")
            digest, make = self._resolve(ticket)
            header = (
                header_of(make())
                if make
                else next(header for _, header in self._hub.stored() if header.selection_digest == digest)
            )
            return _info(ticket, header.to_schema(), header.total_batches)

    def do_get(self, context: fl.ServerCallContext, ticket: fl.Ticket) -> fl.GeneratorStream:
        """Stream a selection, from the token's batch on.

        Raises:
            FlightServerError: The ticket is refused.
        """
        with self._answering():
            parsed = Ticket.parse(ticket.ticket)
            digest, make = self._resolve(parsed)
            start = 0
            if parsed.start is not None:
                if (parsed.start.selection_digest, parsed.start.cache_fingerprint) != (digest, self._store.fingerprint):
                    raise fl.FlightServerError("usage: the resume token is of another selection or another store")
                start = parsed.start.next_seq
            begun = time.perf_counter()
            schema, batches = self._hub.batches(
                digest, make, start, lambda: not (context.is_cancelled() or self.stopping)
            )
            return fl.GeneratorStream(schema, self._send(batches, digest, start, begun))

    def do_action(self, _context: fl.ServerCallContext, action: fl.Action) -> Iterator[bytes]:
        """``health``: whether the service takes requests.

        Yields:
            One JSON object.

        Raises:
            FlightServerError: The action is unknown.
        """
        if action.type != "health":
            raise fl.FlightServerError(f"usage: unknown action {action.type!r:.80}, there is: health")
        state = "stopping" if self.stopping else "serving"
        fields = {"status": state, "readers": self.active, "computing": self._hub.running,
                  "cache_fingerprint": self._store.fingerprint, "selection_digest": self._default}  # fmt: skip
        yield json.dumps(fields).encode()

    def list_actions(self, _context: fl.ServerCallContext) -> list[tuple[str, str]]:
        """The actions there are."""
        return [("health", "one JSON object: status, readers, computing, selection_digest")]

    def _resolve(self, ticket: Ticket) -> tuple[str, Callable[[], BatchSelector] | None]:
        """The digest a ticket means, and what makes its selector, where the settings are known.

        Raises:
            FlightServerError: The rule is none of the registry's.
        """
        if ticket.digest is not None and not self._default.startswith(ticket.digest):
            return self._hub.find(ticket.digest), None
        settings = ticket.select or {}
        if settings.get("rule", self._config.rule) not in {*RULES, self._config.rule}:
            raise fl.FlightServerError(f"usage: unknown rule {settings['rule']!r:.80}")
        config = self._config if ticket.select is None else SelectConfig(
            **{**config_arguments(settings), "device": self._config.device, "threads": self._config.threads,
               "knn_backend": self._config.knn_backend, "solver": self._config.solver}
        )  # fmt: skip
        selector = BatchSelector(self._store, config)
        return selector.digest, lambda: selector

    def _send(self, batches: SharedReader, digest: str, start: int, begun: float) -> Iterator[pa.RecordBatch]:
        sent, ended = 0, "cut off"
        with self._lock:
            self.active += 1
        try:
            for batch in batches:
                yield batch
                sent += batch.num_rows
            ended = "whole"
        except Stopped:
            if self.stopping:
                ended = "service stopped"
                raise fl.FlightUnavailableError(
                    "stopping: the service stops; go on from here when it is back"
                ) from None
        except ProducerFailedError as error:
            ended = "producer failed"
            raise fl.FlightServerError(f"producer: {error.message}") from error
        finally:
            batches.close()
            with self._lock:
                self.active -= 1
                self.counts["records"] += sent
                self.counts["streams"] += 1
            seconds = round(time.perf_counter() - begun, 3)
            self._log("stream", selection=digest, start=start, records=sent, ended=ended, seconds=seconds)

    def _answering(self) -> _Answering:
        return _Answering(self._refused)

    def _refused(self, reason: str) -> None:
        with self._lock:
            self.counts["refused"] += 1
        self._log("refused", reason=reason)


class _Answering:
    """Turns errors into what a client understands; paths and tracebacks stay here."""

    def __init__(self, refused: Callable[[str], None]) -> None:
        self._refused = refused

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, GstdsError):
            self._refused(error.message)
            raise fl.FlightServerError(f"usage: {error.message}") from error
        if isinstance(error, Stopped):
            raise fl.FlightUnavailableError("stopping: the service stops; go on from here when it is back") from error
        if error is not None and not isinstance(error, fl.FlightError):
            self._refused(f"{type(error).__name__}: {error}")
            raise fl.FlightInternalError(f"internal error: {type(error).__name__}") from error


def _info(ticket: Ticket, schema: pa.Schema, records: int) -> fl.FlightInfo:
    data: Any = ticket.to_bytes()
    endpoint = fl.FlightEndpoint(data, [])
    return fl.FlightInfo(schema, fl.FlightDescriptor.for_command(data), [endpoint], records, -1)
