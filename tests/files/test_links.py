"""Shards that are symbolic links: inside the folder, into the hub's cache, or out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptkit.errors import UnreadableFile
from adaptkit.files import limits
from adaptkit.files.open import open_source
from tests.fuzz.files import File


def linked(folder: Path, target: Path, *, indexed: bool) -> Path:
    """A model of two shards, the second a link to `target`; the path to open."""
    folder.mkdir(parents=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    File().add("a.weight", 2).save(folder / names[0])
    File().add("b.weight", 2).save(target)
    try:
        (folder / names[1]).symlink_to(target)
    except OSError:
        pytest.skip("this account may not make links")
    if not indexed:
        return folder
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": names[0], "b.weight": names[1]}}))
    return index


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_that_leaves_the_folder_is_refused_unless_asked_for(
    tmp_path: Path, indexed: bool
) -> None:
    path = linked(tmp_path / "model", tmp_path / "elsewhere" / "x.safetensors", indexed=indexed)
    with pytest.raises(UnreadableFile, match="00002.*a link that leaves its folder") as caught:
        open_source(path)
    assert "--no-limits" in (caught.value.hint or "")
    with limits.allow(), open_source(path) as source:
        assert set(source.infos) == {"a.weight", "b.weight"}


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("inside", ["repo/snapshots/1a/unet", "repo/snapshots/1a"])
def test_the_cache_of_the_hub_is_such_links(tmp_path: Path, inside: str, indexed: bool) -> None:
    path = linked(tmp_path / inside, tmp_path / "repo" / "blobs" / "5e", indexed=indexed)
    with open_source(path) as source:
        assert set(source.infos) == {"a.weight", "b.weight"}
    other = linked(tmp_path / "x" / inside, tmp_path / "y" / "blobs" / "5e", indexed=indexed)
    with pytest.raises(UnreadableFile, match="leaves its folder"):
        open_source(other)


def test_a_link_inside_the_folder(tmp_path: Path) -> None:
    path = linked(tmp_path / "model", tmp_path / "model" / "parts" / "x.safetensors", indexed=True)
    with open_source(path) as source:
        assert set(source.infos) == {"a.weight", "b.weight"}
