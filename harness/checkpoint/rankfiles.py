"""State dicts that every rank saved by itself: a torch file per rank, with DTensors in them.

In: the files of all ranks, as a folder or a glob. Out: their tensors, whole. Refused: sets that
lack a rank, parts that do not tile their tensor, sums over ranks. What several ranks hold (plain
tensors, replicas, values) is read and compared here: one that differs is an entry of its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from harness.checkpoint.formats.assembled import Piece, assemble
from harness.checkpoint.sections import Parts
from harness.checkpoint.sources.paths import AnyPath, files_of
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.dtensors import LocalPart
from harness.errors import CheckpointError
from harness.text.shell import quoted

_RANK = re.compile(r"(?P<head>.*rank[_-]?)(?P<rank>\d+)(?P<tail>\.(?:pt|pth|bin|ckpt))")
_WORLD_SIZE = re.compile(r"world_size[_-]?(\d+)")
_MAX_FILES = 100_000
_STEP_NBYTES = 4 << 20
_ALL_RANKS = "copy the files of all ranks into one folder, and give that, or a glob of them"


class RankFile(NamedTuple):
    rank: int
    path: AnyPath


def rank_sets(paths: Iterable[AnyPath]) -> dict[str, list[RankFile]]:
    """The sets of ranks' files among some files, by a glob for each, in the order of the ranks."""
    found: dict[str, list[RankFile]] = defaultdict(list)
    for path in islice(paths, _MAX_FILES):
        match = _RANK.fullmatch(path.name)
        # DeepSpeed's, whose ranks are named twice, are cut in another way.
        if match and match["head"].count("rank") == 1:
            found[f"{match['head']}*{match['tail']}"].append(RankFile(int(match["rank"]), path))
    return {glob: sorted(files) for glob, files in sorted(found.items())}


def choose_set(folder: AnyPath, sets: Mapping[str, list[RankFile]]) -> str:
    """The glob of the only set, or of the model's; raises CheckpointError."""
    globs = [glob for glob in sets if len(sets) == 1 or glob.startswith("model")]
    if len(globs) != 1:
        raise CheckpointError(
            f"{folder}: holds the files of several saves: {', '.join(islice(sets, 6))}",
            hint=f"give one of them: {quoted(str(folder / next(iter(sets))))}",
        )
    return globs[0]


def with_sets(paths: Sequence[AnyPath]) -> list[AnyPath]:
    """The paths, with its glob in place of the files of each set of which all are there."""
    sets = {
        folder / glob: [file.path for file in files]
        for folder in dict.fromkeys(path.parent for path in paths if isinstance(path, Path))
        for glob, files in rank_sets(path for path in paths if path.parent == folder).items()
        if len(files) > 1
    }
    whole = {path: glob for glob, of in sets.items() if {*of} == {*files_of(glob)} for path in of}
    return list(dict.fromkeys(whole.get(path, path) for path in paths))


def check_ranks(name: str, files: Sequence[RankFile]) -> None:
    """Raise CheckpointError where the names say that a rank's file is not there."""
    size = _WORLD_SIZE.search(files[0].path.name)
    num_ranks = int(size[1]) if size else files[-1].rank + 1
    missing = sorted(set(range(min(num_ranks, _MAX_FILES))) - {file.rank for file in files})
    if missing:
        raise CheckpointError(
            f"{name}: of {num_ranks} ranks' files {len(missing)} are missing, the first of them "
            f"of rank {missing[0]}",
            hint=_ALL_RANKS,
        )


def join_ranks(name: str, ranks: Sequence[tuple[RankFile, Parts]]) -> Iterator[Tensor]:
    """Join what all ranks hold of each entry, in the first rank's order."""
    found: dict[str, list[tuple[RankFile, Tensor | LocalPart]]] = defaultdict(list)
    for file, section in ranks:
        for key, entry in section.entries:
            found[key].append((file, entry))
    for key, held in found.items():
        shapes = {entry.shape for _, entry in held if isinstance(entry, LocalPart)}
        parts = [(file, _piece(name, key, file, entry)) for file, entry in held]
        # A rank may hold nothing of a tensor that is smaller than the mesh.
        parts = [part for part in parts if part[1].tensor.numel] or parts[:1]
        pieces: dict[tuple[int, ...], Piece] = {}
        for file, piece in parts:
            known = pieces.setdefault(piece.start, piece)
            if known is not piece and not _are_equal(known.tensor, piece.tensor):
                yield piece.tensor.named(f"{key}[rank {file.rank}]")
        whole = [*pieces.values()]
        if not shapes:
            yield whole[0].tensor.named(key)
        elif len(shapes) > 1 or len({piece.tensor.dtype for piece in whole}) > 1:
            raise CheckpointError(
                f"{name}: {key!r} has another shape or dtype on each rank: "
                f"{', '.join(map(str, map(list, sorted(shapes))))}",
                hint="the files are of several saves: give those of one",
            )
        else:
            [shape] = shapes
            dtype = whole[0].tensor.dtype
            yield assemble(name, key, dtype, shape, whole, hint=_ALL_RANKS)


def _piece(name: str, key: str, file: RankFile, entry: Tensor | LocalPart) -> Piece:
    if isinstance(entry, Tensor):
        return Piece(start=(0,) * len(entry.shape), tensor=entry, where=file.path.name)
    if entry.is_partial or not isinstance(entry.local, Tensor):
        what = "a sum over ranks" if entry.is_partial else "of a class that is not put together"
        raise CheckpointError(
            f"{name}: {key!r} is {what}",
            hint="save the whole tensors (get_model_state_dict with full_state_dict=True)",
        )
    return Piece(start=entry.start, tensor=entry.local, where=file.path.name)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes, read a few MB at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, _STEP_NBYTES):
        size = min(_STEP_NBYTES, one.nbytes - start)
        ours, theirs = bytearray(size), bytearray(size)
        one.read_into(start, memoryview(ours))
        other.read_into(start, memoryview(theirs))
        if ours != theirs:
            return False
    return True
