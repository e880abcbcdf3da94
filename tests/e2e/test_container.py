"""The README's three commands as a container runs them: hardly any shared memory, no home, a user id that nobody knows.

Of all that is mounted one folder may be written, which is where a user would mount a volume.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from elsewhere import AS_NOBODY, UNKNOWN, codes, need_mounts, need_users, run_commands

CONTAINER = f"""
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount -t tmpfs -o size=256m tmpfs volume
cp -r photos volume/
chown -R {UNKNOWN} volume
mount -o remount,ro,bind /
cd volume
! touch /tmp/x /var/tmp/x "$OLDPWD/x" 2> /dev/null
"""


# The default rule in the long suite: a user who can keep no compiled code compiles all of the solver, 12 s.
@pytest.mark.parametrize("rule", [["--rule", "random"], pytest.param([], marks=pytest.mark.faults)], ids=" ".join)
def test_the_three_commands_in_a_container(tmp_path: Path, image_folder: Path, rule: list[str]) -> None:
    need_mounts()
    need_users()
    (tmp_path / "volume").mkdir()
    train, test = (f"imagefolder:photos?split={part}" for part in ("train", "test"))
    commands = [
        ["gstds-embed", train, "--cache", "photos.store", "--batch-size", "16", "--workers", "2", "--json"],
        ["gstds-select", "photos.store", "--batch-size", "16", "--epochs", "2", "--out", "selection.arrow", "--json",
         *rule],
        ["gstds-train", train, "--selection", "selection.arrow", "--eval", test, "--arch", "conv3", "--workers", "2",
         "--memory-budget", "0", "--lr", "0.01", "--json"],
    ]  # fmt: skip
    again = commands[:2]
    assert image_folder.parent == tmp_path
    ended = run_commands(tmp_path, *commands, *again, before=CONTAINER, prefix=f"{AS_NOBODY} -u TMPDIR", GSTDS_CACHE="")
    assert codes(ended) == [0] * 5, ended
    embedded, selected, trained, hit, found = (json.loads(one.stdout.splitlines()[-1]) for one in ended)
    assert 40 < embedded["embedded"] == embedded["items"] < 60
    assert embedded["workers"] == 2
    assert trained["test_items"] > 0
    assert trained["gradient_samples"] == selected["kept"] > 0
    assert hit["cache_hit"]
    assert found["selection_digest"] == selected["selection_digest"]
    assert "cache hit" in ended[4].stderr
    assert "Traceback" not in "".join(one.stdout + one.stderr for one in ended)
