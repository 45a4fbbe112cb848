"""Open any checkpoint without executing it: `open_checkpoint(path)` decides by content.

In: a path or a URL. Out: a `Checkpoint`, whose tensors read their bytes from where they are.
Refused, each with what, where and what to do: everything that is damaged, that is no checkpoint, or
that would cost more memory or time than its size warrants. Nothing is executed, imported, or
written but unlinked temporary files for what is compressed, and for parts of remote files.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.checkpoint.config import config_of_yaml, hyperparameters_of, settings_of
from harness.checkpoint.formats.nemo import is_tar, read_nemo
from harness.checkpoint.formats.safetensors import is_safetensors, read_safetensors
from harness.checkpoint.formats.torchfile import TorchFile, read_torch_legacy, read_torch_zip
from harness.checkpoint.formats.zero import read_zero, zero_files
from harness.checkpoint.layouts import inner_folder, layout_of, names_in
from harness.checkpoint.limits import MAX_HEADER_NBYTES
from harness.checkpoint.mistakes import no_checkpoint_in, not_a_checkpoint, similar_path
from harness.checkpoint.parts import open_parts
from harness.checkpoint.rankfiles import RankFile, check_ranks, choose_set, join_ranks, rank_sets
from harness.checkpoint.sections import Parts, find_section
from harness.checkpoint.sources.access import closed_on_error, open_source
from harness.checkpoint.sources.inflated import InflatedSource
from harness.checkpoint.sources.paths import (
    DISTCP,
    METADATA,
    AnyPath,
    Location,
    files_of,
    is_file,
    to_path,
)
from harness.checkpoint.sources.source import Source, read
from harness.checkpoint.tensors import Checkpoint, Tensor, tensor_table
from harness.errors import CheckpointError, NoSection

_HEAD_NBYTES = 512


def open_checkpoint(path: Location, *, section: str | None = None) -> Checkpoint:
    """Open a checkpoint: structure only, the values stay where they are until they are read.

    `section` names another part than the state dict (`optimizer_states.0`), or every tensor of
    the file ("."). Raises CheckpointError. Memory: about 2.5 KB per tensor.
    """
    path = to_path(path)
    if sets := rank_sets(files_of(path)):
        return _rank_files(path, sets, section)
    try:
        if _is_folder(path):
            return _open_folder(path, section)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {(error.strerror or 'cannot be read').lower()}",
            hint="check its permissions"
            if isinstance(error, PermissionError)
            else similar_path(path),
        ) from error
    if path.name == METADATA or path.name.endswith(DISTCP):
        raise CheckpointError(
            f"{path}: one file of a torch.distributed.checkpoint folder",
            hint=f"give the whole folder: {path.parent}",
        )
    return _open_file(path, section)


def _open_folder(folder: AnyPath, section: str | None) -> Checkpoint:
    """Open what a folder holds; `.metadata` comes first: its folder has no other name."""
    from harness.checkpoint.formats.rankshards import rank_shards, read_rank_shards

    folder = inner_folder(folder)
    names = names_in(folder)
    if METADATA in names or is_file(folder / METADATA):
        return _distributed(folder, section)
    if any(zero_files(names)):
        return _zero(folder, names, section)
    is_web = not isinstance(folder, Path) and folder.is_web  # where nothing else can be seen
    shards = [] if is_web else rank_shards(folder, names)
    # An index beside nothing but shards is that of another save: it cannot name them.
    if not (shards and all(shard.name.startswith("shard-") for shard in shards)):
        layout = layout_of(folder)
        if len(layout.parts) > 1:
            found = open_parts(folder, layout.parts, section, partial(_open_file, section=None))
        elif layout.parts:
            found = _open_file(next(iter(layout.parts.values())), section)
        if layout.parts:
            others = (*found.others, *((name, None) for name in layout.others))
            return replace(_with_files(found, folder, layout.beside), others=others)
    if shards:
        _no_section(folder, section)
        tensors, sources = read_rank_shards(folder, shards)
        return Checkpoint(
            name=str(folder),
            container="torch.distributed.checkpoint safetensors",
            tensors=_table(folder, tensors),
            sources=sources,
            keeps_aliases=False,
        )
    if sets := rank_sets(folder / name for name in names):
        return _rank_files(folder, sets, section)
    raise no_checkpoint_in(folder, names)


def _with_files(found: Checkpoint, folder: AnyPath, names: Sequence[str]) -> Checkpoint:
    """A folder's checkpoint with what describes it: settings as such, else by the bytes."""
    settings: dict[str, Any] = {}
    members: dict[str, Source] = {}
    for name in names:
        if not is_file(folder / name):
            continue
        source = open_source(folder / name)
        of_file = settings_of(name, source)
        if of_file is None:
            members[name] = source
        else:
            source.close()
            settings |= of_file
    if not settings and not members:
        return found
    return replace(
        found,
        members=members,
        sources=(*found.sources, *members.values()),
        read_config=lambda: {**(found.config or {}), **settings},
    )


