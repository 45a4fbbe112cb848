"""`.nemo` archives: a tar of `model_config.yaml` and `model_weights.ckpt`.

In: a path, or a config and a state dict. Out: the same pair, or the file. Reading accepts plain
and gzip-compressed tar in any dialect, member names with or without `./`, any order, and weights
in torch's zip or legacy format; nothing is unpacked to a named file and nothing but tensors is
unpickled. Refused, with a `CheckpointError`: member names that are absolute or climb, links, a
missing or doubled member, weights that are not a mapping of names to tensors.

Writing follows NVIDIA NeMo 3.0.0 (same members, PAX, uncompressed, weights under the zip prefix
`model_weights/`) except for owner and times, which are fixed: the same model gives the same bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from harness.errors import CheckpointError
from harness.model.config import parse

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"
# what torch.load was seen to raise for damaged and for planted files
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    AssertionError,
)
_MAX_CONFIG_NBYTES = 16 * 1024 * 1024


def read_nemo(
    path: str | Path, map_location: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the resolved config and the state dict of a `.nemo` file, in the file's order.

    Tensors keep the file's dtypes and go to `map_location`. Raises `CheckpointError` for a file
    that is no such archive, and `ModelError` for a config that is no YAML mapping.
    """
    with _opened(Path(path)) as archive:
        members = _members(archive, path)
        config_nbytes = members[CONFIG_MEMBER].size
        if config_nbytes > _MAX_CONFIG_NBYTES:
            raise _unreadable(path, f"{CONFIG_MEMBER} claims {config_nbytes} bytes")
        with _content(archive, members[CONFIG_MEMBER]) as stream:
            text = stream.read().decode("utf-8")
        with _content(archive, members[WEIGHTS_MEMBER]) as stream:
            try:
                weights = torch.load(stream, map_location=map_location, weights_only=True)
            except _LOAD_ERRORS as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise _unreadable(path, f"{WEIGHTS_MEMBER}: {reason}") from error
    config = parse(text, f"{path}: {CONFIG_MEMBER}")
    if not isinstance(weights, dict):
        raise _unreadable(path, f"{WEIGHTS_MEMBER} holds a {type(weights).__name__}, no state dict")
    for key, value in weights.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            kind = type(value).__name__
            raise _unreadable(path, f"{WEIGHTS_MEMBER}: {key!r} holds a {kind}, no tensor")
    return config, weights


def write_nemo(path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write a `.nemo` file atomically; the same config and tensors give the same bytes.

    Tensors are written contiguous, detached and in the given order, aliases of one storage as such.
    """
    target = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode("utf-8")
    tensors = OrderedDict((key, value.detach().contiguous()) for key, value in state.items())
    if (metadata := getattr(state, "_metadata", None)) is not None:
        # module versions: without them BatchNorm fills in a missing counter without a word
        tensors._metadata = metadata  # type: ignore[attr-defined]
    # beside the target: the rename must stay on one file system
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        weights, whole = Path(scratch, WEIGHTS_MEMBER), Path(scratch, "whole")
        # torch takes the zip prefix from the file's name, and NeMo's is model_weights
        torch.save(tensors, weights)
        with whole.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w:", format=tarfile.PAX_FORMAT) as archive:
                archive.addfile(_entry(".", None))
                archive.addfile(_entry(f"./{CONFIG_MEMBER}", len(text)), io.BytesIO(text))
                with weights.open("rb") as content:
                    nbytes = weights.stat().st_size
                    archive.addfile(_entry(f"./{WEIGHTS_MEMBER}", nbytes), content)
            stream.flush()
            os.fsync(stream.fileno())
        whole.replace(target)


def _entry(name: str, nbytes: int | None) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    if nbytes is None:
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    else:
        entry.size, entry.mode = nbytes, 0o644
    return entry


def _unreadable(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a readable .nemo file: {reason}",
        hint="check that the file is complete and was written by save_to",
    )


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with path.open("rb") as stream:
            compressed = stream.read(2) == b"\x1f\x8b"
        with tarfile.open(path, "r:gz" if compressed else "r:") as archive:
            yield archive
    except (OSError, tarfile.TarError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _unreadable(path, str(error)) from error


def _members(archive: tarfile.TarFile, path: str | Path) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    for entry in archive:
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts:
            raise _unreadable(path, f"the member name {entry.name!r} leaves the archive")
        if not (entry.isfile() or entry.isdir()):
            raise _unreadable(path, f"the member {entry.name!r} is a link or a device")
        if str(name) in (CONFIG_MEMBER, WEIGHTS_MEMBER):
            if str(name) in found or not entry.isfile():
                raise _unreadable(path, f"the member {entry.name!r} is doubled or no file")
            found[str(name)] = entry
    if missing := {CONFIG_MEMBER, WEIGHTS_MEMBER} - found.keys():
        raise _unreadable(path, f"no member {' and no member '.join(sorted(missing))}")
    return found


@contextmanager
def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Iterator[IO[bytes]]:
    stream = archive.extractfile(entry)
    if stream is None:  # pragma: no cover - _members lets only files through
        raise _unreadable(entry.name, "no file")
    with stream:
        if isinstance(archive.fileobj, io.BufferedReader):
            yield stream
            return
        # torch seeks to and fro, which a compressed stream answers by starting over
        with tempfile.TemporaryFile() as spooled:
            shutil.copyfileobj(stream, spooled)
            spooled.seek(0)
            yield spooled
