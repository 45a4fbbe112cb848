"""Hypotheses about weight norm: its two forms, and the plain weight g·v/‖v‖ that both stand for.

In: the keys that only one side has, and what is known of their values. Out: a `Cause` for each key
of a weight. The two forms hold the same bytes; the plain weight is computed in float64, and is
proved where all values agree to rounding, or the sketch does within the bound that is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import Array, DType
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, Roundoff
from harness.comparison.causes.linear import UPPER, vector_of
from harness.comparison.causes.views import View, wide_of
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.sketch import projection, sketch_values

# How the norm g and the direction v are called beside the plain weight: torch's old and new form.
_FORMS = (
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    (".weight_g", ".weight_v"),
)
_PLAIN = ".weight"
_MAX_NUMEL = 1 << 24  # 128 MiB as float64
_ROUNDINGS, _SUMMED, _MOST = 8.0, 1e-5, 0.05
_MIN_DIGITS, _MAX_NORMS = 12.0, 2048


def other_form(key: str, there: str) -> Cause | None:
    """Say of a renamed tensor that it is weight norm's, in the other form."""
    for one, other in (_FORMS, _FORMS[::-1]):
        for old, new in zip(one, other, strict=True):
            if key.endswith(old) and there == key.removesuffix(old) + new:
                text = f"weight_norm in its other form: {old[1:]} is {new[1:]} now"
                return Cause(
                    kind="weight_norm", text=text, proof="digest", accept=("renamed",), of=(key,)
                )
    return None


def folded(
    evidence: Evidence,
    missing: Mapping[str, TensorFingerprint],
    unexpected: Mapping[str, Tensor],
) -> Iterator[tuple[tuple[str, ...], Cause]]:
    """Find weights that were folded, or unfolded; yields the keys of both sides, and the cause."""
    for suffixes in _FORMS:
        for g, v, plain in _trios(missing, unexpected, suffixes):
            found = _expected_values(evidence, missing[g]), _expected_values(evidence, missing[v])
            weight = _Values(unexpected[plain])
            bound, proof = _is_plain(evidence, found, weight, None), "values"
            if found[0] is not None and found[1] is None:
                bound, proof = _is_direction(evidence, found[0], missing[v], weight), "sketch"
            if bound is not None:
                yield (g, v, plain), _cause(plain, (g, v), bound, "folded", proof)
            elif found[0] is not None and found[1] is None and _are_norms(found[0], weight):
                cause = _cause(plain, (g, v), 0.0, "folded", "values")
                text = f"{cause.text[:-1]}, of which the golden keeps too little to compare it)"
                yield (g, v, plain), replace(cause, text=text, bound=None)
        for g, v, plain in _trios(unexpected, missing, suffixes):
            parts = _Values(unexpected[g]), _Values(unexpected[v])
            known = _expected_values(evidence, missing[plain])
            bound = _is_plain(evidence, parts, known, missing[plain])
            if bound is not None:
                proof = "sketch" if known is None else "values"
                yield (g, v, plain), _cause(plain, (g, v), bound, "unfolded", proof)


def by_names(
    missing: Mapping[str, TensorFingerprint], unexpected: Mapping[str, TensorFingerprint]
) -> Iterator[tuple[tuple[str, str, str], Cause]]:
    """The same by keys and shapes alone, where there are no values to compare."""
    for suffixes in _FORMS:
        for parts, whole, how in (
            (missing, unexpected, "folded"),
            (unexpected, missing, "unfolded"),
        ):
            for g, v, plain in _trios(parts, whole, suffixes):
                if parts[v].shape == whole[plain].shape:
                    yield (g, v, plain), _cause(plain, (g, v), 0.0, how, "names")


def _trios(
    parts: Mapping[str, object], whole: Mapping[str, object], suffixes: tuple[str, str]
) -> Iterator[tuple[str, str, str]]:
    for key in parts:
        if key.endswith(suffixes[0]):
            stem = key.removesuffix(suffixes[0])
            if stem + suffixes[1] in parts and stem + _PLAIN in whole:
                yield key, stem + suffixes[1], stem + _PLAIN


def _cause(plain: str, parts: tuple[str, str], bound: float, how: str, proof: Any) -> Cause:
    g, v = (part.rpartition(".")[2] for part in parts)
    text = f"weight = g·v/‖v‖: weight_norm was {how} (g is {g}, v is {v}"
    text += f"; to within {bound:.0e})" if bound else ")"
    of = parts if how == "folded" else (plain,)
    return Cause(kind="weight_norm", text=text, proof=proof, of=of, bound=bound)


class _Values:
    """The values of a tensor that can be read, as float64 of its shape; read when asked for."""

    def __init__(self, tensor: Tensor | TensorFingerprint, view: View | None = None) -> None:
        self.tensor, self._view = tensor, view or tensor

    def array(self) -> Array:
        return wide_of(self._view, 0, self.tensor.numel).reshape(self.tensor.shape)


def _expected_values(evidence: Evidence, expected: TensorFingerprint) -> _Values | None:
    known = evidence.values_of(expected)
    return None if known is None else _Values(expected, known)


def _axes(g: Tensor | TensorFingerprint, ndim: int) -> tuple[int, ...] | None:
    """The dims that g is the norm over; None where it is that of no such tensor."""
    if g.dtype.kind != "float" or len(g.shape) not in (0, ndim):
        return None
    return tuple(axis for axis in range(ndim) if not g.shape or g.shape[axis] == 1)


