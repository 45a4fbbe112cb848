"""DeepSpeed's ZeRO checkpoints: float32 weights in flat vectors that the ranks share.

In: a folder with `*_optim_states.pt` of each rank beside `*model_states.pt`. Out: the float32
weights, whole, as DeepSpeed's own `zero_to_fp32.py` gives them, and the buffers. Refused: vectors
that are too short for the shapes, ranks that are missing, and weights that tensor parallelism
splits, too. The files are pickles, read as data.

The layout, as in deepspeed/utils/zero_to_fp32.py of 0.9 to 0.17. Stages 1 and 2: of each group of
parameters (`param_shapes`, one mapping a group) the ranks' partitions, one after the other, are one
vector with the parameters one after the other. Stage 3: each parameter is cut into as many equal
parts as there are ranks, the last padded, and part i lies in the vector of rank i.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from harness.checkpoint.formats.assembled import Piece, assemble, is_index
from harness.checkpoint.formats.torchfile import TorchFile
from harness.checkpoint.keys import format_key
from harness.checkpoint.sources.paths import AnyPath
from harness.checkpoint.tensors import Tensor
from harness.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_VECTORS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
_VECTORS_OF_3 = "fp32_flat_groups"
_AGAIN = "copy the folder again, with the files of all ranks, or save the checkpoint again"


def zero_files(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of the optimizer and of the model, by rank; none where it is no ZeRO."""
    optimizer = sorted((int(m[1]), n) for n in names if (m := _OPTIMIZER.fullmatch(n)))
    model = sorted((int(m[1] or 0), n) for n in names if (m := _MODEL.fullmatch(n)))
    if not optimizer or not model:
        return [], []
    return [name for _, name in optimizer], [name for _, name in model]


def read_zero(
    folder: AnyPath, model: Mapping[str, TorchFile], optimizer: Mapping[str, TorchFile]
) -> list[Tensor]:
    """Assemble the weights; the files of each kind are in the order of their ranks."""
    name = str(folder)
    split = {m[2] for n in optimizer if (m := _OPTIMIZER.fullmatch(n))}
    if len(split) > 1:
        raise CheckpointError(
            f"{name}: its weights are split by tensor parallelism over {len(split)} ranks, too, "
            "which is not read",
            hint="convert it first, with ds_to_universal.py or the project's own script",
        )
    states = [_mapping(file.root, file_name) for file_name, file in model.items()]
    saved = [
        _mapping(_mapping(file.root, file_name).get("optimizer_state_dict"), file_name)
        for file_name, file in optimizer.items()
    ]
    stage = saved[0].get("zero_stage")
    if stage not in (1, 2, 3):
        raise _unfit(name, f"is of ZeRO stage {stage!r}, and 1, 2 and 3 are read")
    counts = saved[0].get("partition_count")
    num_ranks = max(counts) if isinstance(counts, list) and counts else counts
    if num_ranks != len(saved):
        raise _unfit(name, f"has the files of {len(saved)} ranks, of {num_ranks!r}")
    shapes = _shapes(states[0], name)
    key = _VECTORS.get(stage, _VECTORS_OF_3)
    vectors = [_vectors(one.get(key), name) for one in saved]
    found = list(
        _of_stage_3(name, shapes, vectors) if stage == 3 else _of_stage_2(name, shapes, vectors)
    )
    found += _frozen(name, states, is_split=stage == 3)
    weights = {tensor.key: tensor for tensor in found}
    shared = states[0].get("shared_params")
    for tied, original in shared.items() if isinstance(shared, dict) else ():
        if format_key((original,)) in weights:
            found.append(weights[format_key((original,))].named(format_key((tied,))))
    buffers = states[0].get("buffer_names")
    module = states[0].get("module")
    if isinstance(buffers, (list, tuple)) and isinstance(module, dict):
        held = ((name, module.get(name)) for name in buffers)
        found += (t.named(format_key((name,))) for name, t in held if isinstance(t, Tensor))
    return found


def _of_stage_2(
    name: str, groups: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[Tensor]]
) -> Iterator[Tensor]:
    for number, shapes in enumerate(groups):
        if any(len(vectors) != len(groups) for vectors in ranks):
            raise _unfit(name, f"has {len(groups)} groups of parameters, and not as many vectors")
        vectors = [one[number] for one in ranks]
        start = 0
        for key, shape in shapes.items():
            stop = start + prod(shape)
            yield _joined(name, key, shape, list(_span(vectors, start, stop)))
            start = stop


