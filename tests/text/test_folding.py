"""Many names on one line: what they have in common, and what differs."""

from __future__ import annotations

import random

import pytest

from harness.text.folding import fold_names


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ([f"l{i}.w" for i in range(60)], "l{0…59}.w"),
        (
            [f"layer{i}.{j}.conv{c}.w" for i in (1, 2, 3, 5) for j in (0, 1) for c in (1, 2)],
            "layer{1…3,5}.{0,1}.{conv1,conv2}.w",
        ),
        (["w1.a", "w2.a"], "{w1,w2}.a"),
        (["w1.a", "w01.a", "w2.a"], "{w1,w01,w2}.a"),
    ],
)
def test_numbered_names_are_a_range(keys: list[str], pattern: str) -> None:
    [(shown, members)] = fold_names(keys)
    assert sorted(members) == sorted(keys)
    assert shown == pattern


def test_numbered_names_are_a_range_in_any_order() -> None:
    keys = [f"block{i}.weight" for i in range(12)]
    random.Random(0).shuffle(keys)
    assert [pattern for pattern, _ in fold_names(keys)] == ["block{0…11}.weight"]
