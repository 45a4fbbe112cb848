"""The entries of a live state dict that are no tensors, read as those of its file would be.

In: a state dict, or what is left of one. Out: the same tensors and values that a file of it would
give, because it is one: written by `torch.save` into memory, and read by the harness. Entries that
cannot be pickled are named.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import torch

from harness.checkpoint.formats.torchfile import read_torch_zip
from harness.checkpoint.keys import format_key
from harness.checkpoint.sections import find_section
from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.checkpoint.unpickling.rebuild import Literal, value_tensor
from harness.checkpoint.unpickling.values import ValueText
from harness.errors import CheckpointError

_PLAIN = (str, bool, int, float, bytes, type(None))
_PLACE = "value"  # what stands for a key while its value is read


def with_values(checkpoint: Checkpoint, state: Mapping[str, object]) -> Checkpoint:
    """Add what the checkpoint lacks of `state`: what is no tensor, copied in memory."""
    lacking = {format_key((key,)): value for key, value in state.items()}
    return with_keyed_values(
        checkpoint, {k: v for k, v in lacking.items() if k not in checkpoint.tensors}
    )


def with_keyed_values(checkpoint: Checkpoint, values: Mapping[str, object]) -> Checkpoint:
    """Add values, copied in memory, under their keys as they are."""
    found: dict[str, Tensor] = {}
    unread: list[str] = []
    for key, value in values.items():
        if type(value) in _PLAIN:
            found[key] = value_tensor(key, ValueText().of(value))
            continue
        file = io.BytesIO()
        try:
            torch.save({_PLACE: value}, file)
            root = read_torch_zip(Literal(file.getbuffer()))
            section = find_section(root, checkpoint.name, ".")
        except CheckpointError as error:
            unread.append(f"{key} ({error})")
        except Exception as error:  # whatever the object's own pickling raises
            unread.append(f"{key} (cannot be pickled: {type(error).__name__})")
        else:
            held = (t.named(key + t.key.removeprefix(_PLACE)) for t in section.tensors)
            found |= {tensor.key: tensor for tensor in held}
            unread += (key + entry.removeprefix(_PLACE) for entry in section.unread)
    if not found and not unread:
        return checkpoint
    return replace(checkpoint, tensors={**checkpoint.tensors, **found}, unread=tuple(unread))
