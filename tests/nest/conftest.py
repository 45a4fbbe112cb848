"""Files that NVIDIA NeMo 3.0.0 wrote, and models made from their config."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.nest.archive import read_nemo
from harness.nest.model import AudioBatch, EncDecDenoiseMaskedTokenPredModel

_HERE = Path(__file__).parent
_NEMO = _HERE.parent / "data" / "nest_tiny.nemo"
_CKPT = _HERE.parent / "data" / "nest_tiny.ckpt"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for several threads, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nemo_path() -> Path:
    return _NEMO


@pytest.fixture(scope="session")
def ckpt_path() -> Path:
    return _CKPT


@pytest.fixture(scope="session")
def _tiny() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return read_nemo(_NEMO)


@pytest.fixture
def nemo_config(_tiny: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The config in NeMo's file, a copy to change."""
    return copy.deepcopy(_tiny[0])


@pytest.fixture(scope="session")
def nemo_state(
    _tiny: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The state dict in NeMo's file; do not change it."""
    return _tiny[1]


@pytest.fixture
def model(
    nemo_config: dict[str, Any], nemo_state: dict[str, torch.Tensor]
) -> EncDecDenoiseMaskedTokenPredModel:
    """NeMo's tiny model, evaluation mode."""
    made = EncDecDenoiseMaskedTokenPredModel(nemo_config)
    made.load_state_dict(nemo_state)
    return made.eval()


@pytest.fixture
def make_model(
    nemo_config: dict[str, Any],
) -> Callable[..., EncDecDenoiseMaskedTokenPredModel]:
    """Build a seeded model from NeMo's tiny config with `section__key=value` replaced."""

    def make(**changes: Any) -> EncDecDenoiseMaskedTokenPredModel:
        for name, value in changes.items():
            section, _, key = name.partition("__")
            nemo_config[section][key] = value
        torch.manual_seed(5)
        return EncDecDenoiseMaskedTokenPredModel(nemo_config).eval()

    return make


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.Tensor]:
    """NeMo's own outputs of the tiny model."""
    loaded: dict[str, torch.Tensor] = torch.load(
        _HERE / "data" / "forward_tiny.pt", weights_only=True
    )
    return loaded


@pytest.fixture(scope="session")
def nemo_keys() -> list[dict[str, Any]]:
    """NeMo's keys in order, with shape, dtype, kind and requires_grad."""
    listed: list[dict[str, Any]] = json.loads(
        (_HERE / "data" / "state_keys_tiny.json").read_text(encoding="utf-8")
    )["keys"]
    return listed


@pytest.fixture
def batch(model: EncDecDenoiseMaskedTokenPredModel) -> AudioBatch:
    """Two synthetic items as a loader would give them."""
    inputs = model.golden_inputs()
    return AudioBatch(
        sample_id=["a", "b"],
        audio=inputs["input_signal"],
        audio_len=inputs["input_signal_length"],
        noise=None,
        noise_len=None,
        noisy_audio=inputs["noisy_input_signal"],
        noisy_audio_len=inputs["noisy_input_signal_length"],
    )
