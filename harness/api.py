"""The verbs: record, verify, update and diff, from paths to values.

In: paths and policies. Out: `Golden` and `Comparison` values; nothing is printed, and a mismatch
is not an exception (`Comparison.raise_for_mismatch()` makes it one). Raises HarnessError where
something cannot be read or written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from harness.allclose import Tolerance, Values, tally_chunk
from harness.checkpoint import Checkpoint, Tensor, open_checkpoint
from harness.compare import Comparison, Policy, compare
from harness.difference import Difference, conclude, difference_from_sketch
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.fingerprint import (
    MAX_KEPT_NUMEL,
    Fingerprint,
    TensorPrint,
    outline,
)
from harness.fingerprint import fingerprint as fingerprint_checkpoint
from harness.golden import (
    SUFFIX,
    Golden,
    Update,
    is_golden,
    read_golden,
    source_of,
    write_golden,
)
from harness.sketch import DEFAULT_BLOCK_NBYTES
from harness.streaming import CHUNK_NBYTES, Progress, map_chunks

__all__ = [
    "choose_golden",
    "diff",
    "fingerprint",
    "golden_path",
    "open_checkpoint",
    "read_golden",
    "record",
    "update",
    "verify",
]

KeptValues = Literal["small", "all", "none"]
_KEEP: Mapping[KeptValues, Callable[[Tensor], bool]] = {
    "small": lambda tensor: tensor.numel <= MAX_KEPT_NUMEL,
    "all": lambda tensor: True,
    "none": lambda tensor: False,
}
_NOTHING = _KEEP["none"]
GOLDEN_FOLDER = Path("golden")
_SUFFIXES = (".index.json", ".safetensors", ".nemo", ".ckpt", ".pth", ".pt", ".bin", ".gz")


def golden_path(checkpoint: str | Path) -> Path:
    """Where the golden of a checkpoint goes by default: golden/<stem>.safetensors."""
    path = Path(checkpoint)
    name = path.resolve().name if path.name in ("", "..") else path.name
    for suffix in (*_SUFFIXES, *_SUFFIXES):
        name = name.removesuffix(suffix)
    return GOLDEN_FOLDER / f"{name or path.name}{SUFFIX}"


def fingerprint(
    path: str | Path,
    *,
    section: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Fingerprint:
    """Fingerprint a checkpoint in full. Memory: see `harness.fingerprint.fingerprint`."""
    with open_checkpoint(path, section=section) as checkpoint:
        return fingerprint_checkpoint(checkpoint, jobs=jobs, progress=progress)


def record(
    path: str | Path,
    golden: str | Path | None = None,
    *,
    section: str | None = None,
    block_nbytes: int = DEFAULT_BLOCK_NBYTES,
    values: KeptValues = "small",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Golden:
    """Record the golden of a checkpoint, by default at `golden_path(path)`.

    `block_nbytes` (a power of two, 1024 to 1 MiB) of a tensor share one row of the sketch: less
    localises and proves more, more makes the golden smaller. Raises CheckpointError, and
    GoldenError where a golden is there already and `overwrite` is not given.
    """
    target = golden_path(path) if golden is None else Path(golden)
    if not 1024 <= block_nbytes <= CHUNK_NBYTES // 4 or block_nbytes & (block_nbytes - 1):
        raise UsageError(
            f"--block-size {block_nbytes}: must be a power of two from 1024 to {CHUNK_NBYTES // 4}",
            hint=f"leave it out for {DEFAULT_BLOCK_NBYTES}",
        )
    if target.exists() and not overwrite:
        raise GoldenError(
            f"{target}: a golden is recorded there already",
            hint=f"to replace it: harness verify {path} -g {target} --update-golden --reason WHY",
        )
    with open_checkpoint(path, section=section) as checkpoint:
        found = fingerprint_checkpoint(
            checkpoint,
            keep_values=_KEEP[values],
            block_nbytes=block_nbytes,
            check_integrity=True,
            jobs=jobs,
            progress=progress,
        )
        recorded = Golden(
            path=target,
            fingerprint=replace(found, config=checkpoint.config),
            source=source_of(Path(path), target),
            section=section,
        )
    write_golden(recorded, overwrite=overwrite)
    return recorded


def verify(
    path: str | Path | None = None,
    golden: str | Path | Golden | None = None,
    *,
    policy: Policy | None = None,
    reference: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a checkpoint with its golden; without `path`, the checkpoint that the golden names.

    `reference` is the checkpoint that the golden was recorded from: where it is at hand, changed
    tensors are compared with it element by element. Raises CheckpointError and GoldenError.
    """
    policy = policy or Policy()
    recorded = golden if isinstance(golden, Golden) else read_golden(choose_golden(path, golden))
    with ExitStack() as stack:
        actual = stack.enter_context(_opened(path, recorded))
        beside = None
        if reference is not None:
            beside = stack.enter_context(open_checkpoint(reference, section=recorded.section))
        found = fingerprint_checkpoint(actual, details=_NOTHING, jobs=jobs, progress=progress)
        measure = _Measuring(recorded.fingerprint, actual, beside, jobs, progress)
        return compare(recorded.fingerprint, found, policy, measure)


