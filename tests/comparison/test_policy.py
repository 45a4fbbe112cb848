"""What counts as the same: the tolerance of a key, and options that make no sense."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from harness.comparison.policy import Policy
from harness.errors import UsageError
from tests.catalogue import (
    Compared,
    changed,
    named,
)


def test_of_several_tolerances_the_last_that_fits_wins(compared: Compared) -> None:
    actual = changed("encoder.1.weight", lambda t: t + 1e-3)
    loose, strict = ("encoder.*", 1e-2, 0.0), ("*.weight", 1e-6, 0.0)
    assert named(compared(actual, Policy(tolerances=(strict, loose)))) == [
        ("close", "encoder.1.weight")
    ]
    assert named(compared(actual, Policy(tolerances=(loose, strict)))) == [
        ("different", "encoder.1.weight")
    ]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, 3.5e38])
def test_a_tolerance_that_is_no_number_is_an_error(bad: float) -> None:
    for make in (
        lambda: Policy(atol=bad),
        lambda: Policy(rtol=bad),
        lambda: Policy(tolerances=(("*", 1.0, bad),)),
    ):
        with pytest.raises(UsageError, match=r"tol( of \*)? is .*: a tolerance is 0 or more"):
            make()


def test_a_glob_in_the_place_of_a_tuple_of_them_is_an_error() -> None:
    with pytest.raises(UsageError, match="takes a tuple of globs") as caught:
        Policy(ignore="*.bias")  # type: ignore[arg-type]
    assert caught.value.hint == "('*.bias',)"


@pytest.mark.parametrize(
    "wrong", [{"ab": 7}, {7: "ab"}, ("ab",), (7,), (("a",),), "ab", (("a", 1e-5),) * 2]
)
def test_a_map_or_tolerances_of_another_form_are_an_error(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"tolerances takes a tuple of \(GLOB, ATOL, RTOL\), not"):
        Policy(tolerances=wrong)
    if len(wrong) == 1:
        with pytest.raises(
            UsageError, match=r"key_map takes a tuple of \(OLD, NEW\), not"
        ) as caught:
            Policy(key_map=wrong)
        assert caught.value.hint == "key_map=(('encoder.', 'model.encoder.'),)"


def test_mappings_and_lists_are_taken_as_tuples() -> None:
    given: Any = {
        "key_map": {"a.": "b.", "c": "d"},
        "tolerances": {"x*": (1e-3, 0)},
        "ignore": ["y", "z*"],
    }
    policy = Policy(**given)
    assert policy == Policy(
        key_map=(("a.", "b."), ("c", "d")), tolerances=(("x*", 1e-3, 0),), ignore=("y", "z*")
    )
    assert hash(policy)
    assert Policy(key_map=[["a", "b"]]).renamed("a") == "b"  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"atol": "1e-5"}, "atol takes a number, not '1e-5'"),
        ({"rtol": [1]}, r"rtol takes a number, not \[1\]"),
        ({"accept": "rounded"}, "accept takes a tuple of causes, not 'rounded'"),
        ({"must_change": [b"x"]}, "must_change takes a tuple of globs, not b'x'"),
        ({"cast": 16}, "cast takes the name of a dtype, not 16"),
        ({"atol": True}, "atol takes a number, not True"),
        ({"exact": "no"}, "exact takes True or False, not 'no'"),
        ({"strip_prefix": ("a.",)}, "strip_prefix takes a text, not "),
        ({"ignore": 5}, "ignore takes a tuple of globs, not 5"),
        ({"ignore": (5,)}, "ignore takes a tuple of globs, not 5"),
        ({"key_map": {"a": 5}}, "key_map takes a tuple of .*, not .'a': 5"),
    ],
)
def test_what_is_of_another_type_is_named(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Policy(**given)


def test_numbers_of_numpy_are_numbers() -> None:
    assert Policy(atol=np.float64(1e-3), rtol=np.float32(0)).tolerance("x").atol == 1e-3


def test_globs_of_another_stage_are_no_typing_errors() -> None:
    policy = Policy(ignore=("a*", "b*"), tolerances=(("b", 1, 1), ("a", 2, 2)))
    here = policy.at_stage({"a"}, {"b"})
    assert (here.ignore, here.tolerances) == (("a*",), (("a", 2, 2),))
    assert policy.at_stage({"a"}, {"c"}) == policy


def test_a_key_with_brackets_fits_itself(compared: Compared) -> None:
    """In a glob they stand for one of what is in them; the error says how to write them."""
    key = '["exp[0]"]'
    rest = {"rest": torch.ones(2)}
    expected = {"exp[0]": torch.ones(3)} | rest
    actual = {"exp[0]": torch.ones(3) * 1.5} | rest
    assert compared(actual, expected=expected).verdict == "different"
    assert compared(actual, Policy(ignore=(key,)), expected=expected).num_ignored == 1
    loose = Policy(tolerances=((key, 1.0, 0.0),))
    assert named(compared(actual, loose, expected=expected)) == [("close", key)]
    with pytest.raises(UsageError) as caught:
        compared(actual, Policy(ignore=("*exp[0]*",)), expected=expected)
    assert (caught.value.hint or "").endswith("use '*exp[[]0]*'")
    assert compared(actual, Policy(ignore=("*exp[[]0]*",)), expected=expected).num_ignored == 1
