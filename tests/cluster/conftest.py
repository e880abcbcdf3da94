"""One cluster for all tests: two nodes of one core, on loopback, and this process connected to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from images import make_images
from ray_cluster import LoopbackCluster, want_token
from s3_api import BUCKET, FaultProxy, S3Server, s3_environment
from vector_store import vector_store

WITHOUT = "Ray is not installed: pip install 'gstds-cache[ray]'"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out, and count, what needs Ray where there is none."""
    if find_spec("ray") is not None:
        want_token()  # whichever test is the first to import ray
    else:
        for item in items:
            if item.get_closest_marker("ray") is not None:
                item.add_marker(pytest.mark.skip(reason=WITHOUT))


@pytest.fixture(scope="session")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """Stands before the S3 API that the cluster's workers use."""
    proxy = FaultProxy(s3_server.port)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a test leaves files that workers look for."""
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="session")
def cluster(proxy: FaultProxy, marks: Path) -> Iterator[LoopbackCluster]:
    """Two nodes; this process is connected."""
    from gstds_cache.cluster.session import connected

    with pytest.MonkeyPatch.context() as patch:
        s3_environment(patch, proxy.endpoint)
        started = LoopbackCluster(2, {"GSTDS_TEST_FOLDER": str(marks)})
        with connected(started.address):
            yield started
        started.stop()


@pytest.fixture
def bucket(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in the bucket, as the workers see it."""
    s3_environment(monkeypatch, proxy.endpoint)
    return f"s3://{BUCKET}/{uuid4().hex}/store"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real PNGs in three class folders, two of which do not decode."""
    return make_images(tmp_path_factory.mktemp("ray") / "photos")


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 300 vectors in three classes."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("ray") / "vectors.store"
    labels = np.arange(300) % 3
    vector_store(path, rng.normal(size=(300, 16)) + 2 * np.eye(16)[labels], labels, bad=[7], shard_rows=64)
    return path


@pytest.fixture(autouse=True)
def _no_cluster_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    if "RAY_ADDRESS" in os.environ:
        monkeypatch.delenv("RAY_ADDRESS")
