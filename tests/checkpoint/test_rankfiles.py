"""State dicts of DTensors that every rank saved by itself, read one by one and as a set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import harness
from harness.checkpoint import open_checkpoint
from harness.checkpoint.rankfiles import with_sets
from harness.errors import CheckpointError
from tests.conftest import Harness

Placed = tuple[torch.Tensor, Sequence[Any]]


@contextmanager
def _as_rank(rank: int, size: int) -> Iterator[None]:
    """Be one rank of a group of which no other exists."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _save(
    folder: Path, mesh: tuple[int, ...], state: Mapping[str, Placed | object], *, first: int = 0
) -> Path:
    """Save what each rank has: of (tensor, placements) its part, cut as torch does."""
    size = math.prod(mesh)
    folder.mkdir(exist_ok=True)
    for rank in range(first, size):
        with _as_rank(rank, size):
            ranks = init_device_mesh("cpu", mesh)
            held = {}
            for key, entry in state.items():
                if isinstance(entry, tuple):
                    whole, placements = entry
                    cut = DTensor.from_local(whole, ranks, [Replicate()] * len(mesh))
                    if any(isinstance(placement, Partial) for placement in placements):
                        cut = DTensor.from_local(whole, ranks, placements)
                    else:
                        cut = cut.redistribute(ranks, placements)
                    held[key] = cut
                else:
                    held[key] = entry(rank) if callable(entry) else entry
            torch.save(held, folder / f"model_world_size_{size}_rank_{rank}.pt")
    return folder


_SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    shapes=st.lists(_SHAPES, min_size=1, max_size=4),
    mesh=st.sampled_from([(3,), (2, 2)]),
    data=st.data(),
)
def test_a_set_is_the_whole_model(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    mesh: tuple[int, ...],
    data: st.DataObject,
) -> None:
    tmp_path = tmp_path_factory.mktemp("ranks")
    state: dict[str, Placed] = {}
    for index, shape in enumerate(shapes):
        kinds = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape)))])
        placements = [data.draw(kinds) for _ in mesh]
        state[f"w{index}"] = (torch.randn(shape), placements)
    folder = _save(tmp_path / "ranks", mesh, state)
    torch.save({key: whole for key, (whole, _) in state.items()}, tmp_path / "full.pt")
    assert harness.diff(tmp_path / "full.pt", folder).verdict == "identical"


def test_a_rank_alone_says_which_part_it_holds(tmp_path: Path) -> None:
    state = {
        "cut": (torch.randn(5, 2), [Shard(0)]),
        "across": (torch.randn(4, 3), [Shard(1)]),
        "whole": (torch.randn(2), [Replicate()]),
        "sum": (torch.randn(2), [Partial()]),
    }
    folder = _save(tmp_path / "ranks", (2,), state)
    with open_checkpoint(folder / "model_world_size_2_rank_1.pt") as checkpoint:
        found = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    assert found == {
        "cut[shard 1 of 2 of [5, 2] along 0]": (2, 2),
        "across[shard 1 of 2 of [4, 3] along 1]": (4, 1),
        "whole": (2,),
        "sum[summand 1 of 2 of [2]]": (2,),
    }
    with pytest.raises(CheckpointError, match="'sum' is a sum over ranks"):
        open_checkpoint(folder)
    torch.save({key: torch.zeros(2) for key in state}, tmp_path / "full.pt")
    alone = harness.diff(tmp_path / "full.pt", folder / "model_world_size_2_rank_1.pt")
    [note] = alone.notes
    assert note.startswith("3 entries are parts of a tensor: give the files of all ranks")


def test_a_tensor_smaller_than_the_mesh_is_on_some_ranks(tmp_path: Path) -> None:
    state = {"w": (torch.ones(1, 1), [Shard(0), Shard(1)]), "none": (torch.ones(0), [Shard(0)] * 2)}
    with open_checkpoint(_save(tmp_path / "ranks", (2, 2), state)) as checkpoint:
        assert {key: t.shape for key, t in checkpoint.tensors.items()} == {
            "w": (1, 1),
            "none": (0,),
        }


def test_a_change_on_one_rank_is_found(tmp_path: Path) -> None:
    whole = torch.zeros(4, 2)
    one = _save(tmp_path / "one", (2,), {"w": (whole, [Shard(0)])})
    other = _save(tmp_path / "other", (2,), {"w": (whole + 1, [Shard(0)])})
    (other / "model_world_size_2_rank_0.pt").unlink()
    (one / "model_world_size_2_rank_0.pt").rename(other / "model_world_size_2_rank_0.pt")
    one = _save(tmp_path / "one", (2,), {"w": (whole, [Shard(0)])})
    found = harness.diff(one, other).findings
    assert [(finding.kind, finding.key) for finding in found] == [("different", "w")]
    assert found[0].difference is not None
    assert found[0].difference.elements[0].index == (2, 0)


def test_what_all_ranks_should_have_alike_and_do_not_is_an_entry_of_its_own(
    tmp_path: Path,
) -> None:
    state = {
        "w": (torch.zeros(4), [Shard(0)]),
        "same": torch.ones(2),
        "seen": lambda rank: torch.tensor(rank),
        "step": lambda rank: 7 + rank,
    }
    folder = _save(tmp_path / "ranks", (2,), state)
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == [
            *("w", "same", "seen[rank 1]", "seen", "step[rank 1]", "step"),
        ]
        assert checkpoint.container == "torch files of 2 ranks"


def test_a_set_without_one_of_its_ranks_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "ranks", (3,), {"w": (torch.zeros(4), [Shard(0)])})
    (folder / "model_world_size_3_rank_1.pt").unlink()
    with pytest.raises(CheckpointError, match="1 are missing, the first of them of rank 1"):
        open_checkpoint(folder)
    for file in folder.iterdir():
        file.rename(folder / file.name.replace("world_size_3_", ""))
    (folder / "model_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks its element"):
        open_checkpoint(folder)


def test_several_sets_in_a_folder_are_told_apart(tmp_path: Path) -> None:
    folder = _save(tmp_path / "ranks", (2,), {"w": (torch.zeros(4), [Shard(0)])})
    for rank in range(2):
        torch.save({"lr": torch.ones(1)}, folder / f"optim_world_size_2_rank_{rank}.pt")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
        assert checkpoint.others == (("optim_world_size_2_rank_*.pt", None),)
    with open_checkpoint(folder / "optim_*_rank_*.pt") as checkpoint:
        assert list(checkpoint.tensors) == ["lr"]
    for file in [*folder.iterdir()]:
        file.rename(folder / file.name.replace("model", "actor").replace("optim", "critic"))
    with pytest.raises(CheckpointError, match="several saves"):
        open_checkpoint(folder)


def test_the_files_of_all_ranks_are_one_checkpoint_however_a_shell_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Harness
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 2.0)):
        _save(tmp_path / name, (2,), {"w": (torch.full((4, 2), value), [Shard(0)])})
    first, second = (
        [Path(name) / f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)] for name in "ab"
    )
    globs = [Path(name) / "model_world_size_2_rank_*.pt" for name in "ab"]
    other = Path("a") / "other.pt"
    assert with_sets([*first, other, *second]) == [globs[0], other, globs[1]]
    assert with_sets([first[0], *second]) == [first[0], globs[1]]

    assert harness("record", *first).code == 0
    assert harness("verify").code == 0
    assert harness("verify", globs[0]).code == 0
    assert harness("verify", *first).code == 0
    for file, changed in zip(first, second, strict=True):
        file.write_bytes(changed.read_bytes())
    found = harness("verify")
    assert (found.code, "all 2" in found.out) == (1, True)
