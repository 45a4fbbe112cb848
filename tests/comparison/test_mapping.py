"""New names for keys: of keys, of prefixes, and by globs whose stars stand for the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.comparison.mapping import makes_any, mapped, names_any, read_map
from harness.comparison.policy import Policy, PolicyOfStages
from harness.errors import UsageError
from harness.fingerprints.fingerprint import TensorFingerprint
from tests.catalogue import Compared, state
from tests.report_html.results import filled

part = st.from_regex(r"[a-z0-9_\[\]+^$()]{1,4}", fullmatch=True)


@pytest.mark.parametrize(
    ("pair", "key", "expected"),
    [
        (("a.", "b."), "a.c", "b.c"),
        (("a", "b"), "a.c", None),
        (("a.c", "d"), "a.c", "d"),
        (("blocks.*.mlp.", "layers.*.ff."), "blocks.11.mlp.fc.mlp.w", "layers.11.ff.fc.mlp.w"),
        (("*.gamma", "*.weight"), "a.norm.gamma", "a.norm.weight"),
        (("*.gamma", "*.weight"), "a.norm.gamma.x", None),
        (("a.*.b.*.", "*.c.*."), "a.1.b.2.w", "1.c.2.w"),
        (("a.*.", "b.*."), "a..c", None),
        (("a.{1..3}.", "a.{0..2}."), "a.2.b.1.w", "a.1.b.1.w"),
        (("a.{1..3}.", "a.{0..2}."), "a.0.w", None),
        (("a.{1,2}", "a.{3,4}"), "a.12", None),
        (("a{9,1}.*.", "b{3..2}.*."), "a1.x.w", "b2.x.w"),
        (("*.a.{7..5,1}.", "*.b.{0..3}."), "x.a.5.w", "x.b.2.w"),
        (("a.{q}.", "b.{q}."), "a.{q}.w", "b.{q}.w"),
    ],
)
def test_a_pair_renames_what_it_fits(pair: tuple[str, str], key: str, expected: str | None) -> None:
    assert mapped(pair, key) == expected


@given(st.lists(part, min_size=3, max_size=6), st.data())
def test_a_star_stands_for_the_same_text_whatever_that_is(
    parts: list[str], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(parts) - 2))
    key = ".".join(parts)
    old = ".".join([*parts[:at], "*", *parts[at + 1 :]])
    new = f"new.*.{parts[-1]}"
    assert mapped((old, new), key) == f"new.{parts[at]}.{parts[-1]}"
    assert names_any(old, [key])
    assert makes_any((old, new), [f"new.{parts[at]}.{parts[-1]}"])
    assert not makes_any((old, new), [f"old.{key}"])


def test_stars_and_numbers_must_be_on_both_sides() -> None:
    with pytest.raises(UsageError, match="one has 1, the other 0"):
        Policy(key_map=(("a.*.", "b."),))
    for pair in (
        ("a.{1,2}.", "a.{1}."),
        ("{1..9999999}.", "{1..9999999}."),
        ("*.{1,2}", "{1,2}.*"),
    ):
        with pytest.raises(UsageError, match="numbers"):
            Policy(key_map=(pair,))


def test_a_file_holds_a_pair_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("# ours  theirs\n\nblocks.*.mlp.\tblocks.*.ff.\nhead.  out.  # the last\n")
    assert read_map(file) == (("blocks.*.mlp.", "blocks.*.ff."), ("head.", "out."))
    file.write_text("a b\nc\n")
    with pytest.raises(UsageError, match=r"map\.txt:2: has 1 columns"):
        read_map(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_map(tmp_path / "none")


def test_globs_are_maps_of_a_comparison(compared: Compared) -> None:
    actual = {key.replace("encoder.", "layers.x."): value for key, value in state().items()}
    policy = Policy(key_map=(("encoder.*.", "layers.x.*."),))
    assert compared(actual, policy).verdict == "identical"


def of(*keys: str) -> dict[str, TensorFingerprint]:
    return {key: filled(key, float(number), 2) for number, key in enumerate(keys)}


def test_indices_that_are_shifted_are_renamed_where_the_weights_are() -> None:
    """The same keys may be as they were, or each another one's."""
    before, (a, b) = of("l.0.w", "l.1.w"), of("l.0.w", "l.1.w").values()
    stages = PolicyOfStages(Policy(key_map=(("l.{0,1}.", "l.{1,0}."), ("act.", "gelu."))))
    assert stages.at(before, before).key_map == ()
    assert stages.of_modules.key_map == (("act.", "gelu."),)
    after = {"l.0.w": b, "l.1.w": a}
    assert stages.at(before, after).key_map == (("l.{0,1}.", "l.{1,0}."),)
    assert stages.of_modules == stages.policy


def test_each_stage_takes_what_fits_it_and_the_rest_is_known() -> None:
    asked = Policy(
        key_map=(("a.", "b."), ("a.", "c.")),
        ignore=("x", "y"),
        strip_prefix="module.",
        tolerances=(("a.*", 1.0, None),),
    )
    stages = PolicyOfStages(asked)
    here = stages.at(of("a.w", "x"), of("a.w", "x"))
    assert here == Policy(ignore=("x",), tolerances=asked.tolerances)
    assert stages.note(here) == (
        "no effect at this stage: --ignore y, --map a.=b., --map a.=c. and 1 more",
    )
    assert stages.at(of("a.w"), of("module.b.w")).key_map == (("a.", "b."),)
    assert stages.unused == Policy(key_map=(("a.", "c."),), ignore=("y",))
