"""The golden file: a fingerprint in one safetensors file, small enough for git.

In: a `Golden` (a fingerprint, where it came from, its history). Out: bytes that depend on nothing
else, written atomically; to a URL as one whole object. Refused: overwriting without being told to,
files that are no goldens, goldens of a newer schema, columns that do not fit the table of tensors.

Its arrays are those of `harness.columns`. The metadata has one entry, `harness`: canonical JSON,
see `_describe`. safetensors writes several entries in random order, which would make equal goldens
differ.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.formats.safetensors import is_safetensors, read_safetensors
from harness.checkpoint.sources.access import open_source
from harness.checkpoint.sources.paths import AnyPath, Location, is_there, to_path
from harness.checkpoint.sources.source import read
from harness.checkpoint.tensors import Tensor
from harness.errors import CheckpointError, GoldenError
from harness.fingerprints.fingerprint import Fingerprint
from harness.fingerprints.residues import BITS, BLOCK_NUMEL, DEFAULT_TOLERANCE
from harness.fingerprints.sketch import NUM_PROJECTIONS, SEED
from harness.golden.atomic import write_whole
from harness.golden.columns import Columns, columns_of, rows_of, seal_of
from harness.golden.golden import SUFFIX, Golden, LiveRecord, Update, real_path, without_paths
from harness.streaming.chunks import CHUNK_NBYTES
from harness.text.shell import quoted

Array = np.ndarray[Any, np.dtype[Any]]

SCHEMA = 3  # 2, which is read too, has no residues; in 1, P is of float64 and is not named
_LFS = b"version https://git-lfs"
_RESTORE = "restore it from version control, or remove it and record it again"
_NOT_A_GOLDEN = "give the golden with -g, and the checkpoint without"


def write_golden(golden: Golden, *, overwrite: bool = False) -> bool:
    """Write a golden atomically; returns False where the same bytes are there already.

    Raises GoldenError where another golden is there and `overwrite` is not given.
    """
    path = golden.path
    data = serialize(golden)
    try:
        if path.exists():
            if _holds(path, data):
                return False
            if not overwrite:
                raise _is_recorded(path)
            check_is_golden(path)
        if isinstance(path, Path):
            path = real_path(path)  # a link stays one
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _put(path, data, overwrite=overwrite)
        except FileExistsError as error:  # written by somebody else in between
            raise _is_recorded(golden.path) from error
    except OSError as error:
        raise GoldenError(
            f"{golden.path}: cannot be written: {error.strerror}",
            hint="check the folder's permissions, and free space",
        ) from error
    return True


def _holds(path: AnyPath, data: bytes) -> bool:
    with contextlib.closing(open_source(path)) as source:
        return source.nbytes == len(data) and bytes(source.view(0, len(data))) == data


def _put(path: AnyPath, data: bytes, *, overwrite: bool) -> None:
    """Write a whole file; raises FileExistsError where another process has been faster."""
    if isinstance(path, Path):
        return write_whole(path, data, overwrite=overwrite)
    try:
        path.write_bytes(data, overwrite=overwrite)
    except CheckpointError as error:
        raise GoldenError(str(error), hint=error.hint) from error


def _is_recorded(path: AnyPath) -> GoldenError:
    return GoldenError(
        f"{path}: a golden is recorded there already",
        hint=f"to replace it: harness verify CKPT -g {quoted(str(path))} --update-golden",
    )


def check_unchanged(before: Golden, after: Golden) -> None:
    """Raise GoldenError where a golden is no longer what was read, and `after` would undo that."""
    if not is_there(before.path):
        return
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
            f"{path}: is there, and is not a golden",
            hint="give another file with -g, or remove it",
        )


def serialize(golden: Golden) -> bytes:
    """The bytes of a golden file: the same for the same golden, always."""
    from safetensors.numpy import save

    columns = columns_of(golden.parts)
    description = json.dumps(_describe(golden), sort_keys=True, separators=(",", ":"))
    seal = np.frombuffer(seal_of(description, columns), "|u1")
    return save({**columns, "seal": seal}, metadata={"harness": description})


def _describe(golden: Golden) -> dict[str, Any]:
    found = golden.fingerprint
    return {
        "schema": SCHEMA,
        "made": {
            "digest": "blake3",
            "chunk_nbytes": CHUNK_NBYTES,
            "sketch": {
                "projections": NUM_PROJECTIONS,
                "seed": SEED,
                **_describe_sketches(found),
            },
            "residues": {"bits": BITS, "block_numel": BLOCK_NUMEL},
        },
        "source": {
            "path": golden.source,
            "container": found.container,
            "section": golden.section,
            "keeps_aliases": found.keeps_aliases,
        },
        "root": found.root.hex(),
        "tensors": rows_of(found),
        "config": without_paths(found.config),
        "history": [{"root": update.root, "reason": update.reason} for update in golden.history],
        "live": None if golden.live is None else _describe_live(golden.live),
    }


def _describe_sketches(part: Fingerprint) -> dict[str, Any]:
    atol, rtol = part.tolerance
    return {
        "block_nbytes": part.block_nbytes,
        "matrix": part.matrix,
        "tolerance": {"atol": atol, "rtol": rtol},
    }


def _tolerance(described: Mapping[str, Any]) -> tuple[float, float]:
    if "tolerance" not in described:
        return DEFAULT_TOLERANCE
    atol, rtol = (float(described["tolerance"][name]) for name in ("atol", "rtol"))
    if not (0 <= atol < math.inf and 0 <= rtol < math.inf):
        raise ValueError(f"a tolerance of {atol}, {rtol}")
    return atol, rtol


def _how_sketched(schema: int, described: Mapping[str, Any]) -> tuple[int, Any]:
    matrix = "float64" if schema == 1 else described["matrix"]
    return int(described["block_nbytes"]), matrix


def _describe_live(live: LiveRecord) -> dict[str, Any]:
    return {
        "target": live.target,
        "stages": list(live.stages),
        "config": live.config,
        "inputs": live.inputs,
        "parameters": [list(parameter) for parameter in live.parameters],
        **{
            name: None if part is None else {**_describe_sketches(part), "tensors": rows_of(part)}
            for name, part in (("buffers", live.buffers), ("outputs", live.outputs))
        },
    }


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
    """Read a golden of any schema that was ever released; raises GoldenError."""
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
            columns, metadata = read_safetensors(path, source)
            return _parse(path, {c.key: c for c in columns}, metadata)
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


def _parse(path: AnyPath, columns: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Golden:
    if "harness" not in metadata:
        raise GoldenError(
            f"{path}: a safetensors file, but not a golden",
            hint=_NOT_A_GOLDEN,
        )
    try:
        header = json.loads(metadata["harness"])
        schema = header["schema"]
        if schema not in (1, 2, SCHEMA):
            raise GoldenError(
                f"{path}: a golden of schema {schema}, but this version reads up to {SCHEMA}",
                hint="upgrade: pip install --upgrade checkpoint-harness",
            )
        made, source = header["made"], header["source"]
        block_nbytes, matrix = _how_sketched(schema, made["sketch"])
        tolerance = _tolerance(made["sketch"])
        fixed = (made["digest"], made["chunk_nbytes"], made["sketch"]["seed"])
        if fixed != ("blake3", CHUNK_NBYTES, SEED) or not 0 < block_nbytes <= CHUNK_NBYTES:
            raise GoldenError(
                f"{path}: made in a way that this version does not know: {made}",
                hint=_RESTORE,
            )
        reader = Columns(columns)
        reader.check_seal(metadata["harness"])
        fingerprint = Fingerprint(
            name=str(path),
            container=source["container"],
            section=source["section"] or "",
            keeps_aliases=source["keeps_aliases"],
            tensors=dict(
                reader.prints("value", header["tensors"], block_nbytes, matrix, tolerance)
            ),
            block_nbytes=block_nbytes,
            tolerance=tolerance,
            config=header["config"],
        )
        if fingerprint.root.hex() != header["root"]:
            raise GoldenError(
                f"{path}: its digests make the root {fingerprint.root.hex()[:16]}…, but it says "
                f"{header['root'][:16]}…",
                hint="the golden was changed by hand: restore it from version control",
            )
        live = _parse_live(reader, schema, header.get("live"))
        reader.check_used_up()
        return Golden(
            path=path,
            fingerprint=fingerprint,
            source=source["path"],
            section=source["section"],
            history=tuple(Update(root=h["root"], reason=h["reason"]) for h in header["history"]),
            live=live,
        )
    except (
        *(KeyError, IndexError, AttributeError, TypeError),
        *(ValueError, OverflowError, RecursionError),
    ) as error:
        raise GoldenError(
            f"{path}: a damaged golden ({type(error).__name__}: {error})",
            hint=_RESTORE,
        ) from error


def _parse_live(reader: Columns, schema: int, described: Any) -> LiveRecord | None:
    if described is None:
        return None

    def part(name: str) -> Fingerprint | None:
        table = described[name]
        if table is None:
            return None
        block_nbytes, matrix = _how_sketched(schema, table)
        tolerance = _tolerance(table)
        return Fingerprint(
            name=name,
            container=f"live {name}",
            section="",
            tensors=dict(reader.prints(name, table["tensors"], block_nbytes, matrix, tolerance)),
            keeps_aliases=False,
            block_nbytes=block_nbytes,
            tolerance=tolerance,
        )

    return LiveRecord(
        target=described["target"],
        stages=tuple(described["stages"]),
        config=described["config"],
        inputs=described["inputs"],
        parameters=tuple((str(name), bool(grad)) for name, grad in described["parameters"]),
        buffers=part("buffers"),
        outputs=part("outputs"),
    )
