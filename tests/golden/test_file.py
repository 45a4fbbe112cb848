"""The golden file: the same bytes for the same golden, read back whole, never half-written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from bisect import bisect_left
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import save_file

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.limits import MAX_HEADER_NBYTES
from harness.errors import GoldenError
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.fingerprints.scan import fingerprint
from harness.golden.columns import FIELDS, seal_of
from harness.golden.file import is_golden, read_golden, serialize, write_golden
from harness.golden.golden import Golden, Update, source_of


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Golden:
    path = tmp_path_factory.mktemp("recorded") / "golden" / "nest.safetensors"
    return api.record(data / "nest_tiny.nemo", path)


@pytest.fixture
def golden(tmp_path: Path, recorded: Golden) -> Golden:
    path = tmp_path / "golden" / "nest.safetensors"
    path.parent.mkdir()
    shutil.copy(recorded.path, path)
    return replace(recorded, path=path)


def everything(tmp_path: Path) -> Path:
    """A checkpoint with one tensor of every kind that a golden treats differently."""
    state = {
        "large": torch.randn(70, 100),
        "half": torch.randn(300, 40).bfloat16(),
        "complex": torch.randn(90, 90, dtype=torch.complex64),
        "small": torch.randn(5),
        "float8": torch.randn(9000).to(torch.float8_e5m2),
        "steps": torch.tensor(7),
        "many": torch.arange(5000),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "nonfinite": torch.tensor([float("nan"), float("inf"), 1.0]),
        "größe\n[x]": torch.ones(2),
    }
    state["tied"] = state["large"]
    torch.save(state, tmp_path / "all.pt")
    return tmp_path / "all.pt"


def same(one: Golden, other: Golden) -> bool:
    return serialize(replace(one, path=other.path)) == serialize(other)


def test_an_update_never_undoes_another_one(golden: Golden, data: Path) -> None:
    changed = data / "nest_tiny_perturbed_1e-3.nemo"
    first = api.update(changed, golden, reason="first")
    api.update(changed, golden, reason="first")  # two that come to the same
    for checkpoint, reason in ((changed, "second"), (data / "nest_tiny_renamed_key.nemo", "first")):
        with pytest.raises(GoldenError, match="updated by another process since it was") as caught:
            api.update(checkpoint, golden, reason=reason)
        assert caught.value.hint == f"see what it holds now: harness show {golden.path}"
    assert read_golden(golden.path).history == first.history
    api.update(data / "nest_tiny.nemo", golden.path, reason="third")
    assert [u.reason for u in read_golden(golden.path).history] == ["first", "third"]


@pytest.mark.parametrize("values", ["small", "all", "none"])
def test_what_is_written_is_read_back(tmp_path: Path, values: Any) -> None:
    recorded = api.record(everything(tmp_path), tmp_path / "g.safetensors", values=values)
    found = read_golden(tmp_path / "g.safetensors")
    assert same(found, recorded)
    assert found.fingerprint.root == recorded.fingerprint.root
    for key, tensor in recorded.fingerprint.tensors.items():
        other = found.fingerprint.tensors[key]
        assert (other.digest, other.stats, other.values) == (
            tensor.digest,
            tensor.stats,
            tensor.values,
        )
        assert other.alias_of == tensor.alias_of
        assert (other.sketch is None) == (tensor.sketch is None)
        if tensor.sketch is not None and other.sketch is not None:
            np.testing.assert_array_equal(other.sketch.projections, tensor.sketch.projections)


@pytest.mark.parametrize("bits", [4, 8])
def test_residues_are_read_back(tmp_path: Path, bits: Literal[4, 8]) -> None:
    with open_checkpoint(everything(tmp_path)) as checkpoint:
        found = fingerprint(checkpoint, tolerance=(1e-4, 0), bits=bits)
    golden = Golden(path=tmp_path / "g.safetensors", fingerprint=found, source="all.pt")
    write_golden(golden)
    read = read_golden(golden.path)
    assert same(read, golden)
    assert (read.fingerprint.tolerance, read.fingerprint.bits) == ((1e-4, 0), bits)
    kept = {key for key, tensor in found.tensors.items() if tensor.residues is not None}
    assert kept == {"large", "half", "float8", "tied"}
    for key in kept:
        ours, theirs = found.tensors[key].residues, read.fingerprint.tensors[key].residues
        assert ours is not None
        assert theirs is not None
        assert ours.grid == theirs.grid
        np.testing.assert_array_equal(ours.packed, theirs.packed)


def test_the_same_checkpoint_gives_the_same_bytes_in_another_process(
    golden: Golden, data: Path, tmp_path: Path
) -> None:
    again = tmp_path / "golden" / "again.safetensors"
    subprocess.run(
        [sys.executable, "-m", "harness", "record", data / "nest_tiny.nemo", "-g", again],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert again.read_bytes() == golden.path.read_bytes()


def test_any_safetensors_reader_can_read_the_columns(golden: Golden) -> None:
    with safe_open(golden.path, framework="np") as file:
        assert file.get_tensor("digest").shape == (99, 32)
        assert file.get_tensor("stats").shape == (99, 9)
        assert file.get_tensor("sketch").shape[1:] == (16,)
        assert list(file.metadata()) == ["harness"]


def test_no_path_or_time_of_the_machine_is_kept(tmp_path: Path) -> None:
    torch.save(
        {
            "state_dict": {"w": torch.ones(3)},
            "hyper_parameters": {"data": "/mnt/secret/train.json", "other": "~/x", "lr": 1e-3},
        },
        tmp_path / "model.ckpt",
    )
    golden = api.record(tmp_path / "model.ckpt", tmp_path / "golden" / "m.safetensors")
    text = golden.path.read_bytes().decode("latin-1")
    assert "secret" not in text
    assert str(tmp_path) not in text
    found = read_golden(golden.path).fingerprint.config
    assert found == {"data": "…/train.json", "other": "…/x", "lr": 1e-3}


def test_the_source_is_relative_to_the_golden_inside_of_a_project_and_a_name_outside(
    tmp_path: Path,
) -> None:
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    golden = project / "golden" / "m.safetensors"
    assert source_of(project / "data" / "m.pt", golden) == "../data/m.pt"
    assert source_of(tmp_path / "elsewhere" / "m.pt", golden) == "m.pt"


def test_a_link_inside_of_the_project_keeps_its_name(tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "of" / "this" / "machine"
    disk.mkdir(parents=True)
    (disk / "m.pt").touch()
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / "models").symlink_to(disk)
    golden = project / "golden" / "m.safetensors"
    assert source_of(project / "models" / "m.pt", golden) == "../models/m.pt"
    up = project / "models" / ".." / "m.pt"  # beside of `machine`, and not of `models`
    assert source_of(up, golden) == "m.pt"


@pytest.mark.parametrize("link", ["folder", "file"])
def test_a_golden_behind_a_link_finds_its_checkpoint_and_stays_there(
    tmp_path: Path, data: Path, link: str
) -> None:
    project = tmp_path / "project"
    there, here = project / "store" / "of" / "goldens", project / "golden"
    there.mkdir(parents=True)
    (project / ".git").mkdir()
    (project / "m.nemo").symlink_to(data / "nest_tiny.nemo")
    if link == "folder":
        here.symlink_to(there)
    else:
        here.mkdir()
        (here / "m.safetensors").symlink_to(there / "m.safetensors")
    for overwrite in (False, True):
        api.record(project / "m.nemo", here / "m.safetensors", overwrite=overwrite)
        for path in (here / "m.safetensors", there / "m.safetensors"):
            assert read_golden(path).checkpoint == project / "m.nemo"
        assert not (there / "m.safetensors").is_symlink()
        assert here.is_symlink() or (here / "m.safetensors").is_symlink()


def test_an_identical_golden_is_not_touched(golden: Golden) -> None:
    before = golden.path.stat().st_mtime_ns
    assert write_golden(golden, overwrite=True) is False
    assert golden.path.stat().st_mtime_ns == before


def test_another_golden_is_not_overwritten_unless_told(golden: Golden) -> None:
    changed = replace(golden, history=(Update(root="0" * 64, reason="x"),))
    with pytest.raises(GoldenError, match="recorded there already"):
        write_golden(changed)
    assert write_golden(changed, overwrite=True) is True
    assert read_golden(golden.path).history == changed.history


def test_an_update_copies_the_rows_of_unchanged_tensors(golden: Golden, data: Path) -> None:
    changed = "encoder.layers.1.feed_forward1.linear2.weight"
    updated = api.update(data / "nest_tiny_perturbed_1e-3.nemo", golden, reason="why")
    for key, tensor in updated.fingerprint.tensors.items():
        if key != changed:
            assert tensor.sketch is golden.fingerprint.tensors[key].sketch
            assert tensor.values is golden.fingerprint.tensors[key].values
    assert updated.history == (Update(root=golden.fingerprint.root.hex(), reason="why"),)
    fresh = api.record(
        data / "nest_tiny_perturbed_1e-3.nemo", golden.path.with_name("f.safetensors")
    )
    assert replace(updated, history=(), path=fresh.path, source=fresh.source) is not None
    assert same(replace(updated, history=(), source=fresh.source), fresh)


@pytest.mark.parametrize("values", ["small", "all", "none"])
def test_an_update_keeps_what_the_golden_kept(tmp_path: Path, values: Any) -> None:
    golden = api.record(everything(tmp_path), tmp_path / "g.safetensors", values=values)
    state = torch.load(tmp_path / "all.pt")
    torch.save(
        {key: tensor + 1 if key == "large" else tensor for key, tensor in state.items()},
        tmp_path / "b.pt",
    )
    updated = api.update(tmp_path / "b.pt", golden, reason="")
    fresh = api.record(tmp_path / "b.pt", tmp_path / "f.safetensors", values=values)
    assert same(replace(updated, history=(), source=fresh.source), fresh)


def test_an_update_of_a_key_that_is_newly_tied_is_what_a_fresh_record_gives(
    tmp_path: Path,
) -> None:
    large, small = torch.randn(9000), torch.randn(10)
    states: list[dict[str, Any]] = [
        {"w": large, "s": small},
        {"w": large, "head": large, "s": small, "t": small},
        {"head": large, "t": small, "new": torch.randn(9000)},
    ]
    path = tmp_path / "g.safetensors"
    api.record(states[-1], path)
    for state in states:
        updated = api.update(state, path)
        fresh = api.record(state, tmp_path / "fresh.safetensors", overwrite=True)
        assert same(replace(updated, history=()), fresh)


def test_each_of_many_updates_at_a_time_is_in_the_history_or_told(tmp_path: Path) -> None:
    path, reasons = tmp_path / "g.safetensors", list[str]()
    api.record({"w": torch.zeros(5000)}, path)

    def work(worker: int) -> None:
        for turn in range(6):
            number = 10.0 * worker + turn + 1
            with contextlib.suppress(GoldenError):
                api.update({"w": torch.full((5000,), number)}, path, reason=f"{number}")
                reasons.append(f"{number}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(update.reason for update in read_golden(path).history) == sorted(reasons)
    assert _files(tmp_path) == ["g.safetensors"]


def test_a_golden_that_is_held_stays_what_it_was_read_as(tmp_path: Path) -> None:
    one, other = (
        api.record({"w": torch.randn(9000)}, tmp_path / f"{name}.safetensors") for name in "ab"
    )
    held, expected = read_golden(one.path), one.path.read_bytes()
    with open(one.path, "r+b") as file:
        file.write(other.path.read_bytes())
    assert serialize(held) == expected
    os.truncate(one.path, 0)
    assert serialize(held) == expected


def test_a_golden_of_very_many_tensors_is_read_back(tmp_path: Path) -> None:
    """More than the header of a safetensors file may hold."""
    with open_checkpoint(everything(tmp_path)) as checkpoint:
        found = fingerprint(checkpoint)
    steps = found.tensors["steps"]
    keys = [f"layers.{n}.{'experts.' * 500}w" for n in range(7000)]
    assert sum(map(len, keys)) > MAX_HEADER_NBYTES // 4
    many = {key: replace(steps, key=key) for key in keys}
    golden = Golden(
        path=tmp_path / "g.safetensors", fingerprint=replace(found, tensors=many), source=""
    )
    write_golden(golden)
    read = read_golden(golden.path)
    assert list(read.fingerprint.tensors) == keys
    assert read.fingerprint.root == golden.fingerprint.root


class Parts:
    """A golden file taken apart: what is in it, to be changed and written again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="np") as file:
            self.columns = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.header = json.loads(file.metadata()["harness"])
        self.seal = self.columns.pop("seal")
        self.contents = json.loads(self.columns["contents"].tobytes())

    @property
    def rows(self) -> Any:
        return self.contents["parts"]["weights"]

    def write(self) -> None:
        header = json.dumps(self.header)
        self.columns["contents"] = np.frombuffer(json.dumps(self.contents).encode(), "|u1")
        seal = np.frombuffer(seal_of(header, self.columns), "|u1")
        columns = {key: column for key, column in self.columns.items() if column is not None}
        self.path.write_bytes(save({**columns, "seal": seal}, metadata={"harness": header}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.header.pop("source"), "header: Object missing required field source"),
        (lambda p: p.header["source"].update(path=5), "source.path: Expected str, got int"),
        (lambda p: p.header["source"].update(more=5), "source: .*unknown field more"),
        (lambda p: p.header["parts"]["weights"].update(container=5), "container: Expected str"),
        (lambda p: p.header["parts"]["weights"].update(block_nbytes=0), "block_nbytes: .*>= 1"),
        (lambda p: p.header["parts"].update(more={}), "Invalid enum value 'more'"),
        (lambda p: p.header.update(made=[]), "made: Expected object, got array"),
        (
            lambda p: p.header["made"].update(seed=1),
            "of another version of the harness: made with .*seed=1",
        ),
        (lambda p: p.header.update(schema="0"), "schema: Expected int, got str"),
        (lambda p: p.header.update(history=[{"root": 1}]), r"history\[0\]"),
        (lambda p: p.header.update(root="0" * 64), "its digests make the root 8fa8681d0705c440"),
        (lambda p: p.contents.pop("parts"), "missing required field parts"),
        (lambda p: p.contents["parts"].clear(), "has the parts .'weights'., and rows of"),
        (lambda p: p.rows.pop(), "rows in the column"),
        (lambda p: p.rows[0].__setitem__(1, "float31"), "has the dtype 'float31'"),
        (lambda p: p.rows[0].__setitem__(2, [-1]), "Expected int >= 0"),
        (lambda p: p.rows[0].__setitem__(2, [1e300]), "Expected int, got float"),
        (lambda p: p.rows[0].__setitem__(2, [1 << 80]), "ends before"),
        (lambda p: p.rows[1].__setitem__(0, p.rows[0][0]), "two tensors have the key"),
        (lambda p: p.rows[0].__setitem__(3, ["stats"]), "keeps stats"),
        (lambda p: p.rows[0].__setitem__(3, ["digest", "more"]), "keeps digest, more"),
        (lambda p: p.rows[5].__setitem__(4, "nothing"), "is no alias of 'nothing'"),
        (lambda p: p.rows[5].__setitem__(4, p.rows[0][0]), "is no alias of"),
        (
            lambda p: p.columns["digest"].__setitem__((0, 0), p.columns["digest"][0, 0] ^ 1),
            "do not make its digest|make the root",
        ),
        (
            lambda p: p.columns.update(sketch=p.columns["sketch"][1:]),
            "its column sketch ends before",
        ),
        (
            lambda p: p.columns.update(sketch=p.columns["sketch"].astype("<f4")),
            r"its column sketch has rows of float32 \(16,\), not of float64 \(16,\)",
        ),
        (
            lambda p: p.columns.update(stats=p.columns["stats"][:, 1:].copy()),
            "its column stats has rows",
        ),
        (lambda p: p.columns.pop("stats"), "it has no column stats"),
        (
            lambda p: p.columns.update(value=np.append(p.columns["value"], np.uint8(1))),
            "rows in the column value",
        ),
        (lambda p: p.columns.update(value=p.columns["value"] ^ 1), "do not make its digest"),
    ],
)
def test_a_damaged_golden_says_what_is_wrong_and_where(
    golden: Golden, change: Any, message: str
) -> None:
    parts = Parts(golden.path)
    change(parts)
    parts.write()
    with pytest.raises(GoldenError, match=rf"nest\.safetensors: .*{message}") as caught:
        read_golden(golden.path)
    assert caught.value.hint


