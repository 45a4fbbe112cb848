"""Live models that are spread over ranks: one golden, one verdict, whatever the placement."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import harness
from harness.errors import HarnessError
from harness.model.distributed import sharded
from tests.model.distributed.ranks import run_ranks


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


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a consolidated checkpoint, and of goldens by one process."""
    folder = tmp_path_factory.mktemp("goldens")
    torch.save(net().state_dict(), folder / "net.pt")
    harness.record(torch.load(folder / "net.pt"), folder / "net.safetensors")
    harness.record(whole_state(), folder / "whole.safetensors")
    return folder


def in_words(comparison: harness.Comparison) -> Any:
    """What a comparison came to, so that ranks can be compared."""
    return comparison.verdict, comparison.num_identical, repr(comparison.findings)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except HarnessError as error:
        return str(error)
    return ""


def fsdp(size: int, folder: Path, own: Path) -> Any:
    """What one of the first `size` ranks does with a model under FSDP2."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh("cpu", range(size))
    if dist.get_rank() >= size:
        return None
    model = net()
    fully_shard(model.norm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    golden = own / f"live{size}.safetensors"
    recorded = harness.record(model, golden)
    written = golden.stat().st_mtime_ns
    same = harness.verify(model.state_dict(), golden)
    by_file = harness.verify(model, folder / "net.safetensors")
    with torch.no_grad():
        if dist.get_rank() == size - 1:
            model.embed.weight.to_local()[5, 7] = 3.0
        model.narrow.to_local().mul_(1.1)
    changed = harness.verify(model, folder / "net.safetensors")
    updated = harness.update(model, recorded, reason="meant")
    return {
        "root": recorded.fingerprint.root,
        "same": in_words(same),
        "by file": in_words(by_file),
        "changed": in_words(changed),
        "findings": [(f.kind, f.key, f.difference.elements[:1]) for f in changed.findings],
        "updated": updated.fingerprint.root,
        "absent": error_of(lambda: harness.verify(model, own / "absent.safetensors")),
        "after": in_words(harness.verify(model, golden)),
        "replaced": golden.stat().st_mtime_ns > written,
    }


def placed(folder: Path) -> Any:
    """What a rank does with tensors in many placements on a mesh of 2 x 2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

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
    return in_words(harness.verify(state, folder / "whole.safetensors"))


def refused() -> Any:
    """What two ranks hear of states that are no one state."""
    from torch.distributed._shard.sharded_tensor import Shard as Piece
    from torch.distributed._shard.sharded_tensor import ShardedTensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = DeviceMesh("cpu", [0, 2])
    rank = dist.get_rank()
    group = dist.new_group([0, 2])
    if rank not in (0, 2):
        return None
    local = torch.ones(4, 4)
    piece = Piece.from_tensor_and_offsets(local, [2 * rank, 0], rank)
    states: list[Mapping[str, torch.Tensor]] = [
        {"sum": DTensor.from_local(local, mesh, [Partial()])},
        {f"w{rank}": DTensor.from_local(local, mesh, [Shard(0)])},
        {"w": DTensor.from_local(local.to(torch.float16 if rank else torch.float32), mesh)},
        {"w": DTensor.from_local(local, mesh, [Shard(0)]), "meta": torch.ones(2, device="meta")},
        {"fsdp1": ShardedTensor._init_from_local_shards([piece], (8, 4), process_group=group)},
    ]
    found: list[Any] = [error_of(lambda s=state: harness.fingerprint(s)) for state in states]
    state = {"narrow": DTensor.from_local(net().narrow.chunk(2)[rank // 2], mesh, [Shard(0)])}
    found.append(harness.fingerprint(state).tensors["narrow"].digest)
    return found


def replicated(folder: Path) -> Any:
    """What a rank does with a model that each has in full: the first one alone verifies it."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net())
    if dist.get_rank() == 0:
        return harness.verify(model.module, folder / "net.safetensors").verdict
    return None


def everything(folder: Path, own: Path) -> Any:
    sharded._PIECE_NBYTES = 1 << 20
    dist.init_process_group("gloo")
    found = {
        "fsdp": [fsdp(size, folder, own) for size in (1, 2, 3)],
        "placed": placed(folder),
        "refused": refused(),
        "replicated": replicated(folder),
    }
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_a_spread_model_is_as_its_consolidated_checkpoint(goldens: Path, tmp_path: Path) -> None:
    ranks = run_ranks(4, everything, goldens, tmp_path, folder=tmp_path / "run")
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].err
    values = [rank.value for rank in ranks]

    expected = harness.fingerprint(goldens / "net.pt")
    for size in (1, 2, 3):
        one, *others = [value["fsdp"][size - 1] for value in values]
        assert others == [one] * (size - 1) + [None] * (4 - size)
        assert one["root"] == expected.root != one["updated"]
        assert one["same"][:2] == one["by file"][:2] == ("identical", len(net().state_dict()))
        row = 1999 - len(torch.arange(1999).chunk(size)[-1]) + 5
        assert [(kind, key) for kind, key, _ in one["findings"]] == [
            ("different", "embed.weight"),
            ("different", "head.weight"),
            ("different", "narrow"),
        ]
        (element,) = one["findings"][0][2]
        assert (element.index, element.actual) == ((row, 7), 3.0)
        assert one["absent"] == f"{tmp_path / 'absent.safetensors'}: no golden there"
        assert one["after"][0] == "identical"
        assert one["replaced"]

    assert {value["placed"] for value in values} == {("identical", len(whole_state()), "()")}

    one, second, other, fourth = (value["refused"] for value in values)
    assert one == other
    assert second is fourth is None
    partial, keys, dtypes, meta, fsdp1, digest = one
    assert partial.startswith("rank 0: sum: is a partial sum on every rank")
    assert keys == "w0: rank 0 has a DTensor, float32 [8, 4], rank 2 nothing"
    assert dtypes.startswith("w: rank 0 has a DTensor, float32 [4, 4], rank 2 a DTensor, float16")
    assert meta.startswith("rank 0: meta: still on the meta device")
    assert fsdp1.startswith("fsdp1: the values of a ShardedTensor cannot be read where they are")
    assert digest == expected.tensors["narrow"].digest

    assert [value["replicated"] for value in values] == ["identical", None, None, None]


def record_fsdp(own: Path) -> str:
    """What a rank does that records, and of which the second is killed later."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = net()
    fully_shard(model)
    harness.record(model, own / "live.safetensors")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: harness.fingerprint(model))


def test_the_golden_has_the_bytes_of_one_process_and_a_killed_rank_ends_the_call(
    goldens: Path, tmp_path: Path
) -> None:
    first, second, third = run_ranks(3, record_fsdp, tmp_path, folder=tmp_path / "run")
    expected = (goldens / "net.safetensors").read_bytes()
    assert (tmp_path / "live.safetensors").read_bytes() == expected
    assert second.code == -signal.SIGKILL
    for rank in (first, third):
        assert re.search("lost another rank: .*(closed|reset) by peer", rank.value)
        assert rank.ended - second.ended < 10
