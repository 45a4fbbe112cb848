"""Files that torch and NeMo would not write: pickles opcode by opcode, archives entry by entry."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


# Pickles, by protocol 2's opcodes: every function returns the bytes that push one value.


def string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def integers(values: Iterable[int]) -> bytes:
    return sequence(*(integer(value) for value in values))


def listing(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def mapping(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def named(**values: bytes) -> bytes:
    return mapping(*((string(name), value) for name, value in values.items()))


def reference(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + sequence(*args) + b"R"


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    return (
        sequence(
            string("storage"), reference("torch", kind), string(key), string("cpu"), integer(numel)
        )
        + b"Q"
    )


def tensor(
    size: Iterable[int] = (2, 2),
    stride: Iterable[int] = (2, 1),
    *,
    offset: int = 0,
    of: bytes | None = None,
) -> bytes:
    """A float32 tensor; its storage holds four elements unless `of` says otherwise."""
    return call(
        reference("torch._utils", "_rebuild_tensor_v2"),
        storage() if of is None else of,
        integer(offset),
        integers(size),
        integers(stride),
        b"\x89",
        call(reference("collections", "OrderedDict")),
    )


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


# Files


def write_zip(
    path: Path, entries: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def write_torch_zip(
    path: Path,
    body: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A file as torch.save writes it, around the object that the opcodes `body` push."""
    data = {"0": FOUR_FLOATS} if storages is None else storages
    entries = {
        "archive/data.pkl": pickled(body),
        "archive/byteorder": byteorder,
        **{f"archive/data/{key}": value for key, value in data.items()},
        "archive/version": b"3\n",
    }
    return write_zip(path, entries, compression=compression)


def write_torch_legacy(
    path: Path,
    body: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    itemsize: int = 4,
    little_endian: bool = True,
    keys: bytes | None = None,
) -> Path:
    """A file as torch.save wrote it before 1.6."""
    data = {"0": FOUR_FLOATS} if storages is None else storages
    listed = listing(*(string(key) for key in data)) if keys is None else keys
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    parts = [pickle.dumps(value, 2) for value in (LEGACY_MAGIC, 1001, system)]
    parts += [pickled(body), pickled(listed)]
    parts += [struct.pack("<q", len(value) // itemsize) + value for value in data.values()]
    path.write_bytes(b"".join(parts))
    return path


def write_tar(
    path: Path,
    members: Iterable[tuple[str | tarfile.TarInfo, bytes]],
    *,
    form: int = tarfile.PAX_FORMAT,
    gzip: bool = False,
) -> Path:
    mode = "w:gz" if gzip else "w:"
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.writelines((struct.pack("<Q", len(header)), header, data))
    return path
