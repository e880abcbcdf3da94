"""Steps that are recorded and replayed give the run that steps taken one by one give.

On a CPU a recording is the step itself, taken again: all but the recording runs here.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_memory
import numpy as np
import offered
import pytest
import replays
import torch
from torch import Tensor, nn
from trained import CONFIG, run, state

from gstds_cache.config import TrainConfig
from gstds_cache.errors import UsageError
from gstds_cache.runtime import recording as recordings
from gstds_cache.runtime.recording import Seen, place, recording, watched
from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.record_writer import SelectionWriter
from gstds_cache.stream.schema import Header
from gstds_cache.training import learner, step_graphs
from gstds_cache.training.loop import Trainer
from gstds_cache.training.report import TrainingResult
from gstds_cache.training.step_graphs import EAGER, MOST, StepGraphs

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
SIZES = (8, 8, 5)  # of each epoch's batches
EPOCHS = 6


def write_alike(path: Path) -> Path:
    """A selection whose batches have two sizes that come again: 18 steps."""
    kept = [sum(SIZES)] * EPOCHS
    header = Header("c" * 64, "d" * 64, 72, "r" * 64, 0, EPOCHS, 3, EPOCHS * 3, sum(kept), kept, {})
    rng = np.random.default_rng(1)
    with path.open("wb") as file, SelectionWriter(file, header) as writer:
        for seq in range(EPOCHS * 3):
            rows = rng.permutation(72)[: SIZES[seq % 3]]
            writer.write(SelectedBatch(seq, seq // 3, seq % 3, 18, rows, None, Status.CONVERGED, 0.5, 0.0))
    return path


@pytest.fixture
def source(array_source):
    return array_source(72)


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    return write_alike(tmp_path / "alike.arrow")


def stopping(asked: Iterator[bool]) -> AbstractContextManager[Callable[[], bool]]:
    return nullcontext(lambda: next(asked, False))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are recorded on a CPU as well, which is to take them again; the sizes of recordings and of replays."""
    sizes: list[int] = []

    def begun(size: int) -> None:
        # What is left of an earlier step's graph keeps its gradients on another stream: a GPU cannot record then.
        tensors = [one for one in gc.get_objects() if type(one) is Tensor]
        alive = [one for one in tensors if one.grad_fn is not None]
        assert alive == []
        sizes.append(-size)

    monkeypatch.setattr(step_graphs, "recording", replays.on_cpu(sizes.append, begun))
    monkeypatch.setattr(learner, "recordable", lambda _device: True)
    return sizes