def _of_stage_3(
    name: str, groups: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[Tensor]]
) -> Iterator[Tensor]:
    start = 0
    for key, shape in ((k, s) for shapes in groups for k, s in shapes.items()):
        numel = prod(shape)
        share = -(-numel // len(ranks))
        spans: list[tuple[Tensor, int, int]] = []
        for rank, vectors in enumerate(ranks):
            wanted = min(share, numel - rank * share)
            if wanted > 0:
                spans += _span(vectors, start, start + wanted)
        yield _joined(name, key, shape, spans)
        start += share


def _span(vectors: Sequence[Tensor], start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
    """The parts of several vectors, one after the other, between two elements of them all."""
    first = 0
    for vector in vectors:
        last = first + vector.numel
        if max(start, first) < min(stop, last):
            yield vector, max(start, first) - first, min(stop, last) - first
        first = last


def _frozen(name: str, states: Sequence[Mapping[Any, Any]], *, is_split: bool) -> Iterator[Tensor]:
    """Parameters that no optimizer has: whole, or in stage 3 a fragment in each rank's file."""
    shapes = states[0].get("frozen_param_shapes")
    for key, shape in shapes.items() if isinstance(shapes, dict) else ():
        fragments = [
            _mapping(state.get("frozen_param_fragments"), name).get(key) for state in states
        ]
        wanted = fragments if is_split else fragments[:1]
        parts = [part for part in wanted if isinstance(part, Tensor)]
        if not is_index(shape) or len(parts) < len(wanted):
            raise _unfit(name, f"has no values of the frozen {key!r}")
        left = prod(shape)
        spans: list[tuple[Tensor, int, int]] = []
        for part in parts:
            spans.append((part, 0, min(part.numel, left)))
            left -= spans[-1][2]
        yield _joined(name, str(key), shape, [span for span in spans if span[2]])


def _joined(
    name: str, key: str, shape: tuple[int, ...], spans: Sequence[tuple[Tensor, int, int]]
) -> Tensor:
    numel, pieces, at = prod(shape), [], 0
    for vector, start, stop in spans:
        part = replace(vector, shape=(stop - start,), offset=vector.offset + start, strides=None)
        pieces.append(Piece(start=(at,), tensor=part, where=vector.key))
        at += stop - start
    if at != numel:
        raise _unfit(name, f"has {at} of the {numel} elements of {key!r}")
    dtypes = {piece.tensor.dtype for piece in pieces}
    if len(dtypes) > 1:
        raise _unfit(name, f"has {key!r} in {', '.join(sorted(d.name for d in dtypes))}")
    if not pieces:
        raise _unfit(name, f"has no elements of {key!r}")
    (dtype,) = dtypes
    flat = assemble(name, key, dtype, (numel,), pieces, hint=_AGAIN)
    return replace(flat, key=format_key((key,)), shape=shape, strides=None)


def _shapes(state: Mapping[Any, Any], name: str) -> list[dict[str, tuple[int, ...]]]:
    groups = state.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise _unfit(name, "has no param_shapes, which say what its vectors hold")
    found = []
    for group in groups:
        shapes = {key: tuple(shape) for key, shape in group.items() if isinstance(shape, tuple)}
        if len(shapes) < len(group) or not all(is_index(shape) for shape in shapes.values()):
            raise _unfit(name, "has param_shapes of an unknown form")
        found.append({str(key): shape for key, shape in shapes.items()})
    return found


def _vectors(value: object, name: str) -> list[Tensor]:
    vectors = list(value) if isinstance(value, (list, tuple)) else [value]
    fit = [v for v in vectors if isinstance(v, Tensor) and len(v.shape) == 1 and v.is_contiguous]
    if not fit or len(fit) < len(vectors):
        raise _unfit(name, "has no flat vectors of float32 weights in its optimizer states")
    return fit


def _mapping(value: object, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise _unfit(name, "is not what DeepSpeed saves")
    return value


def _unfit(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name}: {why}", hint=_AGAIN)
