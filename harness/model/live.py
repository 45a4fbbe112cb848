"""What is in memory and not in a file, as the verbs of `harness.api` take it.

In: a module, or a state dict. Out: a `Checkpoint` that reads their tensors where they are. Refused
(UsageError): everything else, and a mapping without tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

from harness.checkpoint import Checkpoint
from harness.errors import UsageError
from harness.model.state import as_checkpoint, state_of

Live: TypeAlias = nn.Module | Mapping[str, torch.Tensor]


def open_live(live: Live) -> Checkpoint:
    """Wrap a module's state dict, or the tensors of a state dict; nothing is copied.

    The tensors must not change while they are read. Raises UsageError, and ModelError for tensors
    without values (meta) or of a layout without one storage.
    """
    if isinstance(live, nn.Module):
        found = state_of(live, f"the live {type(live).__name__}")
    elif isinstance(live, Mapping):
        tensors = {k: v for k, v in live.items() if isinstance(v, torch.Tensor)}
        found = as_checkpoint(tensors, "the live state dict")
    else:
        raise UsageError(
            f"a {type(live).__name__} is nothing that can be fingerprinted",
            hint="give a path, an open checkpoint, a torch.nn.Module, or its state_dict()",
        )
    if not found.tensors:
        raise UsageError(f"{found.name}: holds no tensors", hint="give the model's state_dict()")
    return found
