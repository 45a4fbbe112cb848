"""Measure pairs of tensors whose digests differ, reading as little as decides them.

In: the two sides of a comparison, at least one of them open. Out: functions for
`harness.comparison.compare`. Memory: two chunks a thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.errors import CheckpointError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.scan import fingerprint, statistics
from harness.streaming.chunks import Chunk, map_chunks
from harness.streaming.workers import ALL_CORES, Workers

# What measures is imported where something differs: a verify that passes starts without.
if TYPE_CHECKING:
    from harness.comparison.chunk_result import ChunkResult
    from harness.comparison.difference import Difference
    from harness.comparison.policy import Tolerance


Triple: TypeAlias = "tuple[TensorFingerprint, TensorFingerprint, Tolerance]"


@dataclass(frozen=True)
class _Exact:
    """A pair of tensors whose values can both be read, as work for `map_chunks`."""

    expected: Tensor | TensorFingerprint
    actual: Tensor
    tolerance: Tolerance

    @property
    def nbytes(self) -> int:
        return self.expected.nbytes

    def part(self, chunk: Chunk) -> _Exact:
        ours, theirs = self.expected.dtype.itemsize, self.actual.dtype.itemsize
        start, nbytes = (count // ours * theirs for count in (chunk.start, chunk.nbytes))
        return replace(
            self,
            expected=self.expected.part(chunk.start, chunk.nbytes),
            actual=self.actual.part(start, nbytes),
        )


def _compare_chunk(pair: _Exact, chunk: Chunk) -> ChunkResult | None:
    from harness.comparison.allclose import sum_up_chunk

    return sum_up_chunk(pair.expected, pair.actual, chunk, pair.tolerance)


def _measure_exactly(pairs: Sequence[_Exact], workers: Workers, *, stats: bool) -> list[Difference]:
    """ChunkResult every pair; with `stats`, one more pass over both sides of each."""
    from harness.comparison.difference import conclude

    expected, actual = [pair.expected for pair in pairs], [pair.actual for pair in pairs]
    nbytes = sum(pair.nbytes for pair in pairs)
    again = nbytes + sum(tensor.nbytes for tensor in actual)
    workers.expect(nbytes + again if stats else nbytes)
    results = map_chunks(pairs, _compare_chunk, workers)
    differences = [
        conclude(pair.expected, pair.actual, result, pair.tolerance)
        for pair, result in zip(pairs, results, strict=True)
    ]
    if not stats:
        return differences
    before = statistics(expected, workers)
    after = statistics(actual, workers)
    return [
        replace(difference, stats=both)
        for difference, both in zip(differences, zip(before, after, strict=True), strict=True)
    ]


# With many changed tensors, a search among few candidates: recovery is for surgical changes.
_MAX_TENSORS_TO_SEARCH = 20


@dataclass(frozen=True, kw_only=True)
class AgainstCheckpoint:
    """Measures two open checkpoints element by element; with `stats`, also the stats of both."""

    expected: Checkpoint
    actual: Checkpoint
    stats: bool = False
    workers: Workers = ALL_CORES

    def __call__(self, triples: Sequence[Triple]) -> list[Difference]:
        pairs = [
            _Exact(self.expected.tensors[expected.key], self.actual.tensors[actual.key], tolerance)
            for expected, actual, tolerance in triples
        ]
        return _measure_exactly(pairs, self.workers, stats=self.stats)


@dataclass(frozen=True, kw_only=True)
class AgainstGolden:
    """Measures an open checkpoint against a golden: by kept values, by sketches, by a reference.

    `reference` is the recorded checkpoint, where it is given: CheckpointError where it is another
    one. `partial_reference` is one that need not be: what is in it as recorded is used. `details`
    are filled with what was read of the actual side in the golden's blocks, for those who ask on.
    """

    golden: Fingerprint
    actual: Checkpoint
    reference: Checkpoint | None = None
    partial_reference: Checkpoint | None = None
    workers: Workers = ALL_CORES
    details: dict[str, TensorFingerprint] = field(default_factory=dict, compare=False)

    def __call__(self, triples: Sequence[Triple]) -> list[Difference]:
        references = self._references([expected for expected, _, _ in triples])
        exact: dict[int, _Exact] = {}
        sketched: dict[int, Triple] = {}
        for index, (expected, actual, tolerance) in enumerate(triples):
            known: Tensor | TensorFingerprint | None = references.get(expected.key)
            if known is None and expected.values is not None:
                known = expected
            if known is not None:
                exact[index] = _Exact(known, self.actual.tensors[actual.key], tolerance)
            else:
                sketched[index] = (expected, actual, tolerance)
        pairs = [*exact.values()]
        measured = _measure_exactly(pairs, self.workers, stats=True)
        found = dict(zip(exact, measured, strict=True))
        found |= self._from_sketches(sketched)
        return [found[index] for index in range(len(triples))]

    def _references(self, expected: Sequence[TensorFingerprint]) -> dict[str, Tensor]:
        """The reference's tensors, where they are still what the golden recorded."""
        reference = self.reference or self.partial_reference
        if reference is None:
            return {}
        keys = {tensor.key for tensor in expected} & set(reference.tensors)
        digests = fingerprint(part(reference, keys), details=nothing, workers=self.workers).tensors
        found = {}
        for tensor in expected:
            other = digests.get(tensor.key)
            if other is not None and other.digest == tensor.digest:
                found[tensor.key] = reference.tensors[tensor.key]
            elif self.reference is not None:
                raise CheckpointError(
                    f"{reference.name}: not the checkpoint that was recorded: its "
                    f"{tensor.key!r} is {'missing' if other is None else 'different'}",
                    hint="give the reference that the golden was recorded from, or leave it out",
                )
        return found

    def _from_sketches(self, triples: Mapping[int, Triple]) -> dict[int, Difference]:
        from harness.comparison.bounds import difference_from_sketch

        # Blocks count elements, so another dtype needs blocks of another size in bytes.
        by_size: dict[int, set[str]] = defaultdict(set)
        for expected, actual, _ in triples.values():
            by_size[self._block_nbytes(expected, actual)].add(actual.key)
        details: dict[str, TensorFingerprint] = {}
        for block_nbytes, keys in by_size.items():
            details |= fingerprint(
                part(self.actual, keys),
                keep_values=nothing,
                block_nbytes=block_nbytes,
                digests=False,
                workers=self.workers,
            ).tensors
        found = {}
        for index, (expected, actual, tolerance) in triples.items():
            detailed = replace(details[actual.key], digest=actual.digest)
            difference = difference_from_sketch(
                expected,
                detailed,
                tolerance,
                self.golden.block_nbytes,
                self.actual.tensors[actual.key],
                thorough=len(triples) <= _MAX_TENSORS_TO_SEARCH,
            )
            found[index] = replace(difference, stats=(expected.stats, detailed.stats))
            if expected.dtype == actual.dtype:
                self.details[actual.key] = detailed
        return found | self._from_residues(triples, found)

    def _from_residues(
        self, triples: Mapping[int, Triple], found: Mapping[int, Difference]
    ) -> dict[int, Difference]:
        """What sketches leave undecided, where the golden holds more: one more pass."""
        from harness.comparison.bounds import Beside, by_residues, can_check, check_chunk

        pairs = {}
        for index, (expected, actual, _) in triples.items():
            if expected.residues is not None and can_check(found[index], expected, actual):
                pairs[index] = Beside(expected.residues, self.actual.tensors[actual.key])
        self.workers.expect(sum(pair.nbytes for pair in pairs.values()))
        checked = map_chunks([*pairs.values()], check_chunk, self.workers)
        return {
            index: by_residues(found[index], triples[index][0], pairs[index].actual, blocks)
            for index, blocks in zip(pairs, checked, strict=True)
        }

    def _block_nbytes(self, expected: TensorFingerprint, actual: TensorFingerprint) -> int:
        ours, theirs = (t.dtype.component_nbytes for t in (expected, actual))
        return self.golden.block_nbytes * theirs // ours


@dataclass(frozen=True)
class BySketches:
    """Measures two fingerprints by what they hold; nothing is read."""

    block_nbytes: int

    def __call__(self, triples: Sequence[Triple]) -> list[Difference]:
        from harness.comparison.bounds import difference_from_sketch

        return [
            replace(
                difference_from_sketch(expected, actual, tolerance, self.block_nbytes, None),
                stats=(expected.stats, actual.stats),
            )
            for expected, actual, tolerance in triples
        ]


def nothing(tensor: Tensor) -> bool:
    """As `details` of `fingerprint`: digests alone."""
    return False


def part(checkpoint: Checkpoint, keys: set[str]) -> Checkpoint:
    """The tensors with these keys, each for itself."""
    return replace(
        checkpoint,
        tensors={
            key: replace(tensor, alias_of=None)
            for key, tensor in checkpoint.tensors.items()
            if key in keys
        },
    )
