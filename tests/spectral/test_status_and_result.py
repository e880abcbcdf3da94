from __future__ import annotations

import pytest
import torch

from gstds_cache.spectral.result import canonical_sign
from gstds_cache.spectral.status import REMEDY, Status


def test_every_flag_has_a_remedy_and_fits_an_int8():
    assert set(REMEDY) == {Status.CONVERGED, *Status}
    assert sum(int(flag) for flag in Status) <= 127
    assert all(text.startswith(flag.name.lower() + ":") for flag, text in REMEDY.items())


def test_describe():
    assert Status(0).describe() == REMEDY[Status.CONVERGED]
    both = (Status.BRIDGED | Status.DEGENERATE).describe()
    assert both == f"{REMEDY[Status.BRIDGED]}; {REMEDY[Status.DEGENERATE]}"


@pytest.mark.parametrize("status", [64, 65])
def test_describe_refuses_unknown_bits(status):
    with pytest.raises(ValueError, match=f"got {status}, expected a combination of flags from 0 to 63"):
        Status(status).describe()


def signs(*column):
    basis = torch.tensor(column, dtype=torch.float64)[None, :, None]
    return canonical_sign(basis)[0, :, 0].tolist()


def test_the_entry_of_largest_magnitude_is_positive():
    assert signs(0.1, -0.9, 0.3) == [-0.1, 0.9, -0.3]
    assert signs(0.1, 0.9, -0.3) == [0.1, 0.9, -0.3]
    assert signs(0.0, 0.0) == [0.0, 0.0]


def test_the_lowest_index_decides_among_equals_up_to_rounding():
    assert signs(-0.5, 0.5) == [0.5, -0.5]
    assert signs(-0.5, 0.5 + 1e-12) == [0.5, -0.5 - 1e-12]
    assert signs(-0.5, 0.51) == [-0.5, 0.51]


def test_columns_and_graphs_are_turned_one_by_one():
    basis = torch.tensor([[[1.0, -1.0], [0.5, 0.5]], [[-1.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    expected = torch.tensor([[[1.0, 1.0], [0.5, -0.5]], [[1.0, 1.0], [-0.5, 0.5]]], dtype=torch.float64)
    assert torch.equal(canonical_sign(basis), expected)
