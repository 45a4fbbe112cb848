"""How a team splits its work: who does what, and what stays with the first rank."""

from __future__ import annotations

import math
import os
import pickle
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

import harness
from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.formats.assembled import Piece, assemble
from harness.checkpoint.sources.files import MAX_OPEN_FILES, FileSource
from harness.checkpoint.sources.paths import is_url, to_path
from harness.checkpoint.sources.remote import RemotePath
from harness.checkpoint.tensors import Checkpoint, Storage, Tensor
from harness.comparison.measuring import nothing
from harness.errors import CheckpointError
from harness.fingerprints.scan import fingerprint
from harness.model.distributed import team
from harness.model.distributed.team import num_cores_of_rank
from harness.model.state import as_checkpoint
from harness.streaming.chunks import Chunk, map_chunks, share
from harness.streaming.ranks import current_team, working_as
from harness.streaming.threads import num_cores
from harness.streaming.workers import Workers
from tests.checkpoint.dcp_writer import halves, write_dcp
from tests.checkpoint.web import Web, serving
from tests.model.distributed.ranks import run_ranks


def lead(command: Any) -> Any:
    """What a rank does: on the first, a function that may ask the others."""
    from harness.model.distributed.launched import run_on_ranks

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

    def part(self, chunk: Chunk) -> Sized:
        return self


def who_scans(item: Sized, chunk: Chunk) -> tuple[int, int]:
    return slowly(chunk.nbytes)


def tensors_of_any_size() -> Any:
    sizes = [1 << 30, *[1000] * 2000, 0]
    return map_chunks([Sized(size) for size in sizes], who_scans, Workers(jobs=1))


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


def who_reads(tensor: Tensor) -> tuple[bytes, int]:
    return tensor.array().tobytes(), slowly(tensor.key)[1]


def read_in_turns(folder: Path) -> Any:
    """What a rank does that reads from more files than it may have open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES + 100, most))

    def command() -> Any:
        with open_checkpoint(folder) as checkpoint:
            return share(who_reads, [checkpoint.tensors["w"]] * 20, jobs=2)

    return lead(command)


def test_ranks_read_a_tensor_that_lies_in_more_files_than_may_be_open(tmp_path: Path) -> None:
    count = MAX_OPEN_FILES + 150
    tensor = torch.arange(3.0 * count).reshape(count, 3)
    folder = write_dcp(tmp_path / "folder", {"w": halves(tensor, count=count)})
    assert len(list(folder.iterdir())) == count + 1
    first, second = run_ranks(2, read_in_turns, folder, folder=tmp_path / "run")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    (found,) = first.value
    assert {values for values, _ in found} == {tensor.numpy().tobytes()}
    assert {rank for _, rank in found} == {0, 1}


class Courier:
    """A team of which every task travels; counts the bytes of them."""

    def __init__(self) -> None:
        self.nbytes = 0

    def map(self, function: Any, tasks: Sequence[Any], **_: Any) -> Any:
        sent = [bytes(team._pickled(task)) for task in tasks]
        self.nbytes += sum(map(len, sent))
        return [function(pickle.loads(task)) for task in sent]


def in_pieces(path: Path, shape: tuple[int, ...], dim: int) -> Checkpoint:
    """A float32 tensor in a file, cut into pieces of 1 along a dimension."""
    extent = tuple(1 if d == dim else size for d, size in enumerate(shape))
    nbytes = 4 * math.prod(extent)
    path.write_bytes(random.Random(0).randbytes(nbytes * shape[dim]))
    source = FileSource(path)
    pieces = [
        Piece(
            start=tuple(number if d == dim else 0 for d in range(len(shape))),
            tensor=Tensor(
                key="",
                dtype=DTYPES["float32"],
                shape=extent,
                storage=Storage(source=source, offset=number * nbytes, nbytes=nbytes),
            ),
            where="",
        )
        for number in range(shape[dim])
    ]
    tensor = assemble("folder", "w", DTYPES["float32"], shape, pieces, hint="")
    return Checkpoint(name="folder", container="", section="", tensors={"w": tensor})


@pytest.mark.parametrize(
    ("shape", "dim", "times"), [((500, 1 << 14), 0, 1), ((2, 500, 1 << 13), 1, 2)]
)
def test_a_task_brings_along_only_the_pieces_that_it_reads(
    shape: tuple[int, ...], dim: int, times: int, tmp_path: Path
) -> None:
    checkpoint = in_pieces(tmp_path / "pieces", shape, dim)
    whole = len(team._pickled(checkpoint.tensors["w"]))
    with working_as(courier := Courier()):
        found = fingerprint(checkpoint, details=nothing)
    assert found.root == fingerprint(checkpoint, details=nothing).root
    # Of eight tasks: a piece goes into one a row of the outer dimension, a few at a seam into two.
    assert courier.nbytes < 1.2 * times * whole


def test_a_task_brings_along_only_the_kept_values_that_it_reads(tmp_path: Path) -> None:
    state = {"w": torch.arange(4_000_000.0), "half": torch.arange(5_000_000).half()}
    save_file(state, tmp_path / "old.st")
    recorded = harness.record(tmp_path / "old.st", tmp_path / "golden.st", values="all")
    state["w"][3_999_999] += 1e3
    state["half"] = state["half"].float()
    state["half"][4_999_999] = 7
    save_file(state, tmp_path / "new.st")
    policy = harness.Policy(check_dtype=False)
    with working_as(courier := Courier()):
        found = harness.verify(tmp_path / "new.st", recorded, policy=policy)
    assert found == harness.verify(tmp_path / "new.st", recorded, policy=policy)
    assert [finding.key for finding in found.findings if finding.fails] == ["half", "w"]
    read = 3  # passes over the values: to compare them, and for their statistics
    assert courier.nbytes < read * (16_000_000 + 10_000_000)


def test_without_other_ranks_there_is_no_team() -> None:
    assert current_team() is None


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.model.distributed.team.num_cores", lambda: 9)
    for ranks, cores in [("1", 9), ("2", 4), ("16", 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert num_cores_of_rank() == cores
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert num_cores_of_rank() == 9
    assert num_cores() >= 1


def connections() -> Any:
    """How long the connections of a rank may be silent, and whether an older one was touched."""
    from harness.model.distributed import launched, sharded

    with socket.create_server(("127.0.0.1", 0)) as server:
        own = socket.create_connection(server.getsockname())
        before = team._sockets()
        with launched._joined():
            joined = team._sockets() - before
            sharded._new_group(range(3))
            found = [socket.socket(fileno=os.dup(number)) for number in team._sockets() - before]
            idle = {one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) for one in found}
            kept = {one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for one in found}
        return (
            len(found) > len(joined),
            idle,
            kept,
            own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        )


def test_a_machine_that_falls_silent_is_noticed_by_the_kernel(tmp_path: Path) -> None:
    ranks = run_ranks(3, connections, folder=tmp_path / "run")
    idle = team.SILENCE_SECONDS // 2
    assert [rank.value for rank in ranks] == [(True, {idle}, {1}, 0)] * 3, ranks
