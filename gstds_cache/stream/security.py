"""Who may talk to a service: loopback in the clear, everything else by TLS and a token."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from gstds_cache.errors import UsageError

SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Access:
    """What a service was given to protect itself.

    Attributes:
        certificate: PEM certificate chain of the service.
        key: Its PEM private key.
        token: What clients have to show; None where none is asked for.
        client_ca: PEM certificates that clients' certificates have to be signed by (mutual TLS).
    """

    certificate: bytes | None = None
    key: bytes | None = None
    token: str | None = None
    client_ca: bytes | None = None

    @classmethod
    def from_files(
        cls, host: str, *, certificate: Path | None, key: Path | None, token: Path | None, client_ca: Path | None
    ) -> Access:
        """Read the files, and refuse what would leave an open door.

        Raises:
            UsageError: A file is missing, or the address needs more protection than was given.
        """
        if (certificate is None) != (key is None):
            raise UsageError("`tls_cert` and `tls_key` belong together: got one of them")
        if client_ca is not None and certificate is None:
            raise UsageError("`client_ca` needs `tls_cert` and `tls_key`")
        if not is_loopback(host) and (certificate is None or token is None):
            raise UsageError(
                f"`address`: {host} is not loopback, which needs `tls_cert`, `tls_key` and `token_file`",
                hint="serve on 127.0.0.1:PORT, or give all three",
            )
        return cls(
            certificate=_read("`tls_cert`", certificate),
            key=_read("`tls_key`", key),
            token=None if token is None else read_token(token),
            client_ca=_read("`client_ca`", client_ca),
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone. Names are not looked up: only ``localhost`` is known."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, the host in brackets if it is an IPv6 address.

    Raises:
        UsageError: It is not that.
    """
    host, colon, port = str(text).rpartition(":")  # which may be None, from Python
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise UsageError(f"`address`: got {text!r}, expected HOST:PORT, e.g. 127.0.0.1:8815")
    return host, int(port)


def read_token(path: Path) -> str:
    """The token in a file: one line of printable characters.

    Raises:
        UsageError: There is no such file, or no token in it that is hard to guess.
    """
    text = _read("token file", path)
    token = (text or b"").decode(errors="replace").strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"{path} holds no token: expected one line of at least {SHORTEST_TOKEN} printable characters",
            hint=f"make one: openssl rand -hex 32 > {path}",
        )
    return token


def _read(what: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from error
