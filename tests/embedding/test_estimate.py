from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.config import EmbedConfig
from gstds_cache.data import loading
from gstds_cache.data.loading import default_workers
from gstds_cache.embedding import run
from gstds_cache.embedding.estimate import disk_bytes, estimate_run, fitting_batch_size, require_disk
from gstds_cache.embedding.run import embed_dataset, estimate_dataset
from gstds_cache.encoders.factory import open_encoder
from gstds_cache.errors import EncoderError, FingerprintMismatchError, IncompleteError, UsageError
from gstds_cache.store.embed_report import Estimate
from gstds_cache.store.local import LocalTransport
from gstds_cache.store.metadata import StoreMetadata

CPU = torch.device("cpu")


def config_of(model: str, **changes) -> EmbedConfig:
    return EmbedConfig(**({"model": model, "batch_size": 4, "shard_rows": 8, "workers": 0, "device": "cpu"} | changes))


def estimate_of(source, model: str, **changes) -> Estimate:
    config = config_of(model, **changes)
    return estimate_run(source, open_encoder(model), config, CPU, 10_000, batch_size=4, shard_rows=8)


def test_rates_are_measured_and_make_a_time(array_source, watched) -> None:
    watched.SECONDS = 0.05
    estimate = estimate_of(array_source(50, bad=frozenset({0, 49})), watched.URI)
    assert 3 < estimate.forward_per_second <= 80  # 4 images in 0.05 s and a little
    assert estimate.decode_per_second > 10
    both = 1 / (1 / estimate.forward_per_second + 1 / estimate.decode_per_second)
    assert estimate.images_per_second == pytest.approx(both)
    assert estimate.seconds == pytest.approx(10_000 / both)
    assert (estimate.images, estimate.batch_size, estimate.workers, estimate.device) == (10_000, 4, 0, "cpu")
    assert 50 << 20 < estimate.ram_bytes < 8 << 30
    assert estimate.vram_bytes is None


def test_a_slow_model_is_run_once_and_slow_images_are_left_out(array_source, watched) -> None:
    class Slow(array_source):
        def image(self, row):
            import time

            time.sleep(0.3)
            return super().image(row)

    watched.SECONDS = 1.1
    encoder, before = open_encoder(watched.URI), len(watched.SHAPES)
    estimate = estimate_run(
        Slow(50), encoder, config_of(watched.URI, workers=2), CPU, 50, batch_size=4, shard_rows=8, disk_free=None
    )
    assert len(watched.SHAPES) - before == 1
    assert 0.5 < estimate.decode_per_second <= 1 / 0.3
    both = 1 / (1 / estimate.forward_per_second + 1 / (2 * estimate.decode_per_second))
    assert estimate.images_per_second == pytest.approx(both)


def test_the_disk_that_is_needed_is_the_disk_that_is_used(array_source, watched, tmp_path) -> None:
    source, config = array_source(500), config_of(watched.URI, shard_rows=64, dtype="float32")
    embed_dataset(source, config, where=tmp_path / "s")
    used = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
    need = disk_bytes(source, 500, 64, 49 * 4)
    assert used == pytest.approx(need, rel=0.1)
    assert disk_bytes(source, 100, 64, 49 * 4) < need / 2


