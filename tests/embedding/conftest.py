"""An encoder that tests can watch and make fail."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

WATCHED = '''
import torch
from torch import nn
from gstds_cache.encoders.preprocessing import Preprocessing

SHAPES = []      # of every forward pass
FITS = 10**9     # images of a forward pass that memory is enough for
PASSES = 10**9   # forward passes that memory is enough for
SECONDS = 0.0    # that a forward pass takes
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ON_FORWARD = lambda: None


class Watched(nn.Module):
    """Mean colour of a 4 x 4 grid, and something that differs with the number of images."""
    preprocessing = Preprocessing(resize=16, crop=(16, 16))

    def forward(self, x):
        import time
        SHAPES.append(tuple(x.shape))
        ON_FORWARD()
        time.sleep(SECONDS)
        if len(x) > FITS or len(SHAPES) > PASSES:
            raise ERROR
        grid = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return torch.cat([grid, torch.full((len(x), 1), 0.1 * len(x))], dim=1)


def build(**_):
    return Watched()
'''


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of a real encoder, ``watched.URI``, whose globals say what it did and how it is to fail."""
    name = f"watched_encoder_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(WATCHED)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    module.URI = f"{name}:build"  # type: ignore[attr-defined]
    return module