@np.errstate(all="ignore")
def _norms(g: _Values, plain: _Values) -> tuple[Array, Array] | None:
    """What a weight's norms are to be, and what they are; None where g is of no such weight."""
    axes = _axes(g.tensor, len(plain.tensor.shape))
    if axes is None or plain.tensor.numel > _MAX_NUMEL:
        return None
    wanted = np.abs(g.array()).reshape(-1)
    norms = np.sqrt(np.square(plain.array()).sum(axis=axes)).reshape(-1)
    return (wanted, norms) if norms.shape == wanted.shape else None


def _are_norms(g: _Values, plain: _Values) -> bool:
    """Whether a weight's norms are g to within rounding, as chance hardly makes them.

    Of n norms around their mean the share r**(n - 1) is as near to g's, at r of their distance.
    """
    known = _norms(g, plain)
    if known is None:
        return False
    wanted, norms = known
    allowed = max(2 * Roundoff.of(g.tensor.dtype, plain.tensor.dtype).relative, _SUMMED)
    if not np.all(np.abs(norms - wanted) <= allowed * wanted):
        return False
    spread = float(np.linalg.norm(wanted - wanted.mean()))
    share = float(np.linalg.norm(norms - wanted)) / spread if spread else 1.0
    return share < 1 and (wanted.size - 1) * -math.log10(max(share, 1e-6)) >= _MIN_DIGITS


def _may_be_norms(g: _Values, plain: _Values) -> bool:
    """Whether a weight's norms are g to within rounding, of so few that it may be chance."""
    known = _norms(g, plain)
    return known is not None and bool(
        np.all(np.abs(known[1] - known[0]) <= _allowed(plain.tensor.dtype) * known[0])
    )


@np.errstate(all="ignore")
def _is_direction(
    evidence: Evidence, g: _Values, v: TensorFingerprint, plain: _Values
) -> float | None:
    """How far v is at most, of its norm, from the weight with other norms; None where beyond.

    v's sketch is a sum, over the norms, of a number each times that of the weight alone where the
    norm is of: least squares find the numbers, where the sketch has more of them than there are.
    """
    evidence.check_time()
    vector = vector_of(v, evidence.block_nbytes)
    if vector is None or v.shape != plain.tensor.shape or not _may_be_norms(g, plain):
        return None
    count = g.tensor.numel
    if vector.rows.size < 2 * count or count > _MAX_NORMS:
        return None
    places = np.broadcast_to(np.arange(count).reshape(g.tensor.shape), v.shape).reshape(-1)
    weight = plain.array().reshape(-1)
    block = vector.block
    columns = np.zeros((vector.rows.size, count))
    for place in range(len(vector.rows)):
        evidence.check_time()
        of = slice(place * block, (place + 1) * block)
        numbers = projection(block).numbers[: weight[of].size] * weight[of, None]
        for row, by in enumerate(numbers.T):
            at = place * vector.rows.shape[1] + row
            columns[at] = np.bincount(places[of], weights=by, minlength=count)
    rows = vector.rows.reshape(-1)
    sizes = np.linalg.lstsq(columns.T @ columns, columns.T @ rows, rcond=None)[0]
    away = UPPER * float(np.linalg.norm(rows - columns @ sizes))
    size = float(np.linalg.norm(vector.norms))
    allowed = min(_MOST, 10 * _allowed(v.dtype)) * size
    if not size or not away <= allowed:
        return None
    return away / size


def _allowed(dtype: DType) -> float:
    """Relative errors of g, v and the norm, which is a sum of many squares in float32."""
    return max(_ROUNDINGS * Roundoff.of(dtype).relative, _SUMMED)


@np.errstate(all="ignore")
def _is_plain(
    evidence: Evidence,
    parts: tuple[_Values | None, _Values | None],
    plain: _Values | None,
    expected: TensorFingerprint | None,
) -> float | None:
    """How far, of its norm, the plain weight is at most from g·v/‖v‖; None where beyond rounding.

    Without the values of the plain weight, its fingerprint `expected` decides.
    """
    evidence.check_time()
    g, v = parts
    if g is None or v is None or v.tensor.numel > _MAX_NUMEL or v.tensor.dtype.kind != "float":
        return None
    whole = expected if plain is None else plain.tensor
    axes = _axes(g.tensor, len(v.tensor.shape))
    if whole is None or whole.shape != v.tensor.shape or axes is None:
        return None
    direction = v.array()
    norms = np.sqrt(np.square(direction).sum(axis=axes, keepdims=True))
    if g.tensor.shape and g.tensor.shape != norms.shape:
        return None
    weight = g.array() * direction / norms
    size = float(np.linalg.norm(weight))
    allowed = _allowed(whole.dtype)
    if plain is not None:
        away = float(np.linalg.norm(plain.array() - weight))
    else:
        vector = None if expected is None else vector_of(expected, evidence.block_nbytes)
        if vector is None or vector.is_exact or expected is None:
            return None
        numel = block_numel(expected.dtype, evidence.block_nbytes)
        ours = sketch_values(weight.reshape(-1), numel)
        away = UPPER * float(np.linalg.norm(vector.rows - ours.projections))
        allowed = min(_MOST, 10 * allowed)
    if not math.isfinite(size) or not size or not away <= allowed * size:
        return None
    return away / size
