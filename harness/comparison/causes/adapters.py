"""Hypotheses about LoRA: a weight that is the golden's plus the product of an adapter, scaled.

In: an open adapter, and both sides' fingerprints. Out: a `Cause` where actual = expected + s·B·A
holds to rounding for all values, or within the bound of the sketch, which is linear. s is found by
least squares, and told beside the adapter's own scale where they differ. Memory: one run of rows of
the product.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import Array
from harness.checkpoint.sources.access import open_source, read_file
from harness.checkpoint.sources.paths import AnyPath, is_there
from harness.checkpoint.tensors import Tensor
from harness.comparison.cause import Cause
from harness.comparison.causes.evidence import Roundoff
from harness.comparison.causes.linear import (
    ROUNDINGS,
    UPPER,
    Vector,
    are_comparable,
    ceiling,
    of_sketch,
    simple_numbers,
    vector_of,
)
from harness.comparison.causes.views import wide_of
from harness.errors import CheckpointError
from harness.fingerprints.fingerprint import TensorFingerprint, block_numel
from harness.fingerprints.sketch import Sketch, sketch_values

_DOWN = re.compile(
    r"^(?P<stem>.+?)\.(?:lora_A|lora_down)(?P<name>(?:\.(?!weight$)[^.]+)?(?:\.weight)?)$"
)
_UP = {"lora_A": "lora_B", "lora_down": "lora_up"}
_RUN_NUMEL = 1 << 22
_CONFIG = "adapter_config.json"
_MAX_CONFIG_NBYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The pairs of a LoRA adapter: `down` (r, in) and `up` (out, r) by the stem of their keys."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]

    def of_key(self, key: str) -> tuple[Tensor, Tensor, float | None] | None:
        """The pair of a golden's key, where just one fits; its own scale where that is known."""
        parts = key.removesuffix(".weight").split(".")
        alike = [(_num_alike(parts, stem.split(".")), stem) for stem in self.pairs]
        most = max((count for count, _ in alike), default=0)
        found = [stem for count, stem in alike if count == most]
        if not most or len(found) != 1:
            return None
        return *self.pairs[found[0]], self.scales.get(found[0])


def _num_alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many last parts of two keys agree; 0 where what is in front says another layer."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    rest = (*one[: len(one) - count], *other[: len(other) - count])
    return 0 if any(part.isdigit() for part in rest) else count


@contextmanager
def opened_adapter(path: AnyPath) -> Iterator[Adapter]:
    """Open an adapter, a file or a folder; PEFT's adapter_config.json is looked for beside it.

    Raises CheckpointError, also where it holds no pair of LoRA tensors.
    """
    with open_checkpoint(path) as checkpoint:
        found = adapter_of(checkpoint.tensors, _config_of(path))
        if not found.pairs:
            raise CheckpointError(
                f"{path}: not an adapter: it has no lora_A and lora_B (or lora_down and lora_up)",
                hint=f"its first key is {next(iter(checkpoint.tensors), 'none')}",
            )
        yield found


def _config_of(path: AnyPath) -> Mapping[str, Any]:
    for file in (path / _CONFIG, path.parent / _CONFIG):
        if not is_there(file):
            continue
        with closing(open_source(file)) as source:
            if source.nbytes > _MAX_CONFIG_NBYTES:
                raise CheckpointError(
                    f"{file}: {source.nbytes:,} bytes, and at most {_MAX_CONFIG_NBYTES:,} are read",
                    hint="it is not an adapter_config.json: remove it",
                )
        try:
            config = json.loads(read_file(file))
        except ValueError as error:
            raise CheckpointError(
                f"{file}: not JSON: {error}", hint="get it again, or remove it"
            ) from error
        return config if isinstance(config, dict) else {}
    return {}


def adapter_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Adapter:
    """Find the pairs among an adapter's tensors; `config` may have lora_alpha and r (PEFT's)."""
    pairs, scales = {}, {}
    for key, down in tensors.items():
        match = _DOWN.match(key)
        if match is None or len(down.shape) != 2:
            continue
        stem, name = match["stem"], key[len(match["stem"]) + 1 :].partition(".")[0]
        up = tensors.get(f"{stem}.{_UP[name]}{match['name']}")
        if up is None or len(up.shape) != 2 or up.shape[1] != down.shape[0]:
            continue
        pairs[stem] = down, up
        scale = _scale(tensors.get(f"{stem}.alpha"), config or {}, down.shape[0])
        if scale is not None:
            scales[stem] = scale
    return Adapter(pairs=pairs, scales=scales)


