"""What one rank holds of a DTensor: which part of the whole it is.

In: a `Composite` whose class is torch's DTensor. Out: its local tensor, the shape of the whole, and
where in it the local tensor starts. Refused (ValueError): specs of an unknown form, and local
tensors of another size than their placement says. As torch 2.2 to 2.13 pickle them; the arithmetic
is that of `compute_local_shape_and_global_offset` in torch/distributed/tensor/_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.checkpoint.keys import Component
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.inert import Global, Record
from harness.checkpoint.unpickling.rebuild import Composite

Index = tuple[int, ...]
_SHARDS = ("Shard", "_StridedShard")


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalPart:
    """A rank's part of a DTensor of `shape`, from `start` on.

    `what` says which part it is ("shard 0 of 2 of [16, 8] along 0"), None where it is the whole.
    `is_partial` says that the whole is a sum over ranks.
    """

    local: Tensor | Composite
    shape: Index
    start: Index
    what: str | None
    is_partial: bool = False

    @property
    def tensor(self) -> Tensor:
        """The local part, where it is no composite."""
        assert isinstance(self.local, Tensor)
        return self.local

    @property
    def steps(self) -> tuple[Component, ...]:
        """What its key says beside the name of the whole."""
        return () if self.what is None else (Component(self.what),)


class _MeshAxis(NamedTuple):
    """One axis of the mesh: how many ranks, which of them this is, and what it does."""

    num_ranks: int
    rank: int
    placement: Any


def local_part(composite: Composite) -> LocalPart | None:
    """Read a DTensor; None for every other composite. Raises ValueError."""
    local = composite.parts.get("_local_tensor")
    spec = composite.parts.get("_spec")
    if not isinstance(local, (Tensor, Composite)) or not isinstance(spec, Record):
        return None
    state = spec.state if isinstance(spec.state, dict) else {}
    placements, mesh = state.get("placements"), state.get("mesh")
    if not isinstance(placements, tuple) or not isinstance(mesh, Record):
        raise ValueError("a DTensor whose spec has another form")
    shape = composite.shape
    match state.get("tensor_meta"):
        case Record(args=(tuple() as sizes, *_)) | Record(state={"shape": tuple() as sizes}):
            shape = sizes
    if shape is None or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("a DTensor that does not say its shape")
    axes = _mesh_axes(mesh, placements)
    start, size = [0] * len(shape), list(shape)
    for axis in _in_order(axes):
        dim = _dim(axis.placement, len(shape))
        chunk = -(-size[dim] // axis.num_ranks)
        before = min(chunk * axis.rank, size[dim])
        start[dim], size[dim] = start[dim] + before, min(chunk, size[dim] - before)
    held = local.shape
    if held is not None and 0 not in size and tuple(held) != tuple(size):
        raise ValueError(f"a DTensor whose part has shape {list(held)}, and not {size}")
    partial = [axis for axis in axes if _kind(axis.placement) not in (*_SHARDS, "Replicate")]
    return LocalPart(
        local=local,
        shape=tuple(shape),
        start=tuple(start),
        what=_described(axes, tuple(shape), partial),
        is_partial=bool(partial),
    )


def _mesh_axes(mesh: Record, placements: Sequence[Any]) -> list[_MeshAxis]:
    state = mesh.state if isinstance(mesh.state, dict) else {}
    sizes, place = _mesh_shape(state), state.get("_coordinate_on_dim")
    if not isinstance(place, (list, tuple)) or not len(place) == len(sizes) == len(placements):
        raise ValueError("a DTensor of a rank that is not in its mesh")
    for size, rank in zip(sizes, place, strict=True):
        if not (type(rank) is int and 0 <= rank < size):
            raise ValueError(f"a DTensor of rank {rank} of {size}")
    return [_MeshAxis(*axis) for axis in zip(sizes, place, placements, strict=True)]


def _mesh_shape(state: dict[Any, Any]) -> Index:
    """How many ranks there are along each axis of the mesh, as each version of torch keeps it."""
    ranks = state.get("mesh", state.get("_mesh"))
    if isinstance(ranks, Tensor):
        return ranks.shape
    match state.get("_layout"):
        case Record(state={"axes": tuple() as axes}):
            found = [axis.state.get("shape") for axis in axes if isinstance(axis, Record)]
        case Record(state={"shape": shape}) | Record(args=(shape, _)):
            found = list(shape) if isinstance(shape, (tuple, list)) else [shape]
        case _:
            raise ValueError("a DTensor whose mesh has another form")
    return tuple(math.prod(_flat(sizes)) for sizes in found)


def _flat(sizes: Any) -> list[int]:
    if type(sizes) is int:
        return [sizes]
    if not isinstance(sizes, (tuple, list)) or not all(type(size) is int for size in sizes):
        raise ValueError("a DTensor whose mesh has another form")
    return list(sizes)


def _kind(placement: Any) -> str:
    callee = placement.callee if isinstance(placement, Record) else None
    return callee.name if isinstance(callee, Global) else ""


def _dim(placement: Record, num_dims: int) -> int:
    match placement:
        case Record(state={"dim": int() as dim}) | Record(args=(int() as dim, *_)):
            pass
        case Record(kwargs={"dim": int() as dim}):
            pass
        case _:
            raise ValueError("a DTensor whose placement has another form")
    if not -num_dims <= dim < num_dims:
        raise ValueError(f"a DTensor of {num_dims} dimensions that is cut along {dim}")
    return dim % num_dims


def _in_order(axes: Sequence[_MeshAxis]) -> list[_MeshAxis]:
    """The axes that cut, in the order in which they do: strided ones after those that follow."""
    plain = [axis for axis in axes if _kind(axis.placement) == "Shard"]
    return plain + [axis for axis in reversed(axes) if _kind(axis.placement) == "_StridedShard"]


def _described(axes: Sequence[_MeshAxis], shape: Index, partial: list[_MeshAxis]) -> str | None:
    cuts: dict[int, tuple[int, int]] = {}
    for axis in _in_order(axes):
        dim = _dim(axis.placement, len(shape))
        rank, num_ranks = cuts.get(dim, (0, 1))
        cuts[dim] = rank * axis.num_ranks + axis.rank, num_ranks * axis.num_ranks
    said = [f"shard {i} of {n} of {list(shape)} along {dim}" for dim, (i, n) in cuts.items()]
    said += [f"summand {axis.rank} of {axis.num_ranks} of {list(shape)}" for axis in partial]
    return ", ".join(said) or None
