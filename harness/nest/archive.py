"""`.nemo` archives: a tar of `model_config.yaml` and `model_weights.ckpt`.

In: a path, or a config and a state dict. Out: the same pair, or the file. Files are read as any
checkpoint is (`harness.checkpoint`), and their CRC-32s are checked.

Writing follows NVIDIA NeMo 3.0.0 (same members, PAX, uncompressed, weights under the zip prefix
`model_weights/`) except for owner and times, which are fixed: the same model gives the same bytes.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError
from harness.fingerprints.integrity import check_undamaged
from harness.model.config import resolve
from harness.model.state import tensors_of
from harness.streaming.workers import Workers

CONFIG_MEMBER = "model_config.yaml"
WEIGHTS_MEMBER = "model_weights.ckpt"


def read_nemo(
    path: str | Path, map_location: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the resolved config and the state dict of a `.nemo` file, in the file's order.

    Tensors keep the file's dtypes and go to `map_location`. Raises `CheckpointError` for a file
    that is no such archive, or whose bytes are not those that were saved.
    """
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        if checkpoint.container != "nemo" or config is None:
            raise CheckpointError(
                f"{path}: not a .nemo file with a model_config.yaml, but a {checkpoint.container}",
                hint="give a file that save_to wrote",
            )
        check_undamaged((), checkpoint.checksums, Workers())
        state = {key: t.to(map_location) for key, t in tensors_of(checkpoint).items()}
    return resolve(config), state


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