def test_too_small_a_disk_is_refused_before_anything_is_made(array_source, watched, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(LocalTransport, "free_bytes", lambda _self: 1000)
    with pytest.raises(IncompleteError, match=r"got 1\.0 kB of free disk, expected at least .* kB") as caught:
        embed_dataset(array_source(50), config_of(watched.URI), where=tmp_path / "s")
    assert "`cache`" in caught.value.hint
    assert not (tmp_path / "s").exists()
    assert (
        sum(shape[0] == 4 for shape in watched.SHAPES) == 2
    )  # the batch that had to fit, and the second pass of the check
    require_disk(1000, None, location="s")


def test_a_long_run_says_what_it_will_take_and_a_short_one_nothing(
    array_source, watched, tmp_path, monkeypatch
) -> None:
    said: list[str] = []
    short = embed_dataset(array_source(50), config_of(watched.URI), where=tmp_path / "short", notify=said.append).report
    assert (said, short.estimate) == ([], None)
    monkeypatch.setattr(run, "ESTIMATE_FROM", 40)
    report = embed_dataset(array_source(50), config_of(watched.URI), where=tmp_path / "long", notify=said.append).report
    assert report.estimate is not None
    assert report.estimate.images == 50
    assert report.seconds["estimate"] > 0
    assert said[0].startswith("estimate: 50 images at about ")
    assert said[1].startswith("needs: disk ")
    said.clear()
    assert embed_dataset(
        array_source(50), config_of(watched.URI), where=tmp_path / "long", notify=said.append
    ).report.cache_hit
    assert said == []


def test_an_estimate_writes_nothing_and_counts_what_is_committed(array_source, watched, tmp_path) -> None:
    here = sorted(tmp_path.rglob("*"))
    source = array_source(50)
    fresh = estimate_dataset(source, config_of(watched.URI), where=tmp_path / "s", root=tmp_path / "stores")
    assert (fresh.items, fresh.committed, fresh.images) == (50, 0, 50)
    unnamed = estimate_dataset(source, config_of(watched.URI), root=tmp_path / "stores")
    assert unnamed.disk_free
    assert sorted(tmp_path.rglob("*")) == here

    def stop(phase, done, _total, _shares):
        if phase == "embed" and done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_dataset(source, config_of(watched.URI), where=tmp_path / "s", progress=stop)
    rest = estimate_dataset(source, config_of(watched.URI, batch_size=None), where=tmp_path / "s")
    assert (rest.committed, rest.images, rest.batch_size) == (16, 34, 4)
    with pytest.raises(FingerprintMismatchError, match="items"):
        estimate_dataset(array_source(51), config_of(watched.URI), where=tmp_path / "s")


def test_the_estimate_warns_of_what_is_not_enough(array_source, watched) -> None:
    fields = estimate_of(array_source(50), watched.URI).to_dict()
    plenty = Estimate(**fields | {"disk_free": 1 << 50, "ram_free": 1 << 50})
    assert len(plenty.lines()) == 2
    little = Estimate(**fields | {"disk_free": 10, "ram_free": 10, "vram_bytes": 3 << 30, "vram_free": 1 << 30})
    assert little.lines()[2] == "warning: not enough disk and memory and GPU memory"
    assert "GPU memory 3.2 GB of 1.1 GB free" in little.lines()[1]


def test_a_batch_that_does_not_fit_is_halved(array_source, watched, tmp_path) -> None:
    watched.FITS = 5
    said: list[str] = []
    config = config_of(watched.URI, batch_size=16, shard_rows=30)
    report = embed_dataset(array_source(50), config, where=tmp_path / "s", notify=said.append).report
    assert report.batch_size == 4
    assert (StoreMetadata(tmp_path / "s").spec.batch_size, StoreMetadata(tmp_path / "s").spec.shard_rows) == (4, 32)
    assert [line.rpartition(" ")[2] for line in said] == ["8", "4", "4"]
    assert embed_dataset(array_source(50), config, where=tmp_path / "s").report.cache_hit  # the same command again


def test_the_cpu_allocators_error_halves_too_and_others_are_left_alone(watched) -> None:
    encoder = open_encoder(watched.URI)
    watched.FITS = 3
    watched.ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496")
    assert fitting_batch_size(encoder, CPU, 8) == 2
    watched.ERROR = RuntimeError("shape mismatch")
    with pytest.raises(EncoderError, match=r"given float32 \[8, 3, 16, 16\], the model failed: RuntimeError: shape"):
        fitting_batch_size(encoder, CPU, 8)


def test_a_model_that_does_not_fit_with_one_image_is_refused(watched) -> None:
    encoder = open_encoder(watched.URI)
    watched.FITS = 0
    with pytest.raises(UsageError, match="single image"):
        fitting_batch_size(encoder, CPU, 8)


def interrupted(source, config: EmbedConfig, where: Path) -> None:
    def stop(phase, done, _total, _shares):
        if phase == "embed" and done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_dataset(source, config, where=where, progress=stop)


def test_a_store_with_a_batch_size_that_does_not_fit_is_refused(array_source, watched, tmp_path) -> None:
    interrupted(array_source(50), config_of(watched.URI), tmp_path / "s")
    watched.FITS = 3
    for call in (embed_dataset, estimate_dataset):
        with pytest.raises(UsageError, match="begun with batch size 4, and 2 is the largest") as caught:
            call(array_source(50), config_of(watched.URI, batch_size=None), where=tmp_path / "s")
        assert f"gstds-embed memory --model {watched.URI} --cache {tmp_path}/s-b2 --batch-size 2" in caught.value.hint


def test_memory_that_runs_out_on_the_way_loses_nothing(array_source, watched, tmp_path) -> None:
    embed_dataset(array_source(50), config_of(watched.URI), where=tmp_path / "whole")
    watched.PASSES = len(watched.SHAPES) + 8  # one of the factory, two of the check, five of the run
    with pytest.raises(IncompleteError, match=r"out of memory after .* at batch size 4: CUDA out of memory") as caught:
        embed_dataset(array_source(50), config_of(watched.URI), where=tmp_path / "s")
    assert "2 of the 7 shards of this run are committed, and it goes on from there" in caught.value.hint
    watched.PASSES = 10**9
    report = embed_dataset(array_source(50), config_of(watched.URI), where=tmp_path / "s").report
    assert (report.committed_before, report.embedded) == (16, 34)
    np.testing.assert_array_equal(
        (tmp_path / "s" / "COMPLETE.json").read_bytes(), (tmp_path / "whole" / "COMPLETE.json").read_bytes()
    )


@pytest.mark.parametrize(
    ("device", "cores", "workers"), [("cpu", 1, 1), ("cpu", 2, 1), ("cpu", 16, 4), ("cuda", 2, 2), ("cuda", 16, 16)]
)
def test_workers_that_nobody_chose_fit_the_machine(monkeypatch, device, cores, workers) -> None:
    monkeypatch.setattr(loading, "cores", lambda: cores)
    assert default_workers(torch.device(device)) == workers


def test_a_few_small_images_start_no_worker(array_source, tiny_model, tmp_path) -> None:
    assert (
        embed_dataset(array_source(50), config_of(tiny_model, workers=None), where=tmp_path / "s").report.workers == 0
    )
