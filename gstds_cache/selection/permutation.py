"""Permutations of 0 .. n-1: an array where there are few rows, computed place by place where there are many.

An array of n places takes 8 bytes a row, which for ten million rows is more than the rest of a selection. Above
:data:`STORED` places the permutation is a cipher on 0 .. n-1: what stands at a place is computed from the place and a
key, in memory that does not depend on n, and any part of it by itself.

The cipher is the generalised Feistel network of J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002, section 5): a number below a * b, where a and b are about the square root of n, is a pair (x, y) with x
below a and y below b; rounds add a keyed hash of one half to the other half, by turns, which can be undone and so is
one to one. A result that is not below n is enciphered again until it is ("cycle walking", section 3): rare, for a * b
is less than n + a. How this differs from theirs: nobody is to be kept from anything here, so the hash is a mixer of 64
bits (D. Stafford's variant 13 of MurmurHash3's finaliser, as in SplitMix64) in the place of a block cipher, and there
are :data:`ROUNDS` rounds. tests/selection/test_permutation.py compares what comes out with random permutations, and
shows that fewer rounds are found out.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int64, UInt64

from gstds_cache.graph.compiled import compiled

STORED = 1 << 16  # places up to which a permutation is an array, and any one is as likely as any other
ROUNDS = 8
AT_ONCE = 64  # numbers that go through a round together


class Permutation:
    """One permutation of 0 .. n-1."""

    def __init__(self, n: int, rng: np.random.Generator, *, stored: int = STORED) -> None:
        """Draw it.

        Args:
            n: Places, at least 1.
            rng: Where it comes from.
            stored: Places up to which it is held as an array.
        """
        self._n = n
        self._array = rng.permutation(n) if n <= stored else None
        self._keys = np.zeros(0, np.uint64) if n <= stored else rng.integers(0, 2**64, ROUNDS, np.uint64)

    def at(self, start: int, stop: int) -> Int64[np.ndarray, " B"]:
        """What stands at the places ``start`` to ``stop``, int64 [B]."""
        if self._array is not None:
            return self._array[start:stop]
        return self.of(np.arange(start, stop, dtype=np.int64))

    def of(self, places: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """What stands at any places, int64 [B]; ``places`` may be overwritten."""
        if self._array is not None:
            return np.take(self._array, places)
        out = places
        wide = math.isqrt(self._n - 1) + 1
        encipher_into(out, self._n, wide, -(-self._n // wide), self._keys)
        return out


@compiled()
def encipher_into(places: Int64[np.ndarray, " B"], n: int, a: int, b: int, keys: UInt64[np.ndarray, " R"]) -> None:
    """Put in the place of each number what the permutation has there.

    A round is gone through for :data:`AT_ONCE` numbers before the next one, in loops that processors with wide
    registers run for several numbers at once: 5 against 17 us for 512 numbers one by one. Those that have to be
    enciphered again go through the rounds together.

    Args:
        places: Numbers from 0 to n - 1; overwritten.
        n: Their bound.
        a: Bound of one half, below 2^32.
        b: Bound of the other, below 2^32; ``a * b`` is at least ``n``.
        keys: A key for each round.
    """
    # Signed and unsigned numbers together would be floats to numba.
    bound, columns, lines = np.uint64(n), np.uint64(a), np.uint64(b)
    half, s30, s27, s31 = np.uint64(32), np.uint64(30), np.uint64(27), np.uint64(31)
    first, second = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    xs, ys, at = np.empty(AT_ONCE, np.uint64), np.empty(AT_ONCE, np.uint64), np.empty(AT_ONCE, np.uint32)
    for begin in range(0, len(places), AT_ONCE):
        left = min(AT_ONCE, len(places) - begin)
        for i in range(left):
            at[i] = i
        while left:
            for i in range(left):
                whole = np.uint64(places[begin + at[i]])
                ys[i] = whole // columns
                xs[i] = whole - ys[i] * columns
            for r in range(len(keys)):
                # xs are below a and ys below b, before and after.
                if r & 1:
                    for i in range(left):
                        mixed = keys[r] ^ xs[i]
                        mixed = (mixed ^ (mixed >> s30)) * first
                        mixed = (mixed ^ (mixed >> s27)) * second
                        mixed = (mixed ^ (mixed >> s31)) >> half
                        y = ys[i] + ((mixed * lines) >> half)
                        ys[i] = y - lines if y >= lines else y
                else:
                    for i in range(left):
                        mixed = keys[r] ^ ys[i]
                        mixed = (mixed ^ (mixed >> s30)) * first
                        mixed = (mixed ^ (mixed >> s27)) * second
                        mixed = (mixed ^ (mixed >> s31)) >> half
                        x = xs[i] + ((mixed * columns) >> half)
                        xs[i] = x - columns if x >= columns else x
            again = 0
            for i in range(left):
                whole = ys[i] * columns + xs[i]
                places[begin + at[i]] = np.int64(whole)
                if whole >= bound:
                    at[again] = at[i]
                    again += 1
            left = again
