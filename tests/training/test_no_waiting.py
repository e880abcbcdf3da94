"""A step that does not wait for its device: images held there, losses read in blocks; the same numbers as without."""

from __future__ import annotations

import json
import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import offered
import pytest
import torch
from no_sync import forbid_waiting
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from trained import CONFIG, run, state

from gstds_cache.data import loading
from gstds_cache.errors import DivergedError, UsageError
from gstds_cache.runtime.devices import to_device
from gstds_cache.stream.reader import open_selection
from gstds_cache.training import device_images, loop
from gstds_cache.training.augment import augment
from gstds_cache.training.batch_norm import random_batches, random_inputs
from gstds_cache.training.compiled import explained
from gstds_cache.training.device_images import DeviceImages, held_on_device
from gstds_cache.training.distributed import Ranks
from gstds_cache.training.identity import run_config
from gstds_cache.training.images import ImageFeed, decoding_workers
from gstds_cache.training.loop import Trainer
from gstds_cache.training.network import build_network
from gstds_cache.training.report import TrainingResult
from gstds_cache.training.run_dir import RunDir
from gstds_cache.training.step_losses import MOST_STEPS, StepLosses

CPU = torch.device("cpu")


@pytest.fixture
def source(array_source):
    return array_source(72)


@pytest.fixture
def selection(uneven) -> Path:
    """Three epochs of four batches."""
    return uneven[0]


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read in blocks, as on a GPU."""
    monkeypatch.setattr(loop, "StepLosses", partial(StepLosses, deferred=True))


def lines(out: Path) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in parsed]


def assert_same_run(a: Path, b: Path) -> None:
    mine, theirs = state(a), state(b)
    for name, values in theirs["network"].items():
        assert torch.equal(values, mine["network"][name]), name
    for name in ("step", "samples", "loss_sum", "loss", "sha"):
        assert mine[name] == theirs[name], name
    assert lines(a) == lines(b)


# Images on the device


@pytest.mark.parametrize(("shift", "mirror"), [(0, False), (2, True), (15, True)])
def test_rows_are_moved_and_mirrored_as_without(source, shift, mirror) -> None:
    feed = ImageFeed(source, side=16, memory_budget=1 << 24, workers=0)
    held = DeviceImages(source, side=16, workers=0, device=CPU)
    rows, size = np.array([3, 71, 3, 40, 0, 9]), 11
    positions = np.array([0, 4, 5, 6, 9, 10])
    for step in (0, 7):
        settings: dict[str, Any] = {
            "shift": shift, "mirror": mirror, "seed": 5, "step": step, "part": (positions, size)
        }  # fmt: skip
        taken, index = held.augmented(rows, **settings)
        assert torch.equal(taken, augment(feed.pixels(rows), **settings))
        assert taken.is_contiguous(memory_format=torch.channels_last)
        assert index.tolist() == rows.tolist()
    assert torch.equal(held.pixels(rows), feed.pixels(rows))


def test_what_a_rank_or_a_resumed_run_takes_is_what_one_run_takes(source) -> None:
    held = DeviceImages(source, side=16, workers=0, device=CPU)
    rows = np.arange(12) * 5
    draw = partial(held.augmented, shift=2, mirror=True, seed=1, step=3)
    whole, _ = draw(rows, part=(np.arange(12), 12))
    for rank in range(3):
        mine = np.arange(4 * rank, 4 * rank + 4)
        assert torch.equal(draw(rows[mine], part=(mine, 12))[0], whole[mine])


@pytest.mark.parametrize("repack", [0, 8])
def test_images_on_the_device_train_the_same_network(source, selection, tmp_path, repack) -> None:
    config = replace(CONFIG, repack=repack)
    run(source, selection, tmp_path / "host", replace(config, images="host"), evaluation=source)
    run(source, selection, tmp_path / "device", config, evaluation=source)
    assert_same_run(tmp_path / "device", tmp_path / "host")


def test_an_image_that_cannot_be_decoded_is_refused_by_name_and_left_out_of_the_norms(
    array_source, selection, tmp_path
) -> None:
    bad = array_source(72, bad=frozenset({4, 30}))
    with pytest.raises(UsageError, match=r"item/0\d{3}.*made to fail"):
        run(bad, selection, tmp_path / "run")
    held = DeviceImages(bad, side=16, workers=0, device=CPU)
    feed = ImageFeed(bad, side=16, memory_budget=1 << 24, workers=0)
    assert np.flatnonzero(~held.decodable).tolist() == [4, 30]
    batches = random_batches(72, 72, seed=0)
    for mine, theirs in zip(random_inputs(held, batches), random_inputs(feed, batches), strict=True):
        assert len(mine) == 70
        assert torch.equal(mine, theirs)


def test_a_row_without_a_label_is_named(source, selection, tmp_path) -> None:
    source.labels[:71] = 0
    source.labels[71] = -1
    with open_selection(selection) as stream:
        used = {row for batch in stream for row in batch.kept.tolist()}
    assert 71 in used
    with pytest.raises(UsageError, match=r"item/0071.*no label"):
        run(source, selection, tmp_path / "run")


def test_images_are_held_where_they_fit(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2 * 100 * 3 * 32 * 32, 1 << 40))
    assert held_on_device("auto", 100, 32, gpu)
    assert not held_on_device("auto", 101, 32, gpu)
    assert not held_on_device("host", 1, 32, gpu)
    with pytest.raises(UsageError, match=r"(?s)`images`.*1,000 images.*`images='host'`"):
        held_on_device("device", 1000, 32, gpu)
    assert not held_on_device("auto", 1, 32, CPU)
    assert held_on_device("device", 1 << 40, 32, CPU)
    assert device_images.SHARE == 0.5


# Losses in blocks


def test_losses_in_blocks_make_the_same_run(source, selection, tmp_path, deferred) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "StepLosses", StepLosses)
        run(source, selection, tmp_path / "at once", evaluation=source)
    run(source, selection, tmp_path / "in blocks", evaluation=source)
    assert_same_run(tmp_path / "in blocks", tmp_path / "at once")


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6, 12])
def test_a_stopped_run_stops_at_once_and_resumes_to_the_same_numbers(
    source, selection, tmp_path, deferred, stop_at
) -> None:
    run(source, selection, tmp_path / "whole")
    asked = iter([False] * (stop_at - 1) + [True])
    with pytest.raises(KeyboardInterrupt):
        run(source, selection, tmp_path / "run", interruptible=lambda: nullcontext(lambda: next(asked)))
    assert state(tmp_path / "run")["step"] == stop_at
    run(source, selection, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("bad_step", [0, 2, 5, 11])
def test_a_loss_that_is_no_number_is_named_by_its_step_and_never_saved(
    source, selection, tmp_path, deferred, monkeypatch, bad_step
) -> None:
    class Bad(Trainer):
        def batch_loss(self, batch):
            loss, samples = super().batch_loss(batch)
            return (loss * math.nan if self.step == bad_step else loss), samples

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(DivergedError, match=f"the training loss is nan at step {bad_step} of 12"):
        run(source, selection, tmp_path / "run", kind=Bad)
    saved = state(tmp_path / "run") if (tmp_path / "run" / "checkpoint.pt").exists() else None
    assert (saved["step"] if saved else 0) == bad_step // 4 * 4  # the end of the last epoch before
    if saved:
        assert all(bool(values.isfinite().all()) for values in saved["network"].values())
        run(source, selection, tmp_path / "run")
        run(source, selection, tmp_path / "whole")
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_of_short_epochs_are_left_out_but_the_first_and_the_last(
    source, selection, tmp_path, deferred, monkeypatch
) -> None:
    saved: list[int] = []
    save = RunDir.save_checkpoint
    monkeypatch.setattr(RunDir, "save_checkpoint", lambda self, made: (saved.append(made.step), save(self, made))[1])
    run(source, selection, tmp_path / "a", replace(CONFIG, norm_samples=0))
    assert saved == [4, 12]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    saved.clear()
    run(source, selection, tmp_path / "b", replace(CONFIG, norm_samples=0))
    assert saved == [4, 8, 12]
    assert [line["step"] for line in lines(tmp_path / "a")] == [4, 8, 12, 12]
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_blocks_give_each_loss_once_and_grow_to_a_quarter_of_a_second() -> None:
    losses = StepLosses(Ranks(CPU), deferred=True)
    known: list[tuple[int, float]] = []
    behind = []
    for step in range(300):
        known += losses.add(step, torch.tensor(float(step)), wants_stop=False)
        behind.append(step + 1 - len(known))
    assert max(behind) > MOST_STEPS  # the last block is on its way, and another is collected
    assert max(behind) <= 2 * MOST_STEPS
    known += losses.wait()
    assert known == [(step, float(step)) for step in range(300)]
    assert losses.wait() == []
    slow, blocks = StepLosses(Ranks(CPU), deferred=True), []
    for step in range(5):
        time.sleep(0.2)
        blocks.append(len(slow.add(step, torch.tensor(0.0), wants_stop=False)))
    assert blocks == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("saves", [(), (0,), (1,), (0, 1)])
def test_ranks_know_the_same_and_stop_at_the_same_step(monkeypatch, saves) -> None:
    """Two ranks, each a thread; the second wants to stop at its 60th step. Some save at ends of epochs."""
    barrier, parts, added = threading.Barrier(2), {}, threading.local()

    def all_reduce(values: torch.Tensor) -> None:
        parts[added.rank] = values.clone()
        barrier.wait(5)
        values.copy_(parts[0] + parts[1])
        barrier.wait(5)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)

    def work(rank: int) -> tuple[int, list[tuple[int, float]]]:
        added.rank = rank
        losses, known = StepLosses(Ranks(CPU, rank, 2), deferred=True), []
        for step in range(1000):
            known += losses.add(step, torch.tensor(float(step + 2 * rank)), rank == 1 and step == 60)
            if step % 10 == 9:
                known += losses.end_block()
                known += losses.wait() if rank in saves else []
            if losses.stop:
                return step, known + losses.wait()
        raise AssertionError("nobody stopped")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert first == second
    assert 60 < first[0] <= 60 + 2 * MOST_STEPS
    assert first[1] == [(step, step + 1.0) for step in range(first[0] + 1)]  # the mean over both ranks


@pytest.mark.parametrize(("asked", "device", "workers"), [(None, "cpu", 1), (None, "cuda", 8), (3, "cuda", 3)])
def test_beside_a_gpu_every_core_decodes(monkeypatch, asked, device, workers) -> None:
    monkeypatch.setattr(loading, "cores", lambda: 8)
    assert decoding_workers(asked, torch.device(device)) == workers


# What a step asks of its device


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for a device: numbers read from tensors, and sizes that depend on their values."""

    waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if any(part in name for part in self.waiting):
            self.found[name] += 1
        return function(*arguments, **(options or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts reads of dispatched operations, and of methods that copy to the host without one on a CPU."""
    with Reads() as reads, monkeypatch.context() as patch:
        for name in ("tolist", "cpu", "numpy", "item", "__bool__", "__float__", "__int__"):
            method = getattr(torch.Tensor, name)

            def spy(self: torch.Tensor, *words: Any, _method: Callable[..., Any] = method, _name: str = name) -> Any:
                reads.found[_name] += 1
                return _method(self, *words)

            patch.setattr(torch.Tensor, name, spy)
        yield reads.found


@pytest.fixture
def reads_of_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[type[Trainer], Counter[str]]:
    """A trainer whose steps are counted from the first line to the last, but for ends of epochs, and the counts."""
    total: Counter[str] = Counter()

    class Watched(Trainer):
        def _key_random_numbers(self) -> None:
            self.watching = counted(monkeypatch)
            self.found = self.watching.__enter__()
            super()._key_random_numbers()

        def _count(self, *arguments: Any) -> None:
            super()._count(*arguments)
            total.update(self.found)
            self.watching.__exit__(None, None, None)

    return Watched, total


def test_a_step_reads_nothing_from_the_device_but_a_block_that_has_arrived(
    source, selection, tmp_path, deferred, reads_of_steps
) -> None:
    watched, found = reads_of_steps
    run(source, selection, tmp_path / "run", kind=watched)
    # Blocks of this run: one of a step, which nothing is read before; then one to the end of each epoch, read there.
    assert set(found) <= {"tolist"}, found
    assert found["tolist"] <= 3


def test_the_count_sees_a_step_that_waits(source, selection, tmp_path, reads_of_steps) -> None:
    watched, found = reads_of_steps
    run(source, selection, tmp_path / "run", kind=watched)
    assert found["__float__"] == found["_local_scalar_dense"] == 12  # each loss, read at once


def test_losses_of_rows_are_given_on_the_device_in_the_order_of_the_batch(
    source, selection, tmp_path, deferred, reads_of_steps
) -> None:
    watched, found = reads_of_steps
    given: list[tuple[list[int], torch.Tensor]] = []

    class Told(watched):
        def run(self, *arguments: Any) -> TrainingResult:
            self.row_losses = lambda batch, losses: given.append((batch.rows.tolist(), losses))
            return super().run(*arguments)

    result = run(source, selection, tmp_path / "run", kind=Told)
    assert set(found) <= {"tolist"}, found
    assert [len(rows) for rows, _ in given] == [len(losses) for _, losses in given]
    last = torch.cat([losses for _, losses in given[-4:]])
    assert not last.requires_grad
    means = [float(losses.mean()) for _, losses in given[-4:]]
    assert sum(means) / 4 == pytest.approx(result.loss, rel=1e-5)


def test_losses_of_candidates_are_read_when_their_epoch_ends_and_weights_are_only_sent(
    source, tmp_path, deferred, reads_of_steps
) -> None:
    watched, found = reads_of_steps
    config = replace(CONFIG, importance_weights=True)
    run(source, offered.write(tmp_path / "s.arrow"), tmp_path / "run", config, kind=watched)
    assert set(found) <= {"tolist"}, found
    assert found["tolist"] <= 3


def test_evaluation_reads_one_number(source, monkeypatch) -> None:
    network = build_network("conv3", classes=3, side=16, seed=0)
    with counted(monkeypatch) as found:
        loop.evaluate(network, source, CPU, side=16, workers=0)
    assert found == {"__int__": 1, "item": 1}


# Precision, compilation, networks


def test_bfloat16_is_another_run_and_learns_as_well(source, selection, tmp_path) -> None:
    exact = run(source, selection, tmp_path / "a")
    lower = run(source, selection, tmp_path / "b", replace(CONFIG, precision="bfloat16"))
    assert 0 < abs(lower.loss - exact.loss) < 0.05
    assert all(values.dtype != torch.bfloat16 for values in state(tmp_path / "b")["network"].values())
    with open_selection(selection) as stream:
        identities = [
            run_config(replace(CONFIG, precision=kind), stream.header, None) for kind in ("float32", "bfloat16")
        ]
    assert identities[0] != identities[1]


def test_a_compiled_network_trains_as_one_that_is_not_and_compiling_is_warm_up(
    source, selection, tmp_path, monkeypatch, no_type_checks
) -> None:
    made: list[str] = []
    whole = torch.compile

    def traced(function: Any, *, mode: str) -> Any:  # without C code, which takes a minute
        made.append(mode)
        return whole(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    plain = run(source, selection, tmp_path / "a")
    assert made == []
    compiled = run(source, selection, tmp_path / "b", replace(CONFIG, compile="default"))
    assert made == ["default", "default"]  # the network, and taking rows
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
    assert compiled.seconds["warm-up"] > compiled.seconds["step"]
    assert list(state(tmp_path / "a")["network"]) == list(state(tmp_path / "b")["network"])
    run(source, selection, tmp_path / "b", CONFIG)  # the same run: nothing is left to do


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["default", "reduce-overhead"])
@pytest.mark.usefixtures("no_type_checks")  # sizes that the compiler leaves open are no numbers to them
def test_on_a_gpu_a_compiled_network_trains_as_one_that_is_not(source, selection, tmp_path, how) -> None:
    config = replace(CONFIG, device="cuda", precision="float32")
    plain = run(source, selection, tmp_path / "a", replace(config, cuda_graphs=False))
    compiled = run(source, selection, tmp_path / "b", replace(config, compile=how))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-2)


def test_what_torch_says_of_float32_while_it_compiles_is_not_passed_on() -> None:
    """A GPU computes in float32 because that was asked for; what else the compiler warns of is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with explained("default", when=True):
            warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        warnings.warn("TensorFloat32 tensor cores", stacklevel=1)
    assert [str(one.message) for one in told] == ["something else", "TensorFloat32 tensor cores"]


def test_a_network_that_cannot_be_compiled_ends_with_a_sentence(source, selection, tmp_path, monkeypatch) -> None:
    def broken(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_mode: whole(function, backend=broken))
    with pytest.raises(UsageError, match=r"(?s)`compile`.*Failed to find C compiler.*`compile='off'`"):
        run(source, selection, tmp_path / "run", replace(CONFIG, compile="default"))
    torch._dynamo.reset()


def test_the_small_network_has_two_million_parameters_and_learns(array_source, selection, tmp_path) -> None:
    network = build_network("conv7", classes=10, side=32, seed=0)
    assert sum(values.numel() for values in network.parameters()) == pytest.approx(2e6, rel=0.02)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)

    class Grey(array_source):
        def _pixels(self, row: int) -> np.ndarray:
            return np.full((20, 20, 3), 40 + 80 * (row % 3) + row % 7, np.uint8)

    config = replace(CONFIG, arch="conv7", label_smoothing=0.2, lr=0.05)
    assert run(Grey(72), selection, tmp_path / "run", config, evaluation=Grey(72)).accuracy.value > 0.9


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images", ["device", "host"])
def test_no_step_waits_for_the_gpu(source, selection, tmp_path, images) -> None:
    class Strict(Trainer):
        def _key_random_numbers(self) -> None:
            forbid_waiting(self.step > 0)  # the first step warms up
            super()._key_random_numbers()

        def _show_progress(self) -> None:
            forbid_waiting(False)
            super()._show_progress()

        def end_epoch(self, epoch: int) -> None:
            forbid_waiting(False)
            super().end_epoch(epoch)

    config = replace(CONFIG, device="cuda", images=images, norm_samples=32)
    try:
        result = run(source, selection, tmp_path / "run", config, kind=Strict, evaluation=source)
    finally:
        forbid_waiting(False)
    assert result.steps == 12
    assert result.seconds_per_sample is not None
    assert all(bool(values.isfinite().all()) for values in state(tmp_path / "run")["network"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_the_rows_that_a_cpu_takes(source) -> None:
    gpu = torch.device("cuda")
    held = [DeviceImages(source, side=16, workers=0, device=device) for device in (gpu, CPU)]
    rows = np.array([3, 71, 3, 40, 0, 9])
    part = (np.arange(6), 6)
    there, here = (images.augmented(rows, shift=2, mirror=True, seed=5, step=1, part=part) for images in held)
    assert torch.equal(there[0].cpu(), here[0])
    assert to_device(torch.arange(3), gpu).tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_goes_on_from_a_gpu_to_a_cpu_and_back(source, selection, tmp_path) -> None:
    config = replace(CONFIG, precision="float32", images="auto")
    for stop_at, device in ((3, "cuda"), (3, "cpu"), (99, "cuda")):
        asked = iter([False] * (stop_at - 1) + [True])
        how = {"interruptible": lambda asked=asked: nullcontext(lambda: next(asked, False))}
        with pytest.raises(KeyboardInterrupt) if stop_at < 12 else nullcontext():
            run(source, selection, tmp_path / "run", replace(config, device=device), **how)
    run(source, selection, tmp_path / "cpu", replace(config, device="cpu"))
    assert state(tmp_path / "run")["loss"] == pytest.approx(state(tmp_path / "cpu")["loss"], rel=1e-2)