def test_another_schema_says_to_upgrade(golden: Golden) -> None:
    parts = Parts(golden.path)
    parts.header = {"schema": 3, "whatever": "is in it"}
    parts.write()
    with pytest.raises(GoldenError, match="schema 3, but this version reads schema 0") as caught:
        read_golden(golden.path)
    assert "upgrade" in (caught.value.hint or "")


@settings(max_examples=60)
@given(st.data())
def test_a_mutated_golden_is_an_error_or_still_the_same(
    shipped_golden: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    original = shipped_golden.read_bytes()
    place = draw.draw(st.integers(0, len(original) - 1) | st.integers(0, 20000))
    mutated = bytearray(original)
    mutated[place] ^= draw.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(mutated)
    with contextlib.suppress(GoldenError):
        assert read_golden(path).fingerprint.root.hex().startswith("8fa8681d0705c440")


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden of sketches, values and statistics."""
    path = tmp_path_factory.mktemp("sealed") / "golden.safetensors"
    state = {f"layers.{n}.weight": torch.randn(90, 80) for n in range(3)}
    api.record({**state, "bias": torch.randn(7)}, path)
    return path


@settings(max_examples=200)
@given(st.data())
def test_a_bit_that_changed_is_an_error_or_changes_nothing(
    sealed: Path, draw: st.DataObject
) -> None:
    """Else a tensor could be told to differ that does not, and that would be called proved."""
    original = sealed.read_bytes()
    mutated = bytearray(original)
    mutated[draw.draw(st.integers(0, len(original) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path = sealed.with_name("mutated.safetensors")
    path.write_bytes(mutated)
    with contextlib.suppress(GoldenError):
        assert serialize(read_golden(path)) == original


@pytest.mark.parametrize("column", [column.name for field in FIELDS for column in field.columns])
def test_a_column_is_sealed(golden: Golden, data: Path, column: str) -> None:
    with open_checkpoint(data / "nest_tiny.nemo") as checkpoint:
        found = fingerprint(checkpoint, bits=4, hashes=True)
    write_golden(replace(golden, fingerprint=found), overwrite=True)
    parts = Parts(golden.path)
    parts.columns[column] = parts.columns[column].copy()
    parts.columns[column].reshape(-1)[-1] += 1
    golden.path.write_bytes(
        save({**parts.columns, "seal": parts.seal}, metadata={"harness": json.dumps(parts.header)})
    )
    with pytest.raises(GoldenError, match="its parts do not make its seal"):
        read_golden(golden.path)


def test_a_golden_without_a_seal_is_refused(golden: Golden) -> None:
    parts = Parts(golden.path)
    golden.path.write_bytes(save(parts.columns, metadata={"harness": json.dumps(parts.header)}))
    with pytest.raises(GoldenError, match="its parts do not make its seal"):
        read_golden(golden.path)


def test_other_files_are_no_goldens(golden: Golden, data: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(save({"a": np.zeros(3)}))
    assert is_golden(golden.path)
    assert not is_golden(plain)
    assert not is_golden(data / "nest_tiny.nemo")
    assert not is_golden(tmp_path / "missing")
    for path in (plain, data / "nest_tiny.nemo", tmp_path / "missing"):
        with pytest.raises(GoldenError):
            read_golden(path)


def test_a_key_or_config_cannot_pass_a_file_off_as_a_golden(tmp_path: Path) -> None:
    path = tmp_path / "fake.safetensors"
    path.write_bytes(save({'{"__metadata__":{"harness":': np.zeros(3)}))
    assert not is_golden(path)


WRITER = """
import sys, itertools
from dataclasses import replace
from harness.golden.file import read_golden, write_golden
from harness.golden.golden import Update
golden = read_golden(sys.argv[1])
print("ready", flush=True)
for number in itertools.count():
    history = (Update(root="0" * 64, reason=str(number)),)
    write_golden(replace(golden, history=history), overwrite=True)
"""


def _files(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def test_a_kill_at_any_moment_leaves_whole_goldens(golden: Golden) -> None:
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, golden.path], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.002 + 0.0074 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        # what was written at that moment, and never a second
        left = [child for child in golden.path.parent.iterdir() if child != golden.path]
        assert len(left) <= 1
        assert read_golden(golden.path).fingerprint.root == golden.fingerprint.root
    write_golden(replace(golden, source="another"), overwrite=True)
    assert _files(golden.path.parent) == [golden.path.name]


@pytest.mark.parametrize("can", ["links", "neither"])
def test_of_two_that_record_at_a_time_the_second_overwrites_nothing(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: str
) -> None:
    first = golden.path.read_bytes()
    second = replace(golden, path=tmp_path / "new.safetensors", source="another")
    fsync = os.fsync

    def write_first(descriptor: int) -> None:
        second.path.write_bytes(first)
        fsync(descriptor)

    def refuse(*_: object) -> None:
        raise PermissionError

    if can == "neither":  # then the last one wins, and a golden alone is written
        monkeypatch.setattr(Path, "hardlink_to", refuse)
        assert write_golden(second)
    else:
        monkeypatch.setattr(os, "fsync", write_first)
        with pytest.raises(GoldenError, match="recorded there already"):
            write_golden(second)
        assert second.path.read_bytes() == first
    assert _files(tmp_path).count("new.safetensors") == 1
    assert not list(tmp_path.glob(".*.tmp"))


KILLED_BEFORE_RENAMING = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from harness.golden.file import read_golden, write_golden
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
golden = read_golden(sys.argv[1])
write_golden(replace(golden, source="another"), overwrite=True)
"""


def test_what_a_kill_left_is_removed_by_the_next_write(golden: Golden) -> None:
    folder = golden.path.parent
    subprocess.run([sys.executable, "-c", KILLED_BEFORE_RENAMING, golden.path], check=False)
    assert len(_files(folder)) == 2
    assert read_golden(golden.path).source == golden.source
    write_golden(replace(golden, source="a third"), overwrite=True)
    assert _files(folder) == [golden.path.name]
    assert read_golden(golden.path).source == "a third"


def test_the_file_of_a_writer_that_lives_is_left_alone(golden: Golden) -> None:
    written = golden.path.with_name(f".{golden.path.name}.0.tmp")
    with open(written, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_golden(replace(golden, source="another"), overwrite=True)
        assert written.exists()
    write_golden(replace(golden, source="a third"), overwrite=True)
    assert not written.exists()


def test_a_file_that_another_writer_removed_before_it_was_locked_is_made_again(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, list[Path]()

    def late(file: Any, how: int) -> None:
        if not removed:  # the folder is locked before
            removed.extend(golden.path.parent.glob(".*.tmp"))
            for temporary in removed:
                temporary.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_golden(replace(golden, source="another"), overwrite=True)
    assert read_golden(golden.path).source == "another"
    assert _files(golden.path.parent) == [golden.path.name]


def test_a_golden_may_have_the_longest_name(golden: Golden, tmp_path: Path) -> None:
    named = replace(golden, path=tmp_path / f"{'ü' * 121}.safetensors")
    assert write_golden(named)
    assert write_golden(replace(named, source="another"), overwrite=True)
    assert read_golden(named.path).source == "another"


def test_links_that_go_round_in_circles_are_a_clear_error(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(GoldenError):
        write_golden(replace(golden, path=tmp_path / "a"))
    assert source_of(tmp_path / "net.pt", tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_a_clear_error(golden: Golden, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(GoldenError, match="cannot be written"):
        write_golden(replace(golden, path=blocked / "g.safetensors"))


@pytest.mark.parametrize("make", ["checkpoint", "text", "pickle"])
def test_overwriting_replaces_nothing_but_a_golden(golden: Golden, make: str) -> None:
    other = golden.path.with_name("other.safetensors")
    if make == "checkpoint":
        save_file({"weight": torch.ones(3)}, other)
    elif make == "text":
        other.write_text("version https://git-lfs")
    else:
        torch.save({"weight": torch.ones(3)}, other)
    before = other.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(GoldenError, match=r"exists|already") as caught:
            write_golden(replace(golden, path=other), overwrite=overwrite)
    assert str(caught.value) == f"{other}: exists, and is not a golden"
    assert caught.value.hint == "give another file with -g, or remove it"
    assert other.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 300, 5000, -1])
def test_a_damaged_golden_can_be_overwritten(golden: Golden, keep: int) -> None:
    data = golden.path.read_bytes()
    golden.path.write_bytes(data[:keep])
    write_golden(golden, overwrite=True)
    assert golden.path.read_bytes() == data


def test_what_is_given_as_a_golden_and_is_none_is_named(golden: Golden, tmp_path: Path) -> None:
    folder = golden.path.parent
    pointer = tmp_path / "lfs.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    save_file({"weight": torch.ones(3)}, tmp_path / "net.safetensors")
    for path, message, hint in [
        (folder, "a folder, not a golden", f"-g {golden.path}"),
        (
            tmp_path,
            "a folder, not a golden",
            f"-g {tmp_path / 'NAME.safetensors'}",
        ),
        (pointer, "a Git LFS pointer, not the golden itself", "git lfs pull"),
        (
            tmp_path / "net.safetensors",
            "a safetensors file, but not a golden",
            "give the golden with -g, and the checkpoint without",
        ),
        (tmp_path / ("x" * 300), "file name too long", "check the path and its permissions"),
    ]:
        with pytest.raises(GoldenError) as caught:
            read_golden(path)
        assert (str(caught.value), caught.value.hint) == (f"{path}: {message}", hint)


def test_a_golden_that_may_not_be_read_says_so(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(GoldenError, match="cannot be opened: Permission denied") as caught:
        read_golden(golden.path)
    assert caught.value.hint == "check the path and that you may read the file"


def test_a_golden_is_held_once_more_while_it_is_written(golden: Golden) -> None:
    values = bytes(20_000_000)
    digest = hashlib.blake2s().digest()
    large = TensorFingerprint(
        key="x", dtype=DTYPES["uint8"], shape=(len(values),), digest=digest, values=values
    )
    held = replace(golden, fingerprint=replace(golden.fingerprint, tensors={"x": large}))
    tracemalloc.start()
    data = serialize(held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(values) < len(data) < peak < 1.1 * len(data)


@pytest.mark.parametrize("sign", ["a", '"', "\\", "é", "\0"])
def test_the_longest_history_that_is_written_can_be_read(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    for module in ("golden.file", "checkpoint.formats.safetensors"):
        monkeypatch.setattr(f"harness.{module}.MAX_HEADER_NBYTES", 40_000)

    def with_reason(length: int) -> Golden:
        return replace(golden, history=(Update(root="0" * 64, reason=sign * length),))

    def is_refused(length: int) -> bool:
        with suppress(GoldenError):
            serialize(with_reason(length))
            return False
        return True

    first = bisect_left(range(20_000), 1, key=is_refused)
    assert 1000 < first < 10_000
    write_golden(with_reason(first - 1), overwrite=True)
    assert read_golden(golden.path).history == with_reason(first - 1).history
    with pytest.raises(GoldenError, match="bytes, and 10,000 is the most that is read"):
        write_golden(with_reason(first), overwrite=True)
