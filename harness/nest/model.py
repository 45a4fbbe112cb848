"""The model: preprocessor, encoder, quantizer, masking, decoder and loss as a LightningModule.

In: a config, then waveforms, clean and noisy. Out: log-probabilities of the clean features'
tokens, and files: `.nemo` by `save_to`, `.ckpt` by Lightning's Trainer; `restore_from` and
`load_from_checkpoint` read both, NeMo's own included. Refused: what `harness.nest.config`
refuses, and files whose tensors do not fit (strict, unless asked otherwise, and then with a
warning).

Source of keys, numbers and order of random draws: NVIDIA NeMo 3.0.0,
EncDecDenoiseMaskedTokenPredModel. Deviations, all in training: a batch in which no frame is
masked enough gives a zero loss (NeMo: NaN, which ruins the weights) and does not count in
validation; dither does not alter the caller's waveform; module-wide casts leave the codebooks
float64.
"""

from __future__ import annotations

import collections
import typing
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import omegaconf
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from harness.errors import ModelError
from harness.model.config import resolve
from harness.model.mismatch import brief_mismatch
from harness.nest.archive import read_nemo, write_nemo
from harness.nest.config import (
    NEMO_TARGET,
    DecoderConfig,
    LossConfig,
    ModelConfig,
    complete,
)
from harness.nest.encoder import ConformerEncoder
from harness.nest.mel import MelPreprocessor
from harness.nest.optim import NoamAnnealing, OptimConfig
from harness.nest.quantizer import RandomBlockMasking, RandomProjectionQuantizer

# NeMo's .ckpt files carry their config as a pickled DictConfig; these inert classes and no others.
_CONFIG_CLASSES: list[Any] = [
    omegaconf.dictconfig.DictConfig,
    omegaconf.listconfig.ListConfig,
    omegaconf.base.ContainerMetadata,
    omegaconf.base.Metadata,
    omegaconf.nodes.AnyNode,
    typing.Any,
    collections.defaultdict,
    dict,
    list,
    int,
]

_INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
}


class AudioBatch(NamedTuple):
    """One batch of a loader: waveforms `(B, S)` float32 and sample counts `(B,)` int64."""

    sample_id: Any
    audio: Tensor
    audio_len: Tensor
    noise: Tensor | None
    noise_len: Tensor | None
    noisy_audio: Tensor
    noisy_audio_len: Tensor


class Outputs(NamedTuple):
    """What `forward` returns: see there."""

    log_probs: Tensor
    encoded_length: Tensor
    masks: Tensor
    tokens: Tensor


