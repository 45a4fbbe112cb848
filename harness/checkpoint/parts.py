"""A folder of several models as one checkpoint: each file's tensors under the name of its part.

In: the files of a folder by the name of their part, as `layouts` finds them. Out: one `Checkpoint`
of all parts, or of the one that is asked for as a section, under its own keys. Refused: sections
that are no part of the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from harness.checkpoint.keys import format_key
from harness.checkpoint.sources.access import closed_on_error
from harness.checkpoint.sources.paths import AnyPath
from harness.checkpoint.tensors import Checkpoint, tensor_table
from harness.errors import NoSection

Open = Callable[[AnyPath], Checkpoint]


def open_parts(
    folder: AnyPath, parts: Mapping[str, AnyPath], section: str | None, open_file: Open
) -> Checkpoint:
    """Open every part, or the one that `section` names; raises CheckpointError.

    The weights of the folder itself, of which `parts` has no name, keep their keys.
    """
    if section is not None and section in parts:
        others = tuple((part or "the folder's own", None) for part in parts if part != section)
        return replace(open_file(parts[section]), name=str(folder), section=section, others=others)
    if section not in (None, "", "."):
        raise NoSection(
            f"{folder}: no part {section!r} in this folder",
            hint=f"one of: {', '.join(part for part in parts if part)}",
        )
    opened: dict[str, Checkpoint] = {}
    with closed_on_error(opened.values()):
        for part, path in parts.items():
            opened[part] = open_file(path)
        table = tensor_table(
            str(folder),
            (
                tensor.named(f"{format_key((part,))}.{tensor.key}" if part else tensor.key)
                for part, checkpoint in opened.items()
                for tensor in checkpoint.tensors.values()
            ),
        )
    containers = sorted({checkpoint.container for checkpoint in opened.values()})
    return Checkpoint(
        name=str(folder),
        container=f"folder of {len(opened)} parts ({', '.join(containers)})",
        tensors=table,
        sources=tuple(source for checkpoint in opened.values() for source in checkpoint.sources),
        unread=tuple(
            f"{part}: {entry}" if part else entry
            for part, checkpoint in opened.items()
            for entry in checkpoint.unread
        ),
        keeps_aliases=all(checkpoint.keeps_aliases for checkpoint in opened.values()),
        checksums=tuple(one for checkpoint in opened.values() for one in checkpoint.checksums),
    )
