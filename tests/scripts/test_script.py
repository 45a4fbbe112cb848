"""scripts/verify_checkpoint_compatibility.py prints what its specification shows, line by line."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from omegaconf import OmegaConf

from harness.nest import RECIPE
from tests.conftest import REPOSITORY

# The example of the specification, word for word.
SPECIFIED = """\
============================================================
Checkpoint Loading Verification
============================================================
Checkpoint: /path/to/checkpoint.nemo
Test save/reload: True
============================================================

############################################################
TEST: Loading checkpoint in local model
############################################################

============================================================
Loading LOCAL model from checkpoint: /path/to/checkpoint.nemo
============================================================
✓ Successfully loaded .nemo checkpoint
  Total parameters: 123,456,789
  Trainable parameters: 123,456,789

✓ SUCCESS: Checkpoint can be loaded in local model

============================================================
Testing save and reload round-trip
============================================================
✓ Model saved to /path/to/checkpoint.test.nemo

============================================================
Loading LOCAL model from checkpoint: /path/to/checkpoint.test.nemo
============================================================
✓ Successfully loaded .nemo checkpoint
  Total parameters: 123,456,789
  Trainable parameters: 123,456,789

============================================================
Comparing state dicts: Original Model vs Reloaded Model
============================================================

Keys comparison:
  Common keys: 150
  Only in Original Model: 0
  Only in Reloaded Model: 0

Shape mismatches: 0

Value mismatches: 0

✓ State dicts are identical!

✓ SUCCESS: Save and reload round-trip works correctly!
"""


def run(*arguments: object) -> Result:
    path = REPOSITORY / "scripts" / "verify_checkpoint_compatibility.py"
    spec = importlib.util.spec_from_file_location("verify_checkpoint_compatibility", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return CliRunner().invoke(script.main, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path, data: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copy(data / request.param, tmp_path))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The shipped recipe, made as small as the checkpoint."""
    text = RECIPE.read_text()
    sizes = {"num_classes": 128, "n_layers": 2, "d_model": 64, "n_heads": 4}
    sizes["subsampling_conv_channels"] = 32
    for name, value in sizes.items():
        text = re.sub(rf"\b{name}: \d+", f"{name}: {value}", text)
    path = tmp_path / "nest_fast-conformer.yaml"
    path.write_text(text)
    return path


def as_specified(printed: str, *, parameters: str = "246,160", trainable: str = "233,792") -> str:
    """Replace paths and numbers by the specification's."""
    printed = re.sub(r"\S*nest_tiny", "/path/to/checkpoint", printed)
    printed = printed.replace("Common keys: 99", "Common keys: 150")
    printed = printed.replace(f"Total parameters: {parameters}", "Total parameters: 123,456,789")
    return printed.replace(f"parameters: {trainable}", "parameters: 123,456,789")


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("round_trip", [False, True])
@pytest.mark.parametrize("checkpoint", ["nest_tiny.nemo", "nest_tiny.ckpt"], indirect=True)
def test_the_output_is_the_specified_one(
    checkpoint: Path, config: Path, round_trip: bool, with_config: bool
) -> None:
    before = checkpoint.read_bytes()
    arguments: list[object] = ["--ckpt_path", checkpoint]
    arguments += ["--test_save_load"] if round_trip else []
    arguments += ["--config", config] if with_config else []
    result = run(*arguments)
    expected = SPECIFIED
    if not round_trip:
        expected = expected.partition(
            "\n============================================================\nTesting"
        )[0]
        expected = expected.replace("save/reload: True", "save/reload: False")
    if checkpoint.suffix == ".ckpt":
        expected = expected.replace("checkpoint.nemo", "checkpoint.ckpt")
        expected = expected.replace("loaded .nemo", "loaded .ckpt", 1)
    assert as_specified(result.output) == expected
    assert result.exit_code == 0
    assert checkpoint.read_bytes() == before
    assert checkpoint.with_suffix(".test.nemo").exists() == round_trip


@pytest.mark.parametrize("checkpoint", ["nest_tiny_missing_key.nemo"], indirect=True)
def test_a_checkpoint_that_does_not_fit_fails_and_names_the_keys(checkpoint: Path) -> None:
    result = run("--ckpt_path", checkpoint)
    assert result.exit_code == 1
    assert "✗ FAILURE: Checkpoint cannot be loaded in local model" in result.output
    assert "quantizer.codebooks" in result.output
    assert "What to do: " in result.output
    assert "SUCCESS" not in result.output


def test_a_missing_file_fails_and_says_what_to_do(tmp_path: Path) -> None:
    result = run("--ckpt_path", tmp_path / "none.nemo")
    assert result.exit_code == 1
    assert "✗ " in result.output
    assert "What to do: " in result.output


@pytest.mark.parametrize("checkpoint", ["nest_tiny.nemo"], indirect=True)
def test_a_save_that_changes_the_model_fails_and_names_the_keys(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.nest.model import EncDecDenoiseMaskedTokenPredModel as Model

    save_to = Model.save_to

    def sabotaged(self: Model, path: Path) -> None:
        bias = self.encoder.layers[1].norm_out.bias
        original = bias.data.clone()
        bias.data += 1e-3
        save_to(self, path)
        bias.data = original

    monkeypatch.setattr(Model, "save_to", sabotaged)
    result = run("--ckpt_path", checkpoint, "--test_save_load")
    assert result.exit_code == 1
    assert "Value mismatches: 1\n    ✗ encoder.layers.1.norm_out.bias: 64 of 64" in result.output
    assert "✗ FAILURE: Save and reload round-trip changes the model" in result.output


@pytest.mark.parametrize("checkpoint", ["nest_tiny.nemo"], indirect=True)
def test_a_place_that_cannot_be_written_fails_and_says_so(checkpoint: Path) -> None:
    checkpoint.with_suffix(".test.nemo").mkdir()
    result = run("--ckpt_path", checkpoint, "--test_save_load")
    assert result.exit_code == 1
    assert "nest_tiny.test.nemo: saving the model failed: IsADirectoryError" in result.output
    assert "✗ FAILURE: Save and reload round-trip does not work" in result.output


@pytest.mark.parametrize("checkpoint", ["nest_tiny.ckpt"], indirect=True)
def test_a_checkpoint_without_a_class_is_the_local_model_s(checkpoint: Path, config: Path) -> None:
    saved = torch.load(checkpoint, weights_only=False)
    plain = OmegaConf.to_container(OmegaConf.create(saved["hyper_parameters"]["cfg"]))
    assert isinstance(plain, dict)
    del plain["target"]
    torch.save({**saved, "hyper_parameters": {"cfg": plain}}, checkpoint)
    result = run("--ckpt_path", checkpoint, "--test_save_load")
    assert "✓ SUCCESS: Save and reload round-trip works correctly!" in result.output
    # Weights alone say nothing of the model that they are of.
    torch.save(saved["state_dict"], checkpoint)
    result = run("--ckpt_path", checkpoint)
    assert result.exit_code == 1
    assert "What to do: give that as well: --config" in result.output
    assert run("--ckpt_path", checkpoint, "--config", config).exit_code == 0
