"""torch.distributed.checkpoint folders: what several ranks saved is one checkpoint, or an error."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
)

from harness.checkpoint import open_checkpoint
from harness.checkpoint.formats import dcp
from harness.checkpoint.sources import files
from harness.checkpoint.tensors import Checkpoint
from harness.checkpoint.unpickling import opcodes
from harness.checkpoint.unpickling.opcodes import Budget
from harness.errors import CheckpointError, HarnessError
from harness.fingerprints.scan import fingerprint
from harness.streaming.workers import Workers
from tests.checkpoint.conftest import Assert, bits, read_bits
from tests.checkpoint.dcp_writer import (
    Cut,
    halves,
    place_of,
    read_metadata,
    write_dcp,
    write_metadata,
)
from tests.checkpoint.distributed_saves import NUM_RANKS, save_all
from tests.checkpoint.formats.test_assembled import tilings
from tests.checkpoint.test_fuzz import damage
from tests.checkpoint.test_hostile import assert_harmless, measure
from tests.model.distributed.ranks import run_ranks

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def saves(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """What `distributed_saves.py` writes, once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "distributed saves"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            ranks = run_ranks(NUM_RANKS, save_all, folder, folder=folder / "printed")
            assert [rank.code for rank in ranks] == [0] * NUM_RANKS, ranks
    return folder


def root(path: Path, section: str | None = None) -> str:
    with open_checkpoint(path, section=section) as checkpoint:
        return fingerprint(checkpoint, check_integrity=True).root.hex()


# What torch and Lightning write


@pytest.mark.parametrize(
    ("folder", "consolidated"),
    [
        ("mesh", "mesh.pt"),
        ("sharded", "sharded.pt"),
        ("one file an item", "sharded.pt"),
        ("fsdp", "fsdp.pt"),
        ("async", "fsdp.pt"),
        ("rank safetensors", "fsdp.pt"),
        ("rank safetensors in two", "fsdp.pt"),
        ("safetensors", "fsdp.pt"),
        ("lightning.ckpt", "lightning.pt"),
    ],
)
def test_what_ranks_saved_has_the_root_of_the_consolidated_file(
    saves: Path, folder: str, consolidated: str
) -> None:
    assert root(saves / folder) == root(saves / consolidated)


@pytest.mark.parametrize(
    ("folder", "section", "count"),
    [
        ("fsdp", ".", 39),
        ("fsdp", "optim", 15),
        ("fsdp", "optim.state", 15),
        ("fsdp", "flat", 15),
        ("fsdp", "history", 2),
        ("async", "history.1", 1),
        ("fsdp", "pair", 1),
        ("lightning.ckpt", "optimizer_0", 6),
        ("lightning.ckpt", ".", 8),
        ("mesh", ".", 7),
    ],
)
def test_sections_have_the_keys_and_values_of_the_consolidated_file(
    saves: Path, folder: str, section: str, count: int
) -> None:
    file = saves / f"{folder.removesuffix('.ckpt')}.pt"
    with (
        open_checkpoint(saves / folder, section=section) as ours,
        open_checkpoint(file, section=section) as theirs,
    ):
        assert sum(not tensor.dtype.is_value for tensor in ours.tensors.values()) == count
        assert set(ours.tensors) == set(theirs.tensors)
    assert root(saves / folder, section) == root(file, section)


def test_every_tensor_that_torch_consolidates_has_its_bits(
    saves: Path, assert_reads: Assert
) -> None:
    for name in ("mesh", "sharded"):
        expected = torch.load(saves / f"{name}.pt", weights_only=True)
        assert_reads(saves / name, expected)


def test_containers_sections_and_configuration_are_named(saves: Path) -> None:
    with open_checkpoint(saves / "fsdp") as checkpoint:
        assert checkpoint.container == "torch.distributed.checkpoint"
        assert checkpoint.section == "model"
        assert checkpoint.config is None
        assert not checkpoint.keeps_aliases
        assert checkpoint.name == str(saves / "fsdp")
    with open_checkpoint(saves / "lightning.ckpt") as checkpoint:
        assert checkpoint.container == "Lightning sharded checkpoint"
        assert checkpoint.section == "state_dict"
        assert checkpoint.config == {"width": 6}
    with open_checkpoint(saves / "rank safetensors") as checkpoint:
        assert checkpoint.container == "torch.distributed.checkpoint safetensors"
    with open_checkpoint(saves / "safetensors") as checkpoint:
        assert checkpoint.container == "sharded safetensors"


