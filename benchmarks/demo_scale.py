"""A data set embedded on a cluster into a bucket, with a worker and then the driver killed, against a local store.

    python benchmarks/demo_scale.py FOLDER [--model timm:tf_efficientnet_lite0?size=64] [--local STORE]

A Ray cluster of two one-core nodes and an S3 API run on loopback. ``gstds-embed`` runs as a user would; at a third of
the shards one of Ray's workers gets SIGKILL, at two thirds ``gstds-embed`` itself; then the same command runs again,
``gstds-cache verify --level full`` checks the store, and every object is compared with the local store's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
from ray_cluster import SHARED, LoopbackCluster
from s3_api import BUCKET, SECRET, S3Server

from gstds_cache.files.location import Location
from gstds_cache.store import layout
from gstds_cache.store.factory import open_transport

OWN = (layout.GROUP, layout.COMPLETE)  # when and where it was made


def say(*words: object) -> None:
    """Print what happens, with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def workers() -> list[int]:
    """Ray's workers that are embedding."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if entry.read_bytes().startswith(b"ray::gstds-cache shards"):
                found.append(int(entry.parent.name))
    return found


def committed(where: str) -> int:
    """Commit records in the bucket."""
    return len(open_transport(Location.parse(where)).sizes("commits/"))


def run(words: list[str]) -> int:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", *words], env=os.environ | {"PYTHONPATH": str(SHARED)}, check=False
    ).returncode


def compare(local: Path, where: str) -> dict[str, Any]:
    """Every object of the local store beside the bucket's."""
    here, there = open_transport(Location(local)), open_transport(Location.parse(where))
    keys = sorted(set(here.sizes()) | set(there.sizes()))
    different = [key for key in keys if key not in OWN and here.get(key) != there.get(key)]
    return {"objects": len(keys), "different": different, "not_compared": list(OWN)}


def main() -> None:
    """Run it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0?size=64")
    parser.add_argument("--shard-rows", default="64")
    parser.add_argument("--local", type=Path, help="a local store of the same; made where it is not there")
    arguments = parser.parse_args()
    server = S3Server()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    say("S3 on loopback; the cluster starts")
    cluster = LoopbackCluster(2)
    where = f"s3://{BUCKET}/demo/store"
    with tempfile.TemporaryDirectory() as temporary:
        local = arguments.local or Path(temporary, "local.store")
        embed = ["gstds_cache.cli.embed_command", f"folder:{arguments.folder}", "--model", arguments.model]
        embed += ["--shard-rows", arguments.shard_rows, "--device", "cpu"]
        if ":" in arguments.model and not arguments.model.startswith("timm"):
            embed += ["--batch-size", "4"]
        assert run([*embed, "--cache", str(local), "--workers", "1"]) == 0
        shards = len(open_transport(Location(local)).sizes("commits/"))
        on_ray = [*embed, "--cache", where, "--engine", f"ray:{cluster.address}"]
        # One run, in which a worker is killed and then the driver.
        environment = os.environ | {"PYTHONPATH": str(SHARED)}
        process = subprocess.Popen([sys.executable, "-m", *on_ray], env=environment)
        for at, what in ((shards // 3, "worker"), (2 * shards // 3, "driver")):
            while process.poll() is None and committed(where) < at:
                time.sleep(0.1)
            victims = [process.pid] if what == "driver" else workers()
            while process.poll() is None and not victims:
                time.sleep(0.02)
                victims = workers()
            if process.poll() is not None:
                sys.exit(f"gstds-embed ended with {process.returncode}, before the {what} could be killed")
            say(f"{committed(where)} of {shards} shards are committed: SIGKILL to the {what} ({victims[0]})")
            os.kill(victims[0], signal.SIGKILL)
        process.wait()
        left = committed(where)
        say("the same command again")
        code = run(on_ray)
        checked = run(["gstds_cache.cli.cache_command", "verify", where, "--level", "full"])
        result = {"shards": shards, "committed_when_killed": left, "embed": code, "verify": checked}
        print(json.dumps(result | compare(local, where)), flush=True)
    cluster.stop()
    server.stop()


if __name__ == "__main__":
    main()
