"""Forward passes that are recorded and replayed give the store that passes taken one by one give.

On a CPU a recording is the pass itself, taken again: all but the recording runs here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gstds_cache.api import embed as embed_api
from gstds_cache.config import EmbedConfig
from gstds_cache.data.source import ImageSource
from gstds_cache.data.sources import open_source
from gstds_cache.embedding import decoding, forward, run
from gstds_cache.embedding.forward import EAGER, ForwardPasses
from gstds_cache.embedding.job import EmbedJob
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError, UsageError
from gstds_cache.runtime.recording import Seen
from gstds_cache.store.reader import EmbeddingStore

CPU, BATCH, ITEMS = torch.device("cpu"), 4, 38
MODEL = "timm:test_resnet"


def config(**changes: Any) -> EmbedConfig:
    settings = {"model": MODEL, "allow_untrained": True, "batch_size": BATCH, "shard_rows": 8, "workers": 0}
    return EmbedConfig(**(settings | {"device": "cpu"} | changes))


@pytest.fixture
def source(array_source) -> ImageSource:
    return array_source(ITEMS)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Passes are recorded on a CPU as well, which is to take them again; what was done."""
    done: list[str] = []

    def recording(step: Callable[[Tensor], Any], pixels: Tensor, *_: Any, **_where: Any) -> Callable[[Tensor], Any]:
        assert len(pixels) == BATCH
        done.append("recorded")

        def replay(other: Tensor) -> Any:
            done.append("replayed")
            pixels.copy_(other)
            return tuple(output.clone() for output in step(pixels))

        return replay

    monkeypatch.setattr(forward, "recording", recording)
    monkeypatch.setattr(forward, "recordable", lambda _device: True)
    return done


def see(monkeypatch: pytest.MonkeyPatch, *, waits: list[str] | None = None, allocated: int = 0) -> None:
    """Let the pass that is watched have been so."""
    seen = Seen()
    seen.waits, seen.allocated = waits or [], allocated
    monkeypatch.setattr(forward, "watched", lambda _device: nullcontext(seen))


