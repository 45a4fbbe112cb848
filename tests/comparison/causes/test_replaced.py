"""What stands where other tensors stood is named, and that its values are none of theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.comparison.causes.test_explain import State, compare, of_key

Make = Callable[[State], State]


def experts(width: int, seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    made = {"embed.weight": torch.randn(8, width, generator=torch.Generator().manual_seed(1))}
    for layer in range(2):
        for expert in range(3):
            of = f"layers.{layer}.experts.{expert}"
            for name in ("gate_proj", "up_proj"):
                made[f"{of}.{name}.weight"] = torch.randn(width // 2, width, generator=g)
            made[f"{of}.down_proj.weight"] = torch.randn(width, width // 2, generator=g)
    return made


def stacked(old: State, *, turned: bool = False) -> State:
    new = {"embed.weight": old["embed.weight"]}
    for layer in range(2):

        def of(name: str, layer: int = layer) -> torch.Tensor:
            return torch.stack(
                [old[f"layers.{layer}.experts.{e}.{name}_proj.weight"] for e in range(3)]
            )

        both = torch.cat([of("gate"), of("up")], 1)
        new[f"layers.{layer}.experts.gate_up_proj"] = both.mT.contiguous() if turned else both
        new[f"layers.{layer}.experts.down_proj"] = of("down")
    return new


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 160])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_that_were_never_loaded_are_said_to_stand_there(
    tmp_path: Path, width: int, how: str, turned: bool
) -> None:
    after = stacked(experts(width, 2), turned=turned)
    found = compare(tmp_path, experts(width, 1), after, how)
    assert {finding.kind for finding in found.findings} == {"renamed"}
    assert {finding.causes[0].kind for finding in found.findings} == {"unrelated"}
    assert not any(finding.causes[0].accept for finding in found.findings)
    lines = str(found).splitlines()
    assert len(lines) <= 12
    [line] = [line for line in lines if "gate_up_proj stands where" in line]
    assert "layers.{0,1}" in line
    assert "gate_proj.weight and experts.{0..2}.up_proj.weight stood, by shape and name" in line
    assert "never loaded, or initialised again  (12 tensors)" in line


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 160])
def test_what_was_taken_apart_and_made_anew_is_said(tmp_path: Path, width: int, how: str) -> None:
    found = compare(tmp_path, stacked(experts(width, 1)), experts(width, 2), how)
    cause = of_key(found, "layers.0.experts.gate_up_proj").causes[0]
    assert cause.kind == "unrelated"
    assert "gate_up_proj is now" in cause.text


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 160])
def test_experts_that_were_stacked_and_trained_on_are_not_unrelated(
    tmp_path: Path, width: int, how: str
) -> None:
    before = experts(width, 1)
    g = torch.Generator().manual_seed(5)
    trained = {k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in before.items()}
    found = compare(tmp_path, before, stacked(trained), how)
    for layer in range(2):
        cause = of_key(found, f"layers.{layer}.experts.0.up_proj.weight").causes[0]
        assert cause.kind == "stacked"
        assert "with other values" in cause.text
        assert (cause.correlation or 0) > 0.9
        assert not cause.accept


@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_a_new_head_stands_where_the_old_one_stood(tmp_path: Path, how: str) -> None:
    def head(name: str, seed: int) -> State:
        g = torch.Generator().manual_seed(seed)
        body = torch.Generator().manual_seed(0)
        return {
            "body.weight": torch.randn(64, 64, generator=body),
            f"{name}.weight": torch.randn(10, 64, generator=g),
        }

    found = compare(tmp_path, head("classifier", 1), head("score", 2), how)
    text = of_key(found, "classifier.weight").causes[0].text
    assert text.startswith("score.weight stands where classifier.weight stood")
    assert "score.weight stands where classifier.weight stood" in str(found)


@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_nothing_is_said_of_what_may_stand_for_several(tmp_path: Path, how: str) -> None:
    g = torch.Generator().manual_seed(0)
    before = {f"old.{name}": torch.randn(32, 32, generator=g) for name in "abc"}
    after = {f"new.{name}": torch.randn(32, 32, generator=g) for name in "xyz"}
    both = torch.randn(64, 32, generator=g)
    found = compare(tmp_path, before, after | {"new.pq": both}, how)
    assert not any(finding.causes for finding in found.findings)
