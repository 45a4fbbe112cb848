"""Live models that are spread over ranks: one golden, one verdict, whatever the placement."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import harness
from harness.checkpoint.dtypes import DTYPES
from harness.errors import HarnessError
from harness.model.distributed.sharded import Box, Shards, _Row
from tests.model.distributed.ranks import Rank, run_ranks

# The geometry, on one process.


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that cover it: every axis cut or not."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    boxes = [Box((), ())]
    for size in shape:
        places = sorted(draw(st.sets(st.integers(1, size), max_size=2)) | {0, size})
        ranges = list(itertools.pairwise(places))
        boxes = [
            Box((*box.offsets, start), (*box.sizes, stop - start))
            for box in boxes
            for start, stop in ranges
        ]
    return shape, boxes


@pytest.mark.parametrize("least", [1, 64], ids=["run by run", "by index"])
@given(cut=cuts(), data=st.data())
def test_boxes_give_any_range_of_the_tensor(least: int, cut: Any, data: st.DataObject) -> None:
    shape, boxes = cut
    whole = np.arange(math.prod(shape))
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    out = np.full(stop - start, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.model.distributed.sharded._MIN_RUN", least)
        for box in boxes:
            places = tuple(
                slice(o, o + size) for o, size in zip(box.offsets, box.sizes, strict=True)
            )
            held = whole.reshape(shape)[places].reshape(-1)
            first, last = box.num_before(start, shape), box.num_before(stop, shape)
            if first < last:
                box.scatter(held[first:last], first, out, start, shape)
    assert out.tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 4))],
        [Box((0, 0), (2, 4)), Box((1, 0), (2, 4))],
        [Box((0, 0), (4, 2)), Box((0, 2), (4, 2)), Box((0, 1), (4, 2))],
        [Box((0, 0), (4, 3)), Box((0, 2), (2, 2))],
    ],
    ids=["hole", "overlap and hole", "overlap", "overlap of the right size"],
)
def test_boxes_that_do_not_cover_a_tensor_once_are_refused(boxes: list[Box]) -> None:
    rows = [_Row("w", DTYPES["float32"], (4, 4), box, None) for box in boxes]
    with pytest.raises(HarnessError, match=r"w: the pieces on . ranks leave holes or overlap"):
        Shards(0, rows)


# Real ranks.


class Net(nn.Module):
    """Weights of several chunks, uneven ones, tied ones, an integer, one that only one rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1999, 1100)
        self.head = nn.Linear(1100, 1999)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.one = nn.Parameter(torch.randn(1, 5000))
        self.narrow = nn.Parameter(torch.randn(700, 31, dtype=torch.bfloat16))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the consolidated checkpoint, and of the golden of its state dict."""
    folder = tmp_path_factory.mktemp("consolidated")
    torch.save(net().state_dict(), folder / "net.pt")
    harness.record(torch.load(folder / "net.pt"), folder / "net.safetensors")
    return folder


def in_words(comparison: harness.Comparison) -> Any:
    """What a comparison came to, so that ranks can be compared."""
    return comparison.verdict, comparison.num_identical, repr(comparison.findings)


def fsdp(folder: Path, own: Path) -> Any:
    """What a rank does with a model under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    from harness import api

    dist.init_process_group("gloo")
    written = []
    write = api.write_golden
    api.write_golden = lambda golden, **options: written.append(write(golden, **options))
    model = net()
    fully_shard(model.norm)
    fully_shard(model)
    recorded = harness.record(model, own / "live.safetensors")
    same = harness.verify(model.state_dict(), own / "live.safetensors")
    by_file = harness.verify(model, folder / "net.safetensors")
    printed = harness.fingerprint(model)
    with torch.no_grad():
        local = model.embed.weight.to_local()
        if dist.get_rank() == dist.get_world_size() - 1:
            local[5, 7] = 3.0
        model.narrow.to_local().mul_(1.1)
    changed = harness.verify(model, folder / "net.safetensors")
    updated = harness.update(model, recorded, reason="meant")
    errors = []
    try:
        harness.verify(model, own / "absent.safetensors")
    except harness.GoldenError as error:
        errors.append(str(error))
    after = harness.verify(model, own / "live.safetensors")
    dist.destroy_process_group()
    return {
        "written": len(written),
        "root": recorded.fingerprint.root,
        "printed": printed.root,
        "same": in_words(same),
        "by file": in_words(by_file),
        "changed": in_words(changed),
        "findings": [(f.kind, f.key, f.difference.elements[:1]) for f in changed.findings],
        "updated": updated.fingerprint.root,
        "errors": errors,
        "after": in_words(after),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_model_under_fsdp2_has_the_golden_of_its_consolidated_checkpoint(
    consolidated: Path, size: int, tmp_path: Path
) -> None:
    ranks = run_ranks(size, fsdp, consolidated, tmp_path, folder=tmp_path / "run")
    assert [rank.code for rank in ranks] == [0] * size, ranks[-1].err
    values = [rank.value for rank in ranks]
    assert [value.pop("written") for value in values] == [2] + [0] * (size - 1)
    assert all(value == values[0] for value in values)
    found = values[0]
    expected = harness.fingerprint(consolidated / "net.pt")
    assert found["root"] == found["printed"] == expected.root
    assert found["same"][:2] == found["by file"][:2] == ("identical", len(net().state_dict()))
    row = 1999 - len(torch.arange(1999).chunk(size)[-1]) + 5
    kinds = [(kind, key) for kind, key, _ in found["findings"]]
    assert kinds == [
        ("different", "embed.weight"),
        ("different", "head.weight"),
        ("different", "narrow"),
    ]
    (element,) = found["findings"][0][2]
    assert (element.index, element.actual) == ((row, 7), 3.0)
    assert found["errors"] == [f"{tmp_path / 'absent.safetensors'}: no golden there"]
    assert found["after"][0] == "identical"
    assert found["updated"] != found["root"]


def test_the_golden_of_a_spread_model_has_the_bytes_of_one_process(
    consolidated: Path, tmp_path: Path
) -> None:
    ranks = run_ranks(2, record_fsdp, tmp_path, folder=tmp_path / "run")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    expected = (consolidated / "net.safetensors").read_bytes()
    assert (tmp_path / "live.safetensors").read_bytes() == expected


def record_fsdp(own: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = net()
    fully_shard(model)
    harness.record(model, own / "live.safetensors")
    dist.destroy_process_group()


def whole_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "rows": torch.randn(1501, 900),
        "columns": torch.randn(901, 1300, dtype=torch.float64),
        "last": torch.randn(70, 6, 3).to(torch.complex64),
        "both": torch.randn(1030, 1021),
        "twice": torch.randint(0, 100, (1030, 7), dtype=torch.int8),
        "strided": torch.randn(1024, 33).to(torch.float16),
        "replicated": torch.randn(1100, 1000),
        "hybrid": torch.randn(999, 5) > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.randn(0, 4),
        "transposed": torch.randn(300, 200).t(),
        "plain": torch.randn(10),
    }


def placed(folder: Path) -> Any:
    """What a rank does with tensors in many placements on a mesh of 2 x 2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements = {
        "rows": (mesh["tp"], [Shard(0)]),
        "columns": (mesh["dp"], [Shard(1)]),
        "last": (mesh["tp"], [Shard(2)]),
        "both": (mesh, [Shard(1), Shard(0)]),
        "twice": (mesh, [Shard(0), Shard(0)]),
        "replicated": (mesh, [Replicate(), Replicate()]),
        "hybrid": (mesh, [Replicate(), Shard(0)]),
        "scalar": (mesh, [Replicate(), Replicate()]),
        "empty": (mesh, [Shard(0), Replicate()]),
        "transposed": (mesh, [Replicate(), Shard(1)]),
    }
    state: dict[str, torch.Tensor] = {}
    for key, tensor in whole_state().items():
        if key in placements:
            state[key] = distribute_tensor(tensor, *placements[key])
        elif key == "strided":  # as FSDP2 shards what tensor parallelism has sharded already
            dp, tp = mesh.get_coordinate()
            local = tensor.chunk(2)[tp].chunk(2)[dp]
            state[key] = DTensor.from_local(
                local,
                mesh,
                [_StridedShard(0, split_factor=2), Shard(0)],
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        else:
            state[key] = tensor
    found = in_words(harness.verify(state, folder / "whole.safetensors"))
    dist.destroy_process_group()
    return found


def test_any_placement_has_the_same_digests(tmp_path: Path) -> None:
    harness.record(whole_state(), tmp_path / "whole.safetensors")
    ranks = run_ranks(4, placed, tmp_path, folder=tmp_path / "run")
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].err
    assert {rank.value for rank in ranks} == {("identical", len(whole_state()), "()")}


def errors_of(ranks: list[Rank]) -> list[Any]:
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks[0].err
    return [rank.value for rank in ranks]


def refused() -> Any:
    """What a rank hears of states that are no one state."""
    from torch.distributed._shard.sharded_tensor import Shard as Piece
    from torch.distributed._shard.sharded_tensor import ShardedTensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1))
    local = torch.ones(4, 4)
    piece = Piece.from_tensor_and_offsets(local, [4 * rank, 0], rank)
    states: list[Mapping[str, torch.Tensor]] = [
        {"sum": DTensor.from_local(local, mesh, [Partial()])},
        {f"w{rank}": DTensor.from_local(local, mesh, [Shard(0)])},
        {"w": DTensor.from_local(local.to(torch.float16 if rank else torch.float32), mesh)},
        {"w": DTensor.from_local(local, mesh, [Shard(0)]), "meta": torch.ones(2, device="meta")},
        {"holes": DTensor.from_local(local, square, [_StridedShard(0, split_factor=2), Shard(0)])},
        {"fsdp1": ShardedTensor._init_from_local_shards([piece], (8, 4))},
    ]
    found = []
    for state in states:
        try:
            harness.fingerprint(state)
        except HarnessError as error:
            found.append(str(error))
        else:
            found.append("")
    dist.destroy_process_group()
    return found


def test_what_is_no_one_state_is_refused_on_all_ranks_alike(tmp_path: Path) -> None:
    one, other = errors_of(run_ranks(2, refused, folder=tmp_path))
    assert one == other
    partial, keys, dtypes, meta, holes, fsdp1 = one
    assert partial.startswith("rank 0: sum: is a partial sum on every rank")
    assert keys == "w0: rank 0 has a DTensor, float32 [8, 4], rank 1 nothing"
    assert dtypes.startswith("w: rank 0 has a DTensor, float32 [4, 4], rank 1 a DTensor, float16")
    assert meta.startswith("rank 0: meta: still on the meta device")
    assert holes == "holes: the pieces on 2 ranks leave holes or overlap"
    assert fsdp1.startswith("fsdp1: the values of a ShardedTensor cannot be read where they are")


def alone(folder: Path) -> Any:
    """What a rank does with a replicated model, on the first rank alone; then two of three."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    model = DistributedDataParallel(net())
    found = []
    if dist.get_rank() == 0:
        found.append(in_words(harness.verify(model.module, folder / "net.safetensors"))[0])
    mesh = DeviceMesh("cpu", [0, 2])
    if dist.get_rank() != 1:
        state = {"narrow": distribute_tensor(net().narrow.detach(), mesh, [Shard(0)])}
        found.append(harness.fingerprint(state).tensors["narrow"].digest)
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_only_the_ranks_that_hold_a_part_need_call(consolidated: Path, tmp_path: Path) -> None:
    first, second, third = errors_of(run_ranks(3, alone, consolidated, folder=tmp_path))
    digest = harness.fingerprint(consolidated / "net.pt").tensors["narrow"].digest
    assert (first, second, third) == (["identical", digest], [], [digest])


def unreadable() -> Any:
    """What two of three ranks hear while the pieces of one, then of the other, cannot be read."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from harness.model.distributed.team import TorchTeam
    from harness.model.state import _Memory

    dist.init_process_group("gloo")
    mesh = DeviceMesh("cpu", [0, 2])
    if dist.get_rank() == 1:
        return None
    state = {"layer.weight": distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])}
    TorchTeam.map = lambda self, work, tasks, **_: [*map(work, tasks)]  # type: ignore[assignment]
    honest = _Memory.read_into

    def lost(self: Any, offset: int, buffer: memoryview) -> None:
        raise RuntimeError("the device is lost")

    found = []
    for victim in (2, 0):
        if dist.get_rank() == victim:
            _Memory.read_into = lost  # type: ignore[method-assign]
        try:
            harness.fingerprint(state)
        except HarnessError as error:
            found.append((type(error).__name__, str(error), error.hint))
        _Memory.read_into = honest  # type: ignore[method-assign]
    found.append(harness.fingerprint(state).root)
    return found


def test_a_piece_that_cannot_be_read_is_named_with_its_rank_and_the_cause(tmp_path: Path) -> None:
    one, _, other = errors_of(run_ranks(3, unreadable, folder=tmp_path))
    assert one == other
    assert one[:2] == [
        (
            "ModelError",
            f"layer.weight: rank {rank} cannot read its piece [3, 4] at [{start}, 0] of [6, 4]: "
            "RuntimeError: the device is lost",
            f"see that the device of rank {rank} works and has memory left, then run again",
        )
        for rank, start in [(2, 3), (0, 0)]
    ]
    assert one[2] == harness.fingerprint({"layer.weight": torch.ones(6, 4)}).root


def killed(victim: int) -> Any:
    """What a rank hears when another one is killed while its pieces are read."""
    from torch.distributed.fsdp import fully_shard

    fingerprint: Any = import_module("harness.fingerprints.scan")
    dist.init_process_group("gloo")
    model = net()
    fully_shard(model)
    honest = fingerprint._scan_chunk

    def scan(item: Any, chunk: Any) -> Any:
        if os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(item, chunk)

    scan.__module__, scan.__qualname__ = honest.__module__, honest.__qualname__
    fingerprint._scan_chunk = scan
    try:
        harness.fingerprint(model)
    except HarnessError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_call_on_all(victim: int, tmp_path: Path) -> None:
    ranks = run_ranks(3, killed, victim, folder=tmp_path)
    assert ranks[victim].code == -signal.SIGKILL
    for rank in (rank for number, rank in enumerate(ranks) if number != victim):
        name, message = rank.value
        assert name == "TeamError"
        assert "has died" in message
        assert rank.ended - ranks[victim].ended < 5
