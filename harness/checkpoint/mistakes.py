"""What a path that is no checkpoint may be, or may have meant.

In: a path. Out: the error that names what is there, and what to give in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from harness.checkpoint.layouts import layout_of
from harness.checkpoint.sources.paths import DISTCP, METADATA, AnyPath
from harness.errors import CheckpointError
from harness.text.shell import quoted

_FROM_TORCH = "give the checkpoint that it was made from: .safetensors, .bin, .pt, .ckpt, .nemo"
# What a file begins with, what that is, and what to do about it.
_FOREIGN = (
    (b"GGUF", "a GGUF file of llama.cpp", _FROM_TORCH),
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write", "convert it first: from_tf=True"),
    (b"\x93NUMPY", "a numpy array", "save it as a state dict: torch.save({name: tensor}, path)"),
    (b"<!DOCTYPE", "an HTML page, perhaps of a failed download", "download the file again"),
    (b"<html", "an HTML page, perhaps of a failed download", "download the file again"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it first: unzstd"),
    (b"\xfd7zXZ", "compressed by xz", "decompress it first: unxz"),
    (b"BZh", "compressed by bzip2", "decompress it first: bunzip2"),
)
# What has no mark of its own is known by its name.
_FOREIGN_NAMES = {
    ".onnx": ("an ONNX graph", _FROM_TORCH),
    ".msgpack": ("weights of Flax", "convert them first: from_flax=True"),
    ".pb": ("a graph of TensorFlow", "convert it first, or give the checkpoint of torch"),
    ".tflite": ("a TensorFlow Lite model", _FROM_TORCH),
    ".keras": ("a Keras archive", "convert it first, or give the checkpoint of torch"),
    ".mlmodel": ("a Core ML model", _FROM_TORCH),
    ".engine": ("a TensorRT engine", _FROM_TORCH),
    ".index": ("the index of a TensorFlow checkpoint", "convert it first: from_tf=True"),
}


def no_checkpoint_in(folder: AnyPath, names: Sequence[str]) -> CheckpointError:
    """The error for a folder without a checkpoint: what it may be, and what to give instead."""
    what, hint = _folder_of(folder, names)
    return CheckpointError(f"{folder}: {what}", hint=hint)


def _folder_of(folder: AnyPath, names: Sequence[str]) -> tuple[str, str]:
    if any(name.endswith(DISTCP) for name in names):
        return (
            f"a torch.distributed.checkpoint folder without its {METADATA}, which is written last",
            "wait for the save to end, or copy the folder again with its hidden file",
        )
    index = next((name for name in names if name.endswith(".index.json")), None)
    if index is not None:
        return "an index under an unknown name", f"give the index: {folder / index}"
    files = [name for name in names if name.endswith(_SUFFIXES)]
    parts = [name for name in files if _PART.search(name)]
    if len(parts) > 1 or (parts and "-00001-of-00001." not in parts[0]):
        what = f"shards of a checkpoint ({parts[0]}) without their index"
        return what, "copy or download the .index.json as well"
    inner = [name for name in names if not name.startswith(".") and (folder / name).is_dir()]
    saves = [name for name in inner if layout_of(folder / name).parts]
    if saves and not files:
        last = max(saves, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
        what = f"a folder of several checkpoints ({', '.join(saves[:6])})"
        return what, f"give one of them: {folder / last}, or all: {folder / '*'}"
    if "saved_model.pb" in names:
        what = "a SavedModel of TensorFlow, not a checkpoint of torch"
        return what, "convert it first, or give the checkpoint of torch"
    if len(files) > 1:
        return (
            f"a folder of several files ({', '.join(sorted(files)[:6])}"
            f"{', …' if len(files) > 6 else ''}), none under the name of a checkpoint "
            "(model.safetensors, pytorch_model.bin, …)",
            f"give one of them: {folder / files[0]}, or all: {folder / '*'}",
        )
    instead = f", for instance {folder / files[0]}" if files else ""
    return (
        "a folder without a checkpoint under a known name (model.safetensors, pytorch_model.bin, "
        "adapter_model.safetensors, …)",
        f"give the file{instead or ', or the .index.json of a sharded checkpoint'}",
    )


_PART = re.compile(r"-\d{5}-of-\d{5}\.")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".nemo", ".safetensors")


def similar_path(path: AnyPath) -> str:
    """The path with the part that is not there replaced by one alike, else what to look at."""
    from difflib import get_close_matches

    if not isinstance(path, Path):
        return "check the URL"
    try:
        folder = next(parent for parent in path.parents if parent.exists())
        missing, *rest = path.relative_to(folder).parts
        names = sorted(child.name for child in islice(folder.iterdir(), 1000))
    except (OSError, StopIteration, ValueError):
        return "check the path"
    # Without suffixes, by which files would be alike; of equal stems, that of the same suffix.
    suffix = Path(missing).suffix
    names = [n for n in names if n.endswith((*_SUFFIXES, ".json")) or (folder / n).is_dir()]
    names.sort(key=lambda name: Path(name).suffix == suffix)
    stems = {Path(name).stem: name for name in names}
    for stem in get_close_matches(Path(missing).stem, stems):
        meant = (folder / stems[stem]).joinpath(*rest)
        if meant != path and meant.exists():
            return f"did you mean {meant}?"
    return f"see what is there: ls {quoted(str(folder))}"


def not_a_checkpoint(path: AnyPath, head: bytes) -> CheckpointError:
    what, hint = _file_of(path, head)
    return CheckpointError(f"{path}: {what}", hint=hint)


def _file_of(path: AnyPath, head: bytes) -> tuple[str, str]:
    if not head:
        return "the file is empty", "save or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint itself", "run: git lfs pull"
    by_name = ((suffix, *told) for suffix, told in _FOREIGN_NAMES.items())
    known = [told for magic, *told in _FOREIGN if head.startswith(magic)]
    known += [told for suffix, *told in by_name if path.name.endswith(suffix)]
    for what, hint in known:
        return f"{what}, not a checkpoint of torch", hint
    printable = sum(32 <= byte < 127 or byte in b"\n\r\t" for byte in head)
    what = "text" if printable > 0.95 * len(head) else "of an unknown format"
    return (
        f"{what}, not a checkpoint (it starts with {head[:16]!r})",
        "give a .pt, .ckpt, .nemo, .safetensors, or an .index.json of one",
    )
