"""Every benchmark has a smoke mode, and it says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import Forks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


APART = {"bench_scale"}  # starts clusters of Ray: tests/cluster/test_demonstration.py


@pytest.mark.parametrize(
    "path",
    sorted(path for path in BENCHMARKS.glob("bench_*.py") if path.stem not in APART),
    ids=lambda path: path.stem,
)
def test_smoke_mode_ends_with_a_result(path: Path, forks: Forks) -> None:
    before = sorted((BENCHMARKS / "results").glob("*"))
    process = forks.start([str(path), "--smoke"], cwd=path.parent)
    out, errors = process.communicate(300)
    assert process.returncode == 0, errors
    result = json.loads(out[out.index("{") :])
    assert result["environment"]["torch"]
    if path.stem == "bench_accuracy":
        assert (result["batches"], result["unreported_failures"]) == (8, 0)
    if path.stem == "bench_fiedler":
        race = result["races"]["B=64 q=1 tol=1e-06"]
        assert race["residual"]["gstds-cache"]["max"] <= 1e-6
        assert "scipy eigsh SA" in race["ms_per_graph"]
    if path.stem == "bench_knn":
        assert all(same > 0.99 for same in result["by_batch_size"]["64"]["same_neighbours_as_torch"].values())
    if path.stem == "bench_select":
        (whole,) = result["whole_path"].values()
        assert whole["cosine_with_peers"]["min"] > 0.999
    if path.stem == "bench_guidance":
        accuracy = result["held_out_accuracy"]
        assert accuracy["ours_1_threads"] == accuracy["ours_2_threads"] > accuracy["lbfgs"] - 0.1
    if path.stem == "bench_commits":
        (compared,) = result["by_batch_size"].values()
        assert compared["same_rows_kept"]
        assert 0.1 < compared["new_over_old"]["median"] < 10
    if path.stem == "bench_growth":
        for case in ("default", "anew"):
            assert result["cases"][case]["by_rows"]["600"]["ms_per_batch"]["median"] > 0
    if path.stem == "bench_decode":
        assert result["embedding"]["fingerprints_differ"]
        assert result["embedding"]["scaled"]["cosine"]["min"] > 0.9
        assert result["to_pixels"]["gap 2"]["cosine_min"] > 0.9
    if path.stem == "bench_size":
        assert set(result["by_dataset"]["digits"]["sizes"]) == {"32", "48"}
    if path.stem == "bench_embed":
        assert result["embed_over_limit"]["median"] > 0
    if path.stem == "bench_embed_gpu":
        for size in ("0.02 megapixels", "1 megapixels"):
            assert all(result[size]["embed"][way]["over_limit"]["median"] > 0 for way in ("pillow", "nvjpeg"))
    if path.stem == "bench_gpu":
        assert min(result["path, B=32"]["same_rows_kept_as_on_the_cpu"].values()) >= 0.99
        assert result["solver, B=32"]["q=1"]["cosine_of_vectors"]["min"] > 0.999
    if path.stem == "bench_path":
        assert result["path"]["batches"] == 11
        assert result["path, four epochs"]["million_samples_per_second"]["min"] > 0
        assert result["share_solved_again_on_the_cpu"] < 0.1
        assert result["path_to_a_file"]["million_samples_per_second"]["min"] > 0
    if path.stem == "bench_hit":
        assert (result["images_opened_by_a_hit"], result["hits"]) == (0, 1)
        assert result["root_is_that_of_the_files_read"]
    if path.stem == "bench_store":
        assert result["damage"]["gstds-cache"]["flipped byte"].startswith("error: ChunkCorruptError")
        assert result["damage"]["gstds-cache"]["killed, then the same again"] == "right rows"
    if path.stem == "bench_train_gpu":
        assert result["left_out"] == []
        assert min(result[arch]["trainer_over_bare"]["min"] for arch in ("conv7", "resnet18")) > 0
        assert result["accuracy, trainer"]["accuracy"]["min"] > 0.9
    if path.stem == "bench_stream":
        assert result["ratios"]["pipe_over_objects"]["min"] > 0
        assert result["one_reader_stalls"]["beside_over_alone"]["min"] > 0.2  # not held up by the one that stalls
        assert result["trainers_wait"]["steps"] > 0
        assert result["import_of_train"]["heavy_libraries_loaded"] == []
    if path.stem == "bench_import":
        assert result["same_rows"]
        assert result["import_over_copy"] > 0
    if path.stem == "bench_plan_size":
        assert result["at_a_billion"]["shards of 4 MB"]["objects"] > 10**6
        assert set(result["driver_bytes_per_unit"]) == {"100 to 1000"}
    if path.stem == "bench_memory":
        assert all(taken["anonymous"] >= 0 for jobs in result["rise_bytes"].values() for taken in jobs.values())
    if path.stem == "bench_ways_in":
        (raced,) = result["data"].values()
        assert all(raced["same_bytes"].values())
        assert raced["in order"].keys() == raced["shuffled"].keys() == raced["same_bytes"].keys()
    assert sorted((BENCHMARKS / "results").glob("*")) == before
