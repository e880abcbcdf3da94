"""What every executor promises: one suite, run by the one in this process and by Ray's on a real cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_tasks import Folder, SquareRecipe, Squares

from gstds_cache.runtime.executor import Executor, LocalExecutor, PortableTask, Recipe


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "local":
        return LocalExecutor()
    request.getfixturevalue("cluster")
    from gstds_cache.cluster.executor import RayExecutor

    return RayExecutor(notify=lambda _line: None)


def squares(path: Path, **options: Any) -> Squares:
    return Squares(SquareRecipe(path, **options))


def test_it_is_what_the_contract_says(executor: Executor, tmp_path: Path) -> None:
    assert isinstance(executor, Executor)
    assert isinstance(squares(tmp_path), PortableTask)
    assert isinstance(SquareRecipe(tmp_path), Recipe)


def test_every_unit_is_done_once(executor: Executor, tmp_path: Path) -> None:
    assert sorted(executor.run(squares(tmp_path), range(40))) == [unit * unit for unit in range(40)]
    assert [Folder(tmp_path).count(unit) for unit in range(40)] == [1] * 40


def test_results_come_in_order_where_that_is_asked_for(executor: Executor, tmp_path: Path) -> None:
    # The first unit is the last to be done.
    task = squares(tmp_path, seconds=0.01, faults={0: "slow"})
    assert list(executor.run(task, range(30), ordered=True)) == [unit * unit for unit in range(30)]


def test_units_may_come_from_an_iterator(executor: Executor, tmp_path: Path) -> None:
    def units() -> Iterator[int]:
        yield from range(12)

    assert sorted(executor.run(squares(tmp_path), units())) == [unit * unit for unit in range(12)]


def test_no_units(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.run(squares(tmp_path), [])) == []
    assert list(executor.run(squares(tmp_path), [], ordered=True)) == []


def test_an_error_ends_the_run(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unit 3 is wrong"):
        list(executor.run(squares(tmp_path, faults={3: "wrong"}), range(8)))


def test_a_reader_may_have_enough(executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[Any] = []  # Ray ends the process where it cancels a task that ends at the same time
    if not isinstance(executor, LocalExecutor):
        import ray

        monkeypatch.setattr(ray, "cancel", lambda *words, **_: cancelled.append(words))
    run = executor.run(squares(tmp_path), range(1000))
    assert next(run) in {unit * unit for unit in range(1000)}
    run.close()  # type: ignore[attr-defined]
    assert sorted(executor.run(squares(tmp_path), range(4))) == [0, 1, 4, 9]
    assert not cancelled
