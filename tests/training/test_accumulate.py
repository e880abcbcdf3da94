"""Gradient accumulation: a step in pieces is the step at once, up to the order of summation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gstds_cache.config import TrainConfig
from gstds_cache.errors import FingerprintMismatchError, UsageError
from gstds_cache.stream.reader import open_selection
from gstds_cache.training.batches import TrainingBatch
from gstds_cache.training.identity import run_config
from gstds_cache.training.loop import Trainer, train
from gstds_cache.training.run_dir import RunDir

# Layer norm: batch normalisation would normalise by the rows of a piece.
CONFIG = TrainConfig(arch="timm:test_convnext", image_size=32, lr=0.02, augment="crop+flip", device="cpu", workers=0)


def run(source, selection: Path, out: Path, config: TrainConfig):
    with open_selection(selection) as stream:
        return train(source, stream, config, RunDir(out, run_config(config, stream.header, None), provenance={},
                                                    resume=True))  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_a_step_in_pieces_is_the_step_at_once(array_source, uneven, tmp_path, monkeypatch) -> None:
    seen, batch_loss = list[int](), Trainer.batch_loss

    def watched(self, batch):
        seen.append(len(batch.rows))
        return batch_loss(self, batch)

    monkeypatch.setattr(Trainer, "batch_loss", watched)
    reports = {}
    for pieces in (1, 3, 100):  # 100: a piece for each row
        seen.clear()
        reports[pieces] = run(array_source(72), uneven[0], tmp_path / str(pieces), replace(CONFIG, accumulate=pieces))
        assert sum(seen) == sum(map(len, uneven[1]))
        assert len(seen) == sum(min(pieces, len(rows)) for rows in uneven[1])
    whole = torch.load(tmp_path / "1" / "checkpoint.pt", weights_only=True)["network"]
    for pieces in (3, 100):
        np.testing.assert_allclose(losses(tmp_path / str(pieces)), losses(tmp_path / "1"), rtol=1e-5)
        assert reports[pieces].steps == reports[1].steps
        assert reports[pieces].gradient_samples == reports[1].gradient_samples
        for name, values in torch.load(tmp_path / str(pieces) / "checkpoint.pt", weights_only=True)["network"].items():
            torch.testing.assert_close(values, whole[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not torch.equal(whole["head.fc.weight"], torch.zeros_like(whole["head.fc.weight"]))


def test_pieces_are_every_row_once_and_none_is_empty() -> None:
    pixels = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 2, 2)
    batch = TrainingBatch(0, np.arange(10, 17), pixels, np.arange(7), 7, "sha")
    assert batch.pieces(1) == [batch]
    for count in (2, 3, 7, 9):
        pieces = batch.pieces(count)
        assert len(pieces) == min(count, 7)
        assert np.concatenate([piece.rows for piece in pieces]).tolist() == list(range(10, 17))
        assert [piece.start for piece in pieces] == [int(piece.rows[0]) - 10 for piece in pieces]
        for piece in pieces:
            assert piece.pixels is not None
            assert piece.pixels[:, 0, 0, 0].tolist() == piece.positions.tolist()
            assert piece.size == 7
            assert max(map(len, (p.rows for p in pieces))) - len(piece.rows) <= 1


def test_another_number_of_pieces_is_another_run(array_source, uneven, tmp_path) -> None:
    run(array_source(72), uneven[0], tmp_path / "run", replace(CONFIG, accumulate=2))
    with pytest.raises(FingerprintMismatchError, match="accumulate: the run has 2, now 1"):
        run(array_source(72), uneven[0], tmp_path / "run", CONFIG)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["config"]["accumulate"]  # of a version that could not accumulate
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    run(array_source(72), uneven[0], tmp_path / "run", CONFIG)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"accumulate": 0}, "`accumulate`: got 0, expected 1 to"),
        ({"accumulate": 2, "compile": "reduce-overhead"}, "`accumulate`: got 2, expected 1"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(settings, told) -> None:
    with pytest.raises(UsageError, match=told):
        replace(CONFIG, **settings)
