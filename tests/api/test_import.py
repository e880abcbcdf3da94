"""Embeddings that another tool made become a store like any other, or get an answer."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from gstds_cache.cli.common import next_selection
from PIL import Image
from real_store import objects_of, stamps
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

import gstds_cache
from gstds_cache.errors import ChunkCorruptError, DatasetError, FingerprintMismatchError, IncompleteError, UsageError
from gstds_cache.store import layout
from gstds_cache.store.describe import summarise
from gstds_cache.store.verify import verify

N, D = 60, 8
CLASSES = ("cat", "dog", "owl")


def unit_rows(count: int = N, dtype: str = "float16", *, dim: int = D) -> np.ndarray:
    """Rows of length 1 around a direction for each of three classes, row i of class i % 3."""
    rng = np.random.default_rng(7)
    rows = np.eye(dim)[np.arange(count) % 3] * 2 + rng.normal(size=(count, dim)) * 0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def bring(vectors, where: Path | str, **options) -> gstds_cache.EmbeddingStore:
    options = {"progress": False, "notify": lambda _line: None, "shard_rows": 16} | options
    return gstds_cache.import_embeddings(vectors, where, **options)


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", unit_rows())
    return tmp_path / "vectors.npy"


def test_rows_of_length_1_are_kept_to_the_last_bit_with_receipts_and_a_fingerprint_that_says_imported(
    npy, tmp_path
) -> None:
    store = bring(npy, tmp_path / "s")
    np.testing.assert_array_equal(store.gather(np.arange(N)), unit_rows())
    report = verify(tmp_path / "s", "full")
    assert (report.committed, report.complete, report.problems) == (4, True, ())
    assert store.spec.encoder["model"] == summarise(tmp_path / "s").model == "imported"
    assert store.spec.dtype == "float16"
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "s", mode="r")["embeddings"][:], unit_rows())
    assert store.manifest().ids[59] == "0000059"
    assert store.labels.tolist() == [-1] * N


def test_the_same_import_again_writes_nothing_and_other_vectors_are_refused_by_name(npy, tmp_path) -> None:
    bring(npy, tmp_path / "s")
    before = stamps(tmp_path / "s")
    again = bring(npy, tmp_path / "s")
    assert again.report.cache_hit
    assert stamps(tmp_path / "s") == before
    other = unit_rows()
    other[31, 0] += 1e-3
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.vectors: the store has"):
        bring(other, tmp_path / "s")
    with pytest.raises(FingerprintMismatchError, match=r"encoder\.model: the store has 'imported', this run has"):
        bring(npy, tmp_path / "s", model="clip-vit-b16")


def test_the_same_vectors_from_any_kind_of_file_are_the_same_store(npy, tmp_path) -> None:
    rows = unit_rows()
    save_file({"other": np.zeros(3, np.float32), "image": rows}, tmp_path / "v.safetensors")
    lists = pa.array(list(rows), pa.list_(pa.float16()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
    pq.write_table(pa.table({"x": lists, "n": pa.array(range(N))}), tmp_path / "v.parquet", row_group_size=25)
    table = pa.table({"x": fixed})
    with pa.ipc.new_file(tmp_path / "v.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=25)
    ways = {
        "npy": npy,
        "array": rows,
        "big-endian": rows.astype(">f2"),
        "columns first": np.asfortranarray(rows),
        "tensor": torch.from_numpy(rows),
        "safetensors": tmp_path / "v.safetensors",
        "parquet": str(tmp_path / "v.parquet"),
        "arrow": tmp_path / "v.arrow",
    }
    prints = {name: bring(way, tmp_path / name, key="image" if name == "safetensors" else None).fingerprint
              for name, way in ways.items()}  # fmt: skip
    assert len(set(prints.values())) == 1, prints
    objects = {name: {key: data for key, data in objects_of(tmp_path / name).items() if key != "zarr.json"
                      and key != "COMPLETE.json"} for name in ways}  # fmt: skip
    assert all(found == objects["npy"] for found in objects.values())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_other_dtypes_are_stored_as_float32_and_lengths_are_divided_out_and_said(dtype, tmp_path) -> None:
    rows = unit_rows(dtype="float64") * np.linspace(0.5, 9, N)[:, None]
    rows[4] *= 1e30 if dtype == "float32" else 1e-30
    if dtype == "bfloat16":
        given = torch.from_numpy(rows).to(torch.bfloat16)
        save_tensors({"v": given}, tmp_path / "v.safetensors")
        assert bring(given, tmp_path / "t").fingerprint == bring(tmp_path / "v.safetensors", tmp_path / "s").fingerprint
        rows = given.double().numpy()
    store = bring(rows.astype(dtype) if dtype != "bfloat16" else given, tmp_path / "s")
    assert store.spec.dtype == "float32"
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(store.gather(np.arange(N)), expected, atol=1e-6)
    notes = " ".join(store.report.notes)
    assert "were divided by them" in notes
    assert ("stored as float32" in notes) == (dtype != "float32")
    half = bring(rows, tmp_path / "half", dtype="float16")
    np.testing.assert_allclose(half.gather(np.arange(N)), expected, atol=1e-3)


def test_nan_inf_and_zeros_are_quarantined_in_their_place_and_named(tmp_path) -> None:
    rows = unit_rows()
    rows[3, 5], rows[20], rows[59, 0] = np.nan, 0, -np.inf
    lines: list[str] = []
    store = bring(rows, tmp_path / "s", notify=lines.append)
    assert store.without_embedding.tolist() == [3, 20, 59]
    assert [(item.row, item.reason.partition(":")[0]) for item in store.quarantined] == [
        (3, "not a number"), (20, "no features"), (59, "not a number")]  # fmt: skip
    good = np.delete(np.arange(N), [3, 20, 59])
    np.testing.assert_array_equal(store.gather(good), rows[good])
    assert any("2 rows are quarantined, not a number" in line and "3 (0000003), 59 (0000059)" in line for line in lines)
    assert np.isfinite(store.shard(1)).all()
    with pytest.raises(UsageError, match="no row can be used: no features"):
        bring(np.zeros((4, 3), np.float32), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_labels_and_ids_from_a_table_and_back_through_export(tmp_path) -> None:
    labels = [CLASSES[row % 3] for row in range(N)]
    vectors = [None if row == 7 else value for row, value in enumerate(unit_rows().tolist())]
    pq.write_table(
        pa.table({"id": [f"a/{row}" for row in range(N)], "label": labels,
                  "embedding": pa.array(vectors, pa.list_(pa.float16()))}),
        tmp_path / "v.parquet",
    )  # fmt: skip
    lines: list[str] = []
    store = bring(tmp_path / "v.parquet", tmp_path / "s", notify=lines.append)
    assert store.classes == CLASSES
    assert store.labels.tolist() == [row % 3 for row in range(N)]
    assert store.quarantined[0].reason.startswith("no vector")
    assert any("3 classes, sorted: cat, dog, owl" in line for line in lines)
    gstds_cache.export_store(store, tmp_path / "again.parquet")
    again = bring(tmp_path / "again.parquet", tmp_path / "s2")
    assert again.spec.items_root == store.spec.items_root
    assert again.fingerprint == store.fingerprint
    gstds_cache.export_store(store, tmp_path / "again.npy")
    np.testing.assert_array_equal(bring(tmp_path / "again.npy", tmp_path / "s3").without_embedding, [7])


def test_labels_and_ids_from_files(npy, tmp_path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{row % 3}\n" for row in range(N - 1)) + "\n")
    np.save(tmp_path / "ids.npy", np.array([f"x{row}" for row in range(N)]))
    store = bring(npy, tmp_path / "s", labels=tmp_path / "labels.txt", ids=str(tmp_path / "ids.npy"))
    assert store.labels.tolist() == [row % 3 for row in range(N - 1)] + [-1]
    assert store.manifest().ids[5] == "x5"
    pq.write_table(pa.table({"path": [f"x{row}" for row in range(N)], "c": [0] * N}), tmp_path / "m.parquet")
    named = bring(npy, tmp_path / "t", ids=f"{tmp_path}/m.parquet?column=path", labels=np.arange(N) % 3)
    assert named.manifest().ids == store.manifest().ids
    with pytest.raises(UsageError, match="unknown column of .*'pth'; there are: path, c"):
        bring(npy, tmp_path / "u", ids=f"{tmp_path}/m.parquet?column=pth")


@pytest.mark.parametrize(
    ("vectors", "options", "words"),
    [
        (np.zeros(5, np.float32), {}, r"got shape \[5\], expected \[N, D\]"),
        (np.zeros((5, 2, 2), np.float32), {}, r"array\.reshape\(5, -1\)"),
        (np.zeros((0, 4), np.float32), {}, r"got shape \[0, 4\]"),
        (np.ones((5, 4), np.int8), {}, "got int8 .*expected float16, bfloat16, float32, float64"),
        ([[1.0, 2.0]], {}, "got list, expected an array or tensor"),
        (unit_rows(), {"labels": [0] * 50}, "`labels`: got 50 values, fewer than the 60 vectors"),
        (unit_rows(), {"labels": [0.5] * N}, r"row 0: got the label 0\.5"),
        (unit_rows(), {"labels": ["a", 1] * 30}, "all labels to be text, or all numbers"),
        (unit_rows(), {"ids": ["a", "b", "a"] + [str(i) for i in range(57)]}, "once, .* rows 0 and 2"),
        (unit_rows(), {"ids": ["a", ""] + [str(i) for i in range(58)]}, "row 1: got '', expected text"),
        (unit_rows(), {"labels": [0] * N, "dataset": "digits"}, "both say what the labels are"),
        (unit_rows(), {"dataset": "digits"}, "digits has 1,797 items and there are 60 vectors"),
        (unit_rows(), {"dataset": "digits", "ids": list(map(str, range(N)))}, "1,797 of the 1,797 items .* no vector"),
        (unit_rows(), {"key": "x"}, "`key`: got 'x', but `vectors` is an array"),
        ("vectors.pt", {}, r"expected a file that ends in \.npy"),
        ("missing.npy", {}, "`vectors` not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_gets_an_answer_and_leaves_nothing(vectors, options, words, tmp_path) -> None:
    vectors = str(tmp_path / vectors) if isinstance(vectors, str) else vectors
    with pytest.raises(UsageError, match=words):
        bring(vectors, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_files_that_cannot_be_meant_get_an_answer(npy, tmp_path) -> None:
    save_file({"text": unit_rows(), "image": unit_rows()}, tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match=r"has 2 tensors: image \[60, 8\], text \[60, 8\]"):
        bring(tmp_path / "two.safetensors", tmp_path / "s")
    with pytest.raises(UsageError, match="unknown tensor of .*'img'; there are: image"):
        bring(tmp_path / "two.safetensors", tmp_path / "s", key="img")
    uneven = [[0.0] * D] * 7 + [[0.0] * (D - 1)] + [[0.0] * D]
    pq.write_table(pa.table({"v": uneven}), tmp_path / "uneven.parquet")
    with pytest.raises(UsageError, match="row 7 has 7 numbers, expected 8, as those before it have"):
        bring(tmp_path / "uneven.parquet", tmp_path / "s")
    pq.write_table(pa.table({"v": [[0.0, None]]}), tmp_path / "hole.parquet")
    with pytest.raises(UsageError, match="row 0: a number of its vector is null"):
        bring(tmp_path / "hole.parquet", tmp_path / "s")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "without.parquet")
    with pytest.raises(UsageError, match="has no column of vectors"):
        bring(tmp_path / "without.parquet", tmp_path / "s")
    for name in ("two.safetensors", "vectors.npy", "uneven.parquet"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UsageError, match="cannot be read as"):
            bring(tmp_path / name, tmp_path / "s", key="text" if name.startswith("two") else None)
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    with pytest.raises(UsageError, match="cannot be read as one array of numbers"):
        bring(tmp_path / "objects.npy", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_interrupted_import_goes_on_and_ends_with_the_same_bytes(npy, tmp_path) -> None:
    bring(npy, tmp_path / "whole", shard_rows=4)

    def stop(phase: str, done: int, total: int, shares: object) -> None:
        if phase == "write" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring(npy, tmp_path / "s", shard_rows=4, progress=stop)
    with pytest.raises(IncompleteError, match="gstds-cache import .* --out"):
        gstds_cache.EmbeddingStore(tmp_path / "s")
    before = stamps(tmp_path / "s")
    assert before
    store = bring(npy, tmp_path / "s", shard_rows=4)
    assert 0 < store.report.committed_before < N
    assert before.items() <= stamps(tmp_path / "s").items()
    assert objects_of(tmp_path / "s") == objects_of(tmp_path / "whole")


def test_vectors_that_change_while_they_are_imported_are_refused(npy, tmp_path) -> None:
    def change(phase: str, done: int, total: int, shares: object) -> None:
        if phase == "judge" and done == total:
            with npy.open("r+b") as file:
                file.seek(200)
                file.write(b"\x01\x02")

    with pytest.raises(DatasetError, match="changed while it was imported"):
        bring(npy, tmp_path / "s", progress=change)
    with pytest.raises(IncompleteError):
        gstds_cache.EmbeddingStore(tmp_path / "s")


def test_what_is_selected_from_imported_rows_with_guidance_and_what_needs_a_model(npy, tmp_path) -> None:
    store = bring(npy, tmp_path / "s", labels=[CLASSES[row % 3] for row in range(N)])
    settings = {"batch_size": 20, "epochs": 2, "knn": 5, "guidance": "uncertainty?steps=20", "device": "cpu"}
    selection = gstds_cache.select(store, keep=0.5, progress=False, **settings)
    assert selection.summary.kept == N
    assert set(selection.summary.classes) == set(CLASSES)
    with pytest.raises(UsageError, match="holds imported rows, which no model here can make again"):
        gstds_cache.verify_store(store, level="sample", progress=False)
    damaged = tmp_path / "s" / layout.object_key(1)
    data = bytearray(damaged.read_bytes())
    data[9] ^= 1
    damaged.write_bytes(data)
    assert gstds_cache.verify_store(tmp_path / "s", level="full", progress=False).bad_shards == [1]
    with pytest.raises(UsageError, match="import the same vectors again"):
        gstds_cache.repair_store(tmp_path / "s", progress=False)
    damaged.unlink()
    with pytest.raises(ChunkCorruptError):
        bring(npy, tmp_path / "s", labels=[CLASSES[row % 3] for row in range(N)])


@pytest.mark.faults
def test_advice_on_imported_rows(npy, tmp_path) -> None:
    store = bring(npy, tmp_path / "s", labels=[CLASSES[row % 3] for row in range(N)])
    assert gstds_cache.advise(store, epochs=2, device="cpu", threads=1, progress=False).to_dict()


def test_vectors_of_a_data_set_train_on_it_in_whatever_order_they_come(tmp_path) -> None:
    for row in range(N):
        folder = tmp_path / "photos" / CLASSES[row % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (4 * row, 80 * (row % 3), 9)).save(folder / f"{row:02d}.png")
    uri = f"imagefolder:{tmp_path}/photos"
    ids = list(gstds_cache.open_source(uri).ids)
    rows = unit_rows()
    shuffled = np.random.default_rng(1).permutation(N)
    lines: list[str] = []
    store = bring(rows[shuffled], tmp_path / "s", dataset=uri, ids=[ids[row] for row in shuffled], notify=lines.append)
    assert store.fingerprint == bring(rows, tmp_path / "t", dataset=uri).fingerprint
    np.testing.assert_array_equal(store.gather(np.arange(N)), rows)
    assert any("into the order of" in line for line in lines)
    settings = {"batch_size": 20, "epochs": 1, "knn": 5, "guidance": "none", "device": "cpu", "progress": False}
    selection = gstds_cache.select(store, keep=0.5, **settings)
    training = {"arch": "conv3", "device": "cpu", "threads": 1, "progress": False}
    assert gstds_cache.train(uri, selection, out=tmp_path / "run", **training).steps == 3
    # Without the data set ids, and labels where there are any, say which items the vectors are of.
    for number, labels in enumerate((None, [name.partition("/")[0] for name in ids])):
        named = bring(rows, tmp_path / f"n{number}", ids=ids, labels=labels)
        selection = gstds_cache.select(named, keep=0.5, **settings)
        sampler = gstds_cache.SelectedBatchSampler(selection.path, dataset=gstds_cache.open_source(uri))
        assert sampler.total_steps == 3
    other = bring(rows, tmp_path / "other", ids=ids[::-1])
    selection = gstds_cache.select(other, keep=0.5, **settings)
    with pytest.raises(FingerprintMismatchError, match="made from another data set"):
        gstds_cache.train(uri, selection, out=tmp_path / "run2", **training)
    classes = [name.partition("/")[0] for name in ids]
    relabelled = bring(rows, tmp_path / "relabelled", ids=ids, labels=[classes[-1], *classes[1:]])
    selection = gstds_cache.select(relabelled, keep=0.5, **settings)
    with pytest.raises(FingerprintMismatchError, match=r"items 1 have another label; .*\n.*item 0, ") as caught:
        gstds_cache.train(uri, selection, out=tmp_path / "run3", **training)
    assert "bytes" not in caught.value.message  # which are not known of imported vectors


def test_what_to_type_next_is_told_of_a_store_that_another_process_has_begun_to_change(npy, tmp_path) -> None:
    bring(npy, tmp_path / "s", labels=[row % 3 for row in range(N)])
    assert next_selection(str(tmp_path / "s")) == f"next: gstds-select {tmp_path / 's'} --draw auto"
    (tmp_path / "s" / layout.COMPLETE).unlink()
    assert next_selection(str(tmp_path / "s")) == f"next: gstds-select {tmp_path / 's'}"


def test_the_command(npy, tmp_path, command, result_of) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"{CLASSES[row % 3]}\n" for row in range(N)))
    done = command("gstds-cache", "import", "vectors.npy", "--labels", "labels.txt", "--out", "s", "--json")
    assert result_of(done)["items"] == N
    assert "labels are text: 3 classes, sorted: cat, dog, owl" in done.stderr
    assert "imported" in command("gstds-cache", "ls", ".").stdout
    again = command("gstds-cache", "import", "vectors.npy", "--labels", "labels.txt", "--out", "s").stdout
    assert "cache hit" in again
    assert again.splitlines()[-1] == "next: gstds-select s --draw auto"
    plain = command("gstds-cache", "import", "vectors.npy", "--out", "plain").stdout
    assert plain.splitlines()[-1] == "next: gstds-select plain"
    refused = command("gstds-cache", "import", "vectors.npy", "--ids", "labels.txt", "--out", "t", code=2)
    assert "--ids: id 'cat' occurs more than once" in refused.stderr


def test_a_bucket(npy, s3_prefix) -> None:
    store = bring(npy, s3_prefix, labels=np.arange(N) % 3)
    np.testing.assert_array_equal(store.gather(np.arange(N)), unit_rows())
    assert verify(s3_prefix, "full").complete
    assert bring(npy, s3_prefix, labels=np.arange(N) % 3).report.cache_hit


def test_notes_are_logged_where_nobody_is_told(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        gstds_cache.import_embeddings(unit_rows(dtype="float64") * 3, tmp_path / "s", progress=False)
    assert "stored as float32" in caplog.text
