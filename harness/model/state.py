"""A live module as a `Checkpoint`, and a `Checkpoint` as torch tensors.

In: a module. Out: its state dict, its non-persistent buffers, or any table of tensors, as views of
the memory that they live in (read in pieces if that is not the CPU's). Refused: tensors without
values, and layouts that have no single storage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.keys import format_key
from harness.checkpoint.sources.source import Source
from harness.checkpoint.tensors import Checkpoint, Storage, Tensor, tensor_table
from harness.errors import ModelError
from harness.model.values import with_values


class _Memory(Source):
    """The bytes of a torch storage, as a source; from another device they are copied piecewise."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.name = "the live model"
        self.nbytes = storage.nbytes()
        # Holds the storage: the bytes live as long as this does.
        self._bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes[offset : offset + len(buffer)].cpu().numpy().data

    def __reduce__(self) -> NoReturn:
        raise TypeError("the memory of a process is of no use to another one")


def as_checkpoint(tensors: Mapping[str, torch.Tensor], name: str) -> Checkpoint:
    """Wrap live tensors, under the keys that a file would give to these names."""
    return keyed({format_key((key,)): tensor for key, tensor in tensors.items()}, name)


def keyed(tensors: Mapping[str, torch.Tensor], name: str) -> Checkpoint:
    """Wrap live tensors under their keys as they are; tied ones are aliases.

    Nothing is copied but strided ones of devices.
    """
    storages: dict[tuple[int, int], Storage] = {}

    def each() -> Iterator[Tensor]:
        for key, tensor in tensors.items():
            try:
                wrapped = _wrap(key, tensor, storages)
            except (RuntimeError, ValueError, NotImplementedError) as error:  # as its class has it
                kind = type(tensor).__name__
                raise ModelError(
                    f"{key}: the values of a {kind} cannot be read where they are: "
                    f"{str(error).partition(chr(10))[0][:200]}",
                    hint="give FSDP a device_mesh, so that its sharded state dict holds DTensors"
                    if kind == "ShardedTensor"
                    else "fingerprint the checkpoint that it is saved to",
                ) from error
            yield wrapped

    return Checkpoint(
        name=name, container="live model", section="", tensors=tensor_table(name, each())
    )


def state_of(module: nn.Module, name: str) -> Checkpoint:
    """The state dict of a module, but for what has no values."""
    empty = on_meta(module)
    state = {k: v for k, v in module.state_dict().items() if format_key((k,)) not in empty}
    return with_values(as_checkpoint(plain_tensors(state), name), state)


def on_meta(module: nn.Module) -> list[str]:
    """The tensors of a module that a load left on the meta device, without values."""
    named = {**module.state_dict(), **transient_buffers(module)}
    return [
        format_key((key,))
        for key, tensor in named.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_meta
    ]


def transient_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Non-persistent buffers by their path: no file holds them, yet outputs depend on them."""
    found = {}
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name in child._non_persistent_buffers_set and buffer.numel():
                found[f"{path}.{name}" if path else name] = buffer
    return found


def plain_tensors(state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict but those that are made of others, as of torchao.

    Those are read as their file would be, with what is no tensor.
    """
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and (is_cut(value) or not hasattr(value, "__tensor_flatten__"))
    }


def put_together(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors for a module, those that it makes of others put together as it has them.

    What a file keeps as `0.weight[qdata]` and `0.weight[scale]` is `0.weight`, of the class and the
    settings that the module's own has.
    """
    found = dict(tensors)
    for key, own in module.state_dict().items():
        if key not in found and isinstance(own, torch.Tensor) and not is_cut(own):
            whole = _whole(format_key((key,)), own, found)
            if whole is not None:
                found = {k: v for k, v in found.items() if not k.startswith(f"{key}[")}
                found[key] = whole
    return found


def _whole(
    key: str, like: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    flatten = getattr(like, "__tensor_flatten__", None)
    if flatten is None:
        return tensors.get(key)
    names, settings = flatten()
    parts = {name: _whole(f"{key}[{name}]", getattr(like, name), tensors) for name in names}
    if any(part is None for part in parts.values()):
        return None
    make: Any = type(like).__tensor_unflatten__  # type: ignore[attr-defined]
    whole: torch.Tensor = make(parts, settings, like.size(), like.stride())
    return whole


def unwrapped(module: nn.Module, state: Collection[str] = ()) -> nn.Module:
    """The module in torch's own wrappers, but for those whose prefix keys of a `state` have."""
    for name in ("_orig_mod", "module"):
        inner, is_own = getattr(module, name, None), type(module).__module__.startswith("torch.")
        is_bare = not any(key.startswith(f"{name}.") for key in state)
        if is_own and is_bare and isinstance(inner, nn.Module):
            return unwrapped(inner, state)
    return module


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be spread over ranks: a DTensor, which takes long to import."""
    return hasattr(tensor, "device_mesh")


def _wrap(key: str, tensor: torch.Tensor, storages: dict[tuple[int, int], Storage]) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_meta:
        raise ModelError(
            f"{key}: still on the meta device after loading",
            hint="the load left it without values: is the key in the checkpoint?",
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else tensor.layout
        raise ModelError(
            f"{key}: live {kind} tensors cannot be fingerprinted",
            hint="give the dense tensors that it is made of",
        )
    if tensor.device.type != "cpu" and not tensor.is_contiguous():
        tensor = tensor.cpu()  # strided reads need all of it
    untyped = tensor.untyped_storage()
    # Two storages may begin at one place, as arrays of numpy of which one is the head of the other.
    place = untyped.data_ptr(), untyped.nbytes()
    storage = storages.get(place) if place[0] else None
    if storage is None:
        storage = Storage(source=_Memory(untyped), offset=0, nbytes=untyped.nbytes())
        storages[place] = storage
    return Tensor(
        key=key,
        dtype=DTYPES[str(tensor.dtype).removeprefix("torch.")],
        shape=tuple(tensor.shape),
        storage=storage,
        offset=int(tensor.storage_offset()),
        strides=tuple(tensor.stride()),
        conjugate=tensor.is_conj(),
        negative=tensor.is_neg(),
    )


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a file as torch tensors, read by the harness: torch unpickles nothing."""
    made: dict[str, torch.Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        if tensor.dtype.is_value:
            continue
        made[key] = made[tensor.alias_of] if tensor.alias_of else as_torch(tensor)
    return made


def as_torch(tensor: Tensor) -> torch.Tensor:
    """Read a tensor of a file into a torch tensor of its own."""
    dtype = getattr(torch, tensor.dtype.name)
    if tensor.numel == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    tensor.read_into(0, data.numpy().data)
    return data.view(dtype).reshape(tensor.shape)
