"""The examples of docs/trainers.md, run as they stand: one process each, or two ranks where it is about ranks."""

from __future__ import annotations

import ast
import json
import re
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import offered
import pytest
from forked import Forks
from PIL import Image

from gstds_cache.selection.selected_batch import SelectedBatch
from gstds_cache.spectral.status import Status
from gstds_cache.stream.schema import Header
from gstds_cache.stream.writer import SelectionWriter

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ITEMS, KEPT = 72, [[7, 5, 9, 4], [6, 8, 3, 5], [4, 7, 6, 10]]


@pytest.fixture
def selection(tmp_path: Path) -> tuple[str, list[list[int]]]:
    kept = [sum(epoch) for epoch in KEPT]
    header = Header("c" * 64, "d" * 64, ITEMS, "r" * 64, 0, 3, 4, 12, sum(kept), kept, {})
    rng, batches = np.random.default_rng(0), []
    with (tmp_path / "s.arrow").open("wb") as file, SelectionWriter(file, header) as writer:
        for epoch, sizes in enumerate(KEPT):
            for batch_id, size in enumerate(sizes):
                rows = rng.permutation(ITEMS)[:size]
                writer.write(SelectedBatch(len(batches), epoch, batch_id, 18, rows, None, Status.CONVERGED, 0.5, 0.0))
                batches.append(rows.tolist())
    return str(tmp_path / "s.arrow"), batches


@pytest.fixture
def run(tmp_path: Path, forks: Forks) -> Callable[..., str]:
    def once(name: str, *words: str, ranks: int = 0) -> str:
        launcher = ["torchrun", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", "localhost:0"] if ranks else []  # fmt: skip
        process = forks.start([*launcher, str(EXAMPLES / name), *words], cwd=tmp_path)
        out, errors = process.communicate(240)
        assert process.returncode == 0, out + errors
        return out

    return once


def rows_of_ranks(text: str) -> list[list[list[int]]]:
    """Rows by step, by rank, from the lines ``rank R: S steps, rows [[...]]``."""
    lines = sorted(re.findall(r"rank (\d+): \d+ steps, rows (\[\[.*?\]\])", text))
    return [ast.literal_eval(rows) for _, rows in lines]


def test_plain_pytorch_with_persistent_workers(selection, run) -> None:
    text = run("plain_pytorch.py", selection[0], str(ITEMS))
    assert "steps: 12 of 12; a resume from step 6 has 6 left" in text
    assert re.findall(r"epoch (\d): 4 steps", text) == ["0", "1", "2"]


def test_a_data_set_on_the_device_without_a_loader(selection, run) -> None:
    text = run("device_dataset.py", selection[0], str(ITEMS))
    assert f"steps: 12 of 12; gradients: {sum(map(sum, KEPT))} of {sum(map(sum, KEPT))}" in text
    assert re.findall(r"epoch (\d): 4 steps, loss \d\.\d{3}", text) == ["0", "1", "2"]


def test_torchdata_goes_on_in_the_middle_of_an_epoch(selection, run) -> None:
    result = json.loads(run("torchdata_resume.py", selection[0], str(ITEMS)))
    assert result == {"stopped after": 5, "steps": 12, "the same batches": True}


def test_hugging_faces_trainer_and_its_resume(selection, run, tmp_path) -> None:
    text = run("hf_trainer.py", selection[0], str(ITEMS), str(tmp_path / "out"))
    assert "the selection's batches: True" in text
    assert "resumed after step 5, the rest of them: True" in text


def test_accelerate_slices_and_the_sampler_does_not(selection, run) -> None:
    path, batches = selection
    text = run("accelerate_split.py", path, str(ITEMS), ranks=2)
    assert text.count("sliced by the sampler as well: refused: another library is about to slice") == 2
    first, second = rows_of_ranks(text)
    flat = list(chain(*batches))
    assert [a + b for a, b in zip(first, second, strict=True)] == [flat[i : i + 8] for i in range(0, 72, 8)]


def test_lightning_is_refused_until_told_not_to_replace_the_sampler(selection, run) -> None:
    path, batches = selection
    text = run("lightning_ddp.py", path, str(ITEMS), ranks=2)
    assert text.count("with Lightning's own sampler: refused: another library is about to slice") == 2
    first, second = rows_of_ranks(text)
    for a, b, rows in zip(first, second, batches, strict=True):
        assert len(a) == len(b)
        assert a + b == np.resize(rows, 2 * len(a)).tolist()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """As many small images as the selection has items, in three classes, below ``train``."""
    rng = np.random.default_rng(0)
    for item in range(ITEMS):
        folder = tmp_path / "photographs" / "train" / "abc"[item % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{item:03d}.png")
    return tmp_path / "photographs"


@pytest.mark.parametrize("name", ["timm_train.py", "hf_image_classification.py"])
def test_a_training_script_gets_a_selection_in_under_ten_lines(name) -> None:
    added = [line for line in (EXAMPLES / name).read_text().splitlines() if line.endswith("# selection")]
    assert 3 < len(added) < 10


def test_timms_training_script(selection, photographs, run) -> None:
    text = run("timm_train.py", str(photographs), selection[0])
    assert re.findall(r"epoch (\d): (\d+) samples", text) == [(str(e), str(sum(sizes))) for e, sizes in enumerate(KEPT)]
    assert "updates: 12 of 12" in text


def test_hugging_faces_training_script(selection, photographs, run, tmp_path) -> None:
    text = run("hf_image_classification.py", str(photographs / "train"), selection[0], str(tmp_path / "out"))
    assert "steps: 12 of 12; loss" in text


def test_reported_losses_resume_to_the_same_weights_after_a_kill(tmp_path, run, forks) -> None:
    offered.write(tmp_path / "candidates.arrow")
    words = ["report_losses.py", str(tmp_path / "candidates.arrow"), str(offered.ITEMS)]
    whole = run(*words, str(tmp_path / "whole.pt"))
    killed = forks.start([str(EXAMPLES / words[0]), *words[1:], str(tmp_path / "killed.pt"), "7"], cwd=tmp_path)
    out, errors = killed.communicate(240)
    assert (killed.returncode, out.splitlines()[-1]) == (-signal.SIGKILL, "killed after step 7"), errors
    text = run(*words, str(tmp_path / "killed.pt"))
    assert "goes on after step 6 of 12, in the middle of epoch 1" in text
    assert text.splitlines()[-1] == whole.splitlines()[-1]
    assert whole.startswith("steps: 12; weights ")