class MultiSoftmaxDecoder(nn.Module):
    """One pointwise convolution to all books' classes, then a log-softmax per book."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        conv = nn.Conv1d(
            config.feat_in, config.num_classes * config.num_decoders, 1, bias=config.use_bias
        )
        if config.init_mode is not None:
            _INITS[config.init_mode](conv.weight)
        self.decoder_layers = nn.Sequential(conv)

    def forward(self, encoded: Tensor) -> Tensor:
        """Decode `(B, D, T')` into log-probabilities `(B, T', V, H)`, or `(B, T', V)` squeezed."""
        books = self.config.num_decoders
        logits = self.decoder_layers(encoded).transpose(1, 2)
        # the class is the slow index, the book the fast one (the quantizer's rows are the reverse)
        logits = logits.reshape(*logits.shape[:2], self.config.num_classes, books)
        log_probs: Tensor = logits.log_softmax(dim=2)
        return log_probs.squeeze(-1) if self.config.squeeze_single and books == 1 else log_probs


class MaskedTokenLoss(nn.Module):
    """Mean negative log-likelihood of the tokens at frames that are masked enough."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def counted(self, masks: Tensor) -> Tensor:
        """Choose the frames whose share of masked input exceeds the threshold, `(B, T')` bool."""
        steps = self.config.combine_time_steps
        batch, bands, num_frames = masks.shape
        stacked = masks.transpose(1, 2).reshape(batch, num_frames // steps, steps * bands)
        enough: Tensor = stacked.mean(dim=-1) > self.config.mask_threshold
        return enough

    def forward(self, masks: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Average over counted frames of `masks (B, M, T)`, then over books; NaN where none counts.

        `tokens (B, T', H)` int64 and `log_probs (B, T', V, H)`, both perhaps squeezed. Tokens are
        padded or cut to T'.
        """
        counted = self.counted(masks)
        if tokens.ndim == 2:
            tokens, log_probs = tokens.unsqueeze(-1), log_probs.unsqueeze(-1)
        tokens = F.pad(tokens, (0, 0, 0, counted.shape[1] - tokens.shape[1]))
        chosen, targets = log_probs[counted], tokens[counted]
        books = range(self.config.num_decoders)
        losses = [F.nll_loss(chosen[..., book], targets[:, book]) for book in books]
        return torch.stack(losses).sum() / len(losses)


class EncDecDenoiseMaskedTokenPredModel(pl.LightningModule):
    """NEST: predict the quantized tokens of clean speech from noisy, masked speech.

    `cfg` is a model config (mapping or `DictConfig`, see `harness.nest.config`); raises
    `ModelError` for what is not implemented. A new model is in training mode, and so is a
    restored one: call `eval()` before comparing outputs, or dropout, dither and BatchNorm updates
    are active.
    """

    def __init__(self, cfg: Mapping[str, Any] | DictConfig) -> None:
        super().__init__()
        plain = resolve(cfg)
        config = ModelConfig.read(plain)
        # as NeMo: a .ckpt says by it which class it is of
        plain = {**plain, "target": plain.get("target") or NEMO_TARGET}
        # plain containers: such a .ckpt loads with weights_only=True and no allow-list
        self.save_hyperparameters({"cfg": plain}, logger=False)
        self.config = config
        self.preprocessor = MelPreprocessor(config.preprocessor)
        # drawn in this order, registered in the order of the keys: both are NeMo's
        quantizer = RandomProjectionQuantizer(config.quantizer)
        mask_processor = RandomBlockMasking(config.masking)
        self.encoder = ConformerEncoder(config.encoder)
        self.quantizer = quantizer
        self.mask_processor = mask_processor
        self.decoder = MultiSoftmaxDecoder(config.decoder)
        self.loss = MaskedTokenLoss(config.loss)
        self._epoch_losses: dict[str, list[Tensor]] = {"val_loss": [], "test_loss": []}

    @property
    def cfg(self) -> dict[str, Any]:
        """The resolved config that the model was built from, plain dicts and lists."""
        config: dict[str, Any] = self.hparams["cfg"]
        return config

    # files

    @classmethod
    def restore_from(
        cls,
        path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        override_config: Mapping[str, Any] | DictConfig | None = None,
    ) -> Self:
        """Build the model that a `.nemo` file describes and load its weights; in training mode.

        `override_config` replaces the file's config. Raises `CheckpointError` for an unreadable
        file, `ModelError` for a config that is not implemented, and for keys or shapes that do
        not fit. With `strict=False` keys that do not fit are left out, with a warning that lists
        them; shapes must fit. Dtypes are cast to the model's own, silently, as torch does.
        """
        config, tensors = read_nemo(path, map_location)
        model = cls(config if override_config is None else override_config).to(map_location)
        state = OrderedDict(tensors)
        # Without the modules' versions, BatchNorm fills in a missing counter without a word.
        state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
        try:
            result = model.load_state_dict(state, strict=strict)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: the weights do not fit the model: {brief_mismatch(str(error))}",
                hint="the weights or the config are another model's: compare the keys, listed by "
                f"harness show {path}",
            ) from error
        if result.missing_keys or result.unexpected_keys:
            warnings.warn(
                f"{path}: loaded with strict=False: missing keys, left random: "
                f"{_listed(result.missing_keys)}; unexpected keys, ignored: "
                f"{_listed(result.unexpected_keys)}",
                stacklevel=2,
            )
        return model

    def save_to(self, path: str | Path) -> None:
        """Write a `.nemo` file that NeMo restores, too; atomic, same bytes for the same model."""
        write_nemo(path, complete(self.cfg), self.state_dict())

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a Lightning `.ckpt`, this model's or NeMo's; keyword arguments are Lightning's.

        Raises as Lightning does. Reads with `weights_only=True`; besides tensors only omegaconf's
        inert containers are allowed, in which NeMo keeps its config.
        """
        kwargs.setdefault("weights_only", True)
        with torch.serialization.safe_globals(_CONFIG_CLASSES):
            model: Self = super().load_from_checkpoint(checkpoint_path, **kwargs)
        return model

    # computation

    def forward(
        self,
        *,
        input_signal: Tensor | None = None,
        input_signal_length: Tensor | None = None,
        processed_signal: Tensor | None = None,
        processed_signal_length: Tensor | None = None,
        noise_signal: Tensor | None = None,
        noise_signal_length: Tensor | None = None,
        processed_noise_signal: Tensor | None = None,
        processed_noise_signal_length: Tensor | None = None,
        noisy_input_signal: Tensor | None = None,
        noisy_input_signal_length: Tensor | None = None,
        processed_noisy_input_signal: Tensor | None = None,
        processed_noisy_input_signal_length: Tensor | None = None,
        apply_mask: bool = False,
    ) -> Outputs:
        """Predict the clean signal's tokens from the noisy one.

        Each of the two comes as waveforms `(B, S)` with sample counts `(B,)` or as features `(B,
        M, T)` with frame counts `(B,)`; exactly one of both, else ValueError. Noise alone is
        accepted and not used. Both need the same T. Returns log_probs `(B, T', V, H)`,
        encoded_length `(B,)` int64, masks `(B, M, T)` (1.0 masked; zeros without `apply_mask`),
        tokens `(B, T', H)` int64. Frames from `encoded_length` on mean nothing. Masks are random
        in eval mode, too.
        """
        clean, _ = self._features(
            "input_signal",
            (input_signal, input_signal_length),
            (processed_signal, processed_signal_length),
        )
        noisy, frames = self._features(
            "noisy_input_signal",
            (noisy_input_signal, noisy_input_signal_length),
            (processed_noisy_input_signal, processed_noisy_input_signal_length),
        )
        _, tokens = self.quantizer(clean)
        if apply_mask:
            noisy, masks = self.mask_processor(noisy, frames)
        else:
            masks = torch.zeros_like(noisy)
        encoded, encoded_length = self.encoder(noisy, frames)
        return Outputs(self.decoder(encoded), encoded_length, masks, tokens)

    def _features(
        self,
        name: str,
        raw: tuple[Tensor | None, Tensor | None],
        processed: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        given = [pair for pair in (raw, processed) if any(part is not None for part in pair)]
        signal, lengths = given[0] if len(given) == 1 else (None, None)
        if signal is None or lengths is None:
            other = "processed_signal" if name == "input_signal" else f"processed_{name}"
            raise ValueError(
                f"forward: give exactly one of {name} and {other}, each with its _length"
            )
        if given[0] is processed:
            return signal, lengths
        features: tuple[Tensor, Tensor] = self.preprocessor(signal, lengths)
        return features

    def golden_inputs(self) -> dict[str, Any]:
        """Make fixed keyword arguments for `forward`: two synthetic items of about 1.6 s.

        Whole numbers scaled by a power of two, so the same bits on every machine, and never silent:
        silence would be normalised to rounding noise. Of the clean signal no token is of padding
        alone, which NeMo leaves to rounding; the noisy one's second item is shorter, so that masks
        count. No global random state is read or changed.
        """
        config = self.config.preprocessor
        rate, hop, padded_to = config.sample_rate, config.hop_length, max(1, int(config.pad_to))
        # The spectrogram has one frame more, which is not valid: so many fill it to the end.
        numel = (-(-8 * rate // (5 * hop * padded_to)) * padded_to - 1) * hop
        num_samples = torch.tensor([numel, numel])
        num_noisy = torch.tensor([numel, numel * 5 // 8])
        draw = np.random.RandomState(0)
        time = np.arange(numel, dtype=np.int64)
        tones = np.stack([(time * pitch) % rate * 8192 // rate - 4096 for pitch in (110, 197)])
        loudness = np.abs((time * 3) % (2 * rate) - rate) * 3 // (4 * rate // 5) + 1
        clean = tones * loudness // 4 + draw.randint(-256, 256, size=tones.shape)
        noisy = clean + draw.randint(-2048, 2048, size=tones.shape)
        noisy = np.where(time < num_noisy.numpy()[:, None], noisy, 0)
        signals = [
            torch.from_numpy(signal.astype(np.float32) / np.float32(32768.0))
            for signal in (clean, noisy)
        ]
        return {
            "input_signal": signals[0].to(self.device),
            "input_signal_length": num_samples.to(self.device),
            "noisy_input_signal": signals[1].to(self.device),
            "noisy_input_signal_length": num_noisy.to(self.device),
            "apply_mask": False,
        }

    # training

    def _loss_of(self, batch: AudioBatch) -> tuple[Tensor, bool]:
        """Return the loss of a batch and whether any of its frames counts; without one it is 0."""
        outputs = self(
            input_signal=batch.audio,
            input_signal_length=batch.audio_len,
            noisy_input_signal=batch.noisy_audio,
            noisy_input_signal_length=batch.noisy_audio_len,
            apply_mask=True,
        )
        if not bool(self.loss.counted(outputs.masks).any()):
            # still connected, so that every rank and every parameter gets its gradient
            return outputs.log_probs.sum() * 0.0, False
        return self.loss(outputs.masks, outputs.tokens, outputs.log_probs), True

    def training_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return `loss` of one batch; logs learning_rate, global_step and train_loss."""
        loss, _ = self._loss_of(batch)
        values = {
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "global_step": float(self.trainer.global_step),
            "train_loss": loss.detach(),
        }
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=len(batch.audio))
        return {"loss": loss}

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return `val_loss` of one batch, with masks drawn anew."""
        return self._evaluation_step("val_loss", batch)

    def test_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return `test_loss` of one batch, with masks drawn anew."""
        return self._evaluation_step("test_loss", batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`, the unweighted mean over the batches."""
        self._log_epoch("val_loss")

    def on_test_epoch_end(self) -> None:
        """Log `test_loss`, the unweighted mean over the batches."""
        self._log_epoch("test_loss")

    def _evaluation_step(self, name: str, batch: AudioBatch) -> dict[str, Tensor]:
        loss, counted = self._loss_of(batch)
        if counted:
            self._epoch_losses[name].append(loss.detach())
        return {name: loss}

    def _log_epoch(self, name: str) -> None:
        losses = self._epoch_losses[name]
        mean = torch.stack(losses).mean() if losses else torch.tensor(float("nan"))
        losses.clear()
        self.log(name, mean.to(self.device), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW over ALL parameters in one group, as NeMo: the frozen ones hold their index."""
        config = OptimConfig.read(self.cfg)
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        if not config.noam:
            return optimizer
        max_steps = int(self.trainer.estimated_stepping_batches) if config.warmup_ratio else -1
        scheduler = NoamAnnealing(optimizer, config, max_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]


def _listed(keys: list[str]) -> str:
    return ", ".join(keys) if keys else "none"