def _scale(alpha: Tensor | None, config: Mapping[str, Any], rank: int) -> float | None:
    if alpha is not None and alpha.numel == 1:
        return float(_floats(alpha)[0]) / rank
    numbers = config.get("lora_alpha"), config.get("r")
    if all(isinstance(number, int | float) and number for number in numbers):
        given, r = (float(number) for number in numbers if number is not None)
        return given / (math.sqrt(r) if config.get("use_rslora") else r)
    return None


def _floats(tensor: Tensor) -> Array:
    return wide_of(tensor, 0, tensor.numel).reshape(tensor.shape or (1,))


@np.errstate(all="ignore")
def sum_of(
    adapter: Adapter, expected: TensorFingerprint, actual: TensorFingerprint, block_nbytes: int
) -> Cause | None:
    """Find s so that actual = expected + s · up · down."""
    found = adapter.of_key(expected.key)
    if found is None or expected.shape != actual.shape or len(expected.shape) != 2:
        return None
    down, up, own = found
    ours, theirs = vector_of(expected, block_nbytes), vector_of(actual, block_nbytes)
    if ours is None or theirs is None or not are_comparable(ours, theirs):
        return None
    roundoff = Roundoff.of(expected.dtype, actual.dtype)
    if (up.shape[0], down.shape[1]) == expected.shape:
        factors = _floats(up), _floats(down)
    elif (down.shape[1], up.shape[0]) == expected.shape:
        factors = _floats(down).T, _floats(up).T
    else:
        return None
    product = _product(*factors, ours, block_numel(expected.dtype, block_nbytes))
    squares = float(np.square(product.rows).sum())
    if not squares or not math.isfinite(squares) or roundoff.is_coarse:
        return None
    scale = float((product.rows * (theirs.rows - ours.rows)).sum()) / squares
    for s in ([own] if own is not None else []) + simple_numbers(scale):
        bound = _bound(ours, theirs, product, s, roundoff)
        if bound is not None:
            return _cause(expected.key, down, up, s, own, bound, is_exact=ours.is_exact)
    return None


def _product(one: Array, other: Array, like: Vector, block: int) -> Vector:
    """The product of two factors as far as `like` is known: its values, or its sketch."""
    if like.is_exact:
        values = (one @ other).reshape(-1, 1)
        return Vector(rows=values, norms=np.abs(values[:, 0]), is_exact=True, numel=values.size)
    sketches = [sketch_values(run, block) for run in _runs(one, other, block)]
    joined = Sketch(
        projections=np.concatenate([sketch.projections for sketch in sketches]),
        norms=np.concatenate([sketch.norms for sketch in sketches]),
    )
    return of_sketch(joined, like.numel, block)


def _runs(one: Array, other: Array, block: int) -> Iterator[Array]:
    """The product in logical order, in runs of whole blocks."""
    step = max(1, _RUN_NUMEL // other.shape[1])
    left = np.empty(0)
    for first in range(0, len(one), step):
        left = np.concatenate([left, (one[first : first + step] @ other).reshape(-1)])
        whole = left.size // block * block
        if whole:
            yield left[:whole]
            left = left[whole:]
    if left.size:
        yield left


def _bound(
    ours: Vector, theirs: Vector, product: Vector, scale: float, roundoff: Roundoff
) -> float | None:
    away = np.linalg.norm(theirs.rows - ours.rows - scale * product.rows, axis=1)
    size = theirs.norms + ours.norms + abs(scale) * product.norms
    if ours.is_exact:
        # The product was summed up in the type of the factors, and rounded at each step.
        steps = 4 * size + 16 * abs(scale) * float(product.norms.max())
        holds = bool(np.all(away <= roundoff.relative * steps + 3 * roundoff.absolute))
    else:
        away = away * UPPER
        numel = min(ours.block, ours.numel)
        allowed = ROUNDINGS * (roundoff.relative * size + roundoff.absolute * math.sqrt(numel))
        holds = bool(np.all(away <= allowed))
    total = float(np.linalg.norm(theirs.norms))
    effect = abs(scale) * float(np.linalg.norm(product.rows))
    if not holds or not total or effect <= 4 * float(np.linalg.norm(away)):
        return None
    return float(np.linalg.norm(away)) / total


def _cause(
    key: str,
    down: Tensor,
    up: Tensor,
    scale: float,
    own: float | None,
    bound: float,
    *,
    is_exact: bool,
) -> Cause:
    text = f"the golden's {key} + LoRA B·A × {scale:.6g}"
    if own is not None and not math.isclose(own, scale, rel_tol=1e-5):
        text += f", where the adapter's own scale is {own:.6g}"
    text += f" (to within {ceiling(bound):.0e} of its norm)"
    return Cause(
        kind="sum",
        text=text,
        proof="values" if is_exact else "sketch",
        of=(key, down.key, up.key),
        factor=scale,
        bound=bound,
    )
