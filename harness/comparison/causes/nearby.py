"""Which of the tensors without a counterpart are each other, though not of equal values.

In: the golden's tensors without a counterpart, and the checkpoint's. Out: pairs that are much
nearer to each other than to all others, or correlate far more (what was trained on), with the
`Cause` and how far apart they are at most; and pairs whose names differ as those of tensors that
are known to be renamed, which proves nothing yet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, is_constant
from harness.comparison.causes.linear import UPPER, Vector, are_comparable, of_values, vector_of
from harness.comparison.causes.regrouped import NUMBER
from harness.comparison.causes.views import wide_of
from harness.fingerprints.fingerprint import TensorFingerprint

_MIN_NUMEL, _MAX_ROWS = 16, 4096
_MAX_DISTANCE = 0.05  # as a share of the norm
_MARGIN = 4.0  # how much farther the next one is
_MAX_PAIRS = 1 << 20
# What correlates at least so much, and more than all others by so much: in Fisher's z, beside as
# many standard errors as chance does not reach.
_MIN_SCORE, _ERRORS, _LEAD_ERRORS = math.atanh(0.5), 4.0, 7.0


def nearby(
    evidence: Evidence, missing: Mapping[str, TensorFingerprint], unexpected: Iterable[str]
) -> Iterator[tuple[str, str, Cause]]:
    """Pair missing and unexpected tensors; yields the keys of both, and the cause."""
    found = [evidence.actual[key] for key in unexpected if key in evidence.actual]
    for shape in dict.fromkeys(tensor.shape for tensor in missing.values()):
        evidence.check_time()
        ours = _vectors(evidence, (t for t in missing.values() if t.shape == shape))
        theirs = _vectors(evidence, (t for t in found if t.shape == shape))
        is_little = len(ours) * len(theirs) <= _MAX_PAIRS
        if ours and theirs and is_little and _are_comparable(ours, theirs):
            samples = _sampled(evidence.references, ours), _sampled(evidence.tensors, theirs)
            pairs = samples if all(samples) else (ours, theirs)
            for key, there, cause in (*_near(ours, theirs), *_related(*pairs)):
                if ours.pop(key, None) and theirs.pop(there, None):
                    yield key, there, cause


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


def _sampled(tensors: Mapping[str, Tensor], known: Iterable[str]) -> dict[str, Vector]:
    """The first values of tensors that can be read; none where one of them cannot."""
    found: dict[str, Vector] = {}
    for key in known:
        if (tensor := tensors.get(key)) is None:
            return {}
        found[key] = of_values(wide_of(tensor, 0, _MAX_ROWS))
    return found


def _are_comparable(ours: Mapping[str, Vector], theirs: Mapping[str, Vector]) -> bool:
    first, *others = (*ours.values(), *theirs.values())
    return all(are_comparable(first, other) for other in others)


@np.errstate(all="ignore")
def _near(
    ours: Mapping[str, Vector], theirs: Mapping[str, Vector]
) -> Iterator[tuple[str, str, Cause]]:
    keys, there = [*ours], [*theirs]
    e, a = (
        np.stack([v.rows.ravel()[:_MAX_ROWS] for v in side.values()]) for side in (ours, theirs)
    )
    squares = np.square(e).sum(axis=1)[:, None] + np.square(a).sum(axis=1) - 2 * (e @ a.T)
    distances = np.sqrt(np.maximum(squares, 0.0))
    best = distances.argmin(axis=1)
    for row, column in enumerate(best):
        others = _others(distances, row, column)
        one, other = ours[keys[row]], theirs[there[column]]
        bound = _bound(one, other)
        # Of what lies so near to each other rounding of the products shows no distance.
        nearest = max(float(distances[row, column]), 1e-7 * float(np.linalg.norm(a[column])))
        if bound <= _MAX_DISTANCE and (others > _MARGIN * nearest).all():
            yield keys[row], there[column], _cause(keys[row], bound, is_exact=one.is_exact)


def _related(
    ours: Mapping[str, Vector], theirs: Mapping[str, Vector]
) -> Iterator[tuple[str, str, Cause]]:
    """Pair what correlates, by the cosines of blocks without their means, and less with others."""
    keys, there = [*ours], [*theirs]
    e, a = (np.stack([*map(_directions, side.values())]) for side in (ours, theirs))
    num_blocks, size = e.shape[1:]
    error = 1 / math.sqrt(num_blocks * (size - 1))
    cosines = np.einsum("ibk,jbk->ij", e, a, optimize=True) / num_blocks
    scores = np.arctanh(np.clip(cosines, -1 + 1e-12, 1 - 1e-12))  # Fisher's z
    for row, column in enumerate(scores.argmax(axis=1)):
        score = float(scores[row, column])
        most = np.abs(_others(scores, row, column)).max(initial=0.0)
        if score > max(_MIN_SCORE + _ERRORS * error, most + _LEAD_ERRORS * error):
            is_exact = ours[keys[row]].is_exact
            yield keys[row], there[column], _of_score(keys[row], score, error, is_exact=is_exact)


def _of_score(key: str, score: float, error: float, *, is_exact: bool) -> Cause:
    value = math.tanh(score)
    about = max(0.01, value - math.tanh(score - 2 * error))
    return Cause(
        kind="moved",
        text=f"correlates with {key} of the golden ({value:.2f} ± {about:.2f}), and less with all "
        "others",
        proof="values" if is_exact else "sketch",
        of=(key,),
        correlation=value,
    )


def _directions(vector: Vector) -> Array:
    """Unit vectors (blocks, k) of up to 256 blocks, or (1, n) of values, each without its mean."""
    rows, ones = (
        x.T if vector.is_exact else x[: _MAX_ROWS // x.shape[1]] for x in (vector.rows, vector.ones)
    )
    mean = (rows * ones).sum(axis=1) / np.maximum((ones * ones).sum(axis=1), 1e-300)
    rows = rows - mean[:, None] * ones
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0.0, norms, 1.0))


def _others(table: Array, row: int, column: int) -> Array:
    """The rest of a pair's row and column."""
    return np.concatenate([np.delete(table[row], column), np.delete(table[:, column], row)])


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
