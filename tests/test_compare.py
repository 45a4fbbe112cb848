"""A catalogue of mutations of a checkpoint, each named exactly, and what policies make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harness import api
from harness.checkpoint.tensors import DTYPES
from harness.compare import Comparison, Finding, Policy, compare
from harness.difference import Difference, exact_difference
from harness.errors import CheckpointError, GoldenMismatch, UsageError
from harness.fingerprint import Fingerprint, TensorPrint
from harness.measuring import BySketches, Triple

State = dict[str, torch.Tensor]


def state() -> State:
    g = torch.Generator().manual_seed(0)
    tied = torch.randn(20, 8, generator=g)
    return {
        "embed.weight": tied,
        "encoder.0.weight": torch.randn(8, 6, generator=g),
        "encoder.0.bias": torch.zeros(8),
        "encoder.1.weight": torch.randn(8, 8, generator=g),
        "encoder.1.bias": torch.zeros(8),
        "encoder.1.large": torch.randn(100, 100, generator=g),
        "norm.half": torch.randn(30, generator=g).half(),
        "norm.brain": torch.randn(30, generator=g).bfloat16(),
        "norm.double": torch.randn(30, generator=g, dtype=torch.float64),
        "norm.complex": torch.randn(30, generator=g, dtype=torch.complex64),
        "norm.float8": torch.randn(30, generator=g).to(torch.float8_e4m3fn),
        "norm.steps": torch.tensor(12),
        "norm.mask": torch.tensor([True, False, True]),
        "head.weight": tied,
    }


NUM_TENSORS = len(state())
Compared = Callable[..., Comparison]


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    """Record a state dict, and verify another under a policy."""

    def run(
        actual: State, policy: Policy | None = None, *, expected: State | None = None
    ) -> Comparison:
        torch.save(expected or state(), tmp_path / "expected.pt")
        torch.save(actual, tmp_path / "actual.pt")
        golden = api.record(tmp_path / "expected.pt", tmp_path / "golden", overwrite=True)
        return api.verify(tmp_path / "actual.pt", golden, policy=policy)

    return run


def named(comparison: Comparison) -> list[tuple[str, str]]:
    return [(finding.kind, finding.key) for finding in comparison.findings]


def renamed_keys(rename: Callable[[str], str]) -> State:
    return {rename(key): tensor for key, tensor in state().items()}


def without(*keys: str) -> State:
    return {key: tensor for key, tensor in state().items() if key not in keys}


def having(**changes: torch.Tensor) -> State:
    found = state()
    return found | {key.replace("__", "."): tensor for key, tensor in changes.items()}


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    found = state()
    found[key] = change(found[key])
    return found


def one(comparison: Comparison) -> Finding:
    [finding] = comparison.findings
    return finding


def test_the_same_state_is_identical(compared: Compared) -> None:
    found = compared(state())
    assert (found.verdict, found.findings, found.exit_code) == ("identical", (), 0)
    assert found.num_identical == NUM_TENSORS
    assert found.raise_for_mismatch() is found


def test_a_key_that_is_not_there_is_missing(compared: Compared) -> None:
    found = compared(without("encoder.1.weight"))
    assert named(found) == [("missing", "encoder.1.weight")]
    assert one(found).expected == "float32 [8, 8]"
    assert (found.verdict, found.exit_code, found.num_identical) == (
        "different",
        1,
        NUM_TENSORS - 1,
    )
    with pytest.raises(GoldenMismatch, match=r"encoder\.1\.weight"):
        found.raise_for_mismatch()


def test_a_key_too_many_is_unexpected(compared: Compared) -> None:
    found = compared(having(encoder__2__weight=torch.ones(3, 2)))
    assert named(found) == [("unexpected", "encoder.2.weight")]
    assert one(found).actual == "float32 [3, 2]"


def test_a_key_under_another_name_is_renamed(compared: Compared) -> None:
    found = compared(renamed_keys(lambda k: k.replace("encoder.1.weight", "encoder.one.weight")))
    finding = one(found)
    assert (finding.kind, finding.key, finding.actual_key) == (
        "renamed",
        "encoder.1.weight",
        "encoder.one.weight",
    )
    assert found.exit_code == 1


def test_among_equal_tensors_the_most_alike_names_are_a_rename(compared: Compared) -> None:
    """All biases are zeros, and have one digest."""
    found = compared(renamed_keys(lambda k: k.replace(".bias", ".offset")))
    assert [(f.kind, f.key, f.actual_key) for f in found.findings] == [
        ("renamed", "encoder.0.bias", "encoder.0.offset"),
        ("renamed", "encoder.1.bias", "encoder.1.offset"),
    ]


def test_one_new_key_is_the_new_name_of_one_old_key(compared: Compared) -> None:
    actual = without("encoder.0.bias", "encoder.1.bias") | {"encoder.1.offset": torch.zeros(8)}
    found = {f.kind: f for f in compared(actual).findings}
    assert len(found) == 2
    assert found["renamed"].actual_key == "encoder.1.offset"
    assert found["missing"].key.endswith(".bias")


def test_a_tensor_renamed_and_changed_is_missing_and_unexpected(compared: Compared) -> None:
    actual = without("encoder.1.weight") | {"encoder.one.weight": torch.ones(8, 8)}
    assert named(compared(actual)) == [
        ("missing", "encoder.1.weight"),
        ("unexpected", "encoder.one.weight"),
    ]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_a_prefix_too_many_is_one_finding(compared: Compared, prefix: str) -> None:
    found = compared(renamed_keys(lambda k: prefix + k))
    finding = one(found)
    assert (finding.kind, finding.key, finding.count) == ("prefix", prefix, NUM_TENSORS)
    assert (finding.expected, finding.actual) == ("no prefix", f"prefix {prefix!r}")
    assert (found.exit_code, found.count("prefix")) == (1, NUM_TENSORS)


def test_a_lost_prefix_is_one_finding(compared: Compared) -> None:
    found = compared(state(), expected=renamed_keys(lambda k: "model." + k))
    finding = one(found)
    assert (finding.kind, finding.key, finding.count) == ("prefix", "model.", NUM_TENSORS)
    assert (finding.expected, finding.actual) == ("prefix 'model.'", "no prefix")


def test_a_prefix_of_a_part_is_one_finding(compared: Compared) -> None:
    found = compared(renamed_keys(lambda k: f"ema.{k}" if k.startswith("encoder") else k))
    assert (one(found).kind, one(found).key, one(found).count) == ("prefix", "ema.", 5)


@pytest.mark.parametrize(
    ("inside", "wrapper"),
    [
        ("encoder.{}0.", "_orig_mod."),
        ("encoder.0.{}", "_checkpoint_wrapped_module."),
        ("encoder.{}0.", "module."),
    ],
)
def test_a_wrapper_inside_of_the_keys_is_one_finding(
    compared: Compared, inside: str, wrapper: str
) -> None:
    found = compared(renamed_keys(lambda k: k.replace("encoder.0.", inside.format(wrapper))))
    finding = one(found)
    assert (finding.kind, finding.count) == ("prefix", 2)
    assert finding.actual == f"wrapped as {wrapper!r}"


def test_a_lost_wrapper_inside_of_the_keys_is_one_finding(compared: Compared) -> None:
    wrapped = renamed_keys(lambda k: k.replace("encoder.", "encoder._orig_mod."))
    finding = one(compared(state(), expected=wrapped))
    assert (finding.kind, finding.count) == ("prefix", 5)
    assert (finding.expected, finding.actual) == ("wrapped as '_orig_mod.'", "no wrapper")


def test_wrappers_are_whole_parts_of_a_key(compared: Compared) -> None:
    def submodule(key: str) -> str:
        return key.replace("encoder.", "submodule.")

    expected = renamed_keys(submodule)
    actual = renamed_keys(lambda k: submodule(k).replace("module.", "module._orig_mod."))
    finding = one(compared(actual, expected=expected))
    assert (finding.kind, finding.count) == ("prefix", 5)
    assert finding.actual == "wrapped as '_orig_mod.'"


def test_what_changed_under_a_prefix_is_found_too(compared: Compared) -> None:
    actual = {f"module.{k}": t for k, t in changed("norm.half", lambda t: t + 1).items()}
    assert named(compared(actual)) == [("prefix", "module."), ("different", "norm.half")]
    assert compared(actual).findings[1].actual_key == "module.norm.half"


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


def test_tied_tensors_in_another_order_are_still_tied(compared: Compared) -> None:
    assert compared(dict(reversed(state().items()))).verdict == "identical"


def test_a_tie_that_came_apart_and_changed_has_both_findings(compared: Compared) -> None:
    found = compared(changed("head.weight", lambda t: t + 1))
    assert named(found) == [("different", "head.weight"), ("alias", "head.weight")]


def test_safetensors_cannot_say_what_is_tied(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt")
    separate = {key: tensor.clone() for key, tensor in state().items()}
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
        ("encoder.1.large", "undecided", lambda t: t + 1e-6),
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


def test_ignored_keys_are_not_compared(compared: Compared) -> None:
    actual = changed("norm.half", lambda t: t + 1)
    del actual["norm.mask"]
    actual["norm.extra"] = torch.ones(3)
    found = compared(actual, Policy(ignore=("norm.*",)))
    assert (found.verdict, found.num_ignored) == ("identical", 8)
    assert found.num_identical == NUM_TENSORS - 7
    assert named(compared(actual, Policy(ignore=("norm.half", "*.extra")))) == [
        ("missing", "norm.mask")
    ]


def test_of_several_tolerances_the_last_that_fits_wins(compared: Compared) -> None:
    actual = changed("encoder.1.weight", lambda t: t + 1e-3)
    loose, strict = ("encoder.*", 1e-2, 0.0), ("*.weight", 1e-6, 0.0)
    assert named(compared(actual, Policy(tolerances=(strict, loose)))) == [
        ("close", "encoder.1.weight")
    ]
    assert named(compared(actual, Policy(tolerances=(loose, strict)))) == [
        ("different", "encoder.1.weight")
    ]


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


def test_a_map_renames_keys_and_prefixes_of_the_golden(compared: Compared) -> None:
    actual = renamed_keys(
        lambda k: k.replace("encoder.", "layers.").replace("norm.mask", "norm.valid")
    )
    policy = Policy(key_map=(("encoder.", "layers."), ("norm.mask", "norm.valid")))
    found = compared(actual, policy)
    assert (found.verdict, found.num_identical) == ("identical", NUM_TENSORS)
    actual["layers.0.bias"] += 1
    finding = one(compared(actual, policy))
    assert (finding.kind, finding.key, finding.actual_key) == (
        "different",
        "encoder.0.bias",
        "layers.0.bias",
    )


def test_a_stripped_prefix_is_no_finding(compared: Compared) -> None:
    actual = renamed_keys(lambda k: "module." + k)
    assert compared(actual, Policy(strip_prefix="module.")).verdict == "identical"


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


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(ignore=("decoder.*",)), r"--ignore decoder\.\*: fits no key"),
        (Policy(tolerances=(("decoder.*", 1.0, 1.0),)), r"--tolerance decoder\.\*: fits no key"),
        (Policy(key_map=(("decoder.", "x."),)), r"--map decoder\.=x\.: .* has no key"),
        (Policy(key_map=(("embed", "x"),)), r"--map embed=x: .* has no key embed"),
        (Policy(key_map=(("embed.weight", "norm.half"),)), "2 keys of .* would become norm.half"),
        (Policy(strip_prefix="module."), r"--strip-prefix module\.: no key"),
    ],
)
def test_an_option_that_fits_nothing_is_an_error(
    compared: Compared, policy: Policy, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compared(state(), policy)


def test_a_prefix_that_two_keys_lose_to_one_is_an_error(compared: Compared) -> None:
    actual = having(module__norm__half=torch.ones(2))
    with pytest.raises(UsageError, match="two keys"):
        compared(actual, Policy(strip_prefix="module."))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_no_number_is_an_error(bad: float) -> None:
    for make in (
        lambda: Policy(atol=bad),
        lambda: Policy(rtol=bad),
        lambda: Policy(tolerances=(("*", 1.0, bad),)),
    ):
        with pytest.raises(UsageError, match="a tolerance must be a finite number"):
            make()


def test_a_glob_in_the_place_of_a_tuple_of_them_is_an_error() -> None:
    with pytest.raises(UsageError, match="takes a tuple of globs") as caught:
        Policy(ignore="*.bias")  # type: ignore[arg-type]
    assert caught.value.hint == "('*.bias',)"


def test_equal_values_of_unequal_digest_are_never_identical() -> None:
    def fingerprint(digest: bytes, dtype: str = "float32") -> Fingerprint:
        weight = TensorPrint(key="weight", dtype=DTYPES[dtype], shape=(2,), digest=digest)
        return Fingerprint(name="it", container="", section="", tensors={"weight": weight})

    def measure(triples: Sequence[Triple]) -> list[Difference]:
        (triple,) = triples
        equal = replace(triple[0], values=bytes(8))
        return [exact_difference(equal, equal, triple[2])]

    with pytest.raises(CheckpointError, match="'weight' are as expected, but their digest not"):
        compare(fingerprint(b"a"), fingerprint(b"b"), Policy(), measure)


def test_a_checkpoint_without_a_common_key_is_asked_whether_it_is_another_model(
    compared: Compared,
) -> None:
    note = ("no key in common: is it a checkpoint of another model?",)
    assert compared({"other": torch.ones(3)}).notes == note
    assert compared({"other": torch.ones(3), "norm.steps": torch.tensor(1)}).notes == ()
    assert compared({f"module.{k}": v for k, v in state().items()}).notes == ()
    assert compared({"other": state()["norm.half"]}).notes == ()  # renamed


def test_globs_of_another_stage_are_no_typing_errors() -> None:
    policy = Policy(ignore=("a*", "b*"), tolerances=(("b", 1, 1), ("a", 2, 2)))
    here = policy.at_stage({"a"}, {"b"})
    assert (here.ignore, here.tolerances) == (("a*",), (("a", 2, 2),))
    assert policy.at_stage({"a"}, {"c"}) == policy


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
        weight = TensorPrint(key="x", dtype=DTYPES[dtype], shape=(2,), digest=dtype.encode())
        return Fingerprint(name="it", container="", section="", tensors={"x": weight})

    policy = Policy(check_dtype=False, exact=True)
    found = compare(fingerprint("float32"), fingerprint("float64"), policy, BySketches(32768))
    assert found.verdict == "undecided"
