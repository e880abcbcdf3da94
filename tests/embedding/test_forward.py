"""Forward passes that are recorded and replayed give the store that passes taken one by one give.

On a CPU a recording is the pass itself, taken again: all but the recording runs here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from gstds_cache.embedding import decoding, device_decoding, forward, run
from gstds_cache.embedding.device_decoding import DeviceBatches
from gstds_cache.embedding.forward import EAGER, ForwardPasses
from gstds_cache.embedding.job import EmbedJob
from gstds_cache.embedding.jpeg_reader import Item
from gstds_cache.embedding.run import embed_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError, UsageError
from gstds_cache.runtime.recording import Seen
from gstds_cache.store.reader import EmbeddingStore

CPU, BATCH, ITEMS = torch.device("cpu"), 4, 38
MODEL = "timm:test_resnet"
QUEUES = decoding.QUEUES


def config(**changes: Any) -> EmbedConfig:
    settings = {"model": MODEL, "allow_untrained": True, "batch_size": BATCH, "shard_rows": 8, "workers": 0}
    return EmbedConfig(**(settings | {"device": "cpu", "decoder": "nvjpeg"} | changes))


@pytest.fixture
def source(array_source) -> ImageSource:
    return array_source(ITEMS)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Passes are recorded on a CPU as well, which is to take them again; what was done."""
    done: list[str] = []

    def recording(step: Callable[[Tensor], Any], pixels: Tensor, *_: Any, **_where: Any) -> Callable[[Tensor], Any]:
        assert len(pixels) == BATCH
        assert not torch.is_inference_mode_enabled()
        assert device_decoding.decoding_paused().locked()
        done.append("recorded")

        def replay(other: Tensor) -> Any:
            done.append("replayed")
            pixels.copy_(other)
            return tuple(output.clone() for output in step(pixels))

        return replay

    monkeypatch.setattr(forward, "recording", recording)
    monkeypatch.setattr(forward, "recordable", lambda _device: True)
    monkeypatch.setattr(decoding, "device_decoder_version", lambda _device: "stand-in")
    monkeypatch.setitem(decoding._in_time, "value", "32")
    return done


def see(monkeypatch: pytest.MonkeyPatch, *, waits: list[str] | None = None, allocated: int = 0) -> None:
    """Let the pass that is watched have been so."""
    seen = Seen()
    seen.waits, seen.allocated = waits or [], allocated
    monkeypatch.setattr(forward, "watched", lambda _device: nullcontext(seen))


