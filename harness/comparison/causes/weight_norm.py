"""Hypotheses about weight norm: its two forms, and the plain weight g·v/‖v‖ that both stand for.

In: the keys that only one side has, and what is known of their values. Out: a `Cause` for each key
of a weight. The two forms hold the same bytes; the plain weight is computed in float64, and is
proved where all values agree to rounding, or the sketch does within the bound that is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence
from harness.comparison.causes.linear import Roundoff, vector_of
from harness.comparison.causes.views import View
from harness.fingerprints.arithmetic import as_floats
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.sketch import sketch_values

# How the norm g and the direction v are called beside the plain weight: torch's old and new form.
_FORMS = (
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    (".weight_g", ".weight_v"),
)
_PLAIN = ".weight"
_MAX_NUMEL = 1 << 24  # 128 MiB as float64
_ROUNDINGS = 8.0


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
            bound = _is_plain(evidence, found, _Values(unexpected[plain]), None)
            if bound is not None:
                yield (g, v, plain), _cause(plain, (g, v), bound, "folded", "values")
        for g, v, plain in _trios(unexpected, missing, suffixes):
            parts = _Values(unexpected[g]), _Values(unexpected[v])
            known = _expected_values(evidence, missing[plain])
            bound = _is_plain(evidence, parts, known, missing[plain])
            if bound is not None:
                proof = "sketch" if known is None else "values"
                yield (g, v, plain), _cause(plain, (g, v), bound, "unfolded", proof)


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
        data = np.empty(self.tensor.nbytes, "|u1")
        self._view.read_into(0, data.data)
        wide = as_floats(data, self.tensor.dtype).astype("<f8")
        return np.asarray(wide.reshape(self.tensor.shape))


def _expected_values(evidence: Evidence, expected: TensorFingerprint) -> _Values | None:
    if expected.values is not None:
        return _Values(expected)
    reference = evidence.references.get(expected.key)
    return None if reference is None else _Values(expected, reference)


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
    if whole is None or whole.shape != v.tensor.shape or g.tensor.dtype.kind != "float":
        return None
    if len(g.tensor.shape) not in (0, len(v.tensor.shape)):
        return None
    direction = v.array()
    axes = tuple(a for a in range(direction.ndim) if not g.tensor.shape or g.tensor.shape[a] == 1)
    norms = np.sqrt(np.square(direction).sum(axis=axes, keepdims=True))
    if g.tensor.shape and g.tensor.shape != norms.shape:
        return None
    weight = g.array() * direction / norms
    size = float(np.linalg.norm(weight))
    allowed = _ROUNDINGS * Roundoff.of(whole.dtype).relative
    if plain is not None:
        away = float(np.linalg.norm(plain.array() - weight))
    else:
        vector = None if expected is None else vector_of(expected, evidence.block_nbytes)
        if vector is None or vector.is_exact or expected is None:
            return None
        numel = block_numel(expected.dtype, evidence.block_nbytes)
        ours = sketch_values(weight.reshape(-1), numel)
        # 1 / sqrt(0.241289): the bound of |d| by |z|, at a chance of 1e-12 a block.
        away = 2.0358 * float(np.linalg.norm(vector.rows - ours.projections))
        allowed *= 10
    if not math.isfinite(size) or not size or not away <= allowed * size:
        return None
    return away / size
