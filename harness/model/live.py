"""What is in memory and not in a file, as the verbs of `harness.api` take it.

In: a module, or a state dict, and a verb. Out: what the verb makes of a `Checkpoint` that reads
their tensors where they are. Refused (UsageError): everything else, and a mapping that holds no
tensors, or some only in what is nested in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from harness.checkpoint.tensors import Checkpoint
from harness.errors import UsageError
from harness.model.state import as_checkpoint, is_cut, plain_tensors, transient_buffers
from harness.model.values import with_values

Live: TypeAlias = nn.Module | Mapping[str, torch.Tensor]
_Result = TypeVar("_Result")


def call_with(live: Live, verb: Callable[[Checkpoint], _Result]) -> _Result:
    """Call a verb with a module's state dict, or any other, as a checkpoint.

    Nothing is copied; the tensors must not change while they are read. A state with DTensors, in a
    run of torch.distributed, is spread over ranks: all of them must call this alike, and get the
    same (`harness.model.sharded`). Any other is of this process alone, whoever else runs.

    Raises UsageError, ModelError for tensors without values (meta) or of a layout without one
    storage, TeamError, and what the verb raises.
    """
    state, name = _state_of(live)
    tensors = plain_tensors(state)

    def call_whole(checkpoint: Checkpoint) -> _Result:
        whole = with_values(checkpoint, state)
        if isinstance(live, nn.Module):
            own = {k: v for k, v in transient_buffers(live).items() if not is_cut(v)}
            whole = replace(whole, buffers=as_checkpoint(own, name).tensors)
        return verb(whole)

    if dist.is_available() and dist.is_initialized() and any(map(is_cut, tensors.values())):
        from harness.model.distributed.sharded import together  # 1 s of imports

        return together(tensors, name, call_whole)
    return call_whole(as_checkpoint(tensors, name))


def _state_of(live: Live) -> tuple[Mapping[str, object], str]:
    """The state dict, and what a person would call it."""
    state: Mapping[str, object]
    if isinstance(live, nn.Module):
        state, name = live.state_dict(), f"the live {type(live).__name__}"
    elif isinstance(live, Mapping):
        state, name = dict(live), "the live state dict"
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) and _has_tensors({key: value}):
                raise UsageError(
                    f"{name}: holds tensors below {key!r}, which would be left out",
                    hint="give one part of it, or a flat state dict, as of an optimizer with "
                    "StateDictOptions(flatten_optimizer_state_dict=True)",
                )
    else:
        kind = type(live).__name__
        raise UsageError(
            f"cannot fingerprint {'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}",
            hint="give a path, an open checkpoint, a torch.nn.Module, or its state_dict()",
        )
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"{name}: holds no tensors", hint="give the model's state_dict()")
    return state, name


def _has_tensors(value: object) -> bool:
    """Whether there are tensors in a value, other than in a module's extra state."""
    if isinstance(value, Mapping):
        inside = [v for k, v in value.items() if not str(k).endswith("_extra_state")]
        return any(map(_has_tensors, inside))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)
