"""Reports: keys folded into patterns that stand for exactly them, printed safely."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.comparison.plain import number
from harness.model.mismatch import brief_mismatch
from harness.text.folding import fold, printable


def unfold(pattern: str) -> set[str]:
    """The keys that a pattern stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            choices.append([part])
            continue
        numbers = []
        for piece in part.split(","):
            first, _, last = piece.partition("…")
            numbers += [str(n) for n in range(int(first), int(last or first) + 1)]
        choices.append(numbers)
    return {"".join(combination) for combination in itertools.product(*choices)}


def test_keys_that_differ_in_a_number_fold_into_one_pattern() -> None:
    keys = [f"encoder.layers.{layer}.norm_out.bias" for layer in range(17)]
    assert fold(keys) == [("encoder.layers.{0…16}.norm_out.bias", keys)]


def test_gaps_show() -> None:
    keys = [f"conv.{index}.bias" for index in (0, 2, 3, 5, 6, 7)]
    assert [pattern for pattern, _ in fold(keys)] == ["conv.{0,2,3,5…7}.bias"]
    assert [pattern for pattern, _ in fold(keys, ellipsis="..")] == ["conv.{0,2,3,5..7}.bias"]


def test_a_pattern_is_not_used_where_it_would_stand_for_more() -> None:
    keys = ["a.0.b.0", "a.1.b.1"]
    assert fold(keys) == [(key, [key]) for key in keys]


def test_numbers_inside_of_words_do_not_fold() -> None:
    keys = ["feed_forward1.weight", "feed_forward2.weight"]
    assert len(fold(keys)) == 2


def test_indices_in_brackets_fold() -> None:
    keys = [f'state[{index}]["exp_avg"]' for index in range(3)]
    assert fold(keys) == [('state[{0…2}]["exp_avg"]', keys)]


def test_numbers_that_are_spelled_otherwise_do_not_fold() -> None:
    for keys in (["a.01.b", "a.02.b"], ["a.٣.b", "a.4.b"], ["a.\0.b", "a.1.b"]):
        assert [members for _, members in fold(keys)] == [[key] for key in keys]
    endless = [f"a.{'9' * 5000}.b", f"a.{'8' * 5000}.b"]
    assert len(fold(endless)) == 2


key_parts = st.sampled_from(["a", "b", "0", "1", "2", "10", "01", "٣"])
plain_keys = st.lists(key_parts, min_size=1, max_size=4).map(".".join)


@given(st.lists(plain_keys, unique=True, max_size=30))
def test_patterns_stand_for_exactly_the_keys(keys: list[str]) -> None:
    folded = fold(keys)
    assert sorted(key for _, members in folded for key in members) == sorted(keys)
    for pattern, members in folded:
        assert unfold(pattern) == set(members)


@given(st.text(max_size=20), st.text(max_size=20))
def test_two_keys_never_print_alike_and_never_harm_a_terminal(one: str, other: str) -> None:
    assert printable(one).isprintable()
    assert (printable(one) == printable(other)) == (one == other)


def test_numbers_that_json_lacks_are_words() -> None:
    assert number(float("nan")) == "NaN"
    assert number(float("-inf")) == "-Infinity"
    assert number(1.5) == 1.5
    assert number(3) == 3


def test_a_state_dict_that_does_not_fit_is_told_in_one_line() -> None:
    small = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    large = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(40)))
    large[0] = torch.nn.Linear(3, 2)
    with pytest.raises(RuntimeError) as error:
        large.load_state_dict({**small.state_dict(), "extra": torch.ones(1)})
    assert brief_mismatch(str(error.value)) == (
        "missing keys: 74 ({3..39}.weight, {3..39}.bias), unexpected keys: 1 (extra), "
        "other shapes: 1 (0.weight: file [2, 2], model [2, 3])"
    )
    assert brief_mismatch("something\n\telse") == "something else"
    assert len(brief_mismatch("x" * 5000)) < 310
