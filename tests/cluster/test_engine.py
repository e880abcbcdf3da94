"""``engine=``: what may be said, what is refused, and that nothing is open to others or tells a secret."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster_tasks import SquareRecipe, Squares
from ray_cluster import LoopbackCluster
from s3_api import SECRET

import gstds_cache
from gstds_cache.cluster.engine import Engine
from gstds_cache.errors import StoreUnavailableError, UsageError


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [
        ("local", None, Engine()),
        ("ray", None, Engine(True)),
        ("ray:head:6379", None, Engine(True, "head:6379")),
        ("ray:auto", 0.25, Engine(True, "auto", 0.25)),
        ("ray", 1, Engine(True, None, 1.0)),
    ],
)
def test_what_an_engine_is(engine: str, gpus: float | None, expected: Engine) -> None:
    assert Engine.parse(engine, gpus) == expected


@pytest.mark.parametrize("engine", ["", "dask", "ray:", "local:1", "Ray", None, 3])
def test_what_is_no_engine(engine: object) -> None:
    with pytest.raises(UsageError, match="`engine`: got .*, expected local, ray, or ray:HOST:PORT"):
        Engine.parse(engine)


@pytest.mark.parametrize("gpus", [0, -1, 1.5, 2, True, "half", float("nan")])
def test_parts_of_a_gpu_that_there_are_not(gpus: object) -> None:
    with pytest.raises(UsageError, match="`gpus_per_task`: got .*, expected a number above 0 and up to 1"):
        Engine.parse("ray", gpus)


def test_gpus_of_tasks_where_there_are_no_tasks() -> None:
    with pytest.raises(UsageError, match="needs `engine='ray'`"):
        Engine.parse("local", 0.5)


def test_settings_that_contradict_each_other(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "s", engine="ray", gpus_per_task=1.0, device="cpu")


def test_without_ray_it_says_what_to_install(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray, which is not installed\n  pip install 'gstds-cache\[ray\]'"):
        gstds_cache.embed(f"imagefolder:{photos}", tmp_path / "s", engine="ray", progress=False)


def test_the_package_loads_no_ray() -> None:
    import subprocess

    code = (
        "import sys, gstds_cache, gstds_cache.api.embed, gstds_cache.api.select_batches, gstds_cache.cli.embed_command;"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.ray
def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from gstds_cache.cluster import session

    monkeypatch.setattr(session.import_ray(), "is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with (
        pytest.raises(StoreUnavailableError, match=f"no Ray cluster answers at 127.0.0.1:{port}"),
        Engine.parse(f"ray:127.0.0.1:{port}").opened(print),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"got the address 'ray://head:10001', expected HOST:PORT"),
        Engine.parse("ray:ray://head:10001").opened(print),
    ):
        pass


@pytest.mark.ray
def test_another_cluster_than_the_one_that_is_connected(cluster: LoopbackCluster) -> None:
    with Engine.parse(f"ray:{cluster.address}").opened(print) as executor:
        assert executor is not None
    with (
        pytest.raises(UsageError, match="this process is connected to the Ray cluster"),
        Engine.parse("ray:127.0.0.1:1").opened(print),
    ):
        pass


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens, of /proc/net/tcp and tcp6."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(entry.readlink()).removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def children() -> list[int]:
    """Processes of the cluster: all that descend from this one."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    mine, found = {os.getpid()}, [0]
    while found:
        found = [pid for pid, parent in parents.items() if parent in mine and pid not in mine]
        mine.update(found)
    return sorted(mine)


@pytest.mark.ray
def test_nothing_listens_beyond_loopback(cluster: LoopbackCluster, tmp_path: Path) -> None:
    from gstds_cache.cluster.executor import RayExecutor

    list(RayExecutor(notify=print).run(Squares(SquareRecipe(tmp_path)), range(4)))  # there are workers
    addresses: set[str] = set()
    for pid in children():
        try:
            addresses |= listening(pid)
        except OSError:
            continue
    assert addresses
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    assert addresses <= set(loopback)
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.ray
def test_no_secret_travels(
    cluster: LoopbackCluster, photos: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray import cloudpickle

    from gstds_cache.cluster.executor import RayExecutor

    sent: list[bytes] = []
    run = RayExecutor.run

    def spied(self: RayExecutor, task: Any, units: Any, *, ordered: bool = False) -> Any:
        sent.append(cloudpickle.dumps(task.recipe()))
        return run(self, task, units, ordered=ordered)

    monkeypatch.setattr(RayExecutor, "run", spied)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    gstds_cache.embed(
        f"imagefolder:{photos}", bucket, engine="ray", model="cluster_tasks:build", device="cpu", progress=False
    )
    assert len(sent) == 1
    assert SECRET.encode() not in sent[0]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert list(logs.iterdir())
    for file in logs.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