def passes(batches: int = EAGER + 3, model: str = MODEL, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of some batches, and what the model gives by itself."""
    encoder = open_encoder(model, allow_untrained=True).decoded_by("nvjpeg", "stand-in")
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
    assert caplog.text.count("timm:test_resnet are not recorded in a CUDA graph: the host waits for the GPU in it") == 1
    assert "model.py:7" in caplog.text
    assert all(map(torch.equal, mine, theirs))


def test_a_recording_needs_room_for_what_a_pass_takes_and_a_quarter_more(recorded, monkeypatch, caplog) -> None:
    see(monkeypatch, allocated=1000 << 20)
    asked: list[int] = []
    monkeypatch.setattr(forward, "can_allocate", lambda nbytes, _device: asked.append(nbytes))
    mine, theirs = passes()
    assert recorded == []
    assert asked == [(1250 << 20) + (64 << 20)]
    assert caplog.text.count("a pass takes 1,000 MiB, and there is no room to record it as well") == 1
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


def test_rows_that_are_no_numbers_are_compared_as_well(recorded) -> None:
    encoder = open_encoder(MODEL, allow_untrained=True).decoded_by("nvjpeg", "stand-in")
    whole = encoder.queue
    encoder.queue = lambda pixels: torch.where(pixels[:, 0, :1, 0] == 0, torch.nan, whole(pixels))
    queue = ForwardPasses(encoder, CPU)
    black = torch.zeros((BATCH, *encoder.input_shape), dtype=torch.uint8)
    rows = [queue(black) for _ in range(EAGER + 1)]
    assert recorded == ["recorded", "replayed", "replayed"]
    assert bool(rows[-1].isnan().all())


def test_what_fails_in_a_replay_is_the_models_error(recorded) -> None:
    encoder = open_encoder(MODEL, allow_untrained=True).decoded_by("nvjpeg", "stand-in")
    queue = ForwardPasses(encoder, CPU)
    pixels = torch.zeros((BATCH, *encoder.input_shape), dtype=torch.uint8)
    for _ in range(EAGER):
        queue(pixels)
    queue._replay = lambda _pixels: (_ for _ in ()).throw(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(EncoderError, match="timm:test_resnet: the model failed: .*unspecified launch failure"):
        queue(pixels)


def test_the_device_decodes_nothing_while_a_pass_is_recorded(recorded, monkeypatch) -> None:
    decoded, paused = list[bool](), device_decoding.decoding_paused()

    def decode(files: list[Tensor], _device: torch.device) -> list[Tensor]:
        decoded.append(paused.locked())
        return files

    monkeypatch.setattr(device_decoding, "decode_jpegs", decode)
    batches = DeviceBatches.__new__(DeviceBatches)
    batches._decoding_stream, batches._device = None, CPU
    with ThreadPoolExecutor(1) as thread:
        with paused:
            future = thread.submit(batches._decode, torch.zeros(3, dtype=torch.uint8), [Item(0, 3, 1)])
            with pytest.raises(TimeoutError):
                future.result(timeout=0.2)
        assert len(future.result(timeout=20)) == 1
    assert decoded == [True]


@pytest.mark.parametrize("queues", [None, "8", "many"])
def test_with_few_queues_nothing_is_recorded(recorded, monkeypatch, queues: str | None) -> None:
    """A GPU that has always something to do hardly decodes then."""
    monkeypatch.setitem(decoding._in_time, "value", queues)
    passes()
    assert recorded == []


def test_where_pillow_decodes_nothing_is_recorded(recorded, source, tmp_path) -> None:
    embed_dataset(source, config(decoder="pillow"), where=tmp_path / "store")
    assert recorded == []


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
    settings = config(cuda_graphs=graphs, decoder="pillow")
    embed_dataset(source, settings, where=tmp_path / "store", executor=spread)
    assert spread.graphs == [graphs]
    job = EmbedJob(source, settings, CPU, open_encoder(MODEL, allow_untrained=True), print)
    several = run._several_devices(job, EmbeddingStore(tmp_path / "store").spec, 1)
    assert several._setup.cuda_graphs == graphs


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv(QUEUES, "put back as it was, at the end")
    monkeypatch.delenv(QUEUES)
    monkeypatch.setitem(decoding._in_time, "value", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return monkeypatch


def test_streams_are_kept_apart_where_a_gpu_decodes(unset) -> None:
    decoding.keep_streams_apart("pillow")
    assert QUEUES not in os.environ
    decoding.keep_streams_apart("nvjpeg")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert decoding.streams_are_apart()


def test_what_the_user_says_of_queues_stays(unset) -> None:
    unset.setenv(QUEUES, "8")
    decoding.keep_streams_apart("nvjpeg")
    assert os.environ[QUEUES] == "8"
    assert not decoding.streams_are_apart()


def test_a_cuda_that_has_begun_is_told_of(unset, caplog) -> None:
    unset.setattr(torch.cuda, "is_initialized", lambda: True)
    decoding.keep_streams_apart("nvjpeg")
    assert QUEUES not in os.environ
    assert "set CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment before Python starts" in caplog.text
    unset.setenv(QUEUES, "32")  # too late
    decoding.keep_streams_apart("nvjpeg")
    assert not decoding.streams_are_apart()


@pytest.mark.parametrize("call", ["embed", "estimate_embedding"])
def test_streams_are_kept_apart_before_a_device_is_looked_for(unset, monkeypatch, tmp_path, call: str) -> None:
    seen: list[str | None] = []

    def resolve(name: str) -> None:
        seen.append(os.environ.get(QUEUES))
        raise UsageError(name)

    for module in (embed_api, run):
        monkeypatch.setattr(module, "resolve_devices", resolve)
    monkeypatch.setenv("GSTDS_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="cuda"):
        getattr(embed_api, call)("digits", tmp_path / "s", decoder="nvjpeg", device="cuda")
    assert seen == ["32"]


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
@pytest.mark.parametrize("model", [MODEL, "timm:tf_efficientnet_lite0", "torchvision:resnet18"])
def test_on_a_gpu_replays_make_the_store_made_without(photographs, tmp_path, monkeypatch, model) -> None:
    kept: list[bool] = []
    whole = ForwardPasses._record

    def spy(self: ForwardPasses, *arguments: Any) -> None:
        whole(self, *arguments)
        kept.append(self._replay is not None)

    monkeypatch.setattr(ForwardPasses, "_record", spy)
    monkeypatch.setattr(forward, "streams_are_apart", lambda: True)  # this process may have begun with few queues
    on_gpu = {"model": model, "device": "cuda", "batch_size": 16, "shard_rows": 64, "workers": 3}
    made = {
        graphs: embed_dataset(photographs, config(cuda_graphs=graphs, **on_gpu), where=tmp_path / str(graphs))
        for graphs in (True, False)
    }
    assert kept == [True]
    rows = np.arange(len(photographs))
    assert made[True].gather(rows).tobytes() == made[False].gather(rows).tobytes()
