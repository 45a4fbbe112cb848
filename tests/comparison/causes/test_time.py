"""The search ends in time and says so; what is to be accepted is looked for to the end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from harness import api
from harness.comparison.causes.evidence import Budget
from harness.comparison.policy import Policy
from tests.comparison.causes.test_explain import at, cause_of, compare, state

Q = "layers.0.q.weight"


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "is_over", property(lambda self: self.seconds < math.inf))


@pytest.mark.usefixtures("no_time")
@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_without_time_nothing_is_said_but_that(tmp_path: Path, how: str) -> None:
    before = state(torch.float32)
    found = compare(tmp_path, before, at(Q, torch.t)(before), how)
    assert not any(finding.causes for finding in found.findings)
    assert "1 finding was not looked at" in str(found)


@pytest.mark.usefixtures("no_time")
@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_what_is_accepted_is_looked_for_to_the_end(tmp_path: Path, how: str) -> None:
    before = state(torch.float32)
    policy = Policy(accept=("transposed",))
    found = compare(tmp_path, before, at(Q, torch.t)(before), how, policy)
    assert cause_of(found, Q).kind == "transposed"
    assert found.ok


@pytest.mark.parametrize(("factor", "offset"), [(0.5, 0.0), (80**-0.5, 0.0), (1.0, -1.0), (3, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_two_files_all_values_prove_a_scale(
    tmp_path: Path, dtype: torch.dtype, factor: float, offset: float
) -> None:
    g = torch.Generator().manual_seed(3)
    before = {"w": torch.randn(400, 400, generator=g).to(dtype)}
    after = (before["w"] * factor + offset).to(dtype)
    one_off = after.clone()
    one_off[77, 311] *= 1.1
    for there, kind in ((after, "shifted" if factor == 1 else "scaled"), (one_off, None)):
        torch.save(before, tmp_path / "a.pt")
        torch.save({"w": there}, tmp_path / "b.pt")
        [finding] = api.diff(tmp_path / "a.pt", tmp_path / "b.pt").findings
        # One value more is another row, or within the bound of what was added.
        assert [c.kind for c in finding.causes if c.kind not in ("rows", "sum")] == (
            [kind] if kind else []
        )
        if kind:
            cause = finding.causes[0]
            assert cause.proof == "values"
            assert (cause.factor or 1.0, cause.offset or 0.0) == pytest.approx((factor, offset))
