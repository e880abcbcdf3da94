"""A real Ray cluster on loopback: nodes of one core each, small object stores, no dashboard, a token of its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from gstds_cache.cluster.session import LOOPBACK, QUIET, _on_loopback

SHARED = Path(__file__).parent
OBJECT_STORE = 80 << 20


def want_token() -> None:
    """Have this process show a token. Ray asks whether to at its import: this comes before it.

    It stays in the environment: drivers that this process starts show it as well.
    """
    os.environ.update(
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)}
    )


class LoopbackCluster:
    """Nodes of one core each; the first is the head node.

    Attributes:
        address: The cluster's.
        nodes: Its nodes but the first.
    """

    def __init__(self, nodes: int, environment: Mapping[str, str] | None = None) -> None:
        """Start it.

        Args:
            nodes: How many nodes there are.
            environment: What its processes get besides this one's environment.
        """
        want_token()
        path = os.pathsep.join([str(SHARED), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Ray's workers are nice (15): beside other work they would get no time at all.
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        self._environment = QUIET | LOOPBACK | own | dict(environment or {})
        with mock.patch.dict(os.environ, self._environment), _on_loopback():
            from ray.cluster_utils import Cluster

            self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments(num_cpus=1))
        self.address = str(self._cluster.address)
        self.nodes = [self.add() for _ in range(nodes - 1)]

    @staticmethod
    def _arguments(**more: Any) -> dict[str, Any]:
        return {
            "object_store_memory": OBJECT_STORE,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "include_log_monitor": False,
            **more,
        }

    def add(self, **arguments: Any) -> Any:
        """Start one more node."""
        with mock.patch.dict(os.environ, self._environment), _on_loopback():
            return self._cluster.add_node(**self._arguments(num_cpus=1, **arguments))

    def remove(self, node: Any) -> None:
        """Kill all processes of a node."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def stop(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()