def passes(batches: int = EAGER + 3, model: str = MODEL, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of some batches, and what the model gives by itself."""
    encoder = open_encoder(model, allow_untrained=True)
    queue = ForwardPasses(encoder, CPU, **options)
    rng = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(256, (BATCH, *encoder.input_shape), generator=rng, dtype=torch.uint8) for _ in range(batches)
    ]
    return [queue(batch) for batch in pixels], [encoder.queue(batch) for batch in pixels]


def test_a_store_made_by_replays_is_the_store_made_without(source, recorded, tmp_path) -> None:
    plain = embed_dataset(source, config(cuda_graphs=False), where=tmp_path / "plain")
    assert recorded == []
    graphs = embed_dataset(source, config(), where=tmp_path / "graphs")
    batches = -(-ITEMS // BATCH)
    assert recorded == ["recorded", *["replayed"] * (1 + batches - EAGER)]  # once to compare
    rows = np.arange(ITEMS)
    assert graphs.gather(rows).tobytes() == plain.gather(rows).tobytes()
    assert graphs.fingerprint == plain.fingerprint


def test_a_small_run_is_not_recorded(recorded) -> None:
    mine, theirs = passes(EAGER - 1)
    assert recorded == []
    assert all(map(torch.equal, mine, theirs))


def test_rows_of_a_replay_stay_when_the_next_is_queued(recorded) -> None:
    mine, theirs = passes()
    assert recorded.count("replayed") == 4
    assert all(map(torch.equal, mine, theirs))


def test_a_model_that_waits_for_the_gpu_is_not_recorded(recorded, monkeypatch, caplog) -> None:
    see(monkeypatch, waits=["model.py:7"])
    mine, theirs = passes()
    assert recorded == []
    assert caplog.text.count("timm:test_resnet is not recorded in a CUDA graph: the host waits for the GPU in it") == 1
    assert all(map(torch.equal, mine, theirs))


def test_a_recording_needs_room_for_what_a_pass_takes_and_a_quarter_more(recorded, monkeypatch) -> None:
    see(monkeypatch, allocated=1000 << 20)
    asked: list[int] = []
    monkeypatch.setattr(forward, "can_allocate", lambda nbytes, _device: asked.append(nbytes))
    mine, theirs = passes()
    assert recorded == []
    assert asked == [(1250 << 20) + (64 << 20)]
    assert all(map(torch.equal, mine, theirs))


def test_a_recording_that_gives_other_rows_is_not_used(recorded, monkeypatch, caplog) -> None:
    whole = forward.recording

    def other(step: Callable[[Tensor], Any], *arguments: Any, **where: Any) -> Callable[[Tensor], Any]:
        return whole(lambda pixels: (step(pixels)[0].nextafter(torch.tensor(1.0)),), *arguments, **where)

    monkeypatch.setattr(forward, "recording", other)
    mine, theirs = passes()
    assert recorded == ["recorded", "replayed"]
    assert "its rows are others there" in caplog.text
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("kind", [RuntimeError, EncoderError, torch.OutOfMemoryError])
def test_a_recording_that_fails_ends_with_what_to_do(recorded, monkeypatch, source, tmp_path, kind) -> None:
    def broken(*_: Any, **_where: Any) -> Any:
        raise kind("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(forward, "recording", broken)
    with pytest.raises(
        EncoderError, match="cannot be recorded in a CUDA graph here: operation not permitted"
    ) as caught:
        embed_dataset(source, config(), where=tmp_path / "store")
    assert "`cuda_graphs=False`" in caught.value.hint
    assert "and more" not in caught.value.message
    done = embed_dataset(source, config(cuda_graphs=False), where=tmp_path / "store").report
    assert done.ok == ITEMS
    assert done.committed_before > 0  # it goes on from what was committed


def test_a_module_of_ones_own_is_not_recorded(recorded, watched, source, tmp_path) -> None:
    embed_dataset(source, config(model=watched.URI), where=tmp_path / "store")
    assert recorded == []


class _Spread:
    """An executor that would have shards embedded elsewhere, and does so here."""

    def __init__(self) -> None:
        self.graphs: list[bool] = []

    def run(self, task: Any, shards: Sequence[int]) -> Iterator[Any]:
        self.graphs.append(task.recipe().cuda_graphs)
        yield from task(shards)


@pytest.mark.parametrize("graphs", [True, False])
def test_other_machines_and_devices_are_told(source, tmp_path, graphs: bool) -> None:
    spread = _Spread()
    embed_dataset(source, config(cuda_graphs=graphs), where=tmp_path / "store", executor=spread)
    assert spread.graphs == [graphs]
    job = EmbedJob(source, config(cuda_graphs=graphs), CPU, open_encoder(MODEL, allow_untrained=True), print)
    several = run._several_devices(job, EmbeddingStore(tmp_path / "store").spec, 1)
    assert several._setup.cuda_graphs == graphs


QUEUES = decoding.QUEUES


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(QUEUES, "put back as it was, at the end")
    monkeypatch.delenv(QUEUES)
    return monkeypatch


def test_streams_are_kept_apart_where_a_gpu_decodes(unset) -> None:
    decoding.keep_streams_apart("pillow")
    assert QUEUES not in os.environ
    decoding.keep_streams_apart("nvjpeg")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_what_the_user_says_of_queues_stays(unset) -> None:
    unset.setenv(QUEUES, "8")
    decoding.keep_streams_apart("nvjpeg")
    assert os.environ[QUEUES] == "8"


def test_a_cuda_that_has_begun_is_told_of(unset, caplog) -> None:
    unset.setattr(torch.cuda, "is_initialized", lambda: True)
    decoding.keep_streams_apart("nvjpeg")
    assert QUEUES not in os.environ
    assert "set CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment" in caplog.text


@pytest.mark.parametrize("call", ["embed", "estimate_embedding"])
def test_streams_are_kept_apart_before_a_device_is_looked_for(unset, monkeypatch, tmp_path, call: str) -> None:
    def resolve(name: str) -> None:
        assert os.environ[QUEUES] == "32"
        raise UsageError(name)

    for module in (embed_api, run):
        monkeypatch.setattr(module, "resolve_devices", resolve)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="cuda"):
        getattr(embed_api, call)("digits", tmp_path / "s", decoder="nvjpeg", device="cuda")


@pytest.fixture
def photographs(tmp_path: Path) -> ImageSource:
    """240 JPEGs."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "all").mkdir(parents=True)
    for number in range(240):
        areas = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(12 + number % 5, 0).repeat(15, 1)
        Image.fromarray(areas).save(tmp_path / "images" / "all" / f"{number:03d}.jpg", quality=90)
    return open_source(f"imagefolder:{tmp_path / 'images'}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("decoder", ["pillow", "nvjpeg"])
@pytest.mark.parametrize("model", [MODEL, "timm:tf_efficientnet_lite0", "torchvision:resnet18"])
def test_on_a_gpu_replays_make_the_store_made_without(photographs, tmp_path, monkeypatch, decoder, model) -> None:
    kept: list[bool] = []
    whole = ForwardPasses._record

    def spy(self: ForwardPasses, *arguments: Any) -> None:
        whole(self, *arguments)
        kept.append(self._replay is not None)

    monkeypatch.setattr(ForwardPasses, "_record", spy)
    on_gpu = {"model": model, "device": "cuda", "decoder": decoder, "batch_size": 16, "shard_rows": 64, "workers": 3}
    made = {
        graphs: embed_dataset(photographs, config(cuda_graphs=graphs, **on_gpu), where=tmp_path / str(graphs))
        for graphs in (True, False)
    }
    assert kept == [True]
    rows = np.arange(len(photographs))
    assert made[True].gather(rows).tobytes() == made[False].gather(rows).tobytes()
