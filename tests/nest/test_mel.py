"""The preprocessor at its edges, where the parity test does not look."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.nest.config import PreprocessorConfig
from harness.nest.mel import MelPreprocessor, mel_filters


def preprocessor(**changes: Any) -> MelPreprocessor:
    section = {"window_size": 0.025, "features": 80, "n_fft": 512} | changes
    return MelPreprocessor(PreprocessorConfig.read({"preprocessor": section})).eval()


def noise(samples: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))


def mel_by_hand(signal: Tensor, frames: int, config: PreprocessorConfig) -> Tensor:
    """Log-mel of one item, frame by frame, normalised; float64, `(M, frames)`."""
    x = signal.double().numpy()
    if config.preemph is not None:
        x = np.concatenate((x[:1], x[1:] - config.preemph * x[:-1]))
    x = np.pad(x, 256)
    window = np.pad(np.hanning(400), 56)
    columns = []
    for t in range(frames):
        power = np.abs(np.fft.rfft(x[160 * t : 160 * t + 512] * window)) ** config.mag_power
        columns.append(mel_filters(config).double().numpy() @ power)
    mel = np.stack(columns, axis=1)
    guard = config.log_zero_guard_value
    assert isinstance(guard, float)
    if config.log:
        mel = np.log(mel + guard if config.log_zero_guard_type == "add" else np.maximum(mel, guard))
    mean, std = mel.mean(1, keepdims=True), mel.std(1, ddof=1, keepdims=True)
    return torch.from_numpy((mel - mean) / (std + 1e-5))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preemph": None},
        {"mag_power": 1.0},
        {"log": False},
        {"log_zero_guard_type": "clamp", "log_zero_guard_value": 1e-3},
        {"lowfreq": 50, "highfreq": 7000, "features": 64},
    ],
    ids=str,
)
def test_features_by_hand(changes: dict[str, Any]) -> None:
    module = preprocessor(**changes)
    signal = noise(8000)
    mel, frames = module(signal, torch.tensor([8000]))
    assert frames.tolist() == [50]
    assert mel.shape == (1, module.config.features, 64)
    expected = mel_by_hand(signal[0], 50, module.config)
    torch.testing.assert_close(mel[0, :, :50].double(), expected, rtol=1e-4, atol=2e-4)
    assert not mel[0, :, 50:].any()


@pytest.mark.parametrize(
    ("samples", "frames", "padded"), [(32000, 200, 208), (1, 0, 16), (160, 1, 16), (2559, 15, 16)]
)
def test_the_frame_count_is_the_samples_over_the_hop(
    samples: int, frames: int, padded: int
) -> None:
    mel, found = preprocessor()(noise(samples), torch.tensor([samples]))
    assert found.tolist() == [frames]
    assert found.dtype == torch.int64
    assert mel.shape == (1, 80, padded)


def test_too_short_items_are_zeros() -> None:
    mel, frames = preprocessor()(noise(3200, batch=5), torch.tensor([0, 159, 160, 319, 320]))
    assert frames.tolist() == [0, 0, 1, 1, 2]
    assert not mel[:4].any()
    assert mel[4, :, :2].any()
    assert mel.isfinite().all()


def test_samples_after_the_length_do_not_matter() -> None:
    signal, lengths = noise(4000, batch=2), torch.tensor([4000, 1920])
    changed = signal.clone()
    changed[1, 1920:] = 1e3  # the last valid window ends at 1960
    assert torch.equal(preprocessor()(signal, lengths)[0], preprocessor()(changed, lengths)[0])


def test_without_pre_emphasis_nemo_does_not_hide_them() -> None:
    signal, lengths = noise(4000, batch=2), torch.tensor([4000, 1920])
    changed = signal.clone()
    changed[1, 1920:] = 1e3  # the last valid window ends at 1960
    module = preprocessor(preemph=None)
    assert not torch.equal(module(signal, lengths)[0], module(changed, lengths)[0])


def test_padding_of_frames() -> None:
    signal, lengths = noise(1600), torch.tensor([1600])
    assert preprocessor(pad_to=0)(signal, lengths)[0].shape[2] == 11
    mel, _ = preprocessor(pad_to=4, pad_value=-1.5)(signal, lengths)
    assert mel.shape[2] == 12
    assert (mel[:, :, 10:] == -1.5).all()


def test_dither_is_training_only_and_leaves_the_caller_s_waveform_alone() -> None:
    module, signal, lengths = preprocessor(dither=0.1), noise(1600), torch.tensor([1600])
    before = signal.clone()
    quiet = module(signal, lengths)[0]
    module.train()
    torch.manual_seed(0)
    dithered = module(signal, lengths)[0]
    assert torch.equal(signal, before)
    assert not torch.equal(dithered, quiet)
    torch.manual_seed(0)
    added = signal + 0.1 * torch.randn_like(signal)
    assert torch.equal(module.eval()(added, lengths)[0], dithered)


def test_computed_in_float32_whatever_the_module_was_cast_to() -> None:
    module, signal, lengths = preprocessor(), noise(1600), torch.tensor([1600])
    exact = module(signal, lengths)[0]
    module.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel, _ = module(signal.double(), lengths)
    assert mel.dtype == torch.bfloat16
    # only the stored window and filters were rounded
    assert float((mel.float() - exact).abs().max()) < 0.25


@pytest.mark.parametrize("window", ["hann", "hamming", "blackman", "bartlett"])
def test_windows_are_symmetric(window: str) -> None:
    stored = preprocessor(window=window).featurizer.window
    numpy = {"hann": "hanning"}.get(window, window)
    expected = torch.from_numpy(getattr(np, numpy)(400))
    torch.testing.assert_close(stored.double(), expected, rtol=0, atol=1e-6)


def test_filters_are_triangles_of_unit_area() -> None:
    config = PreprocessorConfig.read({"preprocessor": {"features": 8, "n_fft": 4096}})
    filters = mel_filters(config)
    assert filters.shape == (8, 2049)
    assert filters.dtype == torch.float32
    width = config.sample_rate / config.fft_length
    torch.testing.assert_close(filters.sum(1) * width, torch.ones(8), rtol=1e-3, atol=0)
    plain = mel_filters(
        PreprocessorConfig.read({"preprocessor": {"features": 8, "n_fft": 4096, "mel_norm": None}})
    )
    assert float(plain.max()) == pytest.approx(1.0, abs=0.02)


def test_filters_lie_between_the_given_frequencies() -> None:
    section = {"features": 8, "n_fft": 4096, "lowfreq": 50, "highfreq": 7000}
    config = PreprocessorConfig.read({"preprocessor": section})
    heard = mel_filters(config).sum(0).nonzero()[:, 0] * config.sample_rate / 4096
    assert 50 <= float(heard.min()) < 60
    assert 6990 < float(heard.max()) <= 7000


@pytest.mark.parametrize(("word", "guard"), [("tiny", 2.0**-126), ("eps", 2.0**-23)])
def test_the_log_guard_may_be_a_word(word: str, guard: float) -> None:
    module = preprocessor(log_zero_guard_value=word)
    assert float(module._log(torch.zeros(1))) == pytest.approx(math.log(guard))
