"""A selection from a service: the same records as from a file, in Flight's record batches."""

from __future__ import annotations

import os
import re
import weakref
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as fl

from gstds_cache.errors import (
    FingerprintMismatchError,
    ProducerFailedError,
    StoreUnavailableError,
    TruncatedStreamError,
    UsageError,
    command_line,
)
from gstds_cache.stream.resume import ResumeToken
from gstds_cache.stream.security import read_token
from gstds_cache.stream.source import first_line
from gstds_cache.stream.tickets import DIGEST, Ticket

WHERE = re.compile(r"(grpc(?:\+tls)?)://(\[[0-9a-fA-F:]+\]|[^/:\[\]]+):(\d{1,5})(?:/([0-9a-f]*))?")
START = "start it: " + command_line("gstds-select", "STORE", "--serve", "HOST:PORT")
TOKEN, CA, CERTIFICATE, KEY = (f"GSTDS_{name}" for name in ("TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY"))

_open: weakref.WeakSet[FlightSource] = weakref.WeakSet()
_left_by_parent: list[object] = []


def _forked() -> None:
    """In a fork's child gRPC's threads are gone: a call, and even freeing a connection, would wait for ever."""
    for source in _open:
        _left_by_parent.extend((source._client, source._reader))


os.register_at_fork(after_in_child=_forked)


class FlightSource:
    """Record batches of a selection from a service.

    The environment names what a protected service asks for: ``GSTDS_TOKEN_FILE``, ``GSTDS_TLS_CA`` (the certificate to
    trust, where it is not the system's), ``GSTDS_TLS_CERT`` and ``GSTDS_TLS_KEY`` (for mutual TLS).
    """

    def __init__(self, where: str, *, start: ResumeToken | None = None, ticket: Ticket | None = None) -> None:
        """Connect, and ask for a selection.

        Args:
            where: ``grpc://HOST:PORT`` or ``grpc+tls://HOST:PORT``, with ``/DIGEST`` for one that is stored there.
            start: Begin after what was consumed before.
            ticket: Ask for this; None for the selection named by ``where``, or the service's own.

        Raises:
            UsageError: The address is none, or the service refuses the request.
            StoreUnavailableError: The service does not answer.
        """
        if _left_by_parent:
            raise UsageError(
                f"{where}: this process was forked from one that had a service open, and gRPC does not work after that",
                hint="DataLoader(..., multiprocessing_context='spawn'), or num_workers=0, or SelectedBatchSampler, "
                "which reads in the main process",
            )
        match = WHERE.fullmatch(where)
        if match is None or (match[4] and not DIGEST.fullmatch(match[4])):
            raise UsageError(
                f"got {where!r}, expected grpc://HOST:PORT or grpc://HOST:PORT/DIGEST (8 to 64 hexadecimal digits)"
            )
        self._where, self.first_seq = where, 0 if start is None else start.next_seq
        ticket = ticket or Ticket(digest=match[4] or None, start=start)
        headers = []
        if os.environ.get(TOKEN):
            headers.append((b"authorization", f"Bearer {read_token(Path(os.environ[TOKEN]))}".encode()))
        location = f"{match[1]}://{match[2]}:{match[3]}"
        try:
            self._client = fl.FlightClient(location, **(_tls() if match[1] == "grpc+tls" else {}))
            self._reader = self._client.do_get(fl.Ticket(ticket.to_bytes()), fl.FlightCallOptions(headers=headers))
            self.schema = self._reader.schema
            _open.add(self)
        except (pa.ArrowException, OSError) as error:
            raise self._opening(error) from error

    def read(self) -> tuple[pa.RecordBatch, str]:
        """The next record batch.

        Raises:
            EOFError: The stream ends here.
            ProducerFailedError: The selection failed at the service.
            TruncatedStreamError: The connection was lost, or the service stopped.
        """
        try:
            batch = self._reader.read_chunk().data
            batch.validate(full=True)
        except StopIteration:
            raise EOFError("the service sent no more") from None
        except (pa.ArrowException, OSError) as error:
            text = _plain(error)
            if text.startswith("producer: "):
                raise ProducerFailedError(text.removeprefix("producer: "), hint="see the service's log") from error
            raise TruncatedStreamError(
                f"the selection broke off: {self._where} {text.removeprefix('stopping: ')}",
                hint="what was consumed is not lost. When the service is back, a run goes on with `resume=True`, and a "
                f"sampler with sampler.seek(EPOCH, BATCH). {START}",
            ) from error
        return batch, ""

    def close(self) -> None:
        """End the call; a computation that nobody else reads ends with it."""
        if self._client in _left_by_parent:
            return
        with suppress(pa.ArrowException):  # it may have ended
            self._reader.cancel()
        self._client.close()

    def _opening(self, error: Exception) -> Exception:
        text = _plain(error)
        if isinstance(error, fl.FlightUnauthenticatedError):
            return UsageError(
                f"{self._where} asks for a token, and got none or a wrong one",
                hint=f"{TOKEN}=FILE names the file with the service's token",
            )
        if text.startswith("usage: ") and "resume token" in text:
            return FingerprintMismatchError(f"{self._where}: {text.removeprefix('usage: ')}")
        if text.startswith("usage: "):
            return UsageError(f"{self._where} refused: {text.removeprefix('usage: ')}")
        return StoreUnavailableError(f"{self._where} does not answer: {text}", hint=START)


def _tls() -> dict[str, bytes]:
    """Certificates named by the environment, as Flight takes them.

    Raises:
        UsageError: A file cannot be read.
    """
    names = {"tls_root_certs": CA, "cert_chain": CERTIFICATE, "private_key": KEY}
    certificates = {}
    for argument, variable in names.items():
        if os.environ.get(variable):
            try:
                certificates[argument] = Path(os.environ[variable]).read_bytes()
            except OSError as error:
                raise UsageError(f"{variable}={os.environ[variable]}: {error.strerror}") from error
    return certificates


def _plain(error: Exception) -> str:
    """What the service said, without what gRPC wraps around it."""
    text = first_line(error)
    for marker in ("usage: ", "producer: ", "stopping: "):
        if marker in text:
            return marker + text.partition(marker)[2].partition(". Detail:")[0].partition(". gRPC client debug")[0]
    return text.partition(". gRPC client debug")[0]
