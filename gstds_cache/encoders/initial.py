"""Random numbers and pretrained weights while a model is built: always the same, or an error that says what to do."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from gstds_cache.errors import EncoderError, in_words
from gstds_cache.seeding import GLOBAL_NUMBERS


@contextmanager
def seeded() -> Iterator[None]:
    """Random numbers that are the same each time, whichever of the usual sources a factory draws from."""
    with GLOBAL_NUMBERS, torch.random.fork_rng(devices=[]):
        plain, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that others draw from
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numbers)  # noqa: NPY002


@contextmanager
def initial_weights(name: str, download: bool, bring: str = "") -> Iterator[None]:
    """Seed random weights; turn any failure to get pretrained ones into one error that says what to do.

    Args:
        name: What to call the model in errors.
        download: Whether pretrained weights are wanted.
        bring: How to bring them from another machine.

    Yields:
        Nothing; models are made inside.

    Raises:
        EncoderError: The pretrained weights could not be had.
    """
    if download:
        _require_home(name)
    with seeded():
        try:
            yield
        except Exception as error:
            # Libraries raise OSError, RuntimeError, ValueError and their HTTP client's own errors here.
            if not download:
                raise EncoderError(f"{name}: could not be built: {in_words(error)}") from error
            fetch = f" ({bring})" if bring else ""
            raise EncoderError(
                f"{name}: no pretrained weights here and none could be fetched ({in_words(error)})",
                hint=f"pass `model='{name}?weights=FILE'`{fetch}, or `allow_untrained=True` for random weights",
            ) from error


def _require_home(name: str) -> None:
    """Refuse to download where nobody says where to: torch would make a folder named ``~``, where one happens to be.

    Raises:
        EncoderError: No home is known, and no other place is named.
    """
    try:
        Path.home()
    except RuntimeError as error:
        if not {"TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"} & os.environ.keys():
            raise EncoderError(
                f"{name}: no pretrained weights here, and no place to keep any: HOME is not set, and this user id has "
                "no entry",
                hint=f"pass `model='{name}?weights=FILE'`, or set TORCH_HOME and HF_HOME to a folder that can be "
                "written",
            ) from error
