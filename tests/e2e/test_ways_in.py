"""Every way in through the commands: embedded, chosen from, trained on; killed and begun again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from real_store import objects_of
from source_kinds import KINDS, items

COUNT = 48
SMALL = ["--model", "tiny", "--cache", "x.store", "--batch-size", "8", "--shard-rows", "16", "--workers", "1", "--json"]
WAYS = ["folder", "list", "parquet files of structs", "arrow", "hf saved", "webdataset in a bucket"]


@pytest.fixture(params=WAYS)
def named(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The name of a data set of 48 images, the tenth of them broken."""
    kind = KINDS[request.param]
    if kind.missing:
        pytest.skip(f"{kind.needs} is not installed")
    if kind.in_bucket:
        request.getfixturevalue("s3_prefix")
    (tmp_path / "data").mkdir()
    name: str = kind.write(tmp_path / "data", items(COUNT, broken=[9]))
    return name


def test_embed_select_and_train(named, command, result_of, tiny_model) -> None:
    words = [tiny_model if word == "tiny" else word for word in SMALL]
    embedded = result_of(command("gstds-embed", named, *words))
    assert (embedded["items"], embedded["ok"]) == (COUNT, COUNT - 1)
    assert [bad["row"] for bad in embedded["quarantined"]] == [9]
    assert result_of(command("gstds-embed", named, *words))["cache_hit"]
    select = ["gstds-select", "x.store", "--batch-size", "16", "--epochs", "1", "--knn", "3", "--out", "s.arrow"]
    command(*select)
    train = ["gstds-train", named, "--selection", "s.arrow", "--arch", "timm:test_resnet", "--image-size", "16"]
    done = command(*train, "--json", code=2 if named.startswith("folder:") else 0)
    if named.startswith("folder:"):
        assert "label" in done.stderr
    else:
        assert result_of(done)["steps"] > 0


@pytest.mark.faults
@pytest.mark.parametrize("named", [*WAYS, "webdataset", "class folders in a bucket"], indirect=True)
def test_killed_and_begun_again(named, start, command, tiny_model, tmp_path) -> None:
    words = [f"{tiny_model}_slow" if word == "tiny" else word for word in SMALL]
    words[words.index("--batch-size") + 1], words[words.index("--shard-rows") + 1] = "2", "4"
    command("gstds-embed", named, *[word.replace("x.store", "whole.store") for word in words])
    (tmp_path / "hold").touch()
    running = start("gstds-embed", named, *words)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "x.store" / "commits").glob("[0-9]*.json")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate(60)  # or its pipes stay open
    (tmp_path / "hold").unlink()
    command("gstds-embed", named, *words)
    assert objects_of(tmp_path / "x.store") == objects_of(tmp_path / "whole.store")
