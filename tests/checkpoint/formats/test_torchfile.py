"""What torch.save and torch.jit.save write, old and new, reads as torch.load reads it."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.export
import torch.package

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError
from tests.checkpoint.builders import (
    integer,
    named,
    reference,
    sequence,
    storage,
    string,
    tensor,
    write_torch_legacy,
    write_torch_zip,
    write_zip,
)
from tests.checkpoint.conftest import Assert, bits, read_bits


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("kept", torch.arange(2))
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) + self.kept.sum()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.tied = torch.nn.Linear(3, 3)
        self.tied.weight = self.blocks[0].linear.weight
        self.top = torch.nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tied(x) + self.top.sum()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_state_dict_reads_as_torch_loads_it(
    tmp_path: Path, assert_reads: Assert, zipped: bool, protocol: int
) -> None:
    path = tmp_path / "w.pt"
    torch.save(
        Model().state_dict(),
        path,
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    checkpoint = assert_reads(path, torch.load(path, weights_only=False))
    assert checkpoint.tensors["tied.weight"].alias_of == "blocks.0.linear.weight"


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_has_the_keys_of_its_state_dict(
    tmp_path: Path, assert_reads: Assert, zipped: bool
) -> None:
    path = tmp_path / "w.pt"
    torch.save(Model(), path, _use_new_zipfile_serialization=zipped)
    assert_reads(path, torch.load(path, weights_only=False).state_dict())


@pytest.mark.parametrize("nested", [True, False])
def test_a_whole_module_of_fx_has_the_keys_of_its_state_dict(
    tmp_path: Path, assert_reads: Assert, nested: bool
) -> None:
    traced: torch.nn.Module = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), traced) if nested else traced
    torch.save(model, tmp_path / "w.pt")
    assert_reads(tmp_path / "w.pt", torch.load(tmp_path / "w.pt", weights_only=False).state_dict())


class OwnState(torch.nn.Linear):
    def __getstate__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return {"weight": self.weight}, 1

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        raise AssertionError


def test_a_module_that_pickles_itself_in_its_own_way_is_not_left_out(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), OwnState(2, 2))
    torch.save(model, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        assert list(checkpoint.tensors) == ["0.weight", '1[state][0]["weight"]', "1[state][1]"]


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_has_the_keys_of_its_state_dict(
    tmp_path: Path, assert_reads: Assert, how: str
) -> None:
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model = Model().eval()
        made = (
            torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(4, 3))
        )
        torch.jit.save(made, path)
        expected = torch.jit.load(path).state_dict()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "TorchScript"
        found = {key: read_bits(checkpoint, key) for key in checkpoint.tensors}
    assert found == {key: bits(value) for key, value in expected.items()}
    if how == "script":
        assert list(found) == list(expected)


@pytest.mark.filterwarnings("ignore")
def test_what_holds_no_state_dict_says_what_it_is(tmp_path: Path) -> None:
    model, path = Model().eval(), tmp_path / "w"
    torch.export.save(torch.export.export(model, (torch.ones(4, 3),)), path.with_suffix(".pt2"))
    with torch.package.PackageExporter(path.with_suffix(".pkg")) as exporter:
        exporter.save_pickle("model", "w.pkl", {"w": torch.ones(1)})
    torch.jit.save(torch.jit.freeze(torch.jit.script(model)), path.with_suffix(".pt"))
    for suffix, match in [
        (".pt2", "archive of torch.export"),
        (".pkg", "archive of torch.package"),
        (".pt", "holds no tensors\nnext: TorchScript that is frozen"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(path.with_suffix(suffix))


def test_a_big_endian_zip_reads_as_torch_loads_it(tmp_path: Path, assert_reads: Assert) -> None:
    path = write_torch_zip(
        tmp_path / "w.pt",
        named(
            w=tensor(),
            c=tensor((2,), (1,), of=storage("1", 2, "ComplexFloatStorage")),
            t=tensor((2, 2), (1, 2)),
        ),
        {"0": struct.pack(">4f", 1, 2, 3, 4), "1": struct.pack(">4f", 5, 6, 7, 8)},
        byteorder=b"big",
    )
    expected = torch.load(path)
    assert expected["c"].tolist() == [5 + 6j, 7 + 8j]
    assert_reads(path, expected)


def test_a_legacy_file_is_little_endian_whatever_it_says(
    tmp_path: Path, assert_reads: Assert
) -> None:
    """torch.save swapped the bytes on big-endian machines, and torch.load never looks."""
    body = named(w=tensor(of=storage()[:-2] + b"NtQ"))  # legacy ids end with a view, or None
    path = write_torch_legacy(tmp_path / "w.pt", body, little_endian=False)
    assert_reads(path, torch.load(path))


def test_legacy_views_of_a_storage_start_where_they_say(tmp_path: Path) -> None:
    view = sequence(string("view"), integer(1), integer(2))
    part = storage()[:-2] + view + b"tQ"
    body = named(w=tensor(), v=tensor((2,), (1,), of=part))
    path = write_torch_legacy(tmp_path / "w.pt", body)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["v"].array().tolist() == [2, 3]
    wrong = storage()[:-2] + sequence(string("view"), integer(3), integer(2)) + b"tQ"
    path = write_torch_legacy(tmp_path / "w.pt", named(v=tensor((1,), (1,), of=wrong)))
    with pytest.raises(CheckpointError, match="view outside"):
        open_checkpoint(path)


def test_a_zip_compressed_afterwards_reads_the_same(tmp_path: Path, assert_reads: Assert) -> None:
    state = {f"layer.{n}.weight": torch.full((7,), float(n)) for n in range(1500)}
    torch.save(state, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    path = write_zip(tmp_path / "z.pt", entries, compression=zipfile.ZIP_DEFLATED)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open_checkpoint(path) as checkpoint:
        assert [float(tensor.array()[6]) for tensor in checkpoint.tensors.values()] == [
            *range(1500)
        ]
        # One temporary file for all of them, or a large model would run out of open files.
        assert len(list(Path("/proc/self/fd").iterdir())) < before + 9
    assert_reads(path, torch.load(tmp_path / "w.pt"))


@pytest.mark.parametrize("cut", [0.05, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: float, zipped: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save(Model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("body", "options", "match"),
    [
        (named(w=tensor()), {"keys": b"]"}, "does not hold the storage"),
        (named(w=tensor()), {"keys": b"N"}, "no list"),
        (named(w=tensor()), {"keys": b"](]]e"}, "that no tensor names"),
        (named(w=tensor()), {"keys": b"](X\x01\x00\x00\x000X\x01\x00\x00\x000e"}, "or twice"),
        (named(w=tensor()), {"itemsize": 2}, "8 elements"),
        (named(w=tensor()), {"storages": {"0": bytes(16), "9": b""}}, "that no tensor names"),
    ],
)
def test_a_legacy_file_must_hold_its_storages(
    tmp_path: Path, body: bytes, options: dict[str, object], match: str
) -> None:
    path = write_torch_legacy(tmp_path / "w.pt", body, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(path)


def test_bytes_after_a_legacy_file_are_refused(tmp_path: Path) -> None:
    path = write_torch_legacy(tmp_path / "w.pt", named(w=tensor()))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="1 bytes after"):
        open_checkpoint(path)


def test_a_plain_pickle_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": [1, 2]}))
    with pytest.raises(CheckpointError, match="plain pickle") as caught:
        open_checkpoint(tmp_path / "w.pkl")
    assert caught.value.hint


def test_an_unknown_byte_order_is_refused(tmp_path: Path) -> None:
    path = write_torch_zip(tmp_path / "w.pt", named(w=tensor()), byteorder=b"middle")
    with pytest.raises(CheckpointError, match="middle"):
        open_checkpoint(path)


def test_python_2_names_and_numbers_read(tmp_path: Path) -> None:
    body = b"}(U\x01wI7\n" + string("t") + tensor() + b"S'x'\nL5L\nVabc\nF1.5\nu"
    path = write_torch_legacy(tmp_path / "w.pt", body)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["w", "t", "x", "abc"]
        values = (bytes(checkpoint.tensors[key].array()) for key in ("w", "x", "abc"))
        assert list(values) == [b"7", b"5", b"1.5"]


def test_a_state_dict_that_is_an_unknown_class_with_items_reads(tmp_path: Path) -> None:
    body = reference("my.code", "MyDict") + b")R(" + string("w") + tensor() + b"u"
    path = write_torch_zip(tmp_path / "w.pt", named(state_dict=body))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]


def test_a_package_of_compiled_code_is_named_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("net/archive_format", "pt2")
        package.writestr("net/data/aotinductor/model/net.so", b"\x7fELF")
    with pytest.raises(CheckpointError, match="a package of AOTInductor, which holds compiled"):
        open_checkpoint(path)
