"""Where record's time goes, and what two cores make of each step: bench_steps.py CHECKPOINT

Each step runs alone, over chunks of the largest tensor: on one thread, on two threads, and in two
processes. What two processes lack of twice as much, the machine lacks: cache, memory, clock. What
two threads lack beyond that, the interpreter takes: between two calls of numpy they wait for it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.dummy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3
from zlib_ng import zlib_ng

from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import numpy_dtype
from harness.checkpoint.tensors import Tensor
from harness.fingerprints.arithmetic import as_floats, moments_of_runs
from harness.fingerprints.fingerprint import block_numel
from harness.fingerprints.scan import _parts, _Scan, _scan_chunk
from harness.fingerprints.sketch import DEFAULT_BLOCK_NBYTES, sketch_values
from harness.fingerprints.stats import extremes_of
from harness.streaming.chunks import CHUNK_NBYTES, buffers, chunks

RUNS = 20
SECONDS = 0.04
THREADS: Any = multiprocessing.dummy
PROCESSES: Any = multiprocessing.get_context("fork")

STEPS = ("read", "blake3", "crc32", "extremes", "floats", "moments", "project")
STEPS += ("verify", "record")
Step = Callable[[int], object]


class Steps:
    """The steps over one chunk of a tensor, in scratch of the thread that runs them."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.chunks = [chunk for chunk in chunks(tensor.nbytes) if chunk.nbytes == CHUNK_NBYTES]
        self.block_numel = block_numel(tensor.dtype, DEFAULT_BLOCK_NBYTES)
        self.prepare()
        self.known = [moments_of_runs(v, self.block_numel).squares for v in self.values]

    def prepare(self) -> None:
        self.read(0)
        self.floats(0)

    @property
    def data(self) -> Any:
        return buffers.get("chunk", CHUNK_NBYTES)

    @property
    def parts(self) -> Iterator[Any]:
        return _parts(self.data, self.tensor.dtype, DEFAULT_BLOCK_NBYTES)

    @property
    def values(self) -> Iterator[Any]:
        """Each part as floats; where they are in scratch, the last one's for all."""
        for part in self.parts:
            if self.tensor.dtype.name == "float32":
                yield as_floats(part, self.tensor.dtype)
            else:
                yield buffers.get("values", part.size // self.tensor.dtype.itemsize, "<f4")

    def read(self, turn: int) -> None:
        self.tensor.read_into(self.chunks[turn % len(self.chunks)].start, self.data.data)

    def blake3(self, turn: int) -> None:
        blake3(self.data.data).digest()

    def crc32(self, turn: int) -> None:
        zlib_ng.crc32(self.data.data)

    def extremes(self, turn: int) -> None:
        extremes_of(self.data.view(numpy_dtype(self.tensor.dtype)))

    def floats(self, turn: int) -> None:
        for part in self.parts:
            as_floats(part, self.tensor.dtype)

    def moments(self, turn: int) -> None:
        for values in self.values:
            moments_of_runs(values, self.block_numel)

    def project(self, turn: int) -> None:
        for values, squares in zip(self.values, self.known, strict=True):
            sketch_values(values, self.block_numel, squares)

    def verify(self, turn: int) -> None:
        self._scan(turn, details=False)

    def record(self, turn: int) -> None:
        self._scan(turn, details=True)

    def _scan(self, turn: int, *, details: bool) -> None:
        scan = _Scan(self.tensor, details, details, False, DEFAULT_BLOCK_NBYTES)
        _scan_chunk(scan, self.chunks[turn % len(self.chunks)])


def seconds(steps: Steps, step: Step, count: int, kind: Any, workers: int) -> float:
    """How long `workers` threads or processes take to do a step `count` times each."""
    barrier, spans = kind.Barrier(workers, timeout=60), kind.Queue()

    def work() -> None:
        steps.prepare()
        barrier.wait()
        start = time.perf_counter()
        for turn in range(count):
            step(turn)
        spans.put((start, time.perf_counter()))

    team = [kind.Process(target=work) for _ in range(workers)]
    for worker in team:
        worker.start()
    starts, ends = zip(*(spans.get(timeout=60) for _ in team), strict=True)
    for worker in team:
        worker.join()
    return float(max(ends) - min(starts))


def main(path: str) -> None:
    with open_checkpoint(Path(path)) as checkpoint:
        steps = Steps(max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes))
        if not steps.chunks:
            sys.exit(f"{path}: no tensor of {CHUNK_NBYTES} bytes")
        measured: dict[str, list[list[float]]] = {name: [] for name in STEPS}
        for _ in range(RUNS):  # in turns, and the least counts: the machine is shared
            for name in STEPS:
                measured[name].append(measure(steps, getattr(steps, name)))
    print(f"{steps.tensor.dtype.name:16}  ns/B  two threads  two processes")
    costs = {}
    for name in STEPS:
        one, two, apart, both = map(min, zip(*measured[name], strict=True))
        costs[name] = one
        print(f"{name:16} {one:5.3f}       × {2 * one / two:.2f}         × {2 * apart / both:.2f}")
    parts = sum(costs[name] for name in STEPS if name not in ("verify", "record"))
    print(f"record, the sum of its steps: {parts:.3f} ns/B; to read + blake3: ", end="")
    print(f"{parts / (costs['read'] + costs['blake3']):.2f}")


def measure(steps: Steps, step: Step) -> list[float]:
    """The ns per byte of one thread, of two at once, of one process, of two at once."""
    count = max(1, round(SECONDS / seconds(steps, step, 5, THREADS, 1) * 5))
    teams = ((THREADS, 1), (THREADS, 2), (PROCESSES, 1), (PROCESSES, 2))
    return [seconds(steps, step, count, *team) / count / CHUNK_NBYTES * 1e9 for team in teams]


if __name__ == "__main__":
    main(*sys.argv[1:])
