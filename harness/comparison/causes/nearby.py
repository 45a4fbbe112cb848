"""Which of the tensors without a counterpart are each other, though not of equal values.

In: the golden's tensors without a counterpart, and the checkpoint's. Out: pairs that are much
nearer to each other than to all others, with the `Cause` and how far apart they are at most; and
pairs whose names differ as those of tensors that are known to be renamed, which proves nothing yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, is_constant
from harness.comparison.causes.linear import UPPER, Vector, are_comparable, vector_of
from harness.comparison.causes.regrouped import NUMBER
from harness.fingerprints.fingerprint import TensorFingerprint

_MIN_NUMEL, _MAX_ROWS = 16, 4096
_MAX_DISTANCE = 0.05  # as a share of the norm
_MARGIN = 4.0  # how much farther the next one is
_MAX_PAIRS = 1 << 20


def nearby(
    evidence: Evidence, missing: Mapping[str, TensorFingerprint], unexpected: Iterable[str]
) -> Iterator[tuple[str, str, Cause]]:
    """Pair missing and unexpected tensors; yields the keys of both, and the cause."""
    found = [evidence.actual[key] for key in unexpected if key in evidence.actual]
    for shape in dict.fromkeys(tensor.shape for tensor in missing.values()):
        evidence.check_time()
        ours = _vectors(evidence, (t for t in missing.values() if t.shape == shape))
        theirs = _vectors(evidence, (t for t in found if t.shape == shape))
        if ours and theirs and len(ours) * len(theirs) <= _MAX_PAIRS:
            yield from _pairs(ours, theirs)


def renamed_alike(
    known: Iterable[tuple[str, str]], missing: Iterable[str], unexpected: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Pair keys as those of `known` pairs are: of another layer, or with the same new parts.

    Where both sides of a pair end alike, what is in front of that became another, too.
    """
    other_layer: dict[str, str] = {}
    fronts: dict[str, str] = {}
    parts: dict[str, str] = {}
    for key, there in known:
        if key.count(".") == there.count("."):
            parts |= zip(key.split("."), there.split("."), strict=True)
        other_layer[NUMBER.sub("#", key)] = NUMBER.sub("#", there)
        alike = takewhile(
            lambda pair: pair[0] == pair[1], zip(key[::-1], there[::-1], strict=False)
        )
        _, _, end = key[len(key) - len([*alike]) :].partition(".")
        if end:
            fronts[key.removesuffix(end)] = there.removesuffix(end)
    free = set(unexpected)
    for key in missing:
        between = other_layer.get(NUMBER.sub("#", key), "").split("#")
        numbers = NUMBER.findall(key)
        wanted = [".".join(parts.get(part, part) for part in key.split("."))]
        if len(between) == len(numbers) + 1:
            wanted.append("".join(map("".join, zip(between, [*numbers, ""], strict=True))))
        places = (0, *(match.end() for match in re.finditer(r"\.", key)))
        wanted += [fronts[key[:p]] + key[p:] for p in places if key[:p] in fronts]
        for there in wanted:
            if there in free:
                free.remove(there)
                yield key, there
                break


def _vectors(evidence: Evidence, tensors: Iterable[TensorFingerprint]) -> dict[str, Vector]:
    vectors = {}
    for tensor in tensors:
        if tensor.numel >= _MIN_NUMEL and not is_constant(tensor.stats):
            vector = vector_of(tensor, evidence.block_nbytes)
            if vector is not None and vector.norms.any():
                vectors[tensor.key] = vector
    return vectors


@np.errstate(all="ignore")
def _pairs(
    ours: Mapping[str, Vector], theirs: Mapping[str, Vector]
) -> Iterator[tuple[str, str, Cause]]:
    keys, there = [*ours], [*theirs]
    first = ours[keys[0]]
    if not all(are_comparable(first, v) for v in (*ours.values(), *theirs.values())):
        return
    e, a = (
        np.stack([v.rows.ravel()[:_MAX_ROWS] for v in side.values()]) for side in (ours, theirs)
    )
    squares = np.square(e).sum(axis=1)[:, None] + np.square(a).sum(axis=1) - 2 * (e @ a.T)
    distances = np.sqrt(np.maximum(squares, 0.0))
    best = distances.argmin(axis=1)
    for row, column in enumerate(best):
        others = np.concatenate(
            [np.delete(distances[row], column), np.delete(distances[:, column], row)]
        )
        one, other = ours[keys[row]], theirs[there[column]]
        bound = _bound(one, other)
        # Of what lies so near to each other rounding of the products shows no distance.
        nearest = max(float(distances[row, column]), 1e-7 * float(np.linalg.norm(a[column])))
        if bound <= _MAX_DISTANCE and (others > _MARGIN * nearest).all():
            yield keys[row], there[column], _cause(keys[row], bound, is_exact=one.is_exact)


def _bound(one: Vector, other: Vector) -> float:
    away: Array = np.linalg.norm(other.rows - one.rows, axis=1)
    total = float(np.linalg.norm(one.norms))
    return float(np.linalg.norm(away)) * (1.0 if one.is_exact else UPPER) / total


def _cause(key: str, bound: float, *, is_exact: bool) -> Cause:
    return Cause(
        kind="moved",
        text=f"holds nearly what {key} holds in the golden (to within {bound:.0e} of its norm)",
        proof="values" if is_exact else "sketch",
        of=(key,),
        bound=bound,
    )
