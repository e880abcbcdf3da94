"""What a terminal would obey in the name of a file is spelled out; ids, which are identity, stay as they are."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from gstds_cache.cli.cache_command import main as cache
from gstds_cache.cli.common import shown
from gstds_cache.cli.embed_command import main as embed

from gstds_cache.store.reader import EmbeddingStore


def test_control_characters_are_spelled_and_nothing_else() -> None:
    assert shown("\x1b[31mred\x07\r\x7f\x9b1m") == r"\x1b[31mred\x07\x0d\x7f\x9b1m"
    assert shown("a\tb\nc é 木 \\x1b") == "a\tb\nc é 木 \\x1b"


def test_a_name_with_an_escape_does_not_reach_the_terminal(image_folder: Path, tiny_model: str, tmp_path: Path) -> None:
    (image_folder / "cats" / "07.png").rename(image_folder / "cats" / "\x1b[2J7.png")
    store, words = tmp_path / "store", ["--model", tiny_model, "--device", "cpu", "--workers", "0"]
    done = CliRunner().invoke(embed, [f"imagefolder:{image_folder}", "--cache", str(store), *words])
    info = CliRunner().invoke(cache, ["info", str(store)])
    for result in (done, info):
        assert result.exit_code == 0, result.output
        assert r"cats/\x1b[2J7.png: " in result.output
        assert "\x1b" not in result.output
    assert "cats/\x1b[2J7.png" in EmbeddingStore(store).manifest().ids
    missing = CliRunner().invoke(embed, [f"imagefolder:{tmp_path}/\x1b[2J", *words])
    assert missing.exit_code == 2
    assert "\x1b" not in missing.output