def test_a_folder_is_a_subject_like_any_file(
    saves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Run
) -> None:
    shutil.copytree(saves / "fsdp", tmp_path / "step-1")
    shutil.copy(saves / "fsdp.pt", tmp_path / "step-1.pt")
    monkeypatch.chdir(tmp_path)
    recorded = harness("record", "step-1")
    assert recorded.code == 0
    assert "6 tensors of step-1 (torch.distributed.checkpoint, section model)" in recorded.out
    assert [path.name for path in (tmp_path / "golden").iterdir()] == ["step-1.safetensors"]
    for arguments in ([], ["step-1"], ["step-1/"], ["step-1.pt"]):
        assert "ok identical" in harness("verify", *arguments).out
    again = harness("record", "step-1/", "--section", "optim", "-g", "golden/optim.safetensors")
    assert again.code == 0
    assert harness("verify", "-g", "golden/optim.safetensors").code == 0
    assert harness("diff", "step-1", "step-1.pt").code == 0

    with (tmp_path / "step-1" / "__1_0.distcp").open("r+b") as file:
        place = place_of(read_metadata(tmp_path / "step-1"), "model.embed.weight", (6, 0))
        file.seek(place.offset + 800)
        file.write(b"\x40" * 8)
    verified = harness("verify", "step-1")
    assert verified.code == 1
    assert "damaged: not the bytes that were saved (1)\n    embed.weight" in verified.out
    assert "__1_0.distcp: 'model.embed.weight' at" in verified.out
    refused = harness("record", "step-1", "-g", "golden/other.safetensors")
    assert refused.code == 2
    assert "__1_0.distcp: 'model.embed.weight' at" in refused.err
    assert "its CRC-32 is" in refused.err


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_file_of_a_folder_asks_for_the_folder(saves: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="one file of a torch") as caught:
        open_checkpoint(saves / "fsdp" / name)
    assert caught.value.hint == f"give the whole folder: {saves / 'fsdp'}"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("state_dict", "e9df8ebc2ddb5d2657351a11e4d5578110605b59a62d3cf73eb10d683b592cc3"),
        ("optimizer_0", "b711d2f54b970505bb39a2f084e7798f112a7d20076937dcb1a626f1d1a0371a"),
    ],
)
def test_a_folder_that_lightning_2_6_wrote_stays_readable(
    data: Path, section: str, expected: str
) -> None:
    """Made by `distributed_saves.py` with torch 2.13, from two ranks."""
    assert root(data / "lightning_two_ranks.ckpt", section) == expected


