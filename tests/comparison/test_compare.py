"""A catalogue of mutations of values and types, each named exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import harness
from harness import api
from harness.checkpoint.dtypes import DTYPES
from harness.comparison.compare import compare
from harness.comparison.difference import Difference, exact_difference
from harness.comparison.measuring import BySketches, Triple
from harness.comparison.policy import Policy
from harness.errors import CheckpointError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from tests.catalogue import (
    NUM_TENSORS,
    Compared,
    changed,
    having,
    named,
    one,
    state,
    without,
)


def test_the_same_state_is_identical(compared: Compared) -> None:
    found = compared(state())
    assert (found.verdict, found.findings, found.exit_code) == ("identical", (), 0)
    assert found.num_identical == NUM_TENSORS
    assert found.raise_for_mismatch() is found


@pytest.mark.parametrize("key", ["norm.double", "norm.half", "norm.steps", "encoder.1.large"])
def test_another_dtype_is_named(compared: Compared, key: str) -> None:
    before = str(state()[key].dtype).removeprefix("torch.")
    finding = one(compared(changed(key, lambda t: t.to(torch.float32).to(torch.bfloat16))))
    assert (finding.kind, finding.key) == ("dtype", key)
    assert (finding.expected, finding.actual) == (before, "bfloat16")


@pytest.mark.parametrize("change", [lambda t: t.T, torch.flatten, lambda t: t[:-1]])
def test_another_shape_is_named(
    compared: Compared, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    finding = one(compared(changed("encoder.0.weight", lambda t: change(t).contiguous())))
    assert (finding.kind, finding.key) == ("shape", "encoder.0.weight")
    assert (finding.expected, finding.actual) == (
        "[8, 6]",
        str(list(change(state()["encoder.0.weight"]).shape)),
    )


def test_a_transposed_square_is_different(compared: Compared) -> None:
    found = compared(changed("encoder.1.weight", lambda t: t.T.contiguous()))
    assert named(found) == [("different", "encoder.1.weight")]
    strided = changed("encoder.1.weight", lambda t: t.T.contiguous().T)
    assert compared(strided).verdict == "identical"


def test_tied_tensors_that_came_apart_are_named_once(compared: Compared) -> None:
    found = compared(changed("head.weight", torch.clone))
    finding = one(found)
    assert (finding.kind, finding.key) == ("alias", "head.weight")
    assert (finding.expected, finding.actual) == ("tied to embed.weight", "separate")
    assert found.exit_code == 1


def test_tensors_newly_tied_are_named_once(compared: Compared) -> None:
    actual = state()
    actual["encoder.1.bias"] = actual["encoder.0.bias"]
    finding = one(compared(actual))
    assert (finding.kind, finding.key) == ("alias", "encoder.1.bias")
    assert (finding.expected, finding.actual) == ("separate", "tied to encoder.0.bias")


def test_many_tied_tensors_take_a_line_each_however_many_they_are(compared: Compared) -> None:
    """Of a file of 350 KB the words of all pairs would be gigabytes."""
    whole = torch.zeros(2000, 3)
    apart = {f"experts.{index}.weight": whole[index] for index in range(2000)}
    tied = dict.fromkeys(apart, whole[0])
    one = harness.fingerprint(apart)
    found = compare(one, harness.fingerprint(tied), Policy(), BySketches(one.block_nbytes))
    assert found.count("alias") == 1999
    assert found.findings[-1].expected == "separate"
    assert found.findings[-1].actual is not None
    assert found.findings[-1].actual.endswith(" and 1,995 more")
    assert sum(len(finding.actual or "") for finding in found.findings) < 2000 * 150
    assert len(str(found)) < 2000


def test_tied_tensors_in_another_order_are_still_tied(compared: Compared) -> None:
    assert compared(dict(reversed(state().items()))).verdict == "identical"


def test_a_tie_that_came_apart_and_changed_has_both_findings(compared: Compared) -> None:
    found = compared(changed("head.weight", lambda t: t + 1))
    assert named(found) == [("different", "head.weight"), ("alias", "head.weight")]


def test_safetensors_cannot_say_what_is_tied(tmp_path: Path) -> None:
    # Old versions of safetensors cannot write complex numbers.
    tied = {key: tensor for key, tensor in state().items() if not tensor.is_complex()}
    torch.save(tied, tmp_path / "x.pt")
    separate = {key: tensor.clone() for key, tensor in tied.items()}
    safetensors.torch.save_file(separate, tmp_path / "x.safetensors")
    golden = api.record(tmp_path / "x.pt", tmp_path / "golden")
    assert api.verify(tmp_path / "x.safetensors", golden).verdict == "identical"
    again = api.record(tmp_path / "x.safetensors", tmp_path / "other")
    assert api.verify(tmp_path / "x.pt", again).verdict == "identical"


@pytest.mark.parametrize(
    ("key", "verdict", "change"),
    [
        ("embed.weight", "different", lambda t: t + 1e-3),
        ("encoder.1.weight", "close", lambda t: t * (1 + 1e-6)),
        ("encoder.1.large", "different", lambda t: t * 1.1),
        ("encoder.1.large", "undecided", lambda t: t + 9.96e-6),
        ("encoder.1.large", "close", lambda t: t + 1e-6),
        ("encoder.1.large", "close", lambda t: t + 1e-8),
        ("norm.half", "different", lambda t: t * 1.01),
        ("norm.brain", "different", lambda t: t * 1.01),
        ("norm.double", "close", lambda t: t + 1e-12),
        ("norm.double", "different", lambda t: t + 1e-3),
        ("norm.complex", "different", lambda t: t * 1j),
        ("norm.complex", "close", lambda t: t + 1e-6j),
        ("norm.float8", "different", lambda t: (t.float() * 2).to(t.dtype)),
        ("norm.steps", "different", lambda t: t + 1),
        ("norm.mask", "different", lambda t: ~t),
    ],
)
def test_a_change_of_values_is_named_with_its_verdict(
    compared: Compared,
    key: str,
    verdict: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    actual = changed(key, change)
    if key == "embed.weight":
        actual["head.weight"] = actual[key]
    found = compared(actual)
    assert (verdict, key) in named(found)
    assert {kind for kind, _ in named(found)} == {verdict}
    assert found.verdict == verdict
    assert found.exit_code == {"close": 0, "different": 1, "undecided": 3}[verdict]
    assert found.ok == (verdict == "close")


@pytest.mark.parametrize("key", ["encoder.1.weight", "encoder.1.large"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_counted(
    compared: Compared, key: str, value: float
) -> None:
    def put(t: torch.Tensor) -> torch.Tensor:
        t[3, 4] = t[5, 6] = value
        return t

    finding = one(compared(changed(key, put)))
    assert (finding.kind, finding.key) == ("different", key)
    assert finding.difference is not None
    assert finding.difference.num_nonfinite == (0, 2)


def test_nan_that_stays_is_identical_and_counted(compared: Compared) -> None:
    both = having(norm__half=torch.full((3,), math.nan))
    found = compared(both, expected=both)
    assert (found.verdict, found.num_nan) == ("identical", 1)


def test_the_worst_finding_comes_first(compared: Compared) -> None:
    actual = without("norm.mask") | {"extra": torch.ones(2)}
    actual["norm.half"] = actual["norm.half"].float()
    actual["norm.brain"] = actual["norm.brain"][:3].clone()
    actual["norm.double"] = actual["norm.double"] + 1
    actual["encoder.1.weight"] = actual["encoder.1.weight"] + 1e-7
    actual["head.weight"] = actual["head.weight"].clone()
    actual["encoder.zero.weight"] = actual.pop("encoder.0.weight")
    assert named(compared(actual)) == [
        ("missing", "norm.mask"),
        ("unexpected", "extra"),
        ("renamed", "encoder.0.weight"),
        ("shape", "norm.brain"),
        ("dtype", "norm.half"),
        ("different", "norm.double"),
        ("alias", "head.weight"),
        ("close", "encoder.1.weight"),
    ]


# Policies


def test_rtol_and_atol_are_those_of_the_policy(compared: Compared) -> None:
    actual = changed("norm.double", lambda t: t * 1.01)
    assert compared(actual, Policy(rtol=0.02, atol=0.0)).verdict == "close"
    assert compared(actual, Policy(rtol=0.005, atol=0.0)).verdict == "different"
    assert compared(actual, Policy(rtol=0.0, atol=1.0)).verdict == "close"


def test_exact_allows_nothing(compared: Compared) -> None:
    actual = changed("norm.double", lambda t: t + 1e-15)
    assert compared(actual).verdict == "close"
    assert named(compared(actual, Policy(exact=True))) == [("different", "norm.double")]
    loose = Policy(exact=True, tolerances=(("*", 1.0, 1.0),))
    assert compared(actual, loose).verdict == "different"


def test_without_the_check_another_dtype_is_compared_by_value(compared: Compared) -> None:
    policy = Policy(check_dtype=False)
    assert named(compared(changed("norm.half", torch.Tensor.float), policy)) == [
        ("close", "norm.half")
    ]
    assert named(compared(changed("norm.double", torch.Tensor.float), policy)) == [
        ("close", "norm.double")
    ]
    assert named(compared(changed("norm.double", torch.Tensor.bfloat16), policy)) == [
        ("different", "norm.double")
    ]
    assert named(compared(changed("encoder.1.large", torch.Tensor.double), policy)) == [
        ("close", "encoder.1.large")
    ]
    shape = changed("norm.half", lambda t: t.float()[:3].clone())
    assert named(compared(shape, policy)) == [("shape", "norm.half")]


def test_equal_values_of_unequal_digest_are_never_identical() -> None:
    def fingerprint(digest: bytes, dtype: str = "float32") -> Fingerprint:
        weight = TensorFingerprint(key="weight", dtype=DTYPES[dtype], shape=(2,), digest=digest)
        return Fingerprint(name="it", container="", section="", tensors={"weight": weight})

    def measure(triples: Sequence[Triple]) -> list[Difference]:
        (triple,) = triples
        equal = replace(triple[0], values=bytes(8))
        return [exact_difference(equal, equal, triple[2])]

    with pytest.raises(CheckpointError, match="'weight' are as expected, but their digest is not"):
        compare(fingerprint(b"a"), fingerprint(b"b"), Policy(), measure)


@pytest.mark.parametrize("exact", [False, True])
def test_without_kept_values_other_dtypes_are_different_only_where_stats_prove_it(
    tmp_path: Path, exact: bool
) -> None:
    policy = Policy(check_dtype=False, exact=exact)
    steps = torch.arange(5000)
    steps[0] = 5
    golden = tmp_path / "golden"

    def verdict(expected: torch.Tensor, actual: torch.Tensor) -> tuple[str, str]:
        torch.save({"x": expected}, tmp_path / "expected.pt")
        torch.save({"x": actual}, tmp_path / "actual.pt")
        recorded = api.record(tmp_path / "expected.pt", golden, values="none", overwrite=True)
        found = api.verify(tmp_path / "actual.pt", recorded, policy=policy)
        assert found.findings[0].difference is not None
        return found.verdict, found.findings[0].difference.why

    why = "the golden keeps no values of it, and digests of int64 and {} cannot be compared"
    assert verdict(steps, steps.int()) == ("undecided", why.format("int32"))
    assert verdict(steps, steps.double()) == ("undecided", why.format("float64"))
    greater, zeros = steps.int(), steps.int()
    greater[-1] += 1
    zeros[7] = 0
    assert verdict(steps, greater)[0] == "different"
    assert verdict(steps, zeros)[0] == "different"
    assert verdict(steps, steps.flip(0))[0] == "different"  # one dtype: by its digest
    # bool and float32 keep no values nor sketch either.
    assert verdict(steps > 5, (steps > 5).float())[0] == "undecided"


def test_exactness_does_not_compare_digests_of_two_dtypes() -> None:
    def fingerprint(dtype: str) -> Fingerprint:
        weight = TensorFingerprint(key="x", dtype=DTYPES[dtype], shape=(2,), digest=dtype.encode())
        return Fingerprint(name="it", container="", section="", tensors={"x": weight})

    policy = Policy(check_dtype=False, exact=True)
    found = compare(fingerprint("float32"), fingerprint("float64"), policy, BySketches(32768))
    assert found.verdict == "undecided"
