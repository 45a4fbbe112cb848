"""The progress bar: what it expects is what is read, and every byte counts once."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import harness
from harness.api import diff, update
from harness.checkpoint.sources.remote import RemotePath
from harness.cli.progress import _start_bar, progress_bar
from tests.checkpoint.dcp_writer import halves, write_dcp


class Watch:
    """Who is told of progress: never of more than was to be expected."""

    def __init__(self) -> None:
        self.done = 0
        self.totals = [0]
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        assert self.totals[-1] == self.done  # another pass, after the last one
        self.totals.append(self.totals[-1] + nbytes)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            assert self.done <= self.totals[-1]


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"large": torch.randn(1500, 1024), "small": torch.randn(7, 3), "n": torch.arange(9)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Each tensor in two shards, which have checksums of their own."""
    return write_dcp(tmp_path / "folder", {key: halves(t) for key, t in state().items()})


NBYTES = sum(tensor.nbytes for tensor in state().values())
STRUCTURE = 5000  # what has a checksum beside them


def test_shards_are_read_once_if_they_are_runs_of_the_tensors(folder: Path) -> None:
    watch = Watch()
    recorded = harness.record(folder, folder.with_suffix(".golden"), progress=watch)
    _, total = watch.totals
    assert watch.done == total
    assert 0 < total - NBYTES < STRUCTURE
    watch = Watch()
    harness.verify(folder, recorded, progress=watch)
    assert (watch.done, watch.totals) == (NBYTES, [0, NBYTES])


def test_shards_of_columns_are_read_again_for_their_checksums(tmp_path: Path) -> None:
    large = state()["large"]
    folder = write_dcp(tmp_path / "folder", {"large": halves(large, dim=1)})
    watch = Watch()
    harness.record(folder, tmp_path / "golden.st", progress=watch)
    _, total = watch.totals
    assert watch.done == total
    assert 0 < total - 2 * large.nbytes < STRUCTURE


def test_behind_a_url_only_the_section_that_is_read_is_expected(tmp_path: Path) -> None:
    url = "memory://progress.st"
    RemotePath(url).write_bytes(save(state()), overwrite=True)
    watch = Watch()
    harness.record(url, tmp_path / "golden.st", progress=watch)
    assert (watch.done, watch.totals) == (NBYTES, [0, NBYTES])
    torch.save({"state_dict": state(), "other": [torch.ones(9999)]}, tmp_path / "both.ckpt")
    watch = Watch()
    harness.fingerprint(tmp_path / "both.ckpt", progress=watch)
    assert (watch.done, watch.totals) == (NBYTES, [0, NBYTES])


def test_what_differs_is_expected_to_be_read_again(folder: Path, tmp_path: Path) -> None:
    recorded = harness.record(folder, tmp_path / "golden.st")
    changed = state()
    changed["large"] += 0.1
    changed["alone"] = torch.ones(5)
    torch.save(changed, tmp_path / "changed.pt")
    large, alone = changed["large"].nbytes, changed["alone"].nbytes
    # The common keys are compared, the statistics of what differs are taken on both sides; then
    # whether either file is damaged there, of a folder with what lies around the tensor's pieces;
    # and what may explain the difference is looked for on both sides, in a few passes.
    for stats, read in [(False, NBYTES), (True, 3 * NBYTES)]:
        watch = Watch()
        diff(folder, tmp_path / "changed.pt", stats=stats, progress=watch)
        assert watch.done == watch.totals[-1]
        assert 2 * large <= watch.done - (alone + read) < 8 * large + STRUCTURE
    # By its sketch, or exactly with the reference; then whether the file itself is damaged.
    watch = Watch()
    harness.verify(tmp_path / "changed.pt", recorded, progress=watch)
    assert watch.done == watch.totals[-1] == NBYTES + 2 * alone + 2 * large
    watch = Watch()
    harness.verify(tmp_path / "changed.pt", recorded, reference=folder, progress=watch)
    assert watch.done == watch.totals[-1]
    assert 4 * large <= watch.done - (NBYTES + 2 * alone) <= 10 * large
    watch = Watch()
    update(tmp_path / "changed.pt", recorded, progress=watch)
    assert watch.done == watch.totals[-1]
    assert 0 < watch.done - 2 * (NBYTES + alone) < STRUCTURE


class Slow(int):
    """A number that lets other threads run before it is added."""

    def __radd__(self, other: int) -> int:
        time.sleep(0.0001)
        return int(other) + int(self)


def test_every_byte_counts_once_whichever_thread_has_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = []

    class Bar:
        def update(self, task: int, *, completed: int, total: int) -> None:
            shown.append((completed, total))

        def stop(self) -> None:
            shown.append((0, 0))

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("harness.cli.progress._start_bar", lambda path: Bar())
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr("harness.cli.progress.time.monotonic", lambda: next(clock))
    with progress_bar(None) as progress:
        assert progress is not None

        def work() -> None:
            for _ in range(25):
                progress.expect(Slow(2))
                progress.advance(Slow(1))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [completed for completed, _ in shown] == [*range(1, 201), 0]
    assert shown[-2] == (200, 400)


def test_the_bar_shows_a_name_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    bar = _start_bar(Path("run[best]\x1b[31m.ckpt"))
    bar.stop()
    shown = capsys.readouterr().err
    assert r"run[best]\u001b[31m.ckpt" in shown