# Any cut of any tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex128]
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "last first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 1 else t,
    "conjugate": lambda t: t.conj().clone().conj() if t.is_complex() else t,
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.lists(
        st.tuples(
            tilings(),
            st.sampled_from(DTYPES),
            st.sampled_from(sorted(LAYOUTS)),
            st.lists(st.integers(0, 3), max_size=7),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_cut_is_read_as_the_whole_tensor(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    generator = torch.Generator().manual_seed(0)
    cuts = {}
    for number, ((shape, boxes), dtype, layout, names) in enumerate(parts):
        raw = torch.randint(0, 2, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensor = raw.view(dtype).reshape(shape)
        cuts[f"t{number}"] = Cut(tensor, boxes, names, LAYOUTS[layout])
    write_dcp(folder, cuts)
    with open_checkpoint(folder) as checkpoint:
        for key, cut in cuts.items():
            assert read_bits(checkpoint, key) == bits(cut.tensor)


def test_tensors_of_one_shape_are_told_apart(tmp_path: Path) -> None:
    """Archives of the same dtype and shape are read by what is known of the first."""
    tensors = {f"t{n}": torch.full((4, 3), float(n)) for n in range(20)}
    tensors |= {f"u{n}": torch.full((3, 4), float(n)) for n in range(20)}
    write_dcp(tmp_path, {key: halves(tensor) for key, tensor in tensors.items()})
    with open_checkpoint(tmp_path) as checkpoint:
        for key, tensor in tensors.items():
            assert read_bits(checkpoint, key) == bits(tensor)
        fingerprint(checkpoint, check_integrity=True)
        assert len({checksum.crc32 for checksum in checkpoint.checksums}) > 20


def test_thousands_of_files_are_not_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    tensor = torch.arange(40.0)
    write_dcp(tmp_path, {"a": halves(tensor, count=20), "b": halves(tensor + 1, count=20)})

    def num_open() -> int:
        found = 0
        for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - they vanish
            try:
                found += os.readlink(f"/proc/self/fd/{descriptor}").endswith(".distcp")  # noqa: PTH115
            except OSError:
                continue
        return found

    with open_checkpoint(tmp_path) as checkpoint:
        assert num_open() <= 3
        for key, expected in (("a", tensor), ("b", tensor + 1)):
            assert checkpoint.tensors[key].array().tolist() == expected.tolist()
            assert 0 < num_open() <= 3
        assert fingerprint(checkpoint, workers=Workers(jobs=4)).tensors.keys() == {"a", "b"}
    assert num_open() == 0


def test_paths_make_the_dicts_and_lists_that_torch_would(
    tmp_path: Path, assert_reads: Assert
) -> None:
    one = halves(torch.ones(2, 2))
    values = {"x.1": one, "x.0": one, "y.q": one, "z": one, "w": one, "v": [1, 2], "u": None}
    paths: dict[str, Any] = {
        "x.1": ("x", 1, "a.b"),
        "x.0": ("x", 0, "[c]"),
        "y.q": ("y", "q"),
        "w": ("state_dict", "w"),
        "v": ("state_dict", "v"),
    }
    write_dcp(tmp_path, values, paths)
    assert_reads(tmp_path, {"w": one.tensor})
    keys = ['x[0]["[c]"]', 'x[1]["a.b"]', 'y["q"]', "z", 'state_dict["w"]']
    keys += ['state_dict["v"]', "u"]
    with open_checkpoint(tmp_path, section=".") as checkpoint:
        assert set(checkpoint.tensors) == set(keys)
    with open_checkpoint(tmp_path, section="x.1") as checkpoint:
        assert list(checkpoint.tensors) == ["a.b"]


def test_a_folder_without_paths_has_flat_keys(tmp_path: Path, assert_reads: Assert) -> None:
    one = halves(torch.ones(2, 2))
    write_dcp(tmp_path, {"a.b": one, "c": one})
    metadata = read_metadata(tmp_path)
    metadata.planner_data = None
    write_metadata(tmp_path, metadata)
    assert_reads(tmp_path, {"a.b": one.tensor, "c": one.tensor})


def test_shard_files_may_be_links_and_in_folders_below(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", {"a": halves(torch.arange(4.0))})
    (tmp_path / "elsewhere").mkdir()
    (folder / "__1_0.distcp").rename(tmp_path / "elsewhere" / "shard")
    (folder / "__1_0.distcp").symlink_to(tmp_path / "elsewhere" / "shard")
    (folder / "below").mkdir()
    (folder / "__0_0.distcp").rename(folder / "below" / "__0_0.distcp")
    metadata = read_metadata(folder)
    place_of(metadata, "a", (0,)).relative_path = "below/__0_0.distcp"
    write_metadata(folder, metadata)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["a"].array().tolist() == [0, 1, 2, 3]


def test_metadata_comes_before_other_files_of_a_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_dcp(tmp_path, {"a": halves(torch.arange(4.0))})
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["b"]
    (tmp_path / ".metadata").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["b"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"without its \.metadata, which is written last"):
        open_checkpoint(tmp_path)


# Damage: every kind is named, with the tensor, the file and the place

W = torch.arange(24.0).reshape(4, 6)


def _chunks(metadata: Any, key: str = "w") -> Any:
    return metadata.state_dict_metadata[key].chunks


def _moved(metadata: Any, key: str, index: int, offset: tuple[int, ...]) -> None:
    """Move a chunk, in both of the tables that know it."""
    chunk = _chunks(metadata, key)[index]
    place = metadata.storage_data.pop(MetadataIndex(key, chunk.offsets))
    chunk.offsets = torch.Size(offset)
    metadata.storage_data[MetadataIndex(key, offset)] = place


def _dropped(metadata: Any, index: int) -> None:
    chunk = _chunks(metadata).pop(index)
    del metadata.storage_data[MetadataIndex("w", chunk.offsets)]


def _set(name: str, value: Any, key: str = "w") -> Callable[[Any], None]:
    return lambda metadata: setattr(place_of(metadata, key, (2, 0)), name, value)


def _exchanged(metadata: Any) -> None:
    first, second = (place_of(metadata, key, (0, 0)) for key in ("w", "wide"))
    metadata.storage_data[MetadataIndex("w", (0, 0))] = second
    metadata.storage_data[MetadataIndex("wide", (0, 0))] = first


def _twice(metadata: Any) -> None:
    metadata.storage_data[MetadataIndex("w", (2, 0))] = place_of(metadata, "w", (0, 0))


class _SameIndex:
    """Pickled like the index of a chunk that has one already."""

    def __init__(self) -> None:
        self.fqn, self.offset = "w", torch.Size((2, 0))


def _path(key: str, path: Any) -> Callable[[Any], None]:
    return lambda metadata: metadata.planner_data.__setitem__(key, path)


def _number_as_tensor(metadata: Any) -> None:
    """The tables say that a value is a chunk, and the other way round."""
    chunk = metadata.storage_data.pop(MetadataIndex("w", (0, 0)))
    number = metadata.storage_data.pop(MetadataIndex("step"))
    metadata.storage_data |= {MetadataIndex("w", (0, 0)): number, MetadataIndex("step"): chunk}


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hole": (
        lambda m: _dropped(m, 1),
        r"tensor 'w' \(shape \[4, 6\]\) lacks its element \[2, 0\]: no chunk holds it",
    ),
    "overlap": (
        lambda m: _moved(m, "w", 1, (1, 0)),
        r"tensor 'w' \(shape \[4, 6\]\) has its element \[1, 0\] twice: in the chunk at \[0, 0\] "
        r"of shape \[2, 6\] in __0_0.distcp, bytes 0 to \d+, and in the chunk at \[1, 0\] of shape "
        r"\[2, 6\] in __1_0.distcp, bytes 0 to \d+",
    ),
    "outside": (
        lambda m: _moved(m, "w", 1, (3, 0)),
        r"tensor 'w' \(shape \[4, 6\]\) does not hold the chunk at \[3, 0\] of shape \[2, 6\] in "
        r"__1_0.distcp, bytes 0 to \d+",
    ),
    "larger whole": (
        lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size((5, 6))),
        r"tensor 'w' \(shape \[5, 6\]\) lacks its element \[4, 0\]",
    ),
    "huge whole": (
        lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size((1 << 61, 6))),
        r"tensor 'w' .* lacks its element \[4, 0\]",
    ),
    "chunk twice": (
        lambda m: _chunks(m).append(_chunks(m)[0]),
        r"\.metadata: lists the chunk of 'w' at \[0, 0\] twice",
    ),
    "chunk without place": (
        lambda m: m.storage_data.pop(MetadataIndex("w", (2, 0))),
        r"\.metadata: lists the chunk of 'w' at \[2, 0\], but does not say in which file it is",
    ),
    "value without place": (
        lambda m: m.storage_data.pop(MetadataIndex("step")),
        r"\.metadata: lists 'step', but does not say in which file it is",
    ),
    "place without chunk": (
        lambda m: _chunks(m).pop(1),
        r"\.metadata: places the chunk of 'w' at \[2, 0\] in a file, but does not list it",
    ),
    "place without tensor": (
        lambda m: m.state_dict_metadata.pop("step"),
        r"\.metadata: places 'step' in a file, but does not list it",
    ),
    "chunk of fewer dimensions": (
        lambda m: _chunks(m).__setitem__(
            0, ChunkStorageMetadata(torch.Size((0,)), torch.Size((2,)))
        ),
        r"\.metadata: describes a chunk of 'w' in an unknown way",
    ),
    "negative chunk": (
        lambda m: _chunks(m).__setitem__(
            0, ChunkStorageMetadata(torch.Size((-1, 0)), torch.Size((2, 6)))
        ),
        r"\.metadata: describes a chunk of 'w' in an unknown way",
    ),
    "other shape": (
        _exchanged,
        r"__0_0.distcp: 'w' at \d+: is float32 \[2, 7\], but \.metadata says float32 \[2, 6\]",
    ),
    "other dtype": (
        lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32),
        r"__0_0.distcp: 'w' at 0: is float32 \[2, 6\], but \.metadata says int32 \[2, 6\]",
    ),
    "unknown dtype": (
        lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.Tensor),
        r"\.metadata: gives 'w' an unknown dtype torch.Tensor",
    ),
    "number as tensor": (
        _number_as_tensor,
        r"__0_0.distcp: 'w' at \d+: is no tensor with values",
    ),
    "same bytes": (
        _twice,
        r"\.metadata: places two items in the same bytes: 'w' in __0_0.distcp, bytes 0 to \d+, and "
        r"'w' in __0_0.distcp, bytes 0 to",
    ),
    "place twice": (
        lambda m: m.storage_data.__setitem__(_SameIndex(), place_of(m, "step", None)),
        r"\.metadata: places the chunk of 'w' at \[2, 0\] twice, again in __0_0.distcp, bytes",
    ),
    "overlapping bytes": (
        lambda m: setattr(place_of(m, "w", (0, 0)), "length", place_of(m, "w", (0, 0)).length + 1),
        r"\.metadata: places two items in the same bytes: 'w' in __0_0.distcp, bytes 0 to \d+, and "
        r"'wide' in __0_0.distcp, bytes \d+ to \d+",
    ),
    "short item": (
        lambda m: setattr(place_of(m, "w", (2, 0)), "length", 1000),
        r"__1_0.distcp: 'w' at 0: a zip archive without its directory",
    ),
    "moved item": (
        _set("offset", 1 << 20, "wide"),
        r"__1_0.distcp: 'wide' should be in its bytes 1048576 to",
    ),
    "beyond the end": (
        _set("length", 1 << 40, "wide"),
        r"__1_0.distcp: 'wide' should be in its bytes \d+ to 10995\d+, but the file has \d+",
    ),
    "negative offset": (_set("offset", -1), r"places 'w' at \d+ bytes from byte -1 of '__1_0"),
    "no bytes": (_set("length", 0), r"places 'w' at 0 bytes from byte 0 of '__1_0"),
    "above": (_set("relative_path", "../x"), r"places 'w' in '\.\./x', which is no file inside"),
    "inside and above": (
        _set("relative_path", "a/../../x"),
        r"which is no file inside the folder",
    ),
    "absolute": (_set("relative_path", "/etc/passwd"), r"places 'w' in '/etc/passwd', which is no"),
    "no name": (_set("relative_path", ""), r"places 'w' in '', which is no file inside"),
    "nul": (_set("relative_path", "a\0b"), r"which is no file inside the folder"),
    "missing file": (
        _set("relative_path", "__7_0.distcp"),
        r"__7_0.distcp: missing, but \.metadata places 1 items in it, the first of them 'w'",
    ),
    "compressed": (
        _set("transform_descriptors", ["stream.zstd/1"]),
        r"'w' is compressed or encrypted \(stream.zstd/1\) in '__1_0.distcp'",
    ),
    "key that is no text": (
        lambda m: m.state_dict_metadata.__setitem__(3, BytesStorageMetadata()),
        r"\.metadata: names a tensor by 3",
    ),
    "unknown kind": (
        lambda m: m.state_dict_metadata.__setitem__("w", torch.device("cpu")),
        r"\.metadata: describes 'w' in an unknown way",
    ),
    "path that is a text": (_path("w", "w"), r"\.metadata: gives a path as w"),
    "empty path": (_path("w", ()), r"\.metadata: gives a path as"),
    "numbered root": (_path("w", (0, "w")), r"\.metadata: gives a path as \(0, w\)"),
    "deep path": (_path("w", ("a",) * 1000), r"\.metadata: gives a path as"),
    "one path for two": (_path("w", ("wide",)), r"\.metadata: places two values at wide"),
    "path into a tensor": (_path("wide", ("w", "x")), r'\.metadata: places w\["x"\] where some'),
    "list and dict": (
        lambda m: m.planner_data.update({"w": ("a", 0), "wide": ("a", "b")}),
        r'\.metadata: places a\["b"\] where something else is',
    ),
    "list of 4 billion": (
        _path("w", ("a", (1 << 32) - 1)),
        r"\.metadata: fills a list of 4294967296 places with 1 values",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_kind_of_damage_is_named(tmp_path: Path, name: str) -> None:
    folder = write_dcp(
        tmp_path / "dcp", {"w": halves(W), "wide": halves(torch.ones(4, 7)), "step": 3}
    )
    change, match = DAMAGE[name]
    metadata = read_metadata(folder)
    change(metadata)
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("empty", [False, True])
def test_what_torch_saved_as_safetensors_is_told_what_to_save_instead(
    tmp_path: Path, empty: bool
) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    state = {"a": torch.ones(3), "b": torch.ones(0 if empty else 2)}
    writer = FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    save(state, storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointError, match=r"\.metadata: places ") as caught:
        open_checkpoint(tmp_path)
    assert "save it by the HuggingFaceStorageWriter" in str(caught.value.hint)


def test_a_metadata_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", {"w": halves(W)})
    whole = (folder / ".metadata").read_bytes()
    for content, match in [
        (whole + b"x", "has 1 bytes after its pickle"),
        (whole[:-1], "ends before its STOP"),
        (b"\x80\x02}.", "holds no Metadata of torch, but dict"),
        (b"", "ends before its STOP"),
    ]:
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(folder)
    write_dcp(folder, {})
    with pytest.raises(CheckpointError, match="no state dict found"):
        open_checkpoint(folder)


def test_a_chunk_that_expands_is_refused(tmp_path: Path) -> None:
    cut = Cut(torch.ones(4), [((0,), (4,))], layout=lambda t: torch.ones(1).expand(4))
    write_dcp(tmp_path, {"w": cut})
    with pytest.raises(CheckpointError, match="'w' at 0: expands 4 bytes to 16, as no save does"):
        open_checkpoint(tmp_path)


def test_a_chunk_without_values_is_refused(tmp_path: Path) -> None:
    write_dcp(tmp_path, {"w": Cut(torch.ones(4), [((0,), (4,))], layout=lambda t: t.to("meta"))})
    with pytest.raises(CheckpointError, match="'w' at 0: is no tensor with values"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("beside", "match"),
    [([1], "should hold a dict of Lightning's, but holds list"), ({"w": 1}, "which .metadata pl")],
)
def test_a_meta_pt_that_does_not_fit_is_refused(tmp_path: Path, beside: Any, match: str) -> None:
    write_dcp(tmp_path, {"w": halves(W)})
    torch.save(beside, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "meta.pt") in str(caught.value)


# Hostile folders


def test_the_pickles_of_a_folder_share_one_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {f"v{n}": list(range(2000)) for n in range(20)}
    write_dcp(tmp_path, {"w": halves(W), **values})

    def limited(nbytes: int) -> Callable[..., Any]:
        return lambda *args, **options: unlimited(*args, max_nbytes=nbytes, **options)

    unlimited = opcodes.unpickle
    for nbytes, opens in ((4 << 20, True), (1 << 20, False)):
        monkeypatch.setattr(opcodes, "unpickle", limited(nbytes))
        if opens:
            open_checkpoint(tmp_path).close()
        else:
            match = r"'v\d+' at .* a structure of more than 1 MiB"
            with pytest.raises(CheckpointError, match=match) as caught:
                open_checkpoint(tmp_path)
            assert "fewer chunks" in str(caught.value.hint)


def test_the_limit_grows_with_what_torch_writes_of_many_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dcp(tmp_path, {"w": halves(torch.ones(400, 2), count=400)})
    monkeypatch.setattr(dcp, "Budget", lambda: Budget(max_nbytes=1 << 16))
    open_checkpoint(tmp_path).close()
    metadata = read_metadata(tmp_path)
    metadata.planner_data = [{} for _ in range(60_000)]  # objects of a byte each
    write_metadata(tmp_path, metadata)
    with pytest.raises(CheckpointError, match="a structure of more than"):
        open_checkpoint(tmp_path)


def test_many_chunks_cost_no_more_memory_than_they_are_counted_for(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "dcp", {"w": halves(W)})
    metadata = read_metadata(folder)
    _chunks(metadata).extend(
        ChunkStorageMetadata(torch.Size((n, 0)), torch.Size((1, 6))) for n in range(4, 40_000)
    )
    write_metadata(folder, metadata)
    (result,) = measure(8, folder)
    assert_harmless(result, opens=False, most_nbytes=16 << 20)
    assert "a structure of more than 8 MiB" in result["error"]


def test_offsets_that_hash_alike_do_not_slow_the_reader(tmp_path: Path) -> None:
    """CPython hashes all of these numbers to 0: without a defence this takes a minute."""
    write_dcp(tmp_path, {"w": halves(torch.ones(4))})
    metadata = read_metadata(tmp_path)
    _chunks(metadata).extend(
        ChunkStorageMetadata((n * sys.hash_info.modulus,), (1,)) for n in range(1, 12_000)
    )
    write_metadata(tmp_path, metadata)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="does not say in which file it is"):
        open_checkpoint(tmp_path)
    assert time.process_time() - started < 10


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sample")
    values = {"w": halves(W, 1), "v": halves(W.bfloat16()), "o.0": halves(W[0]), "s": [1, "a"]}
    write_dcp(folder, values, {"o.0": ("o", 0)})
    torch.save({"hyper_parameters": {"a": 1}}, folder / "meta.pt")
    return _files(folder)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from([".metadata"] * 4 + ["__0_0.distcp", "meta.pt"]))
