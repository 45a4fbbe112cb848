"""A golden holds the best that fits: what it decides, how large it is, what an update keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import api
from harness.checkpoint import open_checkpoint
from harness.comparison.policy import Policy
from harness.errors import UsageError
from harness.golden.budget import Holding, Sizes, choose, default_max_nbytes, held_by, said_of
from harness.golden.golden import Golden
from harness.text.sizes import parse_size

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    state = {f"large.{d}": torch.randn(40_001, generator=g).to(d) for d in FLOATS}
    state |= {f"middle.{i}": torch.randn(1000, generator=g) for i in range(50)}
    state |= {"small": torch.randn(10, generator=g), "steps": torch.arange(9000)}
    torch.save({"state_dict": state, "note": "ü" * 50}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def record(path: Path, max_size: int | None = None, **options: Any) -> Golden:
    golden = path.parent / "golden.safetensors"
    return api.record(path, golden, max_size=max_size, overwrite=True, **options)


def nbytes(golden: Golden) -> int:
    return Path(str(golden.path)).stat().st_size


HOLDINGS = [
    Holding(max_kept_numel=4096, bits=8),
    Holding(max_kept_numel=4096, bits=4),
    Holding(max_kept_numel=256, bits=4),
    Holding(max_kept_numel=256),
    Holding(max_kept_numel=256, block_nbytes=1 << 17),
    Holding(max_kept_numel=256, block_nbytes=1 << 19),
]


def test_the_best_that_fits_is_held_and_it_fits(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        sizes = [Sizes(checkpoint, (1e-5, 1e-5)).of(holding) for holding in HOLDINGS]
    for holding, size in zip(HOLDINGS, sizes, strict=True):
        golden = record(path, size)
        assert nbytes(golden) <= size
        assert held_by(api.read_golden(golden.path).fingerprint) == holding
        assert api.verify(path, golden.path).verdict == "identical"
    with pytest.raises(UsageError, match="the golden takes at least") as error:
        record(path, 10_000)
    given = error.value.hint.split()[2].rstrip(",")
    assert nbytes(record(path, parse_size(given))) <= parse_size(given)


def test_by_default_up_to_8_mb_or_one_per_cent_are_held_up_to_100_mb(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        small = checkpoint.tensors["small"]
        for numel, size in ((10, 8), (200_000_000, 8), (400_000_000, 16), (10**10, 100)):
            large = replace(checkpoint, tensors={"x": replace(small, shape=(numel,))})
            assert default_max_nbytes(large) == size * 1_000_000
        assert choose(checkpoint, None, "small", (1e-5, 1e-5)).bits == 8
        assert choose(checkpoint, None, "none", (1e-5, 1e-5)) == Holding(max_kept_numel=0)
        assert choose(checkpoint, None, "all", (1e-5, 1e-5)) == Holding(max_kept_numel=None)


@pytest.mark.parametrize("values", ["small", "all", "none"])
def test_the_size_is_known_before_anything_is_read(path: Path, values: str) -> None:
    golden = record(path, values=values)
    with open_checkpoint(path) as checkpoint:
        told = Sizes(checkpoint, (1e-5, 1e-5)).of(held_by(golden.fingerprint))
    assert nbytes(golden) <= told <= nbytes(golden) + 12_000


def test_what_a_golden_decides_is_said_in_one_line(path: Path) -> None:
    assert said_of(record(path).fingerprint) == "it decides allclose at 1e-5 for every tensor"
    golden = record(path, atol=1e-3, rtol=0.0).fingerprint
    assert said_of(golden) == "it decides allclose at atol 0.001, rtol 0 for every tensor"
    said = said_of(record(path, 200_000).fingerprint)
    begin = "it decides allclose at 1e-5 for every tensor, to within 13 %; to within 1 % with "
    assert said.startswith(f"{begin}--max-size ")
    assert (
        said_of(record(path, parse_size(said.split()[-1])).fingerprint) == begin.partition(",")[0]
    )
    said = said_of(record(path, 45_000).fingerprint)
    assert said.startswith("it decides gross changes and single elements; --max-size ")
    assert said_of(record(path, values="none").fingerprint).endswith("--values small keeps more")
    torch.save({"x": torch.randn(5000, dtype=torch.complex64), "y": torch.randn(5000)}, path)
    assert said_of(record(path).fingerprint).endswith("for all but 1 of 2 tensors")


@pytest.mark.parametrize("max_size", [None, 200_000, 45_000, 36_000])
def test_an_update_holds_as_much_of_new_tensors(path: Path, max_size: int | None) -> None:
    golden = record(path, max_size, atol=1e-3)
    state = torch.load(path)["state_dict"]
    state |= {"new": torch.randn(7000), "new.middle": torch.randn(1000)}
    state["large.torch.float32"] += 1
    torch.save({"state_dict": state}, path)
    updated = api.update(path, golden.path)
    assert held_by(updated.fingerprint) == held_by(golden.fingerprint)
    assert updated.fingerprint.tolerance == (1e-3, 1e-5)
    fresh = record(path, max_size, atol=1e-3).fingerprint
    for key, tensor in updated.fingerprint.tensors.items():
        other = fresh.tensors[key]
        assert (tensor.values is None) == (other.values is None)
        assert (tensor.residues is None) == (other.residues is None)


def test_the_recorded_tolerance_is_that_of_a_later_verify(path: Path) -> None:
    golden = record(path, atol=1e-2, rtol=0.0)
    state = torch.load(path)["state_dict"]
    torch.save({"state_dict": {k: v + 5e-3 if "32" in k else v for k, v in state.items()}}, path)
    policy = api.verify(path, golden.path).policy
    assert (policy.atol, policy.rtol) == (1e-2, 0.0)
    assert api.verify(path, golden.path).verdict == "close"
    strict = Policy(atol=1e-5, rtol=1e-5)
    assert api.verify(path, golden.path, policy=strict).verdict == "different"
    beside = Policy(rtol=1e-5, tolerances=(("large*", 1e-4, None),))
    assert api.verify(path, golden.path, policy=beside).verdict == "different"
