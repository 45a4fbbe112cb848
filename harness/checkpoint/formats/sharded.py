"""Checkpoints in shards: an index file that says which file holds which key.

In: the path of a `*.index.json` as Hugging Face libraries write it. Out: the index's table, and
the tensors joined from the shards. Refused: shards outside of the index's folder, keys that a
shard lacks or that no index lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from harness.checkpoint.formats.safetensors import parse_json
from harness.checkpoint.keys import format_key
from harness.checkpoint.limits import MAX_HEADER_NBYTES, MAX_TENSORS
from harness.checkpoint.sources.access import at_once, closed_on_error
from harness.checkpoint.sources.paths import AnyPath, is_file
from harness.checkpoint.sources.source import damaged, too_many
from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.errors import CheckpointError

_MAX_OBJECTS = 64


def read_index(path: AnyPath, text: bytes) -> dict[str, str]:
    """Return the table from key to the name of its shard."""
    if len(text) > MAX_HEADER_NBYTES:
        raise too_many(str(path), MAX_HEADER_NBYTES, "bytes of an index")
    if text.count(b",") > MAX_TENSORS:
        raise too_many(str(path), MAX_TENSORS, "tensors of an index")
    if text.count(b"{") + text.count(b"[") > _MAX_OBJECTS:
        raise damaged(str(path), "the index is nested too deeply")
    try:
        index = parse_json(str(path), text)
    except ValueError as error:
        raise damaged(str(path), f"the index is not JSON: {error}") from error
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise damaged(str(path), "the index has no weight_map")
    for key, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            where = f"{str(shard)[:200]!r}, which is no file beside it"
            raise damaged(str(path), f"the index places {key[:200]!r} in {where}")
    return table


def join_shards(
    path: AnyPath, table: Mapping[str, str], open_shard: Callable[[AnyPath], Checkpoint]
) -> tuple[list[Tensor], list[Checkpoint]]:
    """Open every shard once, and check index and shards against each other."""
    folder = path.parent

    def opened(shard: str) -> Checkpoint:
        if not is_file(folder / shard):
            raise CheckpointError(
                f"{folder / shard[:200]}: missing, but {path.name} places "
                f"{sum(1 for s in table.values() if s == shard)} tensors in it",
                hint="download or copy the missing shard",
            )
        return open_shard(folder / shard)

    names = sorted(set(table.values()))
    shards: dict[str, Checkpoint] = {}
    with closed_on_error(shards.values()):
        shards.update(zip(names, at_once(folder, opened, names), strict=True))
        tensors = []
        for name, shard in table.items():
            tensor = shards[shard].tensors.get(format_key((name,)))
            if tensor is None:
                why = f"the index places {name!r} in {shard}, which does not hold it"
                raise damaged(str(path), why)
            tensors.append(tensor)
        listed = {(format_key((name,)), shard) for name, shard in table.items()}
        for shard, checkpoint in shards.items():
            for key in checkpoint.tensors:
                if (key, shard) not in listed:
                    why = f"the index does not list {key!r}, which {shard} holds"
                    raise damaged(str(path), why)
    return tensors, list(shards.values())
