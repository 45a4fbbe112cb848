"""Open any checkpoint without executing it: `open_checkpoint(path)` decides by content.

In: a path or a URL. Out: a `Checkpoint`, whose tensors read their bytes from where they are.
Refused, each with what, where and what to do: everything that is damaged, that is no checkpoint, or
that would cost more memory or time than its size warrants. Nothing is executed, imported, or
written but unlinked temporary files for what is compressed, and for parts of remote files.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from harness.checkpoint.inert import Record
from harness.checkpoint.nemo import is_tar, read_nemo
from harness.checkpoint.paths import DISTCP, METADATA, AnyPath, Location, to_path
from harness.checkpoint.safetensors import is_safetensors, read_safetensors
from harness.checkpoint.sections import find_tensors, plain_config
from harness.checkpoint.sources import InflatedSource, Source, open_source, read
from harness.checkpoint.tensors import Checkpoint, DType, Tensor, tensor_table
from harness.checkpoint.torchfile import TorchFile, read_torch_legacy, read_torch_zip
from harness.errors import CheckpointError, NoSection
from harness.shell import quoted

__all__ = ["Checkpoint", "DType", "Tensor", "open_checkpoint"]

_HEAD_NBYTES = 512
_MAX_YAML_DEPTH = 64
_MAX_YAML_SCALAR = 1 << 16
# In the order in which a folder is searched for its one checkpoint.
_FOLDER_NAMES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
_FOREIGN = (
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"<!DOCTYPE", "an HTML page, perhaps of a failed download"),
    (b"<html", "an HTML page, perhaps of a failed download"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"BZh", "compressed by bzip2"),
)


def open_checkpoint(path: Location, *, section: str | None = None) -> Checkpoint:
    """Open a checkpoint: structure only, the values stay where they are until they are read.

    `section` names another part than the state dict (`optimizer_states.0`), or every tensor of
    the file ("."). Raises CheckpointError. Memory: about 2.5 KB per tensor.
    """
    path = folder = to_path(path)
    try:
        is_folder = _is_folder(folder)
        if is_folder:
            path = _checkpoint_in(folder)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {(error.strerror or 'cannot be read').lower()}",
            hint=_did_you_mean(path),
        ) from error
    if is_folder and path.name == METADATA:
        return _distributed(folder, section)
    if is_folder and path is folder:
        _no_section(folder, section)
        return _rank_shards(folder)
    if path.name == METADATA or path.name.endswith(DISTCP):
        raise CheckpointError(
            f"{path}: one file of a torch.distributed.checkpoint folder",
            hint=f"give the whole folder: {path.parent}",
        )
    source = open_source(path)
    try:
        head = read(source, 0, min(_HEAD_NBYTES, source.nbytes))
        if head.lstrip()[:1] == b"{" and not is_safetensors(head, source.nbytes):
            _no_section(path, section)
            return _sharded(path, source)
        return _open(path, source, section)
    except BaseException:
        source.close()
        raise


def _is_folder(path: AnyPath) -> bool:
    """Tell folders from files; raises OSError, and CheckpointError for everything else."""
    if not isinstance(path, Path):
        return path.is_dir()
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(f"{path}: not a regular file", hint="give a file or a folder")
    return stat.S_ISDIR(mode)


def _open(path: AnyPath, source: Source, section: str | None) -> Checkpoint:
    head = read(source, 0, min(_HEAD_NBYTES, source.nbytes))
    # First, because the length that safetensors start with can look like any other magic.
    if is_safetensors(head, source.nbytes):
        _no_section(path, section)
        tensors, _ = read_safetensors(path, source)
        return Checkpoint(
            name=str(path),
            container="safetensors",
            section="",
            tensors=_nonempty(path, tensor_table(str(path), tensors)),
            sources=(source,),
            keeps_aliases=False,
        )
    if head.startswith(b"\x1f\x8b"):
        source = InflatedSource(source, 0, source.nbytes, str(path), wbits=31)
        head = read(source, 0, min(_HEAD_NBYTES, source.nbytes))
        if not is_tar(head):
            raise CheckpointError(
                f"{path}: compressed by gzip, and no .nemo archive inside",
                hint="decompress it first (gunzip)",
            )
    if is_tar(head):
        weights, config = read_nemo(source)
        return _torch_checkpoint(
            path, source, _torch_file(weights), section, container="nemo", config_text=config
        )
    if head.startswith(b"PK") or head[:1] == b"\x80":
        return _torch_checkpoint(path, source, _torch_file(source), section)
    raise _not_a_checkpoint(path, head)


def _torch_file(source: Source) -> TorchFile:
    head = read(source, 0, min(2, source.nbytes))
    if head == b"PK":
        return read_torch_zip(source)
    if head[:1] == b"\x80":
        return read_torch_legacy(source)
    raise CheckpointError(
        f"{source.name}: neither a zip archive nor a pickle, the two that torch writes",
        hint="the file is damaged: copy or download it again",
    )


def _torch_checkpoint(
    path: AnyPath,
    source: Source,
    file: TorchFile,
    section: str | None,
    *,
    container: str | None = None,
    config_text: bytes | None = None,
) -> Checkpoint:
    found, tensors = find_tensors(file, str(path), section)
    lightning = isinstance(file.root, dict) and "pytorch-lightning_version" in file.root
    if container is None:
        container = "Lightning checkpoint" if lightning else file.container
    return Checkpoint(
        name=str(path),
        container=container,
        section=found,
        tensors=_nonempty(
            path,
            tensor_table(str(path), tensors),
            "TorchScript that is frozen keeps its weights as constants: give the file of before"
            if file.container == "TorchScript"
            else "is it the right file?",
        ),
        sources=(source,),
        read_config=partial(_yaml, path, config_text)
        if config_text is not None
        else partial(_hparams, file.root),
        checksums=file.checksums,
    )


def _sharded(path: AnyPath, source: Source) -> Checkpoint:
    from harness.checkpoint.sharded import MAX_INDEX_NBYTES, join_shards, read_index

    table = read_index(path, read(source, 0, min(source.nbytes, MAX_INDEX_NBYTES + 1)))

    def open_shard(shard: AnyPath) -> Checkpoint:
        source = open_source(shard)
        try:
            return _open(shard, source, None)
        except BaseException:
            source.close()
            raise

    tensors, shards = join_shards(path, table, open_shard)
    sources = [source, *(one for shard in shards for one in shard.sources)]
    containers = sorted({shard.container for shard in shards})
    return Checkpoint(
        name=str(path),
        container=f"sharded {' and '.join(containers)}",
        section="",
        tensors=tensor_table(str(path), tensors),
        sources=tuple(sources),
        # A tie across two shards is lost in the format.
        keeps_aliases=False,
        checksums=tuple(one for shard in shards for one in shard.checksums),
    )


def _distributed(folder: AnyPath, section: str | None) -> Checkpoint:
    from harness.checkpoint.dcp import read_dcp

    file, sources = read_dcp(folder)
    found, tensors = find_tensors(file, str(folder), section)
    return Checkpoint(
        name=str(folder),
        container=file.container,
        section=found,
        tensors=_nonempty(folder, tensor_table(str(folder), tensors)),
        sources=sources,
        # Tied tensors are saved one by one.
        keeps_aliases=False,
        read_config=partial(_hparams, file.root),
        checksums=file.checksums,
    )


def _rank_shards(folder: AnyPath) -> Checkpoint:
    from harness.checkpoint.rankshards import rank_shards, read_rank_shards

    tensors, sources = read_rank_shards(folder, rank_shards(folder))
    return Checkpoint(
        name=str(folder),
        container="torch.distributed.checkpoint safetensors",
        section="",
        tensors=_nonempty(folder, tensor_table(str(folder), tensors)),
        sources=sources,
        keeps_aliases=False,
    )


def _checkpoint_in(folder: AnyPath) -> AnyPath:
    """The file to open in a folder; the folder itself where its safetensors are ranks' shards.

    `.metadata` comes first: the other files can be given by their own names, its folder cannot.
    """
    from harness.checkpoint.rankshards import rank_shards

    if (folder / METADATA).is_file():
        return folder / METADATA
    can_list = isinstance(folder, Path) or folder.is_listable
    shards = rank_shards(folder) if can_list else []
    # An index beside nothing but shards is that of another save: it cannot name them.
    if shards and all(shard.name.startswith("shard-") for shard in shards):
        return folder
    for name in _FOLDER_NAMES:
        if (folder / name).is_file():
            return folder / name
    if shards:
        return folder
    children: Iterator[AnyPath] = folder.iterdir() if can_list else iter(())
    names = sorted(child.name for child in islice(children, 1000))
    if any(name.endswith(DISTCP) for name in names):
        raise CheckpointError(
            f"{folder}: a torch.distributed.checkpoint folder without its {METADATA}, which is "
            "written last",
            hint="wait for the save to end, or copy the folder again with its hidden file",
        )
    files = [name for name in names if name.endswith(_SUFFIXES)]
    parts = [name for name in files if _PART.search(name)]
    index = next((name for name in names if name.endswith(".index.json")), None)
    if index is not None:
        raise CheckpointError(
            f"{folder}: a folder without one of {', '.join(_FOLDER_NAMES)}",
            hint=f"give its index: {folder / index}",
        )
    if len(parts) > 1 or (parts and "-00001-of-00001." not in parts[0]):
        raise CheckpointError(
            f"{folder}: a part of a sharded checkpoint ({parts[0]}), and no index of its parts",
            hint="get the .index.json from where they came",
        )
    raise CheckpointError(
        f"{folder}: a folder without a checkpoint ({', '.join(_FOLDER_NAMES)})",
        hint=f"give the file, for instance {folder / files[0]}"
        if files
        else "give the file, or the .index.json of a sharded checkpoint",
    )


_PART = re.compile(r"-\d{5}-of-\d{5}\.")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".nemo", ".safetensors")


def _no_section(path: AnyPath, section: str | None) -> None:
    if section not in (None, "", "."):
        raise NoSection(
            f"{path}: safetensors files have no sections, so no {section!r}",
            hint="leave out --section",
        )


def _nonempty(
    path: AnyPath, tensors: dict[str, Tensor], hint: str = "is it the right file?"
) -> dict[str, Tensor]:
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors", hint=hint)
    return tensors


def _yaml(path: AnyPath, text: bytes) -> Mapping[str, Any] | None:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                # They would let a page of text expand without bound; NeMo never writes any.
                raise ValueError("it repeats parts of itself by aliases")
            if depth > _MAX_YAML_DEPTH:
                raise ValueError(f"it is nested deeper than {_MAX_YAML_DEPTH} levels")
            if len(getattr(event, "value", "")) > _MAX_YAML_SCALAR:
                raise ValueError(f"it holds a text of more than {_MAX_YAML_SCALAR} characters")
        plain = plain_config(yaml.load(text, Loader=loader))
    # All but the first are what yaml's constructors raise for values that do not fit their tags.
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"{path}: its model_config.yaml is no plain YAML: {str(error).partition(chr(10))[0]}",
            hint="get the archive again from where it came",
        ) from error
    return plain if isinstance(plain, dict) else None


def _hparams(root: Any) -> Mapping[str, Any] | None:
    value = root.get("hyper_parameters") if isinstance(root, dict) else None
    if not isinstance(value, (dict, Record)):
        return None
    try:
        plain = plain_config(value)
    except ValueError:
        return None
    return plain if isinstance(plain, dict) else None


def _did_you_mean(path: AnyPath) -> str:
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
        if meant.exists():
            return f"did you mean {meant}?"
    return f"see what is there: ls {quoted(str(folder))}"


def _not_a_checkpoint(path: AnyPath, head: bytes) -> CheckpointError:
    if not head:
        return CheckpointError(f"{path}: the file is empty", hint="save or copy it again")
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{path}: a Git LFS pointer, not the checkpoint itself", hint="run: git lfs pull"
        )
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            return CheckpointError(
                f"{path}: {what}, not a checkpoint of torch",
                hint="give a .pt, .ckpt, .nemo, .safetensors, or an .index.json of one",
            )
    printable = sum(32 <= byte < 127 or byte in b"\n\r\t" for byte in head)
    what = "text" if printable > 0.95 * len(head) else "of an unknown format"
    return CheckpointError(
        f"{path}: {what}, not a checkpoint (it starts with {head[:16]!r})",
        hint="give a .pt, .ckpt, .nemo, .safetensors, or an .index.json of one",
    )
