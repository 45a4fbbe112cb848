"""The cache of digests: what is read again, and what is not."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources import files
from harness.checkpoint.sources.files import FileSource
from harness.comparison.comparison import Comparison
from harness.errors import CheckpointError, UsageError
from harness.fingerprints import cache


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(files, "_SETTLED_NS", 0)


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """The bytes that were read of each file, by its name."""
    counts: dict[str, int] = {}
    read = FileSource.read_into

    def counting(self: FileSource, offset: int, buffer: memoryview) -> None:
        name = Path(self.name).name
        counts[name] = counts.get(name, 0) + len(buffer)
        read(self, offset, buffer)

    monkeypatch.setattr(FileSource, "read_into", counting)
    return counts


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two shards with a golden, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    table = {}
    for shard in ("a", "b"):
        tensors = {f"{shard}{i}": rng.standard_normal(50_000, dtype="f4") for i in range(3)}
        save_file(tensors, f"{shard}.safetensors")
        table.update(dict.fromkeys(tensors, f"{shard}.safetensors"))
    index = Path("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": table}))
    api.record(index, "golden/model.safetensors")
    return index


def verify(index: Path) -> Comparison:
    return api.verify(index, "golden/model.safetensors", cache=Path("cache.sqlite"))


@pytest.mark.usefixtures("settled")
def test_untouched_shards_are_not_read_again_and_the_report_says_so(
    sharded: Path, num_read: dict[str, int]
) -> None:
    first = verify(sharded)
    assert (first.verdict, first.notes) == ("identical", ())
    assert num_read["a.safetensors"] > 600_000
    num_read.clear()
    second = verify(sharded)
    assert (second.verdict, second.num_identical) == ("identical", 6)
    assert max(num_read["a.safetensors"], num_read["b.safetensors"]) < 2_000
    assert second.notes == ("6 of 6 tensors were not read: the cache knows their files",)


@pytest.mark.usefixtures("settled")
def test_a_touched_shard_is_read_again_and_its_change_is_found(
    sharded: Path, num_read: dict[str, int]
) -> None:
    verify(sharded)
    with Path("b.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")
    num_read.clear()
    found = verify(sharded)
    assert [f.key for f in found.findings] == ["b2"]
    assert num_read["a.safetensors"] < 2_000
    assert found.notes[0].startswith("3 of 6 tensors")


@pytest.mark.usefixtures("settled")
def test_a_change_that_puts_the_time_of_modification_back_is_found(sharded: Path) -> None:
    verify(sharded)
    before = Path("a.safetensors").stat()
    with Path("a.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")
    os.utime("a.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Path("a.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert [f.key for f in verify(sharded).findings] == ["a2"]


def test_a_file_that_was_just_written_is_not_cached(
    sharded: Path, num_read: dict[str, int]
) -> None:
    verify(sharded)
    num_read.clear()
    assert verify(sharded).notes == ()
    assert num_read["a.safetensors"] > 600_000


@pytest.mark.usefixtures("settled")
def test_a_file_that_changed_while_it_was_read_is_not_cached(sharded: Path) -> None:
    kept = cache.DigestCache(Path("cache.sqlite"))
    with open_checkpoint(sharded) as opened:
        tensors = list(opened.tensors.values())
        assert kept.known(tensors) == {}
        os.utime("a.safetensors")
        kept.keep(tensors, {tensor.key: bytes(32) for tensor in tensors})
        assert set(kept.known(tensors)) == {"b0", "b1", "b2"}


@pytest.mark.usefixtures("settled")
def test_what_was_not_used_for_long_is_forgotten(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(sharded)
    today = cache._today()
    monkeypatch.setattr(cache, "_today", lambda: today + 89)
    assert verify(sharded).notes
    monkeypatch.setattr(cache, "_today", lambda: today + 89 + 91)
    kept = cache.DigestCache(Path("cache.sqlite"))
    kept.keep([], {})
    with open_checkpoint(sharded) as opened:
        assert kept.known(opened.tensors.values()) == {}


def test_a_damaged_cache_is_a_clear_error(sharded: Path) -> None:
    Path("cache.sqlite").write_text("no database" * 100)
    with pytest.raises(UsageError, match="cannot be used") as caught:
        verify(sharded)
    assert caught.value.hint == "remove it (rm cache.sqlite), or leave out --cache"
    spaced = Path("my cache.sqlite")
    spaced.write_text("no database" * 100)
    with pytest.raises(UsageError) as caught:
        cache.DigestCache(spaced).keep([], {})
    assert caught.value.hint == "remove it (rm 'my cache.sqlite'), or leave out --cache"


def test_a_cache_that_cannot_be_made_is_a_clear_error(sharded: Path) -> None:
    Path("file").touch()
    for path in (Path("file/cache.sqlite"), Path("golden")):
        with pytest.raises(UsageError, match="cannot be used") as caught:
            cache.DigestCache(path).keep([], {})
        hint = "set XDG_CACHE_HOME to a folder that can be written, or leave out --cache"
        assert caught.value.hint == hint


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("digest", ["text", b"short", 7])
def test_what_is_no_digest_in_the_cache_is_read_again(sharded: Path, digest: object) -> None:
    verify(sharded)
    spoil(digest)
    comparison = verify(sharded)
    assert (comparison.num_identical, comparison.notes) == (6, ())


@pytest.mark.usefixtures("settled")
def test_a_wrong_digest_in_the_cache_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = Path("small.safetensors")
    save_file({"w": np.ones(3, "f4")}, small)
    api.record(small, "golden/model.safetensors")
    verify(small)
    spoil(bytes(32))
    with pytest.raises(CheckpointError, match="as expected, but their digest not") as caught:
        verify(small)
    assert str(caught.value.hint).startswith("the cache is wrong, so leave out --cache; or")


def spoil(digest: object) -> None:
    with closing(sqlite3.connect("cache.sqlite")) as database, database:
        database.execute("UPDATE digests SET digest = ?", (digest,))


@pytest.mark.usefixtures("settled")
def test_views_of_the_same_bytes_are_told_apart(tmp_path: Path) -> None:
    import torch

    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"rows": base, "columns": base.t(), "part": base[1:]}, tmp_path / "views.pt")
    with open_checkpoint(tmp_path / "views.pt") as opened:
        places = {cache._place(tensor) for tensor in opened.tensors.values()}
    assert len(places) == 3
    assert None not in places


@pytest.mark.usefixtures("settled")
def test_tensors_of_several_ranks_are_cached_file_by_file(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "ranks.ckpt"
    shutil.copytree(data / "lightning_two_ranks.ckpt", folder)
    golden = api.record(folder, tmp_path / "ranks.safetensors")
    kept = tmp_path / "cache.sqlite"
    for _ in range(2):
        found = api.verify(folder, golden, cache=kept)
        assert found.verdict == "identical"
    count = len(found.actual.tensors)
    assert found.actual.num_cached == count
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes())
    touched = api.verify(folder, golden, cache=kept)
    assert touched.verdict == "identical"
    assert touched.actual.num_cached < count