def _open_file(path: AnyPath, section: str | None, *, is_shard: bool = False) -> Checkpoint:
    source = open_source(path)
    with closed_on_error([source]):
        head = read(source, 0, min(_HEAD_NBYTES, source.nbytes))
        is_text = head.lstrip()[:1] == b"{" and not is_safetensors(head, source.nbytes)
        if is_text and not is_shard:
            _no_section(path, section)
            return _sharded(path, source)
        return _open(path, source, section)


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
        tensors, _ = read_safetensors(source)
        return Checkpoint(
            name=str(path),
            container="safetensors",
            tensors=_table(path, tensors),
            sources=(source,),
            keeps_aliases=False,
        )
    if head.startswith(b"\x1f\x8b"):
        source = InflatedSource(source, str(path), wbits=31)
        head = read(source, 0, min(_HEAD_NBYTES, source.nbytes))
        if not is_tar(head):
            raise CheckpointError(
                f"{path}: compressed with gzip, and not a .nemo archive",
                hint="decompress it first (gunzip)",
            )
    if is_tar(head):
        nemo = read_nemo(source)
        file = _torch_file(nemo.weights)
        found = replace(
            _torch_checkpoint(path, (source,), file, section),
            container="nemo",
            members=nemo.members,
        )
        if nemo.config is None:
            return found
        return replace(found, read_config=partial(config_of_yaml, path, nemo.config))
    if head.startswith(b"PK") or head[:1] == b"\x80":
        return _torch_checkpoint(path, (source,), _torch_file(source), section)
    raise not_a_checkpoint(path, head)


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
    path: AnyPath, sources: tuple[Source, ...], file: TorchFile, section: str | None
) -> Checkpoint:
    found = find_section(file, str(path), section)
    lightning = isinstance(file.root, dict) and "pytorch-lightning_version" in file.root
    tensors = found.tensors
    held = [tensor for tensor in tensors if not tensor.dtype.is_value]
    if held and not any(tensor.numel for tensor in held):
        raise CheckpointError(
            f"{path}: {len(held):,} of {len(held):,} tensors are empty: the weights are in other "
            "files, as of ZeRO-3 in *_optim_states.pt",
            hint="give the folder with the files of all ranks",
        )
    frozen = "TorchScript that is frozen keeps its weights as constants: give the file of before"
    return Checkpoint(
        name=str(path),
        container="Lightning checkpoint" if lightning else file.container,
        section=found.path,
        tensors=_table(path, tensors, frozen if file.container == "TorchScript" else None),
        unread=found.unread,
        others=found.others,
        sources=sources,
        read_config=partial(hyperparameters_of, file.root),
        checksums=file.checksums,
    )


def _sharded(path: AnyPath, source: Source) -> Checkpoint:
    from harness.checkpoint.formats.sharded import join_shards, read_index

    table = read_index(path, read(source, 0, min(source.nbytes, MAX_HEADER_NBYTES + 1)))
    open_shard = partial(_open_file, section=None, is_shard=True)
    tensors, shards = join_shards(path, table, open_shard)
    containers = sorted({shard.container for shard in shards})
    return Checkpoint(
        name=str(path),
        container=f"sharded {' and '.join(containers)}",
        tensors=_table(path, tensors),
        sources=(source, *(one for shard in shards for one in shard.sources)),
        # A tie across two shards is lost in the format.
        keeps_aliases=False,
        checksums=tuple(one for shard in shards for one in shard.checksums),
    )


def _distributed(folder: AnyPath, section: str | None) -> Checkpoint:
    from harness.checkpoint.formats.dcp import read_dcp

    file, sources = read_dcp(folder)
    found = _torch_checkpoint(folder, sources, file, section)
    # Tied tensors are saved one by one.
    return replace(found, container=file.container, keeps_aliases=False)


def _rank_files(
    path: AnyPath, sets: Mapping[str, list[RankFile]], section: str | None
) -> Checkpoint:
    chosen = choose_set(path, sets)
    files = sets[chosen]
    check_ranks(str(path), files)
    sources: list[Source] = []
    ranks: list[tuple[RankFile, Parts]] = []
    with closed_on_error(sources):
        for file in files:
            sources.append(open_source(file.path))
            found = find_section(_torch_file(sources[-1]), str(file.path), section)
            ranks.append((file, found))
        tensors = _table(path, join_ranks(str(path), ranks))
    _, first = ranks[0]
    return Checkpoint(
        name=str(path),
        container=f"torch files of {len(files)} ranks",
        section=first.path,
        tensors=tensors,
        unread=first.unread,
        others=(*first.others, *((glob, None) for glob in sets if glob != chosen)),
        sources=tuple(sources),
        # Tied tensors are put together one by one.
        keeps_aliases=False,
    )


def _zero(folder: AnyPath, names: Sequence[str], section: str | None) -> Checkpoint:
    _no_section(folder, section)
    optimizer, model = zero_files(names)
    sources: list[Source] = []
    files: dict[str, TorchFile] = {}
    with closed_on_error(sources):
        for name in (*optimizer, *model):
            sources.append(open_source(folder / name))
            files[name] = _torch_file(sources[-1])
        tensors = read_zero(folder, {n: files[n] for n in model}, {n: files[n] for n in optimizer})
        table = _table(folder, tensors)
    return Checkpoint(
        name=str(folder),
        container=f"DeepSpeed ZeRO files of {len(optimizer)} ranks",
        tensors=table,
        sources=tuple(sources),
        others=(("optimizer states", None),),
    )


def _no_section(path: AnyPath, section: str | None) -> None:
    if section not in (None, "", "."):
        raise NoSection(
            f"{path}: safetensors files have no sections, so no {section!r}",
            hint=f"leave out the section {section!r}",
        )


def _table(path: AnyPath, tensors: Iterable[Tensor], hint: str | None = None) -> dict[str, Tensor]:
    """Check the tensors of a checkpoint; raises CheckpointError, also where there are none."""
    table = tensor_table(str(path), tensors)
    if all(tensor.dtype.is_value for tensor in table.values()):
        raise CheckpointError(f"{path}: holds no tensors", hint=hint or "is it the right file?")
    return table
