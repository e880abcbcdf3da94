"""Weights files that are not quite right: one error each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gstds_cache.encoders.weights import load_into, read_state_dict
from gstds_cache.errors import EncoderError


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def half_of(path: Path) -> None:
    torch.save(model().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def saved_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


def with_nan() -> dict[str, torch.Tensor]:
    state = model().state_dict()
    state["0.weight"][0, 0, 0, 0] = float("nan")
    return state


Write = Callable[[Path], object]


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("w.pth", Path.touch, "is empty"),
        ("w.safetensors", Path.touch, "is empty"),
        ("w.pth", Path.mkdir, "got the folder"),
        ("w.pth", os.mkfifo, "got the device or pipe"),
        ("w.pth", lambda _path: None, "not found"),
        ("w.pth", lambda path: path.write_text("no weights at all\n"), "plain weights"),
        ("w.safetensors", lambda path: path.write_text("no weights at all\n"), "a safetensors file"),
        ("w.safetensors", lambda path: path.write_bytes(b"\xff" * 64), "a safetensors file"),
        ("w.npy", saved_array, "plain weights"),
        ("w.npz", archive, "plain weights"),
        ("w.pth", half_of, "plain weights"),
        ("w.pth", lambda path: torch.save({}, path), "got no tensor"),
        ("w.safetensors", lambda path: save_file({}, path), "got no tensor"),
        ("w.pth", lambda path: torch.save([torch.ones(3)], path), "got a list"),
        ("w.pth", lambda path: torch.save({1: torch.ones(3)}, path), "got the int 1 as a name"),
        ("w.pth", lambda path: torch.save({"a": {"b": torch.ones(3)}}, path), "got a dict at 'a'"),
        ("w.pth", lambda path: torch.save({"a": torch.ones(3, device="meta")}, path), "a tensor without values"),
        ("w.pth", lambda path: torch.save({"a": torch.ones(3)}, path), "7 of the model's 7 tensors are not in it"),
        ("w.pth", lambda path: torch.save(with_nan(), path), "0.weight holds NaN"),
        ("w.safetensors", lambda path: save_file(with_nan(), path), "0.weight holds NaN"),
        (
            "w.pth",
            lambda path: torch.save({k: v.to_sparse() for k, v in model().state_dict().items()}, path),
            "holds NaN|loading failed",
        ),
    ],
)
def test_a_weights_file_that_is_none(tmp_path: Path, name: str, write: Write, words: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(EncoderError, match=words) as caught:
        load_into(model(), read_state_dict(path), head="", origin=str(path))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert str(path) in str(caught.value)


def test_weights_saved_from_a_compiled_or_parallel_model_fit(tmp_path: Path) -> None:
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({prefix + key: value for key, value in model().state_dict().items()}, tmp_path / "w.pth")
        assert load_into(model(), read_state_dict(tmp_path / "w.pth"), head="", origin="w") == "name"
