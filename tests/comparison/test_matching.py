"""A catalogue of mutations of keys, each named exactly, and what policies make of them."""

from __future__ import annotations

import difflib
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from safetensors.torch import save_file

import harness
from harness.api import diff
from harness.comparison import matching
from harness.comparison.compare import compare
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy
from harness.errors import GoldenMismatch, UsageError
from tests.catalogue import (
    NUM_TENSORS,
    Compared,
    changed,
    having,
    named,
    one,
    renamed_keys,
    state,
    without,
)


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


def test_a_key_that_is_tied_to_one_that_is_there_is_not_missing_where_a_format_keeps_but_one(
    tmp_path: Path,
) -> None:
    weight, other = torch.arange(6.0), torch.ones(2)
    torch.save({"out": weight, "emb": weight, "other": other}, tmp_path / "tied.pt")
    save_file({"emb": weight, "other": other}, tmp_path / "one.safetensors")
    for sides in (("tied.pt", "one.safetensors"), ("one.safetensors", "tied.pt")):
        found = diff(*(tmp_path / side for side in sides))
        assert (found.verdict, found.findings) == ("identical", ())
        assert found.notes == ("out is tied to emb, whose values agree",)
    # A format that keeps ties has lost it; and what is not there at all is missing.
    torch.save({"emb": weight, "other": other}, tmp_path / "lost.pt")
    assert named(diff(tmp_path / "tied.pt", tmp_path / "lost.pt")) == [("missing", "out")]
    save_file({"other": other}, tmp_path / "none.safetensors")
    found = diff(tmp_path / "tied.pt", tmp_path / "none.safetensors")
    assert named(found) == [("missing", "out"), ("missing", "emb")]
    save_file({"emb": weight + 1, "other": other}, tmp_path / "one.safetensors")
    found = diff(tmp_path / "tied.pt", tmp_path / "one.safetensors")
    assert named(found) == [("different", "emb")]
    assert found.notes == ("out is tied to emb, whose values differ",)


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


def test_among_equal_tensors_those_of_the_same_numbers_are_a_rename(compared: Compared) -> None:
    """Many containers sort their keys, so that 10 comes before 2."""
    numbers = sorted(range(12), key=str)
    old = {f"layers.{n}.norm.weight": torch.ones(8) for n in range(12)}
    new = {f"blocks.{n}.ln.scale": torch.ones(8) for n in numbers}
    found = compared(new, expected=old)
    assert [f.actual_key for f in found.findings] == [f"blocks.{n}.ln.scale" for n in range(12)]


def test_very_many_equal_tensors_are_not_all_compared_with_each_other(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    likeness = matching._likeness
    monkeypatch.setattr(matching, "_likeness", lambda *k: calls.append(k) or likeness(*k))
    names = [f"{one}{other}" for one in ascii_lowercase for other in ascii_lowercase]
    old, new = ({f"{side}.{name}": torch.ones(8) for name in names} for side in "ab")
    found = compared(new, expected=old)
    assert {f.kind for f in found.findings} == {"renamed"}
    assert len(calls) < 70 * len(names)


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


def test_a_policy_that_leaves_nothing_to_compare_is_an_error(compared: Compared) -> None:
    with pytest.raises(UsageError, match=r"--ignore \*\.\* --ignore \?\*: ignores every key of"):
        compared(state(), Policy(ignore=("*.*", "?*")))


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


@pytest.mark.parametrize(
    "key_map",
    [
        (("encoder.0.", "stem."), ("encoder.0.bias", "encoder.0.bias")),
        (("encoder.0.bias", "stem.bias"), ("encoder.0.bias", "encoder.1.bias")),
    ],
)
def test_a_map_behind_one_that_renames_all_that_it_fits_is_an_error(
    compared: Compared, key_map: tuple[tuple[str, str], ...]
) -> None:
    actual = renamed_keys(lambda k: k.replace("encoder.0.", "stem.")) | {
        "encoder.0.bias": torch.zeros(8)
    }
    with pytest.raises(UsageError, match="no effect: an earlier map") as caught:
        compared(actual, Policy(key_map=key_map))
    assert "first" in (caught.value.hint or "")


def test_of_several_maps_the_first_that_fits_counts(compared: Compared) -> None:
    actual = renamed_keys(
        lambda k: k if k == "encoder.0.bias" else k.replace("encoder.0.", "stem.")
    )
    key_map = (("encoder.0.bias", "encoder.0.bias"), ("encoder.0.", "stem."))
    assert compared(actual, Policy(key_map=key_map)).verdict == "identical"


def test_a_stripped_prefix_is_no_finding(compared: Compared) -> None:
    actual = renamed_keys(lambda k: "module." + k)
    assert compared(actual, Policy(strip_prefix="module.")).verdict == "identical"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(ignore=("decoder.*",)), r"--ignore decoder\.\*: matches no key"),
        (Policy(tolerances=(("decoder.*", 1.0, 1.0),)), r"--tolerance decoder\.\*: matches no key"),
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


