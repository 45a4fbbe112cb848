"""The golden file: a fingerprint in one safetensors file, small enough for git.

In: a `Golden` (a fingerprint, where it came from, its history). Out: bytes that depend on nothing
else, written atomically; to a URL as one whole object. Refused: overwriting without being told to,
files that are no goldens, goldens of another schema, columns that do not fit the tensors.

Its arrays are those of `harness.golden.columns`, the column `contents`, which says whose they are,
and the `seal` over all of them. The metadata has one entry, `harness`: safetensors writes several
in random order, which would make equal goldens differ. Both texts are of `harness.golden.header`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.checkpoint.formats.safetensors import is_safetensors, read_safetensors
from harness.checkpoint.limits import MAX_HEADER_NBYTES
from harness.checkpoint.sources.access import open_source
from harness.checkpoint.sources.paths import AnyPath, Location, to_path
from harness.checkpoint.sources.source import read
from harness.errors import CheckpointError, GoldenError
from harness.fingerprints.fingerprint import Fingerprint
from harness.golden.atomic import locked, write_whole
from harness.golden.columns import Pieces, one_piece, pieces_of, rows_of, seal_of, tensors_of
from harness.golden.golden import SUFFIX, Golden, LiveRecord, PartName, real_path
from harness.golden.header import (
    SCHEMA,
    Contents,
    Header,
    Live,
    Made,
    Origin,
    Part,
    Versioned,
    from_json,
    to_json,
)
from harness.streaming.chunks import chunks
from harness.text.disclosure import disclosed
from harness.text.shell import quoted

_LFS = b"version https://git-lfs"
_RESTORE = "restore it from version control, or remove it and record it again"
_NOT_A_GOLDEN = "give the golden with -g, and the checkpoint without"


def write_golden(golden: Golden, *, overwrite: bool = False) -> bool:
    """Write a golden atomically; returns False where the same bytes are there already.

    Raises GoldenError where another golden is there and `overwrite` is not given.
    """
    data = serialize(golden)
    with _writing(golden) as path:
        return _write(golden, path, data, overwrite=overwrite)


def replace_golden(before: Golden, after: Golden) -> bool:
    """Write a golden in the place of the one that was read; returns False where nothing changes.

    Reading what is there, comparing and writing is one step: of two updates at a time the second
    raises GoldenError, for it would undo the first (but by URL, where nothing can be locked).
    """
    data = serialize(after)
    with _writing(after) as path:
        if path.exists():
            _check_unchanged(before, after)
        return _write(after, path, data, overwrite=True)


@contextlib.contextmanager
def _writing(golden: Golden) -> Iterator[AnyPath]:
    """The place to write to, alone; says what went wrong on the way there."""
    path = golden.path
    try:
        if not isinstance(path, Path):
            yield path
            return
        path = real_path(path)  # a link stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            yield path
    except OSError as error:
        raise GoldenError(
            f"{golden.path}: cannot be written: {error.strerror}",
            hint="check the folder's permissions, and free space",
        ) from error


def _write(golden: Golden, path: AnyPath, data: bytes | bytearray, *, overwrite: bool) -> bool:
    if path.exists():
        if _holds(path, data):
            return False
        if not overwrite:
            raise _is_recorded(golden.path)
        check_is_golden(golden.path)
    try:
        if isinstance(path, Path):
            write_whole(path, data, overwrite=overwrite)
        else:
            path.write_bytes(bytes(data), overwrite=overwrite)
    except FileExistsError as error:  # written by somebody else in between
        raise _is_recorded(golden.path) from error
    except CheckpointError as error:
        raise GoldenError(str(error), hint=error.hint) from error
    return True


def _holds(path: AnyPath, data: bytes | bytearray) -> bool:
    with contextlib.closing(open_source(path)) as source:
        return source.nbytes == len(data) and all(
            read(source, part.start, part.nbytes) == data[part.start : part.start + part.nbytes]
            for part in chunks(len(data))
        )


def _is_recorded(path: AnyPath) -> GoldenError:
    return GoldenError(
        f"{path}: a golden is recorded there already",
        hint=f"to replace it: harness verify CKPT -g {quoted(str(path))} --update-golden",
    )


def _check_unchanged(before: Golden, after: Golden) -> None:
    """Raise GoldenError where a golden is no longer what was read, and `after` would undo that."""
    there = read_golden(before.path)
    known = [(golden.fingerprint.root, golden.history) for golden in (before, after)]
    if (there.fingerprint.root, there.history) not in known:
        raise GoldenError(
            f"{before.path}: was updated by another process since it was read: its root was "
            f"{before.fingerprint.root.hex()[:16]}, and is {there.fingerprint.root.hex()[:16]}",
            hint=f"see what it holds now: harness show {quoted(str(before.path))}",
        )


def check_is_golden(path: AnyPath) -> None:
    """Raise GoldenError for a file that is neither a golden, whole or damaged, nor empty."""
    with contextlib.closing(open_source(path)) as source:
        is_empty = source.nbytes == 0
    if not is_empty and not is_golden(path):
        raise GoldenError(
            f"{path}: exists, and is not a golden", hint="give another file with -g, or remove it"
        )


def serialize(golden: Golden) -> bytearray:
    """The bytes of a golden file: the same for the same golden, always.

    Memory: the file, beside the golden.
    """
    header = to_json(_header(golden))
    if len(header) > MAX_HEADER_NBYTES // 4:  # in the file it is escaped once more
        raise GoldenError(
            f"{golden.path}: its header would take {len(header):,} bytes, and "
            f"{MAX_HEADER_NBYTES // 4:,} is the most that is read; its history has "
            f"{len(golden.history):,} entries",
            hint="record it again with --overwrite, which starts a new history",
        )
    contents = np.frombuffer(to_json(_contents(golden)).encode(), "|u1")
    pieces = pieces_of(golden.parts)
    pieces |= {"contents": one_piece(contents), "seal": one_piece(np.zeros(32, "|u1"))}
    data, columns = _joined(pieces, header)
    seal = columns.pop("seal")
    seal[:] = np.frombuffer(seal_of(header, columns), "|u1")
    return data


def _joined(pieces: Mapping[str, Pieces], header: str) -> tuple[bytearray, dict[str, NDArray[Any]]]:
    """A safetensors file as the library writes it, and its arrays, which are parts of it.

    The library would hold it three times.
    """
    shapes = {name: (of.num_rows(), *of.shape) for name, of in pieces.items()}
    entries: dict[str, Any] = {"__metadata__": {"harness": header}}
    starts, end = {}, 0
    for name in sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name)):
        dtype, shape = pieces[name].dtype, shapes[name]
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": {"float64": "F64", "uint8": "U8"}[dtype.name],
            "shape": shape,
            "data_offsets": (starts[name], end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = bytearray(8 + len(text) + end)
    data[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    columns = {}
    for name, of in pieces.items():
        start, count = 8 + len(text) + starts[name], math.prod(shapes[name])
        columns[name] = np.frombuffer(data, of.dtype, count, start).reshape(shapes[name])
        of.fill(columns[name])
    return data, columns


def _header(golden: Golden) -> Header:
    return Header(
        schema=SCHEMA,
        made=Made(),
        source=Origin(path=golden.source, section=golden.section),
        root=golden.fingerprint.root.hex(),
        parts=msgspec.convert(golden.parts, dict[PartName, Part], from_attributes=True),
        history=golden.history,
        live=None
        if golden.live is None
        else msgspec.convert(golden.live, Live, from_attributes=True),
    )


def _contents(golden: Golden) -> Contents:
    return Contents(
        parts={name: rows_of(part) for name, part in golden.parts.items()},
        parameters=golden.live.parameters if golden.live else (),
        config=disclosed(golden.fingerprint.config),
        members=dict(golden.fingerprint.members),
    )


def is_golden(path: AnyPath) -> bool:
    """Whether a file is a golden, by its content; False for a folder, and what cannot be read.

    For a URL that cannot be read raises CheckpointError: no question about it has an answer.
    """
    if not isinstance(path, Path) and path.is_dir():
        return False
    try:
        with contextlib.closing(open_source(path)) as source:
            head = read(source, 0, min(265, source.nbytes))
            # The metadata come first in the header as safetensors writes it.
            return is_safetensors(head, source.nbytes) and b'"__metadata__":{"harness":' in head[8:]
    except CheckpointError:
        if isinstance(path, Path):
            return False
        raise


def read_golden(path: Location) -> Golden:
    """Read a golden of this version's schema, whole; raises GoldenError."""
    path, opened = to_path(path), False
    try:
        _refuse_no_file(path)
        with contextlib.closing(open_source(path)) as source:
            head = read(source, 0, min(len(_LFS), source.nbytes))
            if head == _LFS:
                raise GoldenError(
                    f"{path}: a Git LFS pointer, not the golden itself", hint="git lfs pull"
                )
            if not is_safetensors(head, source.nbytes):
                what = "no safetensors file" if source.nbytes else "an empty file"
                raise GoldenError(
                    f"{path}: not a golden ({what})",
                    # By its name it is meant to be one.
                    hint=_RESTORE if path.name.endswith(SUFFIX) else _NOT_A_GOLDEN,
                )
            opened = True
            tensors, metadata = read_safetensors(source)
            if "harness" not in metadata:
                raise GoldenError(
                    f"{path}: a safetensors file, but not a golden", hint=_NOT_A_GOLDEN
                )
            # Copies: the file may be overwritten in place while the golden is in use.
            columns = {tensor.key: tensor.array() for tensor in tensors}
            return _parse(path, columns, metadata["harness"])
    except CheckpointError as error:
        raise GoldenError(str(error), hint=_RESTORE if opened else error.hint) from error
    except OSError as error:
        raise GoldenError(
            f"{path}: {(error.strerror or 'cannot be read').lower()}",
            hint="check the path and its permissions",
        ) from error


