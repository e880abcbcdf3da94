from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gstds_cache.files.digest import canonical_json, digest_of, merkle_root, sha256_file
from gstds_cache.seeding import keys_for, rng_for, torch_rng_for, torch_seed_for, torch_seed_of_step


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'.encode()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_merkle_root_of_two_leaves_is_the_hash_written_out() -> None:
    a, b = hashlib.sha256(b"\0a").digest(), hashlib.sha256(b"\0b").digest()
    assert merkle_root([b"a", b"b"]) == hashlib.sha256(b"\x01" + a + b).hexdigest()


def test_merkle_root_of_many_leaves_is_that_of_the_tree_built_level_by_level() -> None:
    for count in (3, 4095, 4096, 4097, 8192, 12289, 20000):
        leaves = [str(number).encode() for number in range(count)]
        level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            level = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in pairs] + level[len(level) // 2 * 2 :]
        assert merkle_root(iter(leaves)) == level[0].hex()


def test_merkle_root_changes_with_order_number_and_content() -> None:
    roots = [merkle_root(leaves) for leaves in ([], [b"a"], [b"a", b"b"], [b"b", b"a"], [b"a", b"b", b"b"], [b"ab"])]
    assert len(set(roots)) == len(roots)


def test_sha256_file(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_the_same_key_gives_the_same_numbers_and_others_do_not() -> None:
    draw = lambda *key: rng_for(*key).integers(0, 2**62, 4).tolist()  # noqa: E731
    assert draw(0, "plan", 3) == draw(0, "plan", 3)
    different = [draw(0, "plan", 3), draw(1, "plan", 2), draw(3, "plan", 0), draw(0, "rule", 3), draw(0, "plan", 3, 0)]
    assert len({tuple(numbers) for numbers in different}) == len(different)


def test_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    rng_for(0, "x").random()
    torch_rng_for(0, "x")
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        rng_for(-1, "x")


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
def test_seeds_of_steps_are_those_of_each(seed: int) -> None:
    for step in (0, 1, 255, 256, 10_000_000):
        assert torch_seed_of_step(seed, "step", step) == torch_seed_for(seed, "step", step)
        assert torch_seed_of_step(seed, "augment", step, 3) == torch_seed_for(seed, "augment", step, 3)
    for step in (-1, 2**32):
        with pytest.raises(ValueError, match="2\\^32"):
            torch_seed_of_step(seed, "step", step)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**40 + 3, 2**70 + 1])
def test_keys_of_many_are_those_of_each(seed: int) -> None:
    first, second = np.array([0, 1, 3, 2**32 - 1]), np.array([7, 0, 2**31, 9])
    keys = keys_for(seed, "steady", first, second)
    for n, key in enumerate(keys):
        generator = rng_for(seed, "steady", int(first[n]), int(second[n]))
        assert generator.bit_generator.state["state"]["key"].tolist() == key.tolist()
    with pytest.raises(ValueError, match="outside 0 to"):
        keys_for(seed, "steady", np.array([2**32]))