def test_a_checkpoint_without_a_common_key_is_asked_whether_it_is_another_model(
    compared: Compared,
) -> None:
    note = ("no key in common: is it a checkpoint of another model?",)
    assert compared({"other": torch.ones(3)}).notes == note
    assert compared({"other": torch.ones(3), "norm.steps": torch.tensor(1)}).notes == ()
    assert compared({f"module.{k}": v for k, v in state().items()}).notes == ()
    known = "no key in common, but 1 of 14 tensors are equal under other keys"
    assert compared({"other": state()["norm.half"]}).notes == (known,)
    # Of two models many a counter is at 0.
    counted = {"steps": state()["norm.steps"], "other": torch.ones(3), "more": torch.ones(4)}
    assert compared(counted).notes == note


def test_a_prefix_may_become_one_without_a_dot(compared: Compared) -> None:
    actual = renamed_keys(lambda key: key.replace("encoder.", "encoder_"))
    found = compared(actual, Policy(key_map=(("encoder.", "encoder_"),)))
    assert found.verdict == "identical"


@pytest.mark.parametrize(
    ("policy", "hint"),
    [
        (Policy(key_map=(("encoder.", "enc."),)), "did you mean encoder.?"),
        (Policy(key_map=(("encoder.0", "layer.0"),)), "--map encoder.0.=layer.0."),
        (Policy(ignore=("encodr.*",)), "did you mean encoder.*?"),
        (Policy(ignore=("qqq",)), "the keys begin with embed, encoder, norm, head"),
        (Policy(strip_prefix="encoder"), "--strip-prefix encoder."),
    ],
)
def test_an_option_that_fits_nothing_says_what_would(
    compared: Compared, policy: Policy, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        compared(state(), policy)
    assert hint in (caught.value.hint or "")


def test_a_prefix_of_the_goldens_keys_is_mapped_away(compared: Compared) -> None:
    expected = renamed_keys(lambda key: f"module.{key}")
    with pytest.raises(UsageError) as caught:
        compared(state(), Policy(strip_prefix="module."), expected=expected)
    assert (caught.value.hint or "").endswith("do: --map module.=")
    policy = Policy(key_map=(("module.", ""),))
    assert compared(state(), policy, expected=expected).verdict == "identical"


def test_a_prefix_is_looked_for_at_the_start_of_a_key_alone() -> None:
    """Each dot of a key of a megabyte would be one to try."""
    for length, kinds in ((20, ["prefix"]), (300, ["renamed", "renamed"])):
        wrapped = {f"{'x' * length}.{key}": torch.full((3,), ord(key) * 1.0) for key in "ab"}
        plain = {key.rpartition(".")[2]: tensor for key, tensor in wrapped.items()}
        one, other = harness.fingerprint(plain), harness.fingerprint(wrapped)
        found = compare(one, other, Policy(), BySketches(one.block_nbytes))
        assert [finding.kind for finding in found.findings] == kinds


def test_of_very_many_keys_those_that_begin_alike_are_compared_with_a_typo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[int] = []
    close = difflib.get_close_matches

    def spied(word: str, candidates: list[str], count: int) -> list[str]:
        compared.append(len(candidates))
        return close(word, candidates, count)

    monkeypatch.setattr("difflib.get_close_matches", spied)
    found = harness.fingerprint({f"layers.{i}.weight": torch.zeros(1) for i in range(3000)})
    policy = Policy(ignore=("layers.2345.wieght",))
    with pytest.raises(UsageError) as caught:
        compare(found, found, policy, BySketches(found.block_nbytes))
    assert caught.value.hint == "did you mean layers.2345.weight?"
    assert compared == [500]
