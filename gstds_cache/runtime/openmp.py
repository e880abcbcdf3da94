"""OpenMP's threads, told how long to wait awake. Before torch is loaded: OpenMP reads this once."""

from __future__ import annotations

import os

SPINS = "5000"  # turns of a waiting loop: a tenth of a millisecond or two


def wait_briefly() -> None:
    """Let threads that wait for each other fall asleep soon, unless the user has set how they wait.

    They wait at the end of every operation of a forward pass. By default (libgomp) they do so awake for milliseconds,
    on a core that a decoder could use: on two busy cores images came up to twice as slow. Asleep at once, they take
    long to wake where a core is virtual. ``benchmarks/bench_embed.py`` compares with the default. Called by a command,
    never on import: it is a setting of the whole process and of its children.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
