"""The golden file: a fingerprint in one safetensors file, small enough for git.

In: a `Golden` (a fingerprint, where it came from, its history). Out: bytes that depend on nothing
else, written atomically. Refused: overwriting without being told to, files that are no goldens,
goldens of a newer schema, columns that do not fit the table of tensors.

    digest      U8  [N, 32]      stats  F64 [N, 9]     one row per tensor (stats: NaN where none)
    sketch      F64 [M, 16]      block_norm F64 [M]    one row per block, tensors in table order
    value/KEY   the tensor's own dtype and shape (U8 where safetensors lacks the dtype)

The metadata has one entry, `harness`: canonical JSON, see `_describe`. safetensors writes several
entries in random order, which would make equal goldens differ.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from harness.checkpoint.safetensors import is_safetensors, read_safetensors
from harness.checkpoint.sources import FileSource, read
from harness.checkpoint.tensors import DTYPES, Tensor, format_key, numpy_dtype
from harness.errors import CheckpointError, GoldenError
from harness.fingerprint import Fingerprint, Stats, TensorPrint, block_numel
from harness.sketch import NUM_PROJECTIONS, SEED, Sketch, num_blocks
from harness.streaming import CHUNK_NBYTES

Array = np.ndarray[Any, np.dtype[Any]]

SCHEMA = 1
SUFFIX = ".safetensors"
_NUM_STATS = len(fields(Stats))
# What safetensors can write from numpy; everything else is stored as bytes.
_NATIVE = frozenset(
    {
        *("float64", "float32", "float16", "bfloat16", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One entry of a golden's history: the root that was replaced, and why."""

    root: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A fingerprint in a file.

    `source` is the checkpoint's path relative to the golden's folder, or its bare name where it
    lies outside of the project; `section` is what the user asked for, None for the state dict.
    """

    path: Path
    fingerprint: Fingerprint
    source: str
    section: str | None = None
    history: tuple[Update, ...] = ()

    @property
    def checkpoint(self) -> Path | None:
        """Where the recorded checkpoint should be, if the golden knows."""
        path = Path(os.path.normpath(self.path.parent / self.source))
        return path if "/" in self.source or path.exists() else None


def source_of(checkpoint: Path, golden: Path) -> str:
    """The checkpoint's path as a golden may keep it: never a path of this machine."""
    project = _project(golden)
    inside = checkpoint.resolve().is_relative_to(project)
    if not inside:
        return checkpoint.name
    relative = os.path.relpath(checkpoint.resolve(), golden.resolve().parent)
    return PurePosixPath(*Path(relative).parts).as_posix()


def _project(golden: Path) -> Path:
    folder = golden.resolve().parent
    for candidate in (folder, *folder.parents):
        if (candidate / ".git").exists() or (candidate / "pyproject.toml").exists():
            return candidate
    return folder.parent if folder.name == "golden" else folder


