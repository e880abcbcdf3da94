"""Random numbers keyed by what they are for, never by global state.

``rng_for(seed, "plan", epoch)`` gives the same numbers in every process and after every resume. Keys go through
NumPy's SeedSequence, so neighbouring seeds and epochs are independent streams (``seed + epoch`` would not be).
"""

from __future__ import annotations

import hashlib
import threading
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt64

GLOBAL_NUMBERS = threading.RLock()
"""Held by whoever seeds torch's, NumPy's or Python's global generator: these are shared by all threads of a process."""

STEPS = 256  # whose seeds are made at once


@cache
def _word_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _words(seed: int, key: tuple[int | str, ...]) -> list[int]:
    words = [seed]
    for part in key:
        if isinstance(part, str):
            words.append(_word_of(part))
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


def torch_seed_of_step(seed: int, purpose: str, step: int, *rest: int) -> int:
    """``torch_seed_for(seed, purpose, step, *rest)``, of steps that follow each other: many seeds are made at once.

    Raises:
        ValueError: If a number is negative, or 2^32 or more.
    """
    block, place = divmod(step, STEPS)
    return _seeds_of_steps(seed, purpose, block, rest)[place]


@lru_cache(maxsize=16)
def _seeds_of_steps(seed: int, purpose: str, block: int, rest: tuple[int, ...]) -> list[int]:
    steps = np.arange(block * STEPS, (block + 1) * STEPS)
    states = keys_for(seed, purpose, steps, *(np.full(STEPS, part) for part in rest))[:, 0]
    seeds: list[int] = (states & np.uint64(2**63 - 1)).tolist()
    return seeds


def torch_rng_for(seed: int, *key: int | str) -> torch.Generator:
    """CPU ``torch.Generator`` keyed like :func:`rng_for`."""
    return torch.Generator().manual_seed(torch_seed_for(seed, *key))


def keys_for(seed: int, purpose: str, *numbers: Int64[np.ndarray, " G"]) -> UInt64[np.ndarray, "G 2"]:
    """The Philox keys of many generators at once: of ``rng_for(seed, purpose, *numbers)`` for each row of ``numbers``.

    Args:
        seed: The user's seed, >= 0.
        purpose: What the numbers are for.
        numbers: The rest of each generator's key, from 0 to 2^32 - 1.

    Returns:
        What ``rng_for(...).bit_generator.state["state"]["key"]`` would be, ``[G, 2]``; its counter begins at 0.

    Raises:
        ValueError: If a number is outside its range.
    """
    if any(part.size and not 0 <= part.min() <= part.max() < 1 << 32 for part in numbers):
        raise ValueError("keys: got a number outside 0 to 2^32 - 1")
    same = [word >> shift & _MASK for word in _words(seed, (purpose,)) for shift in range(0, _bits(word), 32)]
    graphs = len(numbers[0])
    entropy = [np.full(graphs, word, np.uint32) for word in same] + [part.astype(np.uint32) for part in numbers]
    return _seed_sequence_state(entropy, graphs)


Words = npt.NDArray[np.uint32]
_MASK, _POOL = 0xFFFFFFFF, 4


def _bits(word: int) -> int:
    return max(word.bit_length(), 1)


def _seed_sequence_state(entropy: list[Words], graphs: int) -> UInt64[np.ndarray, "G 2"]:
    """``SeedSequence(entropy).generate_state(2, np.uint64)`` for many at once.

    (M. E. O'Neill, "Developing a seed_seq Alternative", 2015; NumPy promises that it stays as it is.)
    """
    constant = 0x43B0D7E5

    def hashed(value: Words, multiplier: int) -> Words:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * multiplier & _MASK
        value = value * np.uint32(constant)
        return value ^ (value >> np.uint32(16))

    def mixed(x: Words, y: Words) -> Words:
        value: Words = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
        return value ^ (value >> np.uint32(16))

    entropy = entropy + [np.zeros(graphs, np.uint32)] * (_POOL - len(entropy))
    pool = [hashed(word, 0x931E8875) for word in entropy[:_POOL]]
    for source in range(_POOL):
        for to in range(_POOL):
            if source != to:
                pool[to] = mixed(pool[to], hashed(pool[source], 0x931E8875))
    for word in entropy[_POOL:]:
        pool = [mixed(part, hashed(word, 0x931E8875)) for part in pool]
    constant = 0x8B51F9DD
    state = [hashed(part, 0x58F38DED).astype(np.uint64) for part in pool]
    return np.stack([state[0] | state[1] << np.uint64(32), state[2] | state[3] << np.uint64(32)], axis=1)
