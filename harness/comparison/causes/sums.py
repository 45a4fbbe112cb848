"""The hypothesis that a tensor is a sum of the golden's: a mean, a moving average, a merge.

In: what is known of a tensor, and of the golden's tensors of its shape and dtype. Out: a `Cause`
with their keys and factors, which holds for all values to within the rounding of the dtype, or for
every block of the sketch, which is linear, within the bound that is printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from harness.checkpoint.dtypes import Array
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Evidence, Roundoff, detailed, is_constant
from harness.comparison.causes.linear import (
    Vector,
    are_comparable,
    ceiling,
    is_sum,
    simple_numbers,
    vector_of,
)
from harness.comparison.causes.regrouped import NUMBER, names
from harness.comparison.causes.views import sample
from harness.fingerprints.fingerprint import TensorFingerprint

_MIN_NUMEL = 32
_MAX_TERMS, _MAX_SHOWN = 64, 4
_MAX_ALIKE, _MAX_CANDIDATES, _MAX_ROWS = 1024, 128, 1024
_SAMPLED, _RUNS = 512, 4
_MAX_READ_NBYTES = 256 << 20  # of a reference, whose tensors are not known otherwise


@dataclass(frozen=True, kw_only=True, eq=False)
class _Basis:
    """The golden's tensors that a sum may be of; `columns` is what is known of each, at most 1,024
    numbers, `gram` their products."""

    keys: Sequence[str]
    vectors: Sequence[Vector]
    columns: Array
    gram: Array


class Sums:
    """Looks for sums in what is known of the golden; bases are kept for tensors of one shape."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._bases: dict[object, _Basis | None] = {}
        self._samples: dict[object, Array] = {}
        self._keys: dict[object, list[str]] = {}
        self._read: dict[str, TensorFingerprint] = {}

    @np.errstate(all="ignore")
    def explain(self, key: str, actual: TensorFingerprint) -> Cause | None:
        """Find the tensors of the golden that add up to this one, and their factors."""
        theirs = vector_of(actual, self._evidence.block_nbytes)
        if theirs is None or actual.numel < _MIN_NUMEL or is_constant(actual.stats):
            return None
        basis = self._basis(key, actual, theirs)
        roundoff = Roundoff.of(actual.dtype)
        if basis is None or roundoff.is_coarse:
            return None
        wanted = theirs.rows.ravel()[: len(basis.columns)]
        factors = np.linalg.solve(basis.gram, basis.columns.T @ wanted)
        size = float(np.linalg.norm(wanted))
        away = float(np.linalg.norm(wanted - basis.columns @ factors))
        if not size or not away <= 16 * roundoff.relative * size:
            return None
        sizes = np.sqrt(np.diag(basis.gram))
        counted = np.abs(factors) * sizes > max(1e-3, 16 * roundoff.relative) * size
        terms = np.flatnonzero(counted).tolist()
        if not 2 <= len(terms) <= _MAX_TERMS:
            return None
        vectors = [basis.vectors[term] for term in terms]
        of = [basis.keys[term] for term in terms]
        for chosen in _chosen(factors[terms]):
            bound = is_sum(theirs, [*zip(chosen, vectors, strict=True)], roundoff)
            if bound is not None:
                return _cause(of, chosen, bound, is_exact=theirs.is_exact)
        return None

    @np.errstate(all="ignore")
    def may_be(self, key: str, actual: TensorFingerprint) -> bool:
        """Whether a sample allows that a tensor is a sum of the golden's and a number.

        True where no sample of both sides can be read.
        """
        references, tensor = self._evidence.references, self._evidence.tensors.get(actual.key)
        if tensor is None or actual.dtype.kind != "float" or actual.numel < 2 * _SAMPLED:
            return True
        alike = {k: references[k] for k in self._alike(key, actual) if k in references}
        name: tuple[object, ...] = (actual.dtype.name, actual.shape)
        if len(alike) > _MAX_CANDIDATES:
            alike = {k: alike[k] for k in _nearest(key, alike)[:_MAX_CANDIDATES]}
            name = (*name, key)
        if name not in self._samples:
            self._evidence.check_time()
            columns = [np.ones(_SAMPLED), *map(_sample, alike.values())]
            self._samples[name] = np.linalg.qr(np.stack(columns, axis=1))[0]
        basis, wanted = self._samples[name], _sample(tensor)
        away = np.linalg.norm(wanted - basis @ (basis.T @ wanted))
        allowed = 64 * Roundoff.of(actual.dtype).relative * np.linalg.norm(wanted)
        return not away > allowed  # nor where something is not finite

    def _alike(self, key: str, actual: TensorFingerprint) -> list[str]:
        """The golden's keys of this dtype and shape; of very many, those of the key's series."""
        if not self._keys:
            for other, tensor in self._evidence.expected.items():
                form = tensor.dtype.name, tensor.shape
                for name in (form, (form, NUMBER.sub("#", other))):
                    self._keys.setdefault(name, []).append(other)
        form = actual.dtype.name, actual.shape
        found = self._keys.get(form, [])
        if len(found) > _MAX_ALIKE:
            found = self._keys.get((form, NUMBER.sub("#", key)), [])[:_MAX_ALIKE]
        return found

    def _basis(self, key: str, actual: TensorFingerprint, theirs: Vector) -> _Basis | None:
        alike = {k: self._evidence.expected[k] for k in self._alike(key, actual)}
        most = min(_MAX_CANDIDATES, theirs.rows.size // 2)
        is_narrowed = len(alike) > most
        if is_narrowed:
            alike = {k: alike[k] for k in _nearest(key, alike)[:most]}
        name = (actual.dtype.name, actual.shape, key if is_narrowed else None)
        if name not in self._bases:
            self._bases[name] = self._made(self._known(alike), theirs)
        return self._bases[name]

    def _known(self, alike: Mapping[str, TensorFingerprint]) -> dict[str, TensorFingerprint]:
        """What is to be known of them, read of the reference where it is not."""
        evidence, known = self._evidence, dict(alike)
        lacking = {
            k
            for k, t in known.items()
            if t.sketch is None and t.values is None and k in evidence.references
        }
        size = sum(known[key].nbytes for key in lacking)
        if evidence.reference is not None and 0 < size <= _MAX_READ_NBYTES:
            known |= detailed(evidence.reference, lacking, evidence.block_nbytes, evidence.workers)
        return known

    def _made(self, tensors: Mapping[str, TensorFingerprint], theirs: Vector) -> _Basis | None:
        self._evidence.check_time()
        found: dict[bytes | str, tuple[str, Vector]] = {}
        for key, tensor in tensors.items():
            if tensor.digest in found or is_constant(tensor.stats):
                continue  # the same again adds nothing
            vector = vector_of(tensor, self._evidence.block_nbytes)
            if vector is not None and are_comparable(vector, theirs) and vector.norms.any():
                found[tensor.digest or key] = key, vector
        if len(found) < 2:
            return None
        vectors = [vector for _, vector in found.values()]
        columns = np.stack([vector.rows.ravel()[:_MAX_ROWS] for vector in vectors], axis=1)
        sizes = np.linalg.norm(columns, axis=0)
        gram = columns.T @ columns
        if not np.isfinite(gram).all() or not sizes.all():
            return None
        least = np.linalg.eigvalsh(gram / np.outer(sizes, sizes))[0]
        if least <= 1e-6:
            return None  # some are sums of the others: more than one answer
        keys = [key for key, _ in found.values()]
        return _Basis(keys=keys, vectors=vectors, columns=columns, gram=gram)


def _sample(tensor: Tensor) -> Array:
    return sample(tensor, _SAMPLED, runs=_RUNS)


def _nearest(key: str, keys: Mapping[str, object]) -> list[str]:
    """Keys of the same series first, then those that begin alike."""
    series = NUMBER.sub("#", key)

    def distance(other: str) -> tuple[bool, int]:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(key, other, strict=False))
        return NUMBER.sub("#", other) != series, -len([*alike])

    return sorted(keys, key=distance)


