"""What the fault tests share: a driver of runs that stop, a whole store to damage, and a count of what was done."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import real_store
from kill_driver import Driver

SEED = "GSTDS_FAULT_SEED"


@dataclass
class Tally:
    """What the session did to stores; the last line of the report says so.

    Attributes:
        kills: Processes that ended by SIGKILL, and were seen to.
        stops: Runs inside the test's own process that were stopped between two steps, as a kill would.
        faults: Other faults that were injected.
        seed: What all random points are drawn from.
    """

    kills: int = 0
    stops: int = 0
    faults: int = 0
    seed: int = field(default_factory=lambda: int(os.environ.get(SEED) or _fresh_seed()))

    def rng(self, what: str) -> random.Random:
        return random.Random(f"{self.seed} {what}")


def _fresh_seed() -> int:
    """CI judges a change by the same points every time; a run by hand looks for new ones."""
    return 0 if "CI" in os.environ else random.SystemRandom().randrange(10**6)


TALLY = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(TALLY, None)
    if tally is not None and (tally.kills or tally.stops or tally.faults):
        terminalreporter.write_line(
            f"faults: {tally.kills} kills (SIGKILL), {tally.stops} stops in process, {tally.faults} other "
            f"injected faults (again with {SEED}={tally.seed})"
        )


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[TALLY]


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    started = Driver()
    yield started
    started.close()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing disturbs makes. Not to be changed."""
    where = tmp_path_factory.mktemp("reference") / "store"
    real_store.embed(where)
    return where


@pytest.fixture
def fresh_copy(reference: Path, tmp_path: Path) -> Callable[[], Path]:
    """Gives copies of the whole store, one after the other."""
    made: list[Path] = []

    def copy() -> Path:
        made.append(tmp_path / f"copy{len(made)}")
        shutil.copytree(reference, made[-1])
        return made[-1]

    return copy


@pytest.fixture
def whole(fresh_copy: Callable[[], Path]) -> Path:
    """A whole store of the test's own."""
    return fresh_copy()
