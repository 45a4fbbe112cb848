"""Waveforms to log-mel features: pre-emphasis, STFT, mel bands, log, normalisation per band.

In: waveforms `(B, S)` with sample counts `(B,)`. Out: features `(B, M, T)` with frame counts
`(B,)`. Always computed in float32 without gradient, outside autocast, and returned in the dtype
that the module was cast to. The window and the mel matrix come from the buffers, so from the
checkpoint.

Source of the numbers: NVIDIA NeMo 3.0.0, EncDecDenoiseMaskedTokenPredModel. Deviation: dither is
added to a copy; NeMo alters the caller's waveform.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from harness.nest.config import PreprocessorConfig

_STD_FLOOR = 1e-5

_WINDOWS: dict[str, Callable[..., Tensor]] = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
}


def _hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear below 1000 Hz, logarithmic above."""
    if hz < 1000.0:
        return 3.0 * hz / 200.0
    return 15.0 + 27.0 * math.log(hz / 1000.0) / math.log(6.4)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 1000.0 * np.exp((mel - 15.0) * math.log(6.4) / 27.0)
    return np.where(mel < 15.0, 200.0 * mel / 3.0, above)


def mel_filters(config: PreprocessorConfig) -> Tensor:
    """Build triangular filters of equal width in mel, `(M, n_fft // 2 + 1)` float32.

    With `mel_norm: slaney` each filter is divided by half its width in Hz. The same matrix as
    librosa's `filters.mel` to 1e-17.
    """
    top = config.highfreq or config.sample_rate / 2
    mels = np.linspace(_hz_to_mel(config.lowfreq), _hz_to_mel(top), config.features + 2)
    edges = _mel_to_hz(mels)
    bins = np.fft.rfftfreq(config.fft_length, 1.0 / config.sample_rate)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    weights = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    if config.mel_norm == "slaney":
        weights = (weights * (2.0 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)
    return torch.from_numpy(weights)


class _Featurizer(nn.Module):
    """Holds the two buffers under NeMo's names, `window (win,)` and `fb (1, M, n_fft // 2 + 1)`."""

    window: Tensor
    fb: Tensor

    def __init__(self, config: PreprocessorConfig) -> None:
        super().__init__()
        window = _WINDOWS[str(config.window)](config.win_length, periodic=False)
        self.register_buffer("window", window)
        self.register_buffer("fb", mel_filters(config).unsqueeze(0))


class MelPreprocessor(nn.Module):
    """Compute normalised log-mel features.

    Training mode adds dither (one normal draw of the waveforms' shape) where the config asks for
    it.
    """

    def __init__(self, config: PreprocessorConfig) -> None:
        super().__init__()
        self.config = config
        self.featurizer = _Featurizer(config)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Count valid frames `(B,)` int64 of waveforms of `lengths` samples `(B,)`.

        S // hop, not 1 + S // hop: the STFT has one frame more, which is never valid.
        """
        n_fft = self.config.fft_length
        trimmed = lengths.to(torch.int64) + 2 * (n_fft // 2) - n_fft
        frames = torch.div(trimmed, self.config.hop_length, rounding_mode="floor")
        return torch.where(lengths == 0, 0, frames)

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Turn waveforms `(B, S)` of `lengths (B,)` into features `(B, M, T)`, frames `(B,)` int64.

        Frames from each item's count on are `pad_value`; samples after an item's length never
        matter.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            x = waveform.to(torch.float32)
            frames = self.num_frames(lengths)
            if self.training and self.config.dither > 0:
                x = x + self.config.dither * torch.randn_like(x)
            x = self._log(self._mel(self._emphasise(x, lengths)))
            x = self._pad(self._normalise(x, frames), frames)
        return x.to(self.featurizer.window.dtype), frames

    def _emphasise(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.config.preemph is None:
            # NeMo hides the samples after the length only together with pre-emphasis
            return x
        x = torch.cat((x[:, :1], x[:, 1:] - self.config.preemph * x[:, :-1]), dim=1)
        inside = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        return x.masked_fill(~inside, 0.0)

    def _mel(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(
            x,
            n_fft=self.config.fft_length,
            hop_length=self.config.hop_length,
            win_length=self.config.win_length,
            window=self.featurizer.window.to(torch.float32),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        # root first, power second: re^2 + im^2 differs in the last bit
        magnitude = torch.view_as_real(spectrum).pow(2).sum(-1).sqrt()
        if self.config.mag_power != 1.0:
            magnitude = magnitude.pow(self.config.mag_power)
        return torch.matmul(self.featurizer.fb.to(torch.float32), magnitude)

    def _log(self, mel: Tensor) -> Tensor:
        if not self.config.log:
            return mel
        guard = self.config.log_zero_guard_value
        if isinstance(guard, str):
            guard = cast("float", getattr(torch.finfo(torch.float32), guard))
        if self.config.log_zero_guard_type == "add":
            return torch.log(mel + guard)
        return torch.log(torch.clamp(mel, min=guard))

    def _normalise(self, x: Tensor, frames: Tensor) -> Tensor:
        valid = _valid(x, frames)
        count = frames.view(-1, 1, 1)
        mean = torch.where(valid, x, 0.0).sum(dim=2, keepdim=True) / count
        squares = torch.where(valid, x - mean, 0.0).pow(2).sum(dim=2, keepdim=True)
        # unbiased; one frame is 0 / 0, which counts as no deviation
        std = torch.sqrt(squares / (count - 1.0)).nan_to_num(nan=0.0)
        return (x - mean) / (std + _STD_FLOOR)

    def _pad(self, x: Tensor, frames: Tensor) -> Tensor:
        x = x.masked_fill(~_valid(x, frames), self.config.pad_value)
        multiple = self.config.pad_multiple
        missing = -x.shape[2] % multiple if multiple else 0
        return F.pad(x, (0, missing), value=self.config.pad_value)


def _valid(x: Tensor, frames: Tensor) -> Tensor:
    """True at valid frames, `(B, 1, T)`."""
    return (torch.arange(x.shape[2], device=x.device) < frames.unsqueeze(1)).unsqueeze(1)