def _chosen(factors: Array) -> Iterator[list[float]]:
    """The factors as a person would have chosen them: all the same, round, then as they are."""
    mean = float(factors.mean())
    for same in (1.0, 1 / len(factors), *simple_numbers(mean)[:2]):
        if abs(same - mean) < 0.02 * abs(mean) and np.ptp(factors) < 0.02 * abs(mean):
            yield [same] * len(factors)
    for digits in (1, 2, 3):
        yield [float(f"{factor:.{digits}g}") for factor in factors]
    yield [float(factor) for factor in factors]


def _term(factor: float, key: str) -> str:
    number = "" if abs(factor) == 1 else f"{abs(factor):.6g} × "
    return f"{'−' if factor < 0 else '+'} {number}{key}"


def _cause(of: Sequence[str], factors: Sequence[float], bound: float, *, is_exact: bool) -> Cause:
    is_even = len(set(factors)) == 1
    if is_even and abs(factors[0] * len(of) - 1) < 1e-12:
        text = f"mean of {names(of)}"
    elif is_even:
        text = f"{'' if factors[0] == 1 else f'{factors[0]:.6g} × the '}sum of {names(of)}"
    else:
        terms = [_term(factor, key) for factor, key in zip(factors, of, strict=True)]
        text = " ".join(terms[:_MAX_SHOWN]).removeprefix("+ ")
        if len(terms) > _MAX_SHOWN:
            text += f" and {len(terms) - _MAX_SHOWN} more"
    text += f" (to within {ceiling(bound):.0e} of its norm)" if bound else ""
    return Cause(
        kind="sum",
        text=text,
        proof="values" if is_exact else "sketch",
        of=tuple(of),
        factor=factors[0] if is_even else None,
        factors=None if is_even else tuple(factors),
        bound=bound,
    )
