"""How a team splits its work: who does what, and what stays with the first rank."""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from harness.checkpoint import open_checkpoint
from harness.checkpoint.paths import is_url, to_path
from harness.checkpoint.remote import RemotePath
from harness.errors import CheckpointError
from harness.model import team
from harness.model.state import as_checkpoint
from harness.model.team import num_cores_of_rank
from harness.ranks import current_team
from harness.streaming import Chunk, map_chunks, num_cores, share
from tests.checkpoint.web import Web, serving
from tests.model.ranks import run_ranks


def lead(command: Any) -> Any:
    """What a rank does: on the first, a function that may ask the others."""
    from harness.model.launched import run_on_ranks

    found = []

    def run() -> int:
        found.append(command())
        return 0

    run_on_ranks(run, [])
    return found


def slowly(task: Any) -> tuple[Any, int]:
    """Some work: what it was, and who did it."""
    time.sleep(0.004)
    return task, int(os.environ["RANK"])


def tasks_of_one_cost() -> Any:
    return list(share(slowly, range(300), jobs=1))


def test_tasks_are_done_by_all_ranks_alike_and_come_back_in_order(tmp_path: Path) -> None:
    first, *others = run_ranks(3, lead, tasks_of_one_cost, folder=tmp_path)
    (found,) = first.value
    assert [task for task, _ in found] == list(range(300))
    counts = Counter(rank for _, rank in found)
    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) > 60, counts
    assert [rank.value for rank in others] == [[], []]


class Sized:
    """Some bytes of a tensor, and nothing else of it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def who_scans(item: Sized, chunk: Chunk) -> tuple[int, int]:
    return slowly(chunk.nbytes)


def tensors_of_any_size() -> Any:
    sizes = [1 << 30, *[1000] * 2000, 0]
    return map_chunks([Sized(size) for size in sizes], who_scans, jobs=1)


def test_a_tensor_larger_than_a_share_is_split_too(tmp_path: Path) -> None:
    first, _ = run_ranks(2, lead, tensors_of_any_size, folder=tmp_path)
    ((huge, *small, empty),) = first.value
    assert sum(nbytes for nbytes, _ in huge) == 1 << 30
    shares = Counter(rank for _, rank in huge)
    assert min(shares[0], shares[1]) > 80, shares
    assert [nbytes for done in small for nbytes, _ in done] == [1000] * 2000
    assert empty == []


class Here:
    """Something of one process alone."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot leave")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Here)


def tasks_of_which_some_cannot_leave() -> Any:
    tasks = [Here() if number % 3 else number for number in range(100)]
    return [(isinstance(task, Here), rank) for task, rank in share(slowly, tasks, jobs=2)]


def test_what_cannot_be_sent_stays_with_the_first_rank(tmp_path: Path) -> None:
    first, _ = run_ranks(2, lead, tasks_of_which_some_cannot_leave, folder=tmp_path)
    (found,) = first.value
    assert [is_here for is_here, _ in found] == [bool(number % 3) for number in range(100)]
    assert {rank for is_here, rank in found if is_here} == {0}
    assert {rank for is_here, rank in found if not is_here} == {0, 1}


@pytest.mark.parametrize(
    "name", ["nest_tiny.nemo", "nest_tiny.ckpt", "lightning_two_ranks.ckpt", "memory://team.nemo"]
)
def test_another_rank_opens_the_files_of_a_tensor_by_their_names(data: Path, name: str) -> None:
    if is_url(name):
        to_path(name).write_bytes((data / "nest_tiny.nemo").read_bytes(), overwrite=True)
    with open_checkpoint(name if is_url(name) else data / name) as checkpoint:
        for tensor in checkpoint.tensors.values():
            sent = pickle.loads(team._pickled(tensor))
            assert sent.array().tobytes() == tensor.array().tobytes()


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("where", ["memory", "web", "file"])
def test_a_file_replaced_by_one_of_its_size_is_refused_by_another_rank(
    where: str, web: Web, tmp_path: Path
) -> None:
    place = {"memory": "memory://same.st", "web": f"{web.url}/same.st", "file": "same.st"}[where]

    def put(value: float) -> None:
        data = save({"w": torch.full((3,), value)})
        if where == "web":
            web.files["/same.st"] = data
        elif where == "memory":
            RemotePath(place).write_bytes(data, overwrite=True)
        else:
            (tmp_path / place).write_bytes(data)
            os.utime(tmp_path / place, (value, value))

    def open_it() -> Any:
        return open_checkpoint(tmp_path / place if where == "file" else place)

    put(1)
    with open_it() as checkpoint:
        sent = team._pickled(checkpoint.tensors["w"])
        assert pickle.loads(sent).array().tolist() == [1] * 3
        sent = team._pickled(checkpoint.tensors["w"])
        put(2)
        team._opened.cache_clear()
        team._files.opened.cache_clear()
        with pytest.raises(CheckpointError, match=r"was replaced.* 88 bytes.*rank 0 sees 88 bytes"):
            pickle.loads(sent)
    with open_it() as checkpoint:  # what was open of that name before is no hindrance
        assert pickle.loads(team._pickled(checkpoint.tensors["w"])).array().tolist() == [2] * 3
        put(3)
    with open_it() as checkpoint:
        assert pickle.loads(team._pickled(checkpoint.tensors["w"])).array().tolist() == [3] * 3


def test_what_is_in_memory_cannot_be_sent() -> None:
    live = as_checkpoint({"w": torch.zeros(3)}, "live").tensors["w"]
    with pytest.raises(TypeError):
        team._pickled(live)


def test_without_other_ranks_there_is_no_team() -> None:
    assert current_team() is None


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.model.team.num_cores", lambda: 9)
    for ranks, cores in [("1", 9), ("2", 4), ("16", 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert num_cores_of_rank() == cores
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert num_cores_of_rank() == 9
    assert num_cores() >= 1