def test_a_damaged_folder_reads_or_says_why_not(
    tmp_path_factory: pytest.TempPathFactory,
    sample: dict[str, bytes],
    data: st.DataObject,
    name: str,
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for file, content in sample.items():
        (folder / file).write_bytes(data.draw(damage(content)) if file == name else content)
    try:
        with open_checkpoint(folder, section=".") as checkpoint:
            _ = checkpoint.config
            for tensor in checkpoint.tensors.values():
                tensor.array()
    except HarnessError as error:
        message, hint = str(error), error.hint
    else:
        message, hint = str(folder), "nothing"
    assert str(folder) in message
    assert hint
    assert sorted(path.name for path in folder.iterdir()) == sorted(sample)


def test_one_flipped_bit_of_a_tensor_is_always_found(
    tmp_path: Path, sample: dict[str, bytes]
) -> None:
    def prints(checkpoint: Checkpoint) -> dict[str, bytes | None]:
        tensors = fingerprint(checkpoint, details=lambda tensor: False).tensors
        return {key: one.digest for key, one in tensors.items()}

    for name, content in sample.items():
        (tmp_path / name).write_bytes(content)
    with open_checkpoint(tmp_path, section=".") as checkpoint:
        before = prints(checkpoint)
    metadata = read_metadata(tmp_path)
    place = place_of(metadata, "w", (0, 3))
    raw = bytearray(sample["__1_0.distcp"])
    start = raw.index(W[:, 3:].contiguous().numpy().tobytes(), place.offset)
    for at in np.random.default_rng(0).integers(0, 48 * 8, 20).tolist():
        flipped = bytearray(raw)
        flipped[start + at // 8] ^= 1 << at % 8
        (tmp_path / "__1_0.distcp").write_bytes(flipped)
        with open_checkpoint(tmp_path, section=".") as checkpoint:
            after = prints(checkpoint)
            assert [key for key in before if before[key] != after[key]] == ["w"]
            with pytest.raises(CheckpointError, match=r"__1_0\.distcp: 'w' at .*CRC-32"):
                fingerprint(checkpoint, check_integrity=True)
