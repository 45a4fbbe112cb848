"""Tensors that were renamed and trained on: paired by their values, and only where these say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.comparison.causes import search
from harness.comparison.policy import Policy
from harness.report.steps import ways_past
from tests.comparison.causes.test_explain import FORMS, State, compare

HOW = ("golden alone", "both files")


def layers(dtype: torch.dtype, width: int, seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "q.weight": (width, width),
        "k.weight": (width, width),
        "up.weight": (2 * width, width),
    }
    return {
        f"layers.{layer}.{name}": (torch.randn(*shape, generator=g) * 0.1).to(dtype)
        for layer in range(3)
        for name, shape in shapes.items()
    }


def under_new_names(state: State) -> State:
    news = {"q.": "query.", "k.": "key.", "up.": "ffn.up."}
    found = {}
    for key, tensor in state.items():
        old = next(old for old in news if f".{old}" in key)
        found[key.replace("layers.", "blocks.").replace(f".{old}", f".{news[old]}")] = tensor
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("dtype", "width"), FORMS)
def test_what_was_renamed_and_trained_on_is_known_by_its_correlation(
    tmp_path: Path, dtype: torch.dtype, width: int, how: str
) -> None:
    before, noise = layers(dtype, width, 1), layers(dtype, width, 2)
    after = under_new_names({k: (t + 0.1 * noise[k]).to(dtype) for k, t in before.items()})
    found = compare(tmp_path, before, after, how)
    assert {f.kind for f in found.findings} == {"renamed"}
    names = dict(zip(before, after, strict=True))
    assert {f.key: f.actual_key for f in found.findings} == names
    for finding in found.findings:
        [cause] = finding.causes
        assert (cause.kind, cause.of, cause.accept) == ("moved", (finding.key,), ())
        assert cause.correlation == pytest.approx(0.995, abs=0.02)
    assert not found.ok
    [(what, fields)] = ways_past(found)
    assert what == "compare the values under the new names"
    mapped = compare(tmp_path, before, after, how, Policy(**fields))
    assert {(f.kind, f.key) for f in mapped.findings} == {("different", key) for key in names}


@pytest.mark.parametrize("how", HOW)
def test_what_was_renamed_and_scaled_is_said_to_be_scaled(tmp_path: Path, how: str) -> None:
    before = layers(torch.float32, 96, 1)
    after = under_new_names({key: tensor * 0.5 for key, tensor in before.items()})
    found = compare(tmp_path, before, after, how)
    assert {(f.kind, f.causes[0].kind, f.causes[0].factor) for f in found.findings} == {
        ("renamed", "scaled", 0.5)
    }


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("width", [8, 96])
def test_no_pair_is_made_of_what_is_unrelated_or_of_which_there_are_two(
    tmp_path: Path, width: int, seed: int, how: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    before = layers(torch.float32, width, 10 + seed)
    common = 1 + 0.5 * torch.randn(width, generator=g)  # channels that all layers share
    before |= {
        f"layers.{layer}.norm.weight": common + 0.1 * torch.randn(width, generator=g)
        for layer in range(3)
    }
    after = under_new_names(layers(torch.float32, width, 20 + seed))
    after |= {
        f"blocks.{layer}.ln.weight": common + 0.1 * torch.randn(width, generator=g)
        for layer in range(3)
    }
    found = compare(tmp_path, before, after, how)
    assert {f.kind for f in found.findings} == {"missing", "unexpected"}


@pytest.mark.parametrize("how", HOW)
def test_of_very_many_one_of_each_series_leads_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(search, "_MAX_NEARBY", 2)
    before = layers(torch.float32, 16, 1)
    after = under_new_names({key: t * 1.001 for key, t in before.items()})
    found = compare(tmp_path, before, after, how)
    assert {f.kind for f in found.findings} == {"renamed"}
    assert {f.causes[0].kind for f in found.findings} == {"scaled"}
