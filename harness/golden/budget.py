"""How much a golden holds of the weights, so that it fits: best first.

In: an open checkpoint and a number of bytes. Out: a `Holding`, which also says what room is left
for what a model computes. Refused (UsageError): less than the table of tensors takes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from harness.checkpoint.dtypes import DType
from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.errors import UsageError
from harness.fingerprints.fingerprint import MAX_KEPT_NUMEL, Fingerprint, block_numel, structure
from harness.fingerprints.hashes import HASH_NBYTES, UNORDERED_NBYTES
from harness.fingerprints.residues import (
    DIGEST_NBYTES,
    Bits,
    Grid,
    num_residue_blocks,
    num_residue_bytes,
)
from harness.fingerprints.sketch import DEFAULT_BLOCK_NBYTES, NUM_PROJECTIONS, num_blocks
from harness.golden.columns import rows_of
from harness.golden.header import Contents, to_json
from harness.streaming.chunks import CHUNK_NBYTES
from harness.text.disclosure import disclosed
from harness.text.sizes import size_at_least

KeptValues = Literal["small", "all", "none"]
_FEW_NUMEL = 256  # of values that are no more than a sketch and residues with their overhead
_MAX_BLOCK_NBYTES = CHUNK_NBYTES // 4
# Digest, stats, hashes, and the names of what is kept.
_ROW_NBYTES = 32 + 9 * 8 + 3 * HASH_NBYTES + UNORDERED_NBYTES + 64
_HEADER_NBYTES = 4096  # but for the table and the configuration


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a golden holds beside digests and statistics, and about what that takes.

    Values of tensors up to `max_kept_numel` (None: of all), sketches of blocks of `block_nbytes`
    of others, and residues of these, of so many `bits`, or none. `room` is what is left.
    """

    max_kept_numel: int | None
    block_nbytes: int = DEFAULT_BLOCK_NBYTES
    bits: Bits | None = None
    room: int = field(default=0, compare=False)

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are held."""
        return self.max_kept_numel is None or tensor.numel <= self.max_kept_numel


def default_max_nbytes(checkpoint: Checkpoint) -> int:
    """8 MB, or 1 % of the checkpoint where that is more, at most 100 MB."""
    nbytes = sum(t.nbytes for t in checkpoint.tensors.values() if t.alias_of is None)
    return min(100_000_000, max(8_000_000, nbytes // 100))


class Sizes:
    """Bytes that a golden of a checkpoint takes, a little more rather than less.

    Made in time proportional to the tensors, asked in time proportional to their kinds.
    """

    def __init__(
        self, checkpoint: Checkpoint | Fingerprint, tolerance: tuple[float, float]
    ) -> None:
        rows = Contents(parts={"weights": rows_of(structure(checkpoint))})
        config = json.dumps(disclosed(checkpoint.config))
        described = len(to_json(rows)) + len(config)
        self._fixed = _HEADER_NBYTES + described + _ROW_NBYTES * len(checkpoint.tensors)
        self._tolerance = tolerance
        originals = (t for t in checkpoint.tensors.values() if t.alias_of is None)
        self._kinds = Counter((tensor.dtype, tensor.numel) for tensor in originals)

    def of(self, holding: Holding) -> int:
        """The bytes of a golden that holds so much."""
        total = self._fixed
        for (dtype, numel), count in self._kinds.items():
            if holding.max_kept_numel is None or numel <= holding.max_kept_numel:
                total += count * numel * dtype.itemsize
            elif dtype.is_floating:
                total += count * self._of_sketch(dtype, numel, holding)
        return total

    def _of_sketch(self, dtype: DType, numel: int, holding: Holding) -> int:
        components = numel * (2 if dtype.kind == "complex" else 1)
        blocks = num_blocks(components, block_numel(dtype, holding.block_nbytes))
        nbytes = 8 * (NUM_PROJECTIONS + 1) * blocks
        bits = holding.bits
        if bits is not None and Grid.of(dtype, *self._tolerance, bits) is not None:
            nbytes += num_residue_bytes(numel, bits) + DIGEST_NBYTES * num_residue_blocks(numel)
        return nbytes


def held_by(golden: Fingerprint) -> Holding:
    """What a golden holds of its tensors: an update holds as much of new ones."""
    originals = [t for t in golden.tensors.values() if t.alias_of is None and not t.dtype.is_value]
    kept = max((t.numel for t in originals if t.values is not None), default=0)
    left = min((t.numel for t in originals if t.values is None), default=MAX_KEPT_NUMEL + 1)
    limits: list[int | None] = [n for n in (MAX_KEPT_NUMEL, _FEW_NUMEL, 0) if kept <= n < left]
    return Holding(
        max_kept_numel=[*limits, None if kept else 0][0],
        block_nbytes=golden.block_nbytes,
        bits=golden.bits,
    )


def size_that_decides(golden: Fingerprint, bits: Bits = 4) -> str:
    """The `--max-size` of a golden that decides allclose for every tensor."""
    sizes = Sizes(golden, golden.tolerance)
    numel = MAX_KEPT_NUMEL if bits == 8 else _FEW_NUMEL
    return size_at_least(sizes.of(Holding(max_kept_numel=numel, bits=bits)))


def said_of(golden: Fingerprint) -> str:
    """What a golden decides, in one line."""
    originals = [t for t in golden.tensors.values() if t.alias_of is None]
    left = [t for t in originals if t.sketch is not None and t.residues is None]
    has_residues = any(tensor.residues is not None for tensor in originals)
    if left and not has_residues:
        decides = "it decides gross changes and single elements"
        # Where room is short, blocks grow before the last values go: they were not wanted.
        if held_by(golden).max_kept_numel == 0 and golden.block_nbytes == DEFAULT_BLOCK_NBYTES:
            return f"{decides}; --values small keeps more"
        return f"{decides}; --max-size {size_that_decides(golden)} would decide all"
    atol, rtol = golden.tolerance
    at = f"{atol:g}" if atol == rtol else f"atol {atol:g}, rtol {rtol:g}"
    said = f"it decides allclose at {at.replace('e-0', 'e-')} for "
    said += f"all but {len(left):,} of {len(originals):,} tensors" if left else "every tensor"
    if not has_residues or golden.bits == 8:
        return said
    return f"{said}, to within 13 %; to within 1 % with --max-size {size_that_decides(golden, 8)}"


def choose(
    checkpoint: Checkpoint,
    max_nbytes: int | None,
    values: KeptValues,
    tolerance: tuple[float, float],
) -> Holding:
    """Choose the best that fits; where nothing is asked for, the least if nothing fits.

    Raises UsageError where nothing does.
    """
    limit = default_max_nbytes(checkpoint) if max_nbytes is None else max_nbytes
    if values == "all":
        return Holding(max_kept_numel=None, room=limit)
    sizes = Sizes(checkpoint, tolerance)
    nbytes, last = 0, Holding(max_kept_numel=0)
    for last in _best_first(values):
        nbytes = sizes.of(last)
        if nbytes <= limit:
            return replace(last, room=limit - nbytes)
    if max_nbytes is not None:
        least = size_at_least(nbytes)
        raise UsageError(
            f"--max-size {max_nbytes:,} bytes: the golden takes at least {least}",
            hint=f"give --max-size {least}, or leave it out",
        )
    return last


def _best_first(values: KeptValues) -> Iterator[Holding]:
    few = 0
    if values == "small":
        few = _FEW_NUMEL
        yield Holding(max_kept_numel=MAX_KEPT_NUMEL, bits=8)
        yield Holding(max_kept_numel=MAX_KEPT_NUMEL, bits=4)
        yield Holding(max_kept_numel=few, bits=4)
        yield Holding(max_kept_numel=MAX_KEPT_NUMEL)
    block = DEFAULT_BLOCK_NBYTES
    while block <= _MAX_BLOCK_NBYTES:
        yield Holding(max_kept_numel=few, block_nbytes=block)
        block *= 2
    yield Holding(max_kept_numel=0, block_nbytes=_MAX_BLOCK_NBYTES)
