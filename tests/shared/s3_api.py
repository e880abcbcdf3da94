"""A real S3 API on loopback, and a proxy before it that breaks requests as networks and services do.

The API is moto's server in a process of its own: its warnings are not ours, and it ends when this process does, however
that ends, because its standard input closes. The proxy hands requests on byte by byte, so that signed ones stay valid,
and counts them: a test of a fault asserts that the fault was met.
"""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import pytest

BUCKET = "gstds-test"
SECRET = "test-secret"
# moto looks for a signature, and does not check it.
SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=none"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

PAGED = {"MOTO_S3_DEFAULT_MAX_KEYS": "7"}  # so that a listing of a few objects has several pages

Action = Literal["slow_down", "reset", "lose", "truncate", "forbid", "conflict", "unknown", "ignore_condition", "delay"]
ANSWERS: dict[str, tuple[int, str]] = {
    "slow_down": (503, "SlowDown"),
    "forbid": (403, "InvalidAccessKeyId"),
    "conflict": (409, "ConditionalRequestConflict"),
    "unknown": (501, "NotImplemented"),
}
# Of one hop, or written anew here.
NOT_HANDED_ON = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class S3Server:
    """moto with one bucket."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"} | PAGED,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "moto's server did not start: is moto[server] installed?"
        self.port = int(line)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        status, body = self.request("PUT", f"/{BUCKET}")
        assert status == 200, body

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """One request past every client library: how a test looks from outside."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Authorization": SIGNED} | named)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stop(self) -> None:
        """Close the server's standard input, and wait for its end."""
        self._process.communicate(timeout=30)


@dataclass
class Fault:
    """What befalls ``times`` requests of ``method`` whose path contains ``key``, after the first ``after`` of them.

    ``hits`` counts the requests it befell.
    """

    action: Action
    method: str = ""
    key: str = ""
    times: float = 1
    after: int = 0
    seconds: float = 0.0
    hits: int = field(default=0, init=False)

    def meets(self, method: str, path: str, *, conditional: bool) -> bool:
        if self.hits >= self.times or self.method not in {"", method} or self.key not in path:
            return False
        if self.action == "ignore_condition" and not conditional:
            return False
        self.after -= 1
        return self.after < 0


class FaultProxy:
    """Stands on loopback before an S3 API.

    * ``slow_down``, ``forbid``, ``conflict``, ``unknown``: answers 503, 403, 409 or 501 itself.
    * ``reset``: resets the connection and hands nothing on.
    * ``lose``: hands the request on, then resets the connection instead of answering.
    * ``truncate``: answers half the body, then resets the connection.
    * ``ignore_condition``: hands the request on without If-None-Match.
    * ``delay``: hands the request on after ``seconds``.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._endpoint_class())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def inject(self, action: Action, **options: Any) -> Fault:
        """Break requests from now on; see :class:`Fault`."""
        fault = Fault(action, **options)
        with self._lock:
            self.faults.append(fault)
        return fault

    def count(self, method: str = "", key: str = "") -> int:
        """Requests that arrived here, broken or not."""
        return sum(method in {"", seen} and key in path for seen, path in self.requests)

    def stop(self) -> None:
        """Close every connection."""
        self._server.shutdown()
        self._thread.join()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def _arrived(self, method: str, path: str, *, conditional: bool) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.meets(method, path, conditional=conditional):
                    fault.hits += 1
                    return fault
        return None

    def _endpoint_class(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Endpoint(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                proxy._open.add(self.connection)

            def finish(self) -> None:
                proxy._open.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError):  # a client may go at any time
                    super().handle()

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = unquote(urlsplit(self.path).path)
                fault = proxy._arrived(self.command, path, conditional="If-None-Match" in self.headers)
                action = fault.action if fault else ""
                if fault and action in ANSWERS:
                    status, code = ANSWERS[action]
                    self._answer(status, [], f"<Error><Code>{code}</Code><Message>made to</Message></Error>".encode())
                    return
                if action == "reset":
                    self._reset()
                    return
                if fault and action == "delay":
                    time.sleep(fault.seconds)
                status, headers, answer = self._hand_on(body, without="if-none-match" if action[:6] == "ignore" else "")
                if action == "lose":
                    self._reset()
                else:
                    self._answer(status, headers, answer, half=action == "truncate")

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

            def _hand_on(self, body: bytes, *, without: str) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection("127.0.0.1", proxy._port, timeout=60)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() not in {"connection", without}:
                            connection.putheader(name, value)
                    connection.endheaders(body)
                    response = connection.getresponse()
                    return response.status, response.getheaders(), response.read()
                finally:
                    connection.close()

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, half: bool = False) -> None:
                length = str(len(body))
                if self.command == "HEAD":
                    length = next((value for name, value in headers if name.lower() == "content-length"), "0")
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in NOT_HANDED_ON:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body[: len(body) // 2] if half else body)
                if half:
                    self._reset()

            def _reset(self) -> None:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RD)
                self.close_connection = True

        return Endpoint


def s3_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Set the variables by which a user says where the API is, and remove what the machine may have set."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def upload(key: str, data: bytes) -> None:
    """Write an object to the bucket, past every client library, at the API that the environment names."""
    place = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    connection = http.client.HTTPConnection(place.netloc, timeout=30)
    try:
        connection.request("PUT", quote(f"/{BUCKET}/{key}"), data, {"Authorization": SIGNED})
        response = connection.getresponse()
        assert response.status == 200, response.read()
    finally:
        connection.close()


def stored(server: S3Server, location: str, key: str) -> bytes | None:
    """An object's bytes as the service has them, or None."""
    parts = urlsplit(location)
    status, body = server.request("GET", f"/{parts.netloc}{parts.path}/{key}")
    return body if status == 200 else None
