"""The maps that a report prints make the old keys the new ones, whatever became of the indices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli.steps import as_options
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy
from harness.comparison.renaming import renaming
from harness.fingerprints.scan import fingerprint
from harness.model.state import as_checkpoint

State = dict[str, torch.Tensor]
LEAVES = {"norm.weight": None, "norm.bias": None, "mlp.0.weight": (3, 2), "mlp.1.w": (4,)}


def layers(*starts: str) -> State:
    """Layers with scales that are all the same, and weights that are not."""
    made = {"embed.weight": torch.randn(5, 2), "head.0.weight": torch.randn(2)}
    for start in starts:
        for name, shape in LEAVES.items():
            made[f"{start}{name}"] = torch.ones(3) if shape is None else torch.randn(shape)
    return made


def moved(state: State, starts: dict[str, str]) -> State:
    """The state with layers under the starts that they have now; those that have none are gone."""
    rest = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    return rest | {
        key.replace(old, new, 1): state[key]
        for old, new in starts.items()
        for key in state
        if key.startswith(old)
    }


def found(expected: State, actual: State, policy: Policy | None = None) -> Comparison:
    ours, theirs = (fingerprint(as_checkpoint(side, "x")) for side in (expected, actual))
    return compare(ours, theirs, policy or Policy(), BySketches(ours.block_nbytes))


def printed(comparison: Comparison) -> Policy:
    way = renaming(comparison)
    assert way is not None, comparison
    return replace(comparison.policy, **way[1])


def check(expected: State, actual: State) -> Policy:
    """What is printed passes, and with one wrong weight fails, for that one."""
    policy = printed(found(expected, actual))
    passed = found(expected, actual, policy)
    assert passed.findings == ()
    shared = [pair for pair in map(policy.renamed, expected) if pair.endswith("mlp.0.weight")]
    wrong = next(key for key in reversed(shared) if key in actual and key.startswith("b"))
    changed = {**actual, wrong: actual[wrong] + 1}
    policy = printed(found(expected, changed))
    [finding] = found(expected, changed, policy).findings
    assert (finding.kind, finding.actual_key or finding.key) == ("different", wrong)
    return policy


@settings(max_examples=40)
@given(st.data())
def test_any_renumbering_passes_with_the_maps_that_are_printed(data: st.DataObject) -> None:
    """Layers change places, go, and come; what is under an old number may be another one."""
    torch.manual_seed(data.draw(st.integers(0, 999)))
    size, places = data.draw(st.integers(3, 6)), data.draw(st.permutations(range(8)))
    gone = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 3))
    expected = layers(*(f"blocks.{n}." for n in range(size)))
    starts = {f"blocks.{n}.": f"blocks.{places[n]}." for n in range(size) if n not in gone}
    actual = moved(expected, starts)
    if data.draw(st.booleans()) and places[7] not in gone:  # else it has other weights
        actual |= {k: v for k, v in layers(f"blocks.{places[7]}.").items() if k not in actual}
    if not (changed := {a for a, b in starts.items() if a != b}) or len(changed) < 2:
        return
    check(expected, actual)


@pytest.mark.parametrize(
    ("size", "starts", "options"),
    [
        (4, ["", "0", "1", "2"], ["blocks.{1..3}.=blocks.{0..2}.", "--ignore", "blocks.0.*"]),
        (3, ["1", "2", "3"], ["blocks.{0..2}.=blocks.{1..3}."]),
        (2, ["1", "0"], ["blocks.{0,1}.=blocks.{1,0}."]),
    ],
)
def test_layers_that_are_shifted_are_one_map(
    size: int, starts: list[str], options: list[str]
) -> None:
    expected = layers(*(f"blocks.{n}." for n in range(size)))
    now = {f"blocks.{n}.": f"blocks.{place}." for n, place in enumerate(starts) if place}
    policy = check(expected, moved(expected, now))
    assert as_options({"key_map": policy.key_map, "ignore": policy.ignore}) == ["--map", *options]


def test_layers_that_became_stages_are_a_map_of_each() -> None:
    expected = layers(*(f"blocks.{n}." for n in range(5)))
    now = {f"blocks.{n}.": f"below{n // 3}.{n % 3}." for n in range(5)}
    policy = check(expected, moved(expected, now))
    assert policy.key_map == (("blocks.{3,4}.", "below1.{0,1}."), ("blocks.", "below0."))


def test_a_module_of_layers_that_are_shifted_may_have_another_name() -> None:
    expected = layers(*(f"blocks.{n}." for n in range(4)))
    expected |= {f"blocks.{n}.norm.weight": torch.randn(3) for n in range(4)}
    actual = moved(expected, {f"blocks.{n}.": f"blocks.{n - 1}." for n in range(1, 4)})
    actual = {key.replace(".mlp.", ".ff."): value for key, value in actual.items()}
    policy = printed(found(expected, actual))
    assert found(expected, actual, policy).findings == ()


def test_what_two_keys_exchanged_is_no_new_name() -> None:
    expected = layers("blocks.0.", "blocks.1.")
    actual = dict(expected)
    a, b = "blocks.0.mlp.0.weight", "blocks.1.mlp.0.weight"
    actual[a], actual[b] = actual[b], actual[a]
    assert renaming(found(expected, actual)) is None


def test_a_glob_leaves_out_what_it_names_on_either_side_but_not_what_was_shifted() -> None:
    expected = layers("blocks.0.", "blocks.1.")
    actual = moved(expected, {"blocks.1.": "blocks.0."})
    maps: Any = (("blocks.1.", "blocks.0."),)
    left = found(expected, actual, Policy(key_map=maps, ignore=("blocks.0.*",)))
    assert (left.num_ignored, left.num_identical) == (4, 6)
    both = found(expected, actual, Policy(key_map=maps, ignore=("blocks.*",)))
    assert (both.num_ignored, both.num_identical) == (8, 2)
    apart = Policy(key_map=(("embed.", "table."),), ignore=("table.*",))
    actual = {key.replace("embed.", "table."): value for key, value in expected.items()}
    assert found(expected, actual, apart).num_ignored == 1


def test_equal_scales_go_where_the_weights_beside_them_went() -> None:
    expected = layers(*(f"blocks.{n}." for n in range(3)))
    order = np.random.default_rng(0).permutation(3)
    actual = moved(expected, {f"blocks.{n}.": f"other.{order[n]}.sub." for n in range(3)})
    pairs = {f.key: f.actual_key for f in found(expected, actual).findings}
    assert pairs == {
        f"blocks.{n}.{name}": f"other.{order[n]}.sub.{name}" for n in range(3) for name in LEAVES
    }


def test_parts_of_each_layer_that_are_shifted_are_one_map_of_all() -> None:
    starts = [f"blocks.{n}.experts.{m}." for n in range(6) for m in range(3)]
    expected = layers(*starts)
    now = {start: f"{start[:-2]}{2 - int(start[-2])}." for start in starts}
    policy = check(expected, moved(expected, now))
    assert policy.key_map == (("blocks.*.experts.{0,2}.", "blocks.*.experts.{2,0}."),)