def write_golden(golden: Golden, *, overwrite: bool = False) -> bool:
    """Write a golden atomically; returns False where the same bytes are there already.

    Raises GoldenError where another golden is there and `overwrite` is not given.
    """
    path = golden.path
    data = serialize(golden)
    try:
        if path.exists():
            if path.read_bytes() == data:
                return False
            if not overwrite:
                raise GoldenError(
                    f"{path}: a golden is recorded there already",
                    hint=f"to replace it: harness verify CKPT -g {path} --update-golden",
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise GoldenError(
            f"{path}: cannot be written: {error.strerror}", hint="check the folder's permissions"
        ) from error
    return True


def _replace(path: Path, data: bytes) -> None:
    """Write beside the target without a name, then name it: a kill leaves no half-written file."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with contextlib.ExitStack() as stack:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        descriptor = -1
        if hasattr(os, "O_TMPFILE"):
            with contextlib.suppress(OSError):  # not every file system can
                descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        nameless = descriptor >= 0
        if not nameless:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        stack.callback(temporary.unlink, missing_ok=True)
        file = stack.enter_context(os.fdopen(descriptor, "wb"))
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if nameless:
            temporary.unlink(missing_ok=True)
            # With a directory's descriptor Python calls linkat, which follows the link in /proc.
            os.link(f"/proc/self/fd/{file.fileno()}", temporary.name, dst_dir_fd=folder)
        temporary.replace(path)
        os.fsync(folder)


def serialize(golden: Golden) -> bytes:
    """The bytes of a golden file: the same for the same golden, always."""
    from safetensors.numpy import save

    tensors = list(golden.fingerprint.tensors.values())
    originals = [tensor for tensor in tensors if tensor.alias_of is None]
    sketches = [t.sketch for t in originals if t.sketch is not None]
    digests = b"".join(tensor.digest or b"" for tensor in tensors)
    if len(digests) != 32 * len(tensors):
        raise ValueError("a golden needs a digest of every tensor")
    nothing = (float("nan"),) * _NUM_STATS
    stats = np.array([astuple(t.stats) if t.stats else nothing for t in tensors], "<f8")
    rows = np.concatenate([np.empty((0, NUM_PROJECTIONS)), *(s.projections for s in sketches)])
    norms = np.concatenate([np.empty(0), *(s.norms for s in sketches)])
    columns: dict[str, Array] = {
        "digest": np.frombuffer(digests, "|u1").reshape(-1, 32),
        "stats": stats.reshape(-1, _NUM_STATS),
        "sketch": rows,
        "block_norm": norms,
    }
    for tensor in originals:
        if tensor.values is not None:
            values = np.frombuffer(tensor.values, "|u1")
            if tensor.dtype.name in _NATIVE:
                dtype = "?" if tensor.dtype.name == "bool" else numpy_dtype(tensor.dtype)
                values = values.view(dtype).reshape(tensor.shape)
            columns[_value_name(tensor.key)] = values
    metadata = json.dumps(_describe(golden), sort_keys=True, separators=(",", ":"))
    return save(columns, metadata={"harness": metadata})


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
                "block_nbytes": found.block_nbytes,
            },
        },
        "source": {
            "path": golden.source,
            "container": found.container,
            "section": golden.section,
            "keeps_aliases": found.keeps_aliases,
        },
        "root": found.root.hex(),
        "tensors": [
            [
                t.key,
                t.dtype.name,
                list(t.shape),
                t.alias_of,
                "values" if t.values is not None else "sketch" if t.sketch is not None else None,
            ]
            for t in found.tensors.values()
        ],
        "config": _without_paths(found.config),
        "history": [{"root": update.root, "reason": update.reason} for update in golden.history],
    }


def _value_name(key: str) -> str:
    """The name of a tensor's values in the golden: lone surrogates have no UTF-8."""
    return "value/" + key.encode("utf-8", "backslashreplace").decode()


def _column(key: str) -> str:
    """The key under which the reader of safetensors files lists a tensor's values."""
    return format_key((_value_name(key),))


def _without_paths(value: Any) -> Any:
    """Configurations hold paths of the machine that trained: keep their last part only."""
    if isinstance(value, Mapping):
        return {key: _without_paths(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(child) for child in value]
    if isinstance(value, str) and (
        value.startswith("~")
        or PurePosixPath(value).is_absolute()
        or PureWindowsPath(value).is_absolute()
    ):
        return f"…/{PureWindowsPath(value).name}"
    return value


def is_golden(path: Path) -> bool:
    """Whether a file is a golden, by its content; False for anything that cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
            if not is_safetensors(head, path.stat().st_size):
                return False
            # The metadata come first in the header as safetensors writes it.
            return b'"__metadata__":{"harness":' in head[8:] + file.read(256)
    except OSError:
        return False


def read_golden(path: str | Path) -> Golden:
    """Read a golden of any schema that was ever released; raises GoldenError."""
    path = Path(path)
    if not path.is_file():
        raise GoldenError(f"{path}: no golden there", hint=f"harness record CKPT -g {path}")
    try:
        with contextlib.closing(FileSource(path)) as source:
            head = read(source, 0, min(9, source.nbytes))
            if not is_safetensors(head, source.nbytes):
                raise GoldenError(
                    f"{path}: not a golden (no safetensors file)",
                    hint="restore it from version control, or record it again with --overwrite",
                )
            columns, metadata = read_safetensors(path, source)
            return _parse(path, {c.key: c for c in columns}, metadata)
    except CheckpointError as error:
        raise GoldenError(
            str(error), hint="restore it from version control, or record it again with --overwrite"
        ) from error


def _parse(path: Path, columns: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Golden:
    if "harness" not in metadata:
        raise GoldenError(
            f"{path}: a safetensors file, but not a golden",
            hint=f"to record it as a checkpoint: harness record {path} -g golden/NAME{SUFFIX}",
        )
    try:
        header = json.loads(metadata["harness"])
        schema = header["schema"]
        if schema != SCHEMA:
            raise GoldenError(
                f"{path}: a golden of schema {schema}, but this version reads up to {SCHEMA}",
                hint="upgrade: pip install --upgrade checkpoint-harness",
            )
        made, source = header["made"], header["source"]
        block_nbytes = int(made["sketch"]["block_nbytes"])
        fixed = (made["digest"], made["chunk_nbytes"], made["sketch"]["seed"])
        if fixed != ("blake3", CHUNK_NBYTES, SEED) or not 0 < block_nbytes <= CHUNK_NBYTES:
            raise GoldenError(
                f"{path}: made in a way that this version does not know: {made}",
                hint="restore it from version control, or record it again with --overwrite",
            )
        fingerprint = Fingerprint(
            name=str(path),
            container=source["container"],
            section=source["section"] or "",
            keeps_aliases=source["keeps_aliases"],
            tensors=dict(_prints(path, header["tensors"], columns, block_nbytes)),
            block_nbytes=block_nbytes,
            config=header["config"],
        )
        if fingerprint.root.hex() != header["root"]:
            raise GoldenError(
                f"{path}: its digests make the root {fingerprint.root.hex()[:16]}…, but it says "
                f"{header['root'][:16]}…",
                hint="the golden was changed by hand: restore it from version control",
            )
        return Golden(
            path=path,
            fingerprint=fingerprint,
            source=source["path"],
            section=source["section"],
            history=tuple(Update(root=h["root"], reason=h["reason"]) for h in header["history"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError) as error:
        raise GoldenError(
            f"{path}: a damaged golden ({type(error).__name__}: {error})",
            hint="restore it from version control, or record it again with --overwrite",
        ) from error


def _prints(
    path: Path, table: list[Any], columns: Mapping[str, Tensor], block_nbytes: int
) -> Iterator[tuple[str, TensorPrint]]:
    digests, stats = columns["digest"].array(), columns["stats"].array()
    sketch, norms = columns["sketch"].array(), columns["block_norm"].array()
    if digests.shape != (len(table), 32) or stats.shape != (len(table), _NUM_STATS):
        raise ValueError(f"{len(table)} tensors, but {len(digests)} digests, {len(stats)} stats")
    position = 0
    known: dict[str, TensorPrint] = {}
    for row, (key, dtype, shape, alias_of, kept) in enumerate(table):
        tensor = TensorPrint(
            key=str(key),
            dtype=DTYPES[dtype],
            shape=tuple(int(size) for size in shape),
            digest=digests[row].tobytes(),
            alias_of=alias_of,
            stats=_stats(stats[row]),
        )
        if alias_of is not None:
            original = known[alias_of]
            tensor = replace(tensor, values=original.values, sketch=original.sketch)
        elif kept == "values":
            tensor = replace(tensor, values=columns[_column(key)].array().tobytes())
            if len(tensor.values or b"") != tensor.nbytes:
                raise ValueError(f"the values of {key!r} do not fit its shape {shape}")
        elif kept == "sketch":
            factor = 2 if tensor.dtype.kind == "complex" else 1
            count = num_blocks(tensor.numel * factor, block_numel(tensor.dtype, block_nbytes))
            rows = slice(position, position + count)
            position += count
            if position > len(sketch) or position > len(norms):
                raise ValueError(f"the sketch ends before {key!r}")
            tensor = replace(tensor, sketch=Sketch(projections=sketch[rows], norms=norms[rows]))
        if tensor.key in known:
            raise ValueError(f"two tensors have the key {key!r}")
        known[tensor.key] = tensor
        yield tensor.key, tensor
    if position != len(sketch) or position != len(norms):
        raise ValueError(f"{len(sketch)} sketched blocks, but the tensors have {position}")


def _stats(row: Array) -> Stats | None:
    if np.isnan(row).all():
        return None
    values = [float(value) for value in row]
    low, high, mean, std, l2, *counts = values
    zero, nan, posinf, neginf = (int(count) for count in counts)
    return Stats(
        min=low,
        max=high,
        mean=mean,
        std=std,
        l2=l2,
        num_zero=zero,
        num_nan=nan,
        num_posinf=posinf,
        num_neginf=neginf,
    )
