"""A LoRA adapter explains what was merged, and at which scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import api
from harness.comparison.cause import Cause
from harness.errors import CheckpointError

NAMES = [
    "base_model.model.{}.lora_{}.weight",
    "diffusion_model.{}.lora_{}.default.weight",
    "{}.lora_{}.weight",
]


def merged(
    folder: Path, width: int, dtype: torch.dtype, name: str, scale: float
) -> tuple[Path, Path, Path]:
    """A base, what is merged of it at a scale, and an adapter whose own scale is 2."""
    g = torch.Generator().manual_seed(0)
    base, tuned, adapter = {}, {}, {}
    for layer in range(2):
        stem = f"layers.{layer}.q_proj"
        weight = (torch.randn(2 * width, width, generator=g) * 0.05).to(dtype)
        down, up = torch.randn(4, width, generator=g), torch.randn(2 * width, 4, generator=g) * 0.02
        base[f"model.{stem}.weight"] = weight
        tuned[f"model.{stem}.weight"] = (weight.float() + scale * (up @ down)).to(dtype)
        adapter |= {name.format(stem, "A"): down, name.format(stem, "B"): up}
    files = [folder / f"{file}.safetensors" for file in ("base", "tuned", "adapter_model")]
    for state, file in zip((base, tuned, adapter), files, strict=True):
        save_file(state, file)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    return files[0], files[1], files[2]


def found(files: tuple[Path, Path, Path], how: str) -> list[tuple[Cause, ...]]:
    base, tuned, adapter = files
    if how == "both files":
        comparison = api.diff(base, tuned, adapter=adapter)
    else:
        golden = api.record(base, base.parent / "golden.safetensors", overwrite=True)
        comparison = api.verify(tuned, golden, adapter=adapter)
    return [finding.causes for finding in comparison.findings]


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 128])
def test_what_was_merged_is_the_golden_plus_the_product(
    tmp_path: Path, width: int, dtype: torch.dtype, how: str
) -> None:
    for name in NAMES:
        for [cause] in found(merged(tmp_path, width, dtype, name, 2.0), how):
            assert (cause.kind, cause.factor) == ("sum", pytest.approx(2))
            assert " + LoRA B·A × 2 (to within" in cause.text
    [first, _] = found(merged(tmp_path, width, dtype, NAMES[0], 4.0), how)
    assert "× 4, where the adapter's own scale is 2 " in first[0].text


def test_another_change_than_the_adapters_is_not_explained_by_it(tmp_path: Path) -> None:
    files = merged(tmp_path, 128, torch.float32, NAMES[0], 2.0)
    state = {k: v.clone() for k, v in load_file(files[1]).items()}
    for weight in state.values():
        weight += 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save_file(state, files[1])
    for how in ("golden alone", "both files"):
        assert found(files, how) == [(), ()]


def test_what_is_no_adapter_is_an_error(tmp_path: Path) -> None:
    base, tuned, _ = merged(tmp_path, 16, torch.float32, NAMES[0], 2.0)
    with pytest.raises(CheckpointError, match="not an adapter: it has no lora_A and lora_B"):
        api.diff(base, tuned, adapter=base)


def test_a_configuration_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    files = merged(tmp_path, 16, torch.float32, NAMES[0], 2.0)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not JSON"):
        found(files, "both files")
