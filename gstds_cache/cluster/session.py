"""Connecting to a Ray cluster, or starting one on this machine: on loopback, with a token, without a dashboard."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gstds_cache.errors import StoreUnavailableError, UsageError, command_line
from gstds_cache.runtime.threads import cores

ANSWERS_WITHIN = 10.0
"""Seconds in which a cluster's address has to take a connection."""
OBJECTS = 256 << 20
"""Bytes of Ray's object store of a cluster that is started here: it holds recipes, and no embeddings."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray takes this machine's outside address in place of 127.0.0.1, unless it believes that there are no clusters.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def import_ray() -> Any:
    """Ray, if it is installed.

    Raises:
        UsageError: It is not.
        ModuleNotFoundError: Something that it needs is not.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError(
            "`engine='ray'` needs Ray, which is not installed", hint="pip install 'gstds-cache[ray]'"
        ) from error
    return ray


_token: dict[str, str] = {}  # of clusters that this process starts; empty where Ray was imported without one


def _import_with_token() -> None:
    """Import Ray as a process whose clusters want a token (Ray 2.52 and later), which it asks for at its import alone.

    A process that has imported Ray before starts clusters as it was imported.
    """
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _environment(wanted):
        import_ray()
    _token.update(wanted)


def is_to_start(address: str | None) -> bool:
    """Whether a cluster has to be started here: none is connected to, and none is named.

    Raises:
        UsageError: Ray is not installed.
    """
    named = address or os.environ.get("RAY_ADDRESS") or "local"
    if named == "local":
        _import_with_token()
    return not import_ray().is_initialized() and named == "local"


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to a cluster while the block lasts.

    Args:
        address: ``HOST:PORT``, or ``auto`` for the one that runs on this machine. None is the cluster that this process
            is connected to already, else that of ``$RAY_ADDRESS``, else one that is started here and ends with the
            block.

    Yields:
        Nothing.

    Raises:
        UsageError: Ray is not installed, the address cannot be meant, or this process is connected to another cluster.
        StoreUnavailableError: No cluster answers there, or it refuses.
    """
    with _environment(QUIET):
        ray = import_ray()
        if ray.is_initialized():
            _require_same(ray, address)
            yield
            return
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address != "local":
            _require_answer(address)
        local = address == "local" or _is_loopback(address)
        with _environment(_token if address == "local" else {}), _on_loopback() if local else _environment({}):
            _init(ray, address)
            try:
                yield
            finally:
                ray.shutdown()


def _init(ray: Any, address: str) -> None:
    started = {
        "num_cpus": cores(),
        "include_dashboard": False,
        "object_store_memory": OBJECTS,
        "_node_ip_address": "127.0.0.1",
    }
    loopback = {"_node_ip_address": "127.0.0.1"} if _is_loopback(address) else {}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(started if address == "local" else loopback),
        )
    except (RuntimeError, ConnectionError, ValueError) as error:  # Ray's own are of these
        text = str(error).strip().partition("\n\n")[0]
        raise StoreUnavailableError(
            f"`engine`: cannot connect to the Ray cluster {address}: {text or type(error).__name__}",
            hint="the cluster needs the same versions of Ray and Python as this process; where it has token "
            "authentication, RAY_AUTH_MODE=token and its token (docs/ray.md)",
        ) from error


def _require_same(ray: Any, address: str | None) -> None:
    """Refuse another cluster than the one this process is connected to.

    Raises:
        UsageError: It is another.
    """
    mine = ray.get_runtime_context().gcs_address
    if address not in {None, "auto", mine} and _resolved(str(address)) != _resolved(mine):
        raise UsageError(
            f"`engine`: this process is connected to the Ray cluster {mine}, got {address}",
            hint="call ray.shutdown() first, or give `engine='ray'`",
        )


def _resolved(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    try:
        return socket.gethostbyname(host), port
    except OSError:
        return host, port


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for minutes.

    Raises:
        UsageError: It is no address.
        StoreUnavailableError: Nothing answers.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"`engine`: got the address {address!r}, expected HOST:PORT of a cluster's head node, or auto",
            hint="run the command on a node of the cluster, with the address that `ray start` printed there",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN).close()
    except (OSError, OverflowError) as error:
        raise StoreUnavailableError(
            f"`engine`: no Ray cluster answers at {address} within {ANSWERS_WITHIN:.0f} s: {error}",
            hint=f"start one there with `{command_line('ray', 'start', '--head')}`, or leave the address out",
        ) from error


_changing = threading.Lock()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, while the block lasts: Ray's processes inherit them.

    Yields:
        Nothing.
    """
    with _changing:
        mine = {name: value for name, value in values.items() if name not in os.environ}
        os.environ.update(mine)
    try:
        yield
    finally:
        with _changing:
            for name in mine:
                os.environ.pop(name, None)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray leave 127.0.0.1 as it is, also where it was imported before.

    Yields:
        Nothing.
    """
    with _environment(LOOPBACK):
        constants = sys.modules.get("ray._private.ray_constants")
        before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
        if before is not None:
            constants.ENABLE_RAY_CLUSTER = False  # type: ignore[union-attr]
        try:
            yield
        finally:
            if before is not None:
                constants.ENABLE_RAY_CLUSTER = before  # type: ignore[union-attr]
