"""How work is shared among ranks; what ranks do together is in test_launched and test_sharded."""

from __future__ import annotations

import math
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import harness
from harness.checkpoint.dtypes import DTYPES
from harness.checkpoint.formats.assembled import Piece, assemble
from harness.checkpoint.sources.files import FileSource
from harness.checkpoint.tensors import Checkpoint, Storage, Tensor
from harness.comparison.measuring import nothing
from harness.fingerprints.scan import fingerprint
from harness.model.distributed import group
from harness.model.distributed.group import Ranks
from harness.streaming.threads import num_cores
from harness.streaming.workers import Task, Workers


class Sized(NamedTuple):
    number: int
    nbytes: int


class Here(Sized):
    """Something of one process alone."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot leave")


class InTurns(Ranks):
    """Ranks without processes: what each would do is done here, one after the other."""

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.is_broken = 0, size, False
        self.nbytes: list[int] = []  # sent, a round
        self.elsewhere: list[Any] = []

    def broadcast(self, value: Any = None) -> Any:
        self._asked = pickle.loads(pickle.dumps(value))
        self.nbytes.append(sum(len(task) for share in value[1][1] for task in share))
        return value

    def gather(self, value: Any = None) -> list[Any]:
        _, (function, shares, _) = self._asked
        done = [[function(pickle.loads(task)) for task in share] for share in shares]
        self.elsewhere += [task for some in done for task in some]
        return done


def itself(task: Any) -> Any:
    return task


@given(st.lists(st.tuples(st.integers(0, 9 << 20), st.booleans()), max_size=200), st.integers(2, 5))
def test_work_is_shared_by_bytes_and_comes_back_in_order(
    sizes: list[tuple[int, bool]], size: int
) -> None:
    tasks = [(Here if here else Sized)(n, nbytes) for n, (nbytes, here) in enumerate(sizes)]
    ranks = InTurns(size)
    assert Workers(jobs=1, group=ranks).map(itself, tasks) == tasks
    assert not any(sizes[task.number][1] for task in ranks.elsewhere)


@given(st.lists(st.integers(0, 9 << 20), min_size=1, max_size=200), st.integers(1, 5))
def test_each_rank_has_about_the_same_bytes_in_a_row(sizes: list[int], size: int) -> None:
    owners = group._owners([Sized(n, nbytes) for n, nbytes in enumerate(sizes)], size)
    assert owners == sorted(owners)
    assert set(owners) <= set(range(size))
    for rank in range(size):
        own = sum(n for n, owner in zip(sizes, owners, strict=True) if owner == rank)
        assert own <= sum(sizes) / size + max(sizes) + len(sizes)


def test_a_round_is_short_so_that_a_rank_that_died_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = InTurns(2)
    honest, rounds = ranks._round, list[Sequence[Task]]()

    def counted(function: Any, tasks: Sequence[Task], workers: Workers) -> list[Any]:
        rounds.append(tasks)
        return honest(function, tasks, workers)

    monkeypatch.setattr(ranks, "_round", counted)
    monkeypatch.setattr(group, "_ROUND_NBYTES", 100)
    sizes = [300, *[30] * 9, *[0] * 3000]
    tasks = [Sized(n, nbytes) for n, nbytes in enumerate(sizes)]
    assert Workers(jobs=1, group=ranks).map(itself, tasks) == tasks
    assert [len(some) for some in rounds] == [1, 6, 2048, 955]


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
    whole = len(pickle.dumps(checkpoint.tensors["w"]))
    ranks = InTurns(9)
    found = fingerprint(checkpoint, details=nothing, workers=Workers(group=ranks))
    assert found.root == fingerprint(checkpoint, details=nothing).root
    # Of eight tasks: a piece goes into one a row of the outer dimension, a few at a seam into two.
    assert sum(ranks.nbytes) < 1.2 * times * whole


def test_kept_values_that_a_task_brings_along_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": torch.arange(2_000_000.0), "half": torch.arange(2_500_000).half()}
    save_file(state, tmp_path / "old.st")
    recorded = harness.record(tmp_path / "old.st", tmp_path / "golden.st", values="all")
    state["w"][-1] += 1e3
    state["half"] = state["half"].float()
    state["half"][-1] = 7
    save_file(state, tmp_path / "new.st")
    policy = harness.Policy(check_dtype=False)
    expected = harness.verify(tmp_path / "new.st", recorded, policy=policy)
    assert [finding.key for finding in expected.findings if finding.fails] == ["half", "w"]
    for limit, most in [(32 << 20, 14_000_000), (1 << 20, 6_000_000)]:
        monkeypatch.setattr(group, "_MAX_SENT_NBYTES", limit)
        ranks = InTurns(2)
        found = harness.verify(tmp_path / "new.st", recorded, policy=policy, group=ranks)
        assert found == expected
        assert 0 < max(ranks.nbytes) < most


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(9))
    for ranks, cores in [("1", 9), ("2", 4), ("16", 1), ("0", 9), ("", 9), ("x", 9)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert num_cores() == cores
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert num_cores() == 9