def _refuse_no_file(path: AnyPath) -> None:
    """Say what is at a path that is no file; may raise OSError."""
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}")) if isinstance(path, Path) else []
        inside = next((p for p in files if is_golden(p)), None)
        raise GoldenError(
            f"{path}: a folder, not a golden",
            hint=f"-g {quoted(str(inside or path / f'NAME{SUFFIX}'))}",
        )
    if not path.is_file():
        close = similar_golden(path)
        raise GoldenError(
            f"{path}: no golden there",
            hint=f"did you mean -g {quoted(str(close))}?"
            if close
            else f"harness record CKPT -g {quoted(str(path))}",
        )


def similar_golden(path: AnyPath) -> Path | None:
    """A golden beside the place, with a name much like it; None by URL."""
    if not isinstance(path, Path):
        return None
    from difflib import get_close_matches

    # Without the suffix, by which all of them are alike.
    beside = {other.stem: other for other in path.parent.glob(f"*{SUFFIX}")}
    close = get_close_matches(path.name.removesuffix(SUFFIX), sorted(beside))
    return next((beside[name] for name in close if is_golden(beside[name])), None)


def _damaged(path: AnyPath, error: Exception | str) -> GoldenError:
    return GoldenError(f"{path}: a damaged golden: {error}", hint=_RESTORE)