def assert_same(a: Path, b: Path, **about: float) -> None:
    """The same to the bit, or about the same on a GPU, whose kernels add in any order."""
    mine, theirs = state(a), state(b)
    assert mine["step"] == theirs["step"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=about.get("rtol", 0))
    for name, values in theirs["network"].items():
        torch.testing.assert_close(mine["network"][name], values, **(about or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("arch", ["conv3", "timm:test_resnet"])
def test_a_replayed_run_is_the_run_without(source, alike, tmp_path, recorded, arch) -> None:
    config = replace(CONFIG, arch=arch, label_smoothing=0.1)
    run(source, alike, tmp_path / "plain", replace(config, cuda_graphs=False))
    assert recorded == []
    run(source, alike, tmp_path / "graphs", config)
    assert_same(tmp_path / "graphs", tmp_path / "plain")
    counts = Counter(recorded)
    assert counts == {-8: 1, -5: 1, 8: 2 * EPOCHS - EAGER, 5: EPOCHS - EAGER}


def test_a_replayed_run_that_was_stopped_goes_on(source, alike, tmp_path, recorded) -> None:
    run(source, alike, tmp_path / "whole")
    for stop_at in (7, 10):  # steps of that session
        asked = iter([False] * (stop_at - 1) + [True])
        with pytest.raises(KeyboardInterrupt):
            run(source, alike, tmp_path / "run", interruptible=partial(stopping, asked))
    run(source, alike, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert state(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"] < 1e-3  # a number, not a tensor
    assert isinstance(state(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"], float)


def test_losses_of_candidates_are_reported_from_replays(source, tmp_path, recorded) -> None:
    stream = offered.write(tmp_path / "s.arrow", epochs=8)
    plain = run(source, stream, tmp_path / "plain", replace(CONFIG, cuda_graphs=False))
    graphs = run(source, stream, tmp_path / "graphs")
    assert {6, 7, 5} <= set(recorded)
    assert graphs.loss == pytest.approx(plain.loss, rel=1e-3)
    mine, theirs = (state(tmp_path / name)["feedback"] for name in ("graphs", "plain"))
    assert mine["epoch"] == theirs["epoch"] == 8
    assert mine["rows"] == theirs["rows"]  # the rows of every epoch were drawn by the same losses


@pytest.mark.parametrize(
    "change", [{"accumulate": 2}, {"images": "host"}, {"cuda_graphs": False}, {"importance_weights": True}]
)
def test_steps_that_cannot_be_recorded_are_taken_as_ever(source, alike, tmp_path, recorded, change) -> None:
    stream = offered.write(tmp_path / "s.arrow", epochs=6) if "importance_weights" in change else alike
    run(source, stream, tmp_path / "run", replace(CONFIG, **change))
    assert recorded == []


def test_a_loss_of_ones_own_is_not_recorded(source, alike, tmp_path, recorded) -> None:
    class Doubled(Trainer):
        def batch_loss(self, batch):
            loss, samples = super().batch_loss(batch)
            return 2 * loss, samples

    run(source, alike, tmp_path / "run", kind=Doubled)
    assert recorded == []


def graphs_of(step: Callable[[Tensor], Any] = lambda packed: (packed.sum(),)) -> StepGraphs:
    return StepGraphs(step, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), CPU)


def test_no_more_sizes_are_recorded_than_four(monkeypatch) -> None:
    graphs = graphs_of()
    monkeypatch.setattr(step_graphs, "recording", lambda step, *_, **_where: step)
    replayed = []
    for _ in range(EAGER + 1):
        for size in range(1, MOST + 3):
            if graphs.ready(size):
                assert graphs.records(size)
                assert int(graphs.take(torch.ones((4, size), dtype=torch.int64), 0.1)[0]) == 4 * size
                assert not graphs.records(size)
                replayed.append(size)
            else:
                with graphs.eager(size):
                    pass
    assert replayed == list(range(1, MOST + 1))


def see(monkeypatch: pytest.MonkeyPatch, *, waits: list[str] | None = None, allocated: int = 0) -> None:
    """Let every watched step have been so."""
    seen = Seen()
    seen.waits, seen.allocated = waits or [], allocated
    monkeypatch.setattr(step_graphs, "watched", lambda _device: nullcontext(seen))


@pytest.mark.parametrize(
    ("free", "sizes"),
    [
        (100, {}),
        (119, {}),
        (120, {60: True}),  # once to replay, once to go on without
        (180, {60: True, 40: True, 90: True}),  # smaller ones and, at the end, 30 more
        (119, {40: True, 60: False, 50: True}),
        (101, {100: False, 50: False}),  # the larger one is taken without, and needs its memory for the whole run
    ],
)
def test_a_size_is_recorded_where_there_is_room_for_it_twice(monkeypatch, caplog, free, sizes) -> None:
    """A size of n rows allocates n MiB; recordings share theirs. What does not fit is not begun to be recorded."""
    held = 0

    def can_allocate(nbytes: int, _device: torch.device) -> bool:
        return nbytes <= (free - held << 20)

    made: list[int] = []
    monkeypatch.setattr(step_graphs, "MARGIN", (1, 0))
    monkeypatch.setattr(step_graphs, "can_allocate", can_allocate)
    monkeypatch.setattr(
        step_graphs, "recording", lambda step, packed, *_, **_where: made.append(packed.shape[1]) or step
    )
    graphs = graphs_of()
    for size in sizes or {60: False}:
        see(monkeypatch, allocated=size << 20)
        for _ in range(EAGER):
            with graphs.eager(size):
                pass
        if not graphs.ready(size):  # as large as one that was refused
            assert not sizes[size]
            continue
        assert int(graphs.take(torch.ones((4, size), dtype=torch.int64), 0.1)[0]) == 4 * size
        assert graphs.ready(size) == (size in made) == sizes.get(size, False)
        held = max(made, default=0)
    assert caplog.text.count("there is no room to record them") == (not all(sizes.values()) or not sizes)


def test_room_is_asked_for_with_a_margin(monkeypatch) -> None:
    """Twice what a step takes, a quarter more, and cuBLAS's workspace; for as much as was refused it is not asked."""
    asked: list[int] = []
    monkeypatch.setattr(step_graphs, "can_allocate", lambda nbytes, _device: asked.append(nbytes))
    graphs = graphs_of()
    for size in (8, 9):
        see(monkeypatch, allocated=1000 << 20)
        for _ in range(EAGER):
            with graphs.eager(size):
                pass
        assert graphs.ready(size) == (size == 8)
        if size == 8:
            graphs.take(torch.ones((4, size), dtype=torch.int64), 0.1)
    assert asked == [(2500 << 20) + (64 << 20)]


def test_room_is_asked_for_by_taking_it(monkeypatch) -> None:
    assert step_graphs.can_allocate(1 << 60, CPU)
    told: list[int] = []

    def empty(nbytes: int, **how: Any) -> None:
        assert how == {"dtype": torch.uint8, "device": CUDA}
        told.append(nbytes)
        if nbytes > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append(0))
    assert step_graphs.can_allocate(100, CUDA)
    assert told == [0, 100, 0]  # what torch keeps for later is given back, before and after
    assert not step_graphs.can_allocate(101, CUDA)


def test_a_network_that_waits_for_the_gpu_is_not_recorded(monkeypatch, caplog) -> None:
    see(monkeypatch, waits=["network.py:7"])
    graphs = graphs_of()
    for _ in range(EAGER + 2):
        for size in (4, 5):
            assert not graphs.ready(size)
            with graphs.eager(size):
                pass
    assert caplog.text.count("network.py:7") == 1


@pytest.mark.parametrize("candidates", [False, True])
def test_images_go_with_the_trainer(source, alike, tmp_path, recorded, candidates) -> None:
    """Half of a GPU's memory may be theirs: the next run must not wait for the garbage collector."""
    stream = offered.write(tmp_path / "s.arrow", epochs=6) if candidates else alike
    kept: list[weakref.ref[Trainer]] = []

    class Watched(Trainer):
        def run(self, *arguments: Any) -> TrainingResult:
            kept.append(weakref.ref(self))
            return super().run(*arguments)

    run(source, stream, tmp_path / "first", kind=Watched)  # what is made once in a process is made here
    gc.collect()
    gc.disable()
    try:
        run(source, stream, tmp_path / "second", kind=Watched)
        assert kept[-1]() is None
    finally:
        gc.enable()
    assert recorded


FAILURES = {
    "CUDA error: operation not permitted when stream is capturing\nand more": RuntimeError,
    "CUDA out of memory. Tried to allocate 1.00 GiB.\nand more": torch.OutOfMemoryError,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_recording_that_fails_ends_with_what_to_do(source, alike, tmp_path, recorded, monkeypatch, failure) -> None:
    held: list[weakref.ref[nn.Module]] = []

    def broken(*_: Any, **_where: Any) -> Any:
        graph = nn.Module()
        held.append(weakref.ref(graph))
        raise FAILURES[failure](failure)

    whole = step_graphs.recording
    monkeypatch.setattr(step_graphs, "recording", broken)
    what = failure.partition("\n")[0]
    with pytest.raises(UsageError, match=f"(?s)CUDA graph.*{what}.*`cuda_graphs=False`") as caught:
        run(source, alike, tmp_path / "run")
    assert "and more" not in caught.value.message
    del caught
    gc.collect()
    assert held[0]() is not None  # freeing it ended the process on a GPU
    monkeypatch.setattr(step_graphs, "recording", whole)
    assert run(source, alike, tmp_path / "run", replace(CONFIG, cuda_graphs=False)).steps == 3 * EPOCHS


def test_a_size_without_room_is_trained_as_ever(source, alike, tmp_path, recorded, monkeypatch, caplog) -> None:
    run(source, alike, tmp_path / "plain", replace(CONFIG, cuda_graphs=False))
    monkeypatch.setattr(step_graphs, "can_allocate", lambda *_: False)
    run(source, alike, tmp_path / "run")
    assert recorded == []
    assert_same(tmp_path / "run", tmp_path / "plain")
    assert caplog.text.count("there is no room to record them") == 1


def test_recording_is_warm_up(source, alike, tmp_path, recorded, monkeypatch) -> None:
    phases: list[str] = []

    class Timed(Trainer):
        def _count(self, batch, samples, seconds) -> None:
            phases.append(self.times.phase)
            super()._count(batch, samples, seconds)

    run(source, alike, tmp_path / "run", kind=Timed)
    assert [step for step, phase in enumerate(phases) if phase == "warm-up"] == [0, 4, 11]


# What is asked of PyTorch's CUDA, by stand-ins for its functions


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stands for ``torch.cuda``; what it was told."""
    told: dict[str, Any] = {"mode": 0, "replayed": 0}

    class Graph:
        def replay(self) -> None:
            told["replayed"] += 1

    @contextmanager
    def capture(graph: Graph, **how: Any) -> Iterator[None]:
        told["how"] = how
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error

    def stream(device: torch.device) -> tuple[str, torch.device]:
        told["streams"] = told.get("streams", 0) + 1
        return ("stream", device)

    recordings._stream_of.cache_clear()
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": capture,
        "current_stream": lambda device: ("current", device),
        "stream": lambda stream: nullcontext(told.setdefault("kept", stream)),
        "Stream": stream,
        "graph_pool_handle": lambda: "pool",
        "get_sync_debug_mode": lambda: told["mode"],
        "set_sync_debug_mode": lambda mode: told.update(mode=mode),
        "reset_peak_memory_stats": lambda device: told.update(reset=device),
        "memory_allocated": lambda _device: 100,
        "max_memory_allocated": lambda _device: 175,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    yield told
    recordings._stream_of.cache_clear()


def test_a_watched_step_tells_its_waits_and_its_memory_and_other_warnings_go_on(cuda) -> None:
    def step() -> Seen:
        with watched(CUDA) as seen:
            assert cuda["mode"] == "warn"
            for text in ("Synchronization debug mode is a prototype", "called a synchronizing CUDA operation", "other"):
                warnings.warn(text, stacklevel=1)
        return seen

    with pytest.warns(UserWarning, match="other") as others:
        seen = step()
    assert len(others) == 1
    assert seen.allocated == 75
    assert [Path(place.rpartition(":")[0]).name for place in seen.waits] == ["test_step_graphs.py"]
    assert (cuda["mode"], cuda["reset"]) == (0, CUDA)
    with pytest.raises(KeyError), watched(CUDA):
        raise KeyError
    assert cuda["mode"] == 0


def test_a_recording_is_of_a_stream_and_a_pool_of_its_own_and_replays_with_new_rows(cuda) -> None:
    where, calls = place(CUDA), []
    assert place(CPU) == {}
    packed, outputs = torch.zeros((4, 3), dtype=torch.int64), torch.tensor([1.0])

    def step(rows: Tensor) -> tuple[Tensor, ...]:
        calls.append(rows)
        return (outputs,)

    replay = recording(step, packed, CUDA, **where)
    assert cuda["how"] == {"capture_error_mode": "thread_local", "stream": ("stream", CUDA), "pool": "pool"}
    assert cuda["streams"] == 1
    place(CUDA)
    assert cuda["streams"] == 1  # one for all runs
    assert cuda["kept"] == ("current", CUDA)
    (given,) = replay(torch.ones((4, 3), dtype=torch.int64))
    assert (len(calls), cuda["replayed"], int(packed.sum())) == (1, 1, 12)
    outputs += 1
    assert float(given) == 1.0  # a later replay changes its own memory alone


def test_a_failed_recording_tells_what_failed_first(cuda) -> None:
    def step(_packed: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing blocking stream")

    graphs = graphs_of(step)
    for _ in range(EAGER):
        with graphs.eager(4):
            pass
    with pytest.raises(UsageError, match="would make the legacy stream depend"):
        graphs.take(torch.ones((4, 4), dtype=torch.int64), 0.25)
    assert [group["lr"] for group in graphs._optimizer.param_groups] == [0.1]


# On a GPU


class Sparse(nn.Module):
    """A network with dropout, batch normalisation, and on request a look at its own values."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.looks = looks
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        self.head = nn.LazyLinear(3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        if self.looks and float(features.detach().sum()) > 1e9:
            features = features * 0
        found: Tensor = self.head(features)
        return found


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def use(looks: bool) -> None:
        def build(*_: Any, **_how: Any) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = Sparse(looks=looks)
                network(torch.zeros(2, 3, 16, 16))
            return network

        monkeypatch.setattr(learner, "build_network", build)
        monkeypatch.setattr(learner, "check_network", lambda *_: None)

    return use


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arch", ["conv3", "conv7", "timm:test_resnet", "dropout"])
def test_a_graph_of_the_gpu_gives_the_run_without(source, alike, tmp_path, monkeypatch, sparse, arch) -> None:
    if arch == "dropout":
        sparse(False)
    config = replace(CONFIG, arch="conv3" if arch == "dropout" else arch, device="cuda", precision="float32")
    made: list[int] = []
    whole = step_graphs.recording

    def spy(step: Any, packed: Tensor, *where: Any, **more: Any) -> Any:
        made.append(packed.shape[1])
        return whole(step, packed, *where, **more)

    monkeypatch.setattr(step_graphs, "recording", spy)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    run(source, alike, tmp_path / "plain", replace(config, cuda_graphs=False))
    run(source, alike, tmp_path / "graphs", config)
    assert made == [8, 5]
    assert_same(tmp_path / "graphs", tmp_path / "plain", rtol=2e-3, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_losses_of_candidates_are_those_without(source, tmp_path) -> None:
    stream = offered.write(tmp_path / "s.arrow", epochs=8)
    config: TrainConfig = replace(CONFIG, device="cuda", precision="float32")
    losses = [
        run(source, stream, tmp_path / str(graphs), replace(config, cuda_graphs=graphs)).loss
        for graphs in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_that_looks_at_its_values_trains_without_graphs(
    source, alike, tmp_path, monkeypatch, sparse, caplog
) -> None:
    sparse(True)
    monkeypatch.setattr(step_graphs, "recording", lambda *_, **_where: pytest.fail("recorded"))
    result = run(source, alike, tmp_path / "run", replace(CONFIG, device="cuda"))
    assert result.steps == 3 * EPOCHS
    assert "test_step_graphs.py" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_that_has_no_room_for_a_recording_the_step_is_taken_without(
    source, alike, tmp_path, monkeypatch, caplog
) -> None:
    config: TrainConfig = replace(CONFIG, device="cuda", precision="float32")
    asked, can_allocate = list[int](), step_graphs.can_allocate

    def nearly_full(nbytes: int, device: torch.device) -> bool:
        asked.append(nbytes)
        with gpu_memory.left(nbytes - (4 << 20)):
            return can_allocate(nbytes, device)

    run(source, alike, tmp_path / "plain", replace(config, cuda_graphs=False))
    with monkeypatch.context() as patched:
        patched.setattr(step_graphs, "can_allocate", nearly_full)
        patched.setattr(step_graphs, "recording", lambda *_, **_where: pytest.fail("recorded"))
        assert run(source, alike, tmp_path / "run", config).steps == 3 * EPOCHS
    assert len(asked) == 2
    assert "there is no room to record them" in caplog.text
    assert_same(tmp_path / "run", tmp_path / "plain", rtol=2e-3, atol=2e-4)
    made, whole = list[int](), step_graphs.recording

    def spy(step: Any, packed: Tensor, *where: Any, **more: Any) -> Any:
        made.append(packed.shape[1])
        return whole(step, packed, *where, **more)

    monkeypatch.setattr(step_graphs, "recording", spy)
    run(source, alike, tmp_path / "after", config)
    assert made == [8, 5]  # there is room again
    assert_same(tmp_path / "after", tmp_path / "plain", rtol=2e-3, atol=2e-4)
