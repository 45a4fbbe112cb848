"""safetensors files, whole and in shards, read as the library reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.keys import format_key
from harness.errors import CheckpointError
from tests.checkpoint.builders import write_safetensors
from tests.checkpoint.conftest import Assert
from tests.checkpoint.test_tensors import every_bit

NAMES = [d.name for d in DTYPES.values() if d.safetensors and hasattr(torch, d.name)]


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_reads_as_safe_open_reads_it(
    tmp_path: Path, assert_reads: Assert, name: str
) -> None:
    path = tmp_path / "w.safetensors"
    try:
        save_file({"w": every_bit(getattr(torch, name))}, path)
    except (KeyError, ValueError, TypeError) as error:
        pytest.skip(f"the library itself cannot save it: {error}")
    with safe_open(path, "pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert_reads(path, expected)


def test_most_dtypes_are_within_reach_of_the_library() -> None:
    assert {"float32", "bfloat16", "float8_e4m3fn", "complex64", "uint16", "bool"} <= set(NAMES)


@pytest.mark.parametrize("padding", range(0, 264, 8))
def test_a_header_of_any_length_reads(tmp_path: Path, padding: int) -> None:
    """The length comes first: 128 is a pickle's start, 19280 a zip's, 31520 that of an index."""
    row = {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header = json.dumps(row).encode()
    path = write_safetensors(tmp_path / "w.st", header + b" " * (padding + -len(header) % 8), b"x")
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    for length in (0x4B50, 0x7B20, 0x7B):
        path = write_safetensors(path, header + b" " * (length - len(header)), b"x")
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint.tensors) == ["w"]


def row(start: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def text(**rows: Any) -> bytes:
    return json.dumps(rows).encode()


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (text(w=row(0, 8, [8])), b"1234"),
        (text(w=row(0, 4, [4])), b"12345678"),
        (text(w=row(0, 4, [4]), v=row(2, 6, [4])), b"123456"),
        (text(w=row(0, 4, [4]), v=row(6, 8, [2])), b"12345678"),
        (text(w=row(0, 4, [5])), b"1234"),
        (text(w=row(4, 0, [4])), b"1234"),
        (text(w=row(0, 4, [1 << 62, 4])), b"1234"),
        (text(w=row(0, 0, [1 << 32, 1 << 32, 0])), b""),
        (text(w=row(0, 0, [0])).replace(b"[0]", b"[-0]"), b""),
        (text(w=row(0, 4, [4])).replace(b'"w"', rb'"\ud800"'), b"1234"),
        (text(w=row(0, 1, [1])).replace(b"[1]", b"[true]"), b"1"),
        (b'{"__metadata__":{"a":1},' + text(w=row(0, 4, [4]))[1:], b"1234"),
        (text(w=row(0, 4, [4], "F128")), b"1234"),
        (text(w=row(0, 3, [2, 3], "F4")), b"123"),
        (b'{"w":%s,"w":%s}' % ((json.dumps(row(0, 4, [4])).encode(),) * 2), b"1234"),
        (b'{"__metadata__":{"a":"1","a":"2"},' + text(w=row(0, 4, [4]))[1:], b"1234"),
        (b"{}", b""),
        (b"{" + b"[" * 1000, b""),
        (b'{"w": 1}', b""),
        (b'{"w"\xff: 1}', b""),
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, header: bytes, data: bytes
) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64])
ODD = st.sampled_from(["-0", "-1", "1.0", "1e0", "true", "null", '"1"', "NaN", "[1]", "01", ""])
NAME = st.sampled_from(["w", "v", "x.y", "\\ud800", "\\u00e9"])
METADATA = ["null", "{}", '{"a":"b"}', '{"a":1}', "[]", "7"]
DTYPE = st.sampled_from(["U8", "F32", "F4", "BOOL", "I64", "F8_E4M3", "C64", "f32", ""])


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header, sound or nearly so, and how many bytes follow it."""
    rows, at = [], 0
    for name in draw(st.lists(NAME, max_size=4)):
        size = draw(st.integers(0, 4))
        shape = [str(n) for n in draw(st.permutations([1, size])) if n != 1 or draw(st.booleans())]
        if draw(st.integers(0, 9)) == 0:
            shape.insert(0, draw(SIZES.map(str) | ODD))
        first, last = str(at), str(at + size)
        if draw(st.integers(0, 9)) == 0:
            first, last = draw(st.permutations([first, draw(SIZES.map(str) | ODD)]))
        offsets = [first, last] + ["9"] * (draw(st.integers(0, 30)) == 0)
        dtype = draw(DTYPE) if draw(st.integers(0, 9)) == 0 else "U8"
        fields = [
            f'"dtype":"{dtype}"',
            f'"shape":[{",".join(shape)}]',
            f'"data_offsets":[{", ".join(offsets)}]',
        ]
        if draw(st.integers(0, 9)) == 0:
            fields[draw(st.integers(0, 2))] = draw(st.sampled_from(['"x":[{}]', *fields]))
        rows.append(f'"{name}":{{{",".join(draw(st.permutations(fields)))}}}')
        at += size
    metadata = [f'"__metadata__":{value}' for value in METADATA]
    if draw(st.booleans()):
        rows.insert(draw(st.integers(0, len(rows))), draw(st.sampled_from(metadata)))
    text = bytearray(f"{{{','.join(draw(st.permutations(rows)))}}}", "utf-8")
    text += b" " * draw(st.integers(0, 2))
    if draw(st.integers(0, 5)) == 0:
        text[draw(st.integers(1, len(text) - 1))] = draw(st.sampled_from(b'\0 \xff"{}[],:'))
    return bytes(text), max(0, at + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


@settings(max_examples=300)
@given(headers())
def test_what_the_library_refuses_is_refused_and_nothing_else_but_what_torch_lacks(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[bytes, int]
) -> None:
    header, nbytes = file
    data = struct.pack("<Q", len(header)) + header + bytes(nbytes)
    try:
        expected = {format_key((name,)) for name, _ in deserialize(data)}
    except SafetensorError:
        expected = None
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        with open_checkpoint(path) as checkpoint:
            found, why = set(checkpoint.tensors), ""
    except CheckpointError as error:
        found, why = None, str(error)
    own = ("twice", "lacks", "no tensors", "float4", "impossible")
    assert found == expected or (found is None and any(word in why for word in own)), why


def shards(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    state = {f"layer.{n}.weight": torch.full((3, n + 1), float(n)) for n in range(4)}
    suffix = "safetensors" if kind == "safetensors" else "bin"
    table = {}
    for part in range(2):
        rows = {key: value for n, (key, value) in enumerate(state.items()) if n % 2 == part}
        name = f"model-{part}.{suffix}"
        if kind == "safetensors":
            save_file(rows, folder / name)
        else:
            torch.save(rows, folder / name)
        table |= dict.fromkeys(rows, name)
    base = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    ordered = {key: table[key] for key in state}
    index = {"metadata": {"total_size": 1}, "weight_map": ordered}
    (folder / f"{base}.index.json").write_text(json.dumps(index))
    return state


def index_of(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_joined_by_their_index_or_their_folder(
    tmp_path: Path, assert_reads: Assert, kind: str
) -> None:
    expected = shards(tmp_path, kind)
    assert_reads(index_of(tmp_path), expected)
    assert_reads(tmp_path, expected)


def test_tied_tensors_of_a_shard_are_aliases_in_the_order_of_the_index(tmp_path: Path) -> None:
    weight = torch.ones(3)
    torch.save({"b": weight, "a": weight}, tmp_path / "part.bin")
    index = {"weight_map": {"a": "part.bin", "b": "part.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        aliases = {key: tensor.alias_of for key, tensor in checkpoint.tensors.items()}
    assert aliases == {"a": None, "b": "a"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda table: table | {"new": "model-0.safetensors"}, "does not hold it"),
        (lambda table: table | {"new": "model-9.safetensors"}, "missing"),
        (lambda table: table | {"new": "../model-0.safetensors"}, "no file beside it"),
        (lambda table: table | {"new": "/etc/passwd"}, "no file beside it"),
        (lambda table: table | {"new": ".."}, "no file beside it"),
        (lambda table: table | {"new": "x" * 5000}, "missing"),
        (lambda table: table | {"new": "nul\0"}, "missing"),
        (lambda table: table | {"new": "\ud800"}, "missing"),
        (lambda table: table | {"new": 7}, "no file beside it"),
        (lambda table: table | {"new": "model.safetensors.index.json"}, "not a checkpoint"),
        (lambda table: dict(list(table.items())[1:]), "does not list"),
        (lambda table: {}, "no weight_map"),
        (lambda table: [table], "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, change: Any, match: str
) -> None:
    shards(tmp_path, "safetensors")
    path = index_of(tmp_path)
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": change(index["weight_map"])}))
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_a_key_that_stands_twice_in_an_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.index.json"
    path.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(path)


def test_files_are_closed_after_errors_and_after_reading(tmp_path: Path) -> None:
    shards(tmp_path, "safetensors")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with open_checkpoint(tmp_path) as checkpoint:
            checkpoint.tensors["layer.0.weight"].array()
    (tmp_path / "model-1.safetensors").write_bytes(b"broken")
    for _ in range(3):
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
