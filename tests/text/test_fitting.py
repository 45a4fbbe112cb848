"""Lines that fit a terminal: never wider, wrapped between parts, keys cut in the middle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.text.fitting import cells, fit, shorten

KEY = "model.encoder.backbone.layers.11.self_attn.linear_q.weight"
printable = st.text(st.characters(categories=["L", "M", "N", "P", "S"])).filter(str.isprintable)
lines = st.lists(printable | st.just("x" * 50), max_size=12)


@given(st.integers(0, 12), lines, st.sampled_from([" ", "  ", "   "]), st.integers(32, 120))
def test_no_line_is_wider_and_no_short_word_is_lost(
    indent: int, words: list[str], gap: str, width: int
) -> None:
    line = " " * indent + gap.join(words)
    fitted = fit(line, width)
    assert all(cells(part) <= width for part in fitted)
    kept = " ".join(fitted).split()
    # A line half of which is left free takes any word of up to 12 columns whole.
    assert [w for w in kept if cells(w) <= 12 and "…" not in w] == [
        w for w in line.split() if cells(w) <= 12 and "…" not in w
    ]


def test_a_line_that_fits_or_has_no_width_is_left_alone() -> None:
    line = f"    {KEY * 3}  float32 [64, 256]"
    assert fit(line, None) == [line]
    assert fit(line, cells(line)) == [line]
    assert fit(line, cells(line) - 1) != [line]


def test_what_does_not_fit_goes_below_a_part_at_a_time() -> None:
    assert fit(f"    {KEY}  float32 [64, 256]  (17 tensors)", 66) == [
        f"    {KEY}",
        "        float32 [64, 256]  (17 tensors)",
    ]
    assert fit("  note: one two three four five six seven eight", 32) == [
        "  note: one two three four five",
        "      six seven eight",
    ]


def test_a_key_keeps_its_end_and_its_numbers() -> None:
    assert shorten(KEY, 58) == KEY
    assert shorten(KEY, 57) == "model.….backbone.layers.11.self_attn.linear_q.weight"
    assert shorten(KEY, 30) == "model.….11.….linear_q.weight"
    assert shorten("/data/checkpoints/nest/run.7/last.ckpt", 30) == "/…/nest/run.7/last.ckpt"
    assert shorten(KEY, 57, "..") == "model....backbone.layers.11.self_attn.linear_q.weight"


@pytest.mark.parametrize("text", ["x" * 99, "鍵" * 60, "a.b." * 50000])
@pytest.mark.parametrize("width", [16, 33, 80])
def test_what_has_no_parts_to_drop_is_cut_in_the_middle(text: str, width: int) -> None:
    short = shorten(text, width)
    assert cells(short) <= width
    head, tail = short.split("…")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert width // 4 <= cells(head) <= cells(tail)


def test_colours_take_no_columns_and_wide_signs_take_two() -> None:
    assert cells("\x1b[31m✗ different\x1b[0m") == len("✗ different")
    assert cells("鍵.ключ") == 7
    assert cells("e\u0301") == 1
    painted = f"\x1b[31m✗ different\x1b[0m  {'g' * 40}"
    assert fit(painted, 53) == [painted]
    assert len(fit(painted, 52)) == 2