def _parse(path: AnyPath, columns: dict[str, NDArray[Any]], text: str) -> Golden:
    seal = columns.pop("seal", None)
    if seal is None or seal_of(text, columns) != seal.tobytes():
        raise _damaged(path, "its parts do not make its seal")
    try:
        schema = from_json(text, Versioned).schema
        if schema != SCHEMA:
            raise GoldenError(
                f"{path}: a golden of schema {schema}, but this version reads schema {SCHEMA}",
                hint="upgrade: pip install --upgrade checkpoint-harness, or record it again",
            )
        header = from_json(text, Header)
        if header.made != Made():
            raise ValueError(f"made with {header.made}")
        if "contents" not in columns:
            raise ValueError("it has no column contents")
        contents = from_json(columns["contents"].tobytes(), Contents)
        tensors = tensors_of(header.parts, contents.parts, columns)
        if "weights" not in header.parts:
            raise ValueError("it has no part 'weights'")
        parts = {
            name: Fingerprint(
                name=name, section="", tensors=tensors[name], **msgspec.structs.asdict(part)
            )
            for name, part in header.parts.items()
        }
    except (ValueError, OverflowError, RecursionError) as error:
        # It is what was written: until the first release the format may change.
        raise GoldenError(
            f"{path}: a golden of another version of the harness: {error}",
            hint=f"record it again: harness record CKPT -g {quoted(str(path))} --overwrite",
        ) from error
    weights, live = parts["weights"], header.live
    weights = replace(
        weights,
        name=str(path),
        section=header.source.section or "",
        config=contents.config,
        members=contents.members,
    )
    if weights.root.hex() != header.root:
        raise GoldenError(
            f"{path}: its digests make the root {weights.root.hex()[:16]}…, but it says "
            f"{header.root[:16]}…",
            hint="the golden was changed by hand: restore it from version control",
        )
    return Golden(
        path=path,
        fingerprint=weights,
        source=header.source.path,
        section=header.source.section,
        history=header.history,
        live=None
        if live is None
        else LiveRecord(
            **msgspec.structs.asdict(live),
            parameters=contents.parameters,
            buffers=parts.get("buffers"),
            outputs=parts.get("outputs"),
        ),
    )