def update(
    path: str | Path | None,
    golden: Golden,
    *,
    reason: str = "",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Golden:
    """Replace a golden with what the checkpoint holds now; the old root and `reason` are kept.

    Rows of unchanged tensors are copied, so that the file changes only where the weights did.
    """
    old = golden.fingerprint
    with _opened(path, golden) as actual:
        digests = fingerprint_checkpoint(actual, details=_NOTHING, jobs=jobs, progress=progress)
        same = {
            key
            for key, tensor in digests.tensors.items()
            if key in old.tensors and old.tensors[key].digest == tensor.digest
        }
        keeps = _kept_as_before(old)
        found = fingerprint_checkpoint(
            actual,
            details=lambda tensor: tensor.key not in same,
            keep_values=keeps,
            block_nbytes=old.block_nbytes,
            check_integrity=True,
            jobs=jobs,
        )
        tensors = {
            key: replace(old.tensors[key], alias_of=tensor.alias_of) if key in same else tensor
            for key, tensor in found.tensors.items()
        }
        updated = replace(
            golden,
            fingerprint=replace(found, tensors=tensors, config=actual.config),
            source=golden.source if path is None else source_of(Path(path), golden.path),
        )
    if updated.fingerprint.root != old.root:
        entry = Update(root=old.root.hex(), reason=reason)
        updated = replace(updated, history=(*golden.history, entry))
    write_golden(updated, overwrite=True)
    return updated


def diff(
    expected: str | Path,
    actual: str | Path,
    *,
    policy: Policy | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two checkpoints element by element, or goldens with either by their sketches."""
    policy = policy or Policy()
    one, other = Path(expected), Path(actual)
    if is_golden(one):
        recorded = read_golden(one)
        if not is_golden(other):
            return verify(other, recorded, policy=policy, jobs=jobs, progress=progress)
        return compare(
            recorded.fingerprint, read_golden(other).fingerprint, policy, _between_goldens(recorded)
        )
    if is_golden(other):
        recorded = read_golden(other)
        with open_checkpoint(one, section=recorded.section) as checkpoint:
            found = fingerprint_checkpoint(
                checkpoint,
                keep_values=_kept_as_before(recorded.fingerprint),
                block_nbytes=recorded.fingerprint.block_nbytes,
                jobs=jobs,
                progress=progress,
            )
        return compare(found, recorded.fingerprint, policy, _between_goldens(recorded))
    with open_checkpoint(one) as left, open_checkpoint(other) as right:
        ours, theirs = outline(left), outline(right)
        # Renames are told by digest: only keys that stand on one side alone need one.
        ours = _with_digests(ours, left, set(left.tensors) - set(right.tensors), jobs)
        theirs = _with_digests(theirs, right, set(right.tensors) - set(left.tensors), jobs)

        def measure(
            triples: Sequence[tuple[TensorPrint, TensorPrint, Tolerance]],
        ) -> list[Difference]:
            pairs = [
                _Exact(left.tensors[e.key], right.tensors[a.key], tolerance)
                for e, a, tolerance in triples
            ]
            return _measure_exactly(pairs, jobs, progress)

        return compare(ours, theirs, policy, measure)


def choose_golden(path: str | Path | None, golden: str | Path | None) -> Path:
    """The golden to verify against: the one given, else the default one of the checkpoint."""
    if golden is not None:
        return Path(golden)
    if path is None:
        raise UsageError("give a checkpoint, a golden, or both")
    chosen = golden_path(path)
    if not chosen.exists():
        if not Path(path).exists():
            open_checkpoint(path).close()  # says what is wrong with the path
        raise GoldenError(
            f"{chosen}: no golden is recorded for {path}", hint=f"harness record {path}"
        )
    return chosen


@contextmanager
def _opened(path: str | Path | None, golden: Golden) -> Iterator[Checkpoint]:
    source = golden.checkpoint if path is None else Path(path)
    if source is None or (path is None and not source.exists()):
        raise CheckpointError(
            f"{golden.path}: the checkpoint that it was recorded from is not there: "
            f"{golden.source}",
            hint=f"harness verify CKPT -g {golden.path}",
        )
    with open_checkpoint(source, section=golden.section) as checkpoint:
        yield checkpoint


def _kept_as_before(old: Fingerprint) -> Callable[[Tensor], bool]:
    """Keep values or sketches as the golden at hand does, for new tensors as `record` does."""
    small = [t for t in old.tensors.values() if t.numel <= MAX_KEPT_NUMEL]
    large = [t for t in old.tensors.values() if t.numel > MAX_KEPT_NUMEL]
    if any(tensor.values is not None for tensor in large):
        return _KEEP["all"]
    if small and not any(tensor.values is not None for tensor in small):
        return _KEEP["none"]
    return _KEEP["small"]


class _Exact:
    """A pair of tensors whose values are both at hand, as work for `map_chunks`."""

    def __init__(self, expected: Values, actual: Values, tolerance: Tolerance) -> None:
        self.expected, self.actual, self.tolerance = expected, actual, tolerance
        self.nbytes = expected.nbytes


def _measure_exactly(
    pairs: Sequence[_Exact], jobs: int | None, progress: Progress | None
) -> list[Difference]:
    tallies = map_chunks(
        pairs,
        lambda pair, chunk: tally_chunk(pair.expected, pair.actual, chunk, pair.tolerance),
        jobs=jobs,
        progress=progress,
    )
    return [
        conclude(pair.expected, pair.actual, tally, pair.tolerance)
        for pair, tally in zip(pairs, tallies, strict=True)
    ]


# With many changed tensors, a search among few candidates: recovery is for surgical changes.
_MAX_TENSORS_TO_SEARCH = 20


class _Measuring:
    """Measures the tensors of a checkpoint whose digests a golden does not know."""

    def __init__(
        self,
        golden: Fingerprint,
        actual: Checkpoint,
        reference: Checkpoint | None,
        jobs: int | None,
        progress: Progress | None,
    ) -> None:
        self.golden, self.actual, self.reference = golden, actual, reference
        self.jobs, self.progress = jobs, progress

    def __call__(
        self, triples: Sequence[tuple[TensorPrint, TensorPrint, Tolerance]]
    ) -> list[Difference]:
        references = self._references([expected for expected, _, _ in triples])
        exact: dict[int, _Exact] = {}
        sketched: dict[int, tuple[TensorPrint, TensorPrint, Tolerance]] = {}
        for index, (expected, actual, tolerance) in enumerate(triples):
            known: Values | None = references.get(expected.key)
            if known is None and expected.values is not None:
                known = expected
            if known is not None:
                exact[index] = _Exact(known, self.actual.tensors[actual.key], tolerance)
            else:
                sketched[index] = (expected, actual, tolerance)
        found = dict(
            zip(exact, _measure_exactly([*exact.values()], self.jobs, self.progress), strict=True)
        )
        found |= self._from_sketches(sketched)
        return [found[index] for index in range(len(triples))]

    def _references(self, expected: Sequence[TensorPrint]) -> dict[str, Tensor]:
        """The reference's tensors, where they are still what the golden recorded."""
        if self.reference is None:
            return {}
        keys = {tensor.key for tensor in expected}
        candidates = _part(self.reference, keys & set(self.reference.tensors))
        digests = fingerprint_checkpoint(candidates, details=_NOTHING, jobs=self.jobs).tensors
        for tensor in expected:
            other = digests.get(tensor.key)
            if other is None or other.digest != tensor.digest:
                raise CheckpointError(
                    f"{self.reference.name}: not the checkpoint that was recorded: its "
                    f"{tensor.key!r} is {'missing' if other is None else 'different'}",
                    hint="give the reference that the golden was recorded from, or leave it out",
                )
        return {key: self.reference.tensors[key] for key in keys}

    def _from_sketches(
        self, triples: Mapping[int, tuple[TensorPrint, TensorPrint, Tolerance]]
    ) -> dict[int, Difference]:
        # Blocks count elements, so another dtype needs blocks of another size in bytes.
        by_block: dict[int, set[str]] = defaultdict(set)
        for expected, actual, _ in triples.values():
            by_block[self._block_nbytes(expected, actual)].add(actual.key)
        details: dict[str, TensorPrint] = {}
        for block_nbytes, keys in by_block.items():
            details |= fingerprint_checkpoint(
                _part(self.actual, keys),
                keep_values=_NOTHING,
                block_nbytes=block_nbytes,
                jobs=self.jobs,
                progress=self.progress,
            ).tensors
        return {
            index: difference_from_sketch(
                expected,
                details[actual.key],
                tolerance,
                self.golden.block_nbytes,
                self.actual.tensors[actual.key],
                thorough=len(triples) <= _MAX_TENSORS_TO_SEARCH,
            )
            for index, (expected, actual, tolerance) in triples.items()
        }

    def _block_nbytes(self, expected: TensorPrint, actual: TensorPrint) -> int:
        ours, theirs = (
            t.dtype.itemsize // (2 if t.dtype.kind == "complex" else 1) for t in (expected, actual)
        )
        return self.golden.block_nbytes * theirs // ours


def _between_goldens(
    golden: Golden,
) -> Callable[[Sequence[tuple[TensorPrint, TensorPrint, Tolerance]]], list[Difference]]:
    block_nbytes = golden.fingerprint.block_nbytes

    def measure(triples: Sequence[tuple[TensorPrint, TensorPrint, Tolerance]]) -> list[Difference]:
        return [
            difference_from_sketch(expected, actual, tolerance, block_nbytes, None)
            for expected, actual, tolerance in triples
        ]

    return measure


def _part(checkpoint: Checkpoint, keys: set[str]) -> Checkpoint:
    """The tensors with these keys, each for itself."""
    return replace(
        checkpoint,
        tensors={
            key: replace(tensor, alias_of=None)
            for key, tensor in checkpoint.tensors.items()
            if key in keys
        },
    )


def _with_digests(
    outlined: Fingerprint, checkpoint: Checkpoint, keys: set[str], jobs: int | None
) -> Fingerprint:
    digests = fingerprint_checkpoint(_part(checkpoint, keys), details=_NOTHING, jobs=jobs).tensors
    return replace(
        outlined,
        tensors={
            key: replace(tensor, digest=digests[key].digest) if key in digests else tensor
            for key, tensor in outlined.tensors.items()
        },
    )
