"""Random numbers keyed by what they are for, never by global state.

``rng_for(seed, "plan", epoch)`` gives the same numbers in every process and after every resume. Keys go through
NumPy's SeedSequence, so neighbouring seeds and epochs are independent streams (``seed + epoch`` would not be).
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import torch

GLOBAL_NUMBERS = threading.RLock()
"""Held by whoever seeds torch's, NumPy's or Python's global generator: these are shared by all threads of a process."""


def _words(seed: int, key: tuple[int | str, ...]) -> list[int]:
    words = [seed]
    for part in key:
        if isinstance(part, str):
            words.append(int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big"))
        else:
            words.append(part)
    if any(word < 0 for word in words):
        raise ValueError(f"seeds and keys must be >= 0, got {words}")
    return words


def rng_for(seed: int, *key: int | str) -> np.random.Generator:
    """Counter-based generator (Philox) for one purpose.

    Args:
        seed: The user's seed, >= 0.
        key: What the numbers are for, e.g. ``"plan", epoch``; integers must be >= 0.

    Returns:
        A generator that depends on ``seed`` and ``key`` alone.

    Raises:
        ValueError: If the seed or a key is negative.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_words(seed, key))))


def torch_seed_for(seed: int, *key: int | str) -> int:
    """A 63-bit seed for ``torch.manual_seed`` or a ``torch.Generator``, keyed like :func:`rng_for`."""
    state = np.random.SeedSequence(_words(seed, key)).generate_state(1, np.uint64)[0]
    return int(state) & (2**63 - 1)


def torch_rng_for(seed: int, *key: int | str) -> torch.Generator:
    """CPU ``torch.Generator`` keyed like :func:`rng_for`."""
    return torch.Generator().manual_seed(torch_seed_for(seed, *key))
