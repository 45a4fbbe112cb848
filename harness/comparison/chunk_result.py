"""What comparing one chunk element by element gives, and how the results of chunks are joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from harness.checkpoint.dtypes import DType

MAX_ELEMENTS = 5
_MIN_RUN_NUMEL = 64
_MAX_RUN_NUMEL = 262144  # a chunk of the widest numbers, complex128
MAX_STRIP = 64


class Values(Protocol):
    """A tensor whose bytes can be read: a `Tensor`, or a `TensorFingerprint` with values."""

    @property
    def key(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def numel(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def read_into(self, start: int, buffer: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What one chunk adds to an exact difference.

    `squares` are sums of squared differences over runs of `run_numel` elements. `worst` are beyond
    the tolerance where any element is.
    """

    num_differing: int = 0
    num_beyond: int = 0
    max_abs: float = 0.0
    min_atol: float = 0.0
    squares: tuple[float, ...] = ()
    first: int = -1
    last: int = -1
    worst: tuple[tuple[float, int], ...] = ()
    num_nonfinite: tuple[int, int] = (0, 0)

    @property
    def least_worst(self) -> float:
        """What an element must exceed to be among the worst of this and later results."""
        return self.worst[-1][0] if len(self.worst) == MAX_ELEMENTS else -math.inf


def run_numel(numel: int) -> int:
    """Elements of a run: about `MAX_STRIP` make a tensor; passes and chunks end where runs do."""
    run = _MIN_RUN_NUMEL
    while run < _MAX_RUN_NUMEL and run * MAX_STRIP < numel:
        run *= 2
    return run


def add_results(results: Sequence[ChunkResult]) -> ChunkResult:
    """Join the results of several chunks."""
    changed = [result for result in results if result.num_differing]
    of_interest = [result for result in changed if result.num_beyond] or changed
    worst = sorted((w for t in of_interest for w in t.worst), key=lambda item: (-item[0], item[1]))
    return ChunkResult(
        num_differing=sum(t.num_differing for t in results),
        num_beyond=sum(t.num_beyond for t in results),
        max_abs=max((t.max_abs for t in results), default=0.0),
        min_atol=max((t.min_atol for t in results), default=0.0),
        squares=tuple(square for result in results for square in result.squares),
        first=min((t.first for t in changed), default=-1),
        last=max((t.last for t in changed), default=-1),
        worst=tuple(worst[:MAX_ELEMENTS]),
        num_nonfinite=(
            sum(t.num_nonfinite[0] for t in results),
            sum(t.num_nonfinite[1] for t in results),
        ),
    )
