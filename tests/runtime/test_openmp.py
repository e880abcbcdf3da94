"""How OpenMP's threads wait: ours unless the user said otherwise, and in time for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gstds_cache.runtime.openmp import SPINS, wait_briefly


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [({}, SPINS), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_what_the_user_set_stays(monkeypatch, set_by_user: dict[str, str], expected: str | None) -> None:
    monkeypatch.setattr(os, "environ", dict(set_by_user))
    wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    assert os.environ.get("OMP_WAIT_POLICY") == set_by_user.get("OMP_WAIT_POLICY")


def test_gstds_embed_sets_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\n"
        "import gstds_cache.runtime.openmp as openmp\n"
        "import gstds_cache.cli.embed_command as command\n"
        "def watched():\n"
        "    print('torch' in sys.modules)\n"
        "    raise SystemExit(0)\n"
        "command.wait_briefly = watched\n"
        "command.main(['digits'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", done.stdout + done.stderr
