"""Results to report: of tensors that are easily told apart, of hostile names, and of many."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from harness.checkpoint.dtypes import DTYPES
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.difference import Difference, Element
from harness.comparison.findings import Finding, describe
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy, Tolerance
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.stats import Stats
from harness.report.outcome import Outcome, Result

PHONE, DESKTOP = (375, 780), (1280, 900)
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    '"><b onmouseover=alert(3)>',
    "' autofocus onfocus='alert(4)",
    "{{ 7 * 7 }}{% raw %}${7*7}",
    "<!--<script>",
    "lone \udc80 surrogate",
    "bell \x07 and \u202e backwards",
    "__proto__.constructor",
    "toString",
    "",
    "...",
    "a..b",
    "line\u2028break",
]
PLACES = ["(model):in.0", "a:in.0", "a:out", "b:in.0", "b:in.1", "b.inner:in.0", "b.inner:out"]
PLACES += ["b:out", "c:in.0", "c:out", "(model):out"]


def result_of(*stages: Comparison, **known: Any) -> Result:
    given = {"expected": stages[0].expected.name, "actual": stages[0].actual.name, **known}
    return Result(command="verify", outcomes=(Outcome(stages=stages, **given),))


def compared(
    expected: Mapping[str, float],
    actual: Mapping[str, float],
    *,
    stage: str = "file",
    numels: Mapping[str, int] | None = None,
) -> Comparison:
    """A comparison of tensors that hold one number each, many times."""
    sides = (
        Fingerprint(
            name=name,
            container="container",
            section="",
            tensors={
                k: filled(k, value, (numels or {}).get(k, 600)) for k, value in values.items()
            },
        )
        for name, values in (("golden/x", expected), ("x.pt", actual))
    )
    return compare(*sides, Policy(), BySketches(1024), stage=stage)


def filled(key: str, value: float, numel: int) -> TensorFingerprint:
    values = np.full(numel, value, "<f4").tobytes()
    stats = Stats(
        min=value, max=value, mean=value, std=0.0, l2=abs(value) * numel**0.5,
        num_zero=0, num_nan=0, num_posinf=0, num_neginf=0,
    )  # fmt: skip
    return TensorFingerprint(
        key=key,
        dtype=DTYPES["float32"],
        shape=(numel,),
        digest=values[:32],
        stats=stats,
        values=values,
    )


@cache
def all_differing(
    num_tensors: int, stage: str = "file", suffixes: tuple[str, ...] = ("weight",)
) -> Comparison:
    """Every tensor differs, and every detail of it is known and unlike all others."""
    rng = random.Random(stage)
    tensors, findings = {}, []
    for index in range(num_tensors):
        for suffix in suffixes:
            key = f"encoder.layers.{index // 20}.self_attention.projection_{index % 20}.{suffix}"
            shape = (1024, rng.randrange(1, 4096))
            tensor = TensorFingerprint(
                key=key, dtype=DTYPES["float32"], shape=shape, digest=None, stats=random_stats(rng)
            )
            tensors[key] = tensor
            findings.append(
                Finding(
                    kind="different",
                    key=key,
                    expected=describe(tensor),
                    actual=describe(tensor),
                    difference=random_difference(rng, tensor),
                )
            )
    side = Fingerprint(name="golden/big", container="nemo", section="", tensors=tensors)
    return Comparison(
        expected=side,
        actual=side,
        policy=Policy(),
        findings=tuple(findings),
        num_identical=0,
        stage=stage,
    )


STRIP = [(1 + place * 37 % 64) / 64 for place in range(64)]


def random_stats(rng: random.Random) -> Stats:
    return Stats(
        min=-rng.random(), max=rng.random(), mean=rng.random() - 0.5, std=rng.random(),
        l2=1000 * rng.random(), num_zero=rng.randrange(100), num_nan=0, num_posinf=0, num_neginf=0,
    )  # fmt: skip


def random_difference(rng: random.Random, tensor: TensorFingerprint) -> Difference:
    size = 10 ** -rng.uniform(1, 6)
    return Difference(
        verdict="different",
        why=f"{rng.randrange(10**6):,} of {tensor.numel:,} elements are beyond the tolerance",
        is_exact=True,
        tolerance=Tolerance(),
        numel=tensor.numel,
        max_abs=(size, size),
        min_atol=(size, size),
        rms=size / 10,
        num_differing=tensor.numel,
        num_beyond=rng.randrange(10**6),
        where="rows 1-3, 17, 40-44, 60-1003 and 9 more ranges",
        strip=tuple(size * part for part in STRIP),
        elements=tuple(
            Element(
                index=(rng.randrange(1024), rng.randrange(4096)),
                expected=rng.random(),
                actual=rng.random(),
            )
            for _ in range(5)
        ),
        stats=(tensor.stats, random_stats(rng)),
    )
