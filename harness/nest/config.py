"""The model's config: what NeMo's `model_config.yaml` means to the local NEST FastConformer.

In: the `model:` level of a config, resolved (`resolve`), or a YAML file (`load_config`). Out:
frozen dataclasses with NeMo's own defaults (`ModelConfig`, and `optim.OptimConfig`), so that an
absent key means here what it means there; `complete` adds what NeMo needs to read a config back.
Refused, with a `ModelError` naming section, key, value and what is implemented: every value that
would build another tree or compute other numbers than this package does, and unknown keys in
`preprocessor`, `encoder`, `masking`, `quantizer`, `decoder` and `loss`. Unknown keys elsewhere
(`train_ds`, `optim`, the top level) are kept and ignored.

Source of keys, defaults and effects: NVIDIA NeMo 3.0.0, EncDecDenoiseMaskedTokenPredModel.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from harness.nest.schema import (
    NEMO_MODULES,
    Fixed,
    Section,
    invalid,
    is_whole,
    refuse,
)

MODEL_CLASS = "EncDecDenoiseMaskedTokenPredModel"
NEMO_TARGET = f"nemo.collections.asr.models.ssl_models.{MODEL_CLASS}"
NEMO_VERSION = "3.0.0"
"""The NeMo release that this package follows; written where a config names none."""

INIT_MODES = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", None)
_SPEC_AUGMENT = {
    "_target_": f"{NEMO_MODULES}SpectrogramAugmentation",
    "freq_masks": 0,
    "time_masks": 0,
    "freq_width": 27,
    "time_width": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class PreprocessorConfig(Section):
    """Waveform to normalised log-mel; times in seconds, frequencies in Hz."""

    name: ClassVar[str] = "preprocessor"
    nemo_class: ClassVar[str] = "AudioToMelSpectrogramPreprocessor"
    fixed: ClassVar[Fixed] = {
        "normalize": ("per_feature", ("per_feature",)),
        "exact_pad": (False, (False,)),
        "frame_splicing": (1, (1,)),
        "nb_augmentation_prob": (0.0, (0.0, 0)),
        # an older NeMo took another extractor with other numbers on this word
        "use_torchaudio": (False, (False,)),
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"rng", "nb_max_freq", "stft_conv", "stft_exact_pad"}
    )

    sample_rate: int = 16000
    window_size: float | None = 0.02
    window_stride: float | None = 0.01
    n_window_size: int | None = None
    n_window_stride: int | None = None
    n_fft: int | None = None
    window: str | None = "hann"
    features: int = 64
    lowfreq: float = 0.0
    highfreq: float | None = None
    mel_norm: str | None = "slaney"
    preemph: float | None = 0.97
    mag_power: float = 2.0
    log: bool = True
    log_zero_guard_type: str = "add"
    log_zero_guard_value: float | str = 2.0**-24
    pad_to: int | str = 16
    pad_value: float = 0.0
    dither: float = 1e-5

    def __post_init__(self) -> None:
        self._check_one_of("window", "hann", "hamming", "blackman", "bartlett")
        self._check_one_of("mel_norm", "slaney", None)
        self._check_one_of("log_zero_guard_type", "add", "clamp")
        if isinstance(self.log_zero_guard_value, str):
            self._check_one_of("log_zero_guard_value", "tiny", "eps")
        if isinstance(self.pad_to, str):
            refuse("preprocessor.pad_to", self.pad_to, "a whole number of frames, 0 for none")
        self._check("pad_to", self.pad_to >= 0, "a whole number >= 0")
        self._check_positive("sample_rate", "features")
        for size, samples in (
            ("window_size", "n_window_size"),
            ("window_stride", "n_window_stride"),
        ):
            both = (getattr(self, size), getattr(self, samples))
            if (both[0] is None) == (both[1] is None):
                invalid(f"preprocessor.{size}, {samples}", both, "one of the two, the other null")
        self._check("window_size", self.win_length > 0, "at least one sample")
        self._check("window_stride", self.hop_length > 0, "at least one sample")
        self._check("n_fft", self.fft_length >= self.win_length, f">= window, {self.win_length}")

    @property
    def win_length(self) -> int:
        """Samples in the window; a product of floats, truncated, as NeMo does."""
        if self.window_size is None:
            return self.n_window_size or 0
        return int(self.window_size * self.sample_rate)

    @property
    def hop_length(self) -> int:
        """Samples between frames; truncated too."""
        if self.window_stride is None:
            return self.n_window_stride or 0
        return int(self.window_stride * self.sample_rate)

    @property
    def fft_length(self) -> int:
        """Samples in the transform: `n_fft`, or the smallest power of 2 that holds the window."""
        return self.n_fft or 1 << (self.win_length - 1).bit_length()

    @property
    def pad_multiple(self) -> int:
        """Frames are padded to a multiple of this; 0 for no padding."""
        return int(self.pad_to)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Section):
    """FastConformer: widths, depth, attention span, convolution and dropouts."""

    name: ClassVar[str] = "encoder"
    nemo_class: ClassVar[str] = "ConformerEncoder"
    fixed: ClassVar[Fixed] = {
        "subsampling": ("striding", ("dw_striding",)),
        "causal_downsampling": (False, (False,)),
        "self_attention_model": ("rel_pos", ("rel_pos",)),
        "att_context_style": ("regular", ("regular",)),
        "att_context_probs": (None, (None,)),
        "att_chunk_context_size": (None, (None,)),
        "conv_context_style": ("regular", ("regular",)),
        "reduction": (None, (None,)),
        "global_tokens": (0, (0,)),
        "global_attn_separate": (False, (False,)),
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "subsampling_conv_chunking_factor",
            "pos_emb_max_len",
            "use_pytorch_sdpa",
            "use_pytorch_sdpa_backends",
            "sync_max_audio_length",
            "reduction_position",
            "reduction_factor",
            "global_tokens_spacing",
        }
    )

    feat_in: int
    n_layers: int
    d_model: int
    feat_out: int = -1
    n_heads: int = 4
    subsampling_factor: int = 4
    subsampling_conv_channels: int = -1
    ff_expansion_factor: int = 4
    att_context_size: Any = None
    xscaling: bool = True
    untie_biases: bool = True
    conv_kernel_size: int = 31
    conv_norm_type: str = "batch_norm"
    conv_context_size: Any = None
    use_bias: bool = True
    dropout: float = 0.1
    dropout_pre_encoder: float = 0.1
    dropout_emb: float = 0.1
    dropout_att: float = 0.0
    stochastic_depth_drop_prob: float = 0.0
    stochastic_depth_mode: str = "linear"
    stochastic_depth_start_layer: int = 1

    def __post_init__(self) -> None:
        self._check_positive("feat_in", "n_layers", "d_model", "n_heads", "ff_expansion_factor")
        self._check("subsampling_conv_channels", self.num_channels > 0, "-1 or a number > 0")
        even_split = self.d_model % self.n_heads == 0 and self.d_model % 2 == 0
        self._check("d_model", even_split, f"even and a multiple of n_heads, {self.n_heads}")
        factor = self.subsampling_factor
        self._check("subsampling_factor", factor >= 2 and factor.bit_count() == 1, "a power of 2")
        self._check("conv_kernel_size", self.conv_kernel_size % 2 == 1, "an odd number")
        if (groups := self.num_norm_groups) is None:
            self._check_one_of("conv_norm_type", "batch_norm", "layer_norm", "group_normG")
        elif groups < 1 or self.d_model % groups:
            invalid("encoder.conv_norm_type", self.conv_norm_type, "groups that divide d_model")
        self._check_probability(
            "dropout",
            "dropout_pre_encoder",
            "dropout_emb",
            "dropout_att",
            "stochastic_depth_drop_prob",
        )
        self._check_one_of("stochastic_depth_mode", "linear", "uniform")
        self._check_positive("stochastic_depth_start_layer")
        _ = self.att_contexts, self.conv_padding

    @property
    def num_channels(self) -> int:
        """Channels of the subsampling convolutions."""
        channels = self.subsampling_conv_channels
        return self.d_model if channels == -1 else channels

    @property
    def num_stages(self) -> int:
        """Strided convolutions; each halves time and frequency."""
        return self.subsampling_factor.bit_length() - 1

    @property
    def num_norm_groups(self) -> int | None:
        """G of the convolution's norm where that is `group_normG`, else None."""
        match = re.fullmatch(r"group_norm(\d+)", self.conv_norm_type)
        return int(match[1]) if match else None

    @property
    def width_out(self) -> int:
        """Width of the encoder's output: `feat_out` where it is given, else `d_model`."""
        return self.feat_out if self.feat_out > 0 else self.d_model

    @property
    def att_contexts(self) -> tuple[tuple[int, int], ...]:
        """Frames (left, right) that attention sees, -1 for all; several are drawn in training."""
        given = self.att_context_size
        if given is None:
            return ((-1, -1),)
        nested = given if given and isinstance(given[0], list) else [given]
        for pair in nested:
            if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_whole, pair))):
                invalid("encoder.att_context_size", given, "[left, right] or a list of pairs")
        return tuple((int(left), int(right)) for left, right in nested)

    @property
    def conv_padding(self) -> tuple[int, int]:
        """Zeros (left, right) of the depthwise convolution in time."""
        given, kernel = self.conv_context_size, self.conv_kernel_size
        if given is None:
            return (kernel - 1) // 2, (kernel - 1) // 2
        if given == "causal":
            return kernel - 1, 0
        pair = given if isinstance(given, list) and all(map(is_whole, given)) else []
        if len(pair) != 2 or min(pair) < 0 or sum(pair) + 1 != kernel:
            expected = f"null, 'causal' or [left, right] with left + right + 1 = {kernel}"
            invalid("encoder.conv_context_size", given, expected)
        return pair[0], pair[1]


@dataclass(frozen=True, kw_only=True)
class MaskingConfig(Section):
    """Random block masking of mel frames."""

    name: ClassVar[str] = "masking"
    nemo_class: ClassVar[str] = "RandomBlockMasking"
    # an older NeMo stopped at this ratio; the masking implemented here has no such limit
    ignored: ClassVar[frozenset[str]] = frozenset({"max_mask_ratio"})

    feat_in: int
    block_size: int = 48
    mask_prob: float = 0.5
    mask_value: float | None = None
    freeze: bool = True
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        self._check_positive("feat_in", "block_size")
        self._check("mask_prob", 0.0 <= self.mask_prob <= 1.0, "a probability")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig(Section):
    """Random-projection vector quantizer, the source of the training targets."""

    name: ClassVar[str] = "quantizer"
    nemo_class: ClassVar[str] = "RandomProjectionVectorQuantizer"
    fixed: ClassVar[Fixed] = {
        # NeMo's own 'cosine' fails on float32 against float64
        "dist_fn": ("cosine", ("l2",)),
        "time_ahead": (False, (False,)),
    }

    feat_in: int
    code_dim: int
    num_classes: int
    num_books: int
    combine_time_steps: int = 1
    freeze: bool = True
    squeeze_single: bool = False

    def __post_init__(self) -> None:
        self._check_positive(
            "feat_in", "code_dim", "num_classes", "num_books", "combine_time_steps"
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Section):
    """One softmax per codebook on the encoder's output."""

    name: ClassVar[str] = "decoder"
    nemo_class: ClassVar[str] = "MultiSoftmaxDecoder"

    feat_in: int
    num_classes: int
    num_decoders: int = 1
    init_mode: str | None = "xavier_uniform"
    use_bias: bool = False
    squeeze_single: bool = False

    def __post_init__(self) -> None:
        self._check_positive("feat_in", "num_classes", "num_decoders")
        self._check_one_of("init_mode", *INIT_MODES)


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Mean negative log-likelihood over the frames that are masked enough."""

    name: ClassVar[str] = "loss"
    nemo_class: ClassVar[str] = "MultiMLMLoss"
    nemo_package: ClassVar[str] = "nemo.collections.asr.losses."

    combine_time_steps: int = 1
    mask_threshold: float = 0.8
    num_decoders: int = 1
    squeeze_single: bool = False

    def __post_init__(self) -> None:
        self._check_positive("combine_time_steps", "num_decoders")


_SECTIONS: tuple[type[Section], ...] = (
    PreprocessorConfig,
    MaskingConfig,
    QuantizerConfig,
    EncoderConfig,
    DecoderConfig,
    LossConfig,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All sections, checked one by one and against each other."""

    preprocessor: PreprocessorConfig
    encoder: EncoderConfig
    masking: MaskingConfig
    quantizer: QuantizerConfig
    decoder: DecoderConfig
    loss: LossConfig

    @classmethod
    def read(cls, model: Mapping[str, Any]) -> Self:
        """Read a resolved model config; `ModelError` names what is not implemented."""
        target = model.get("target")
        if target is not None and str(target).rpartition(".")[2] != MODEL_CLASS:
            refuse("target", target, NEMO_TARGET)
        if (position := model.get("mask_position", "pre_conv")) != "pre_conv":
            refuse("mask_position", position, "'pre_conv'")
        if "loss_list" in model:
            # the parent class's several losses, with which NeMo cannot build this model either
            refuse("loss_list", model["loss_list"], "no such key")
        return cls(
            preprocessor=PreprocessorConfig.read(model),
            encoder=EncoderConfig.read(model),
            masking=MaskingConfig.read(model),
            quantizer=QuantizerConfig.read(model),
            decoder=DecoderConfig.read(model),
            loss=LossConfig.read(model),
        )

    def __post_init__(self) -> None:
        encoder, quantizer, decoder, loss = self.encoder, self.quantizer, self.decoder, self.loss
        bands = ("preprocessor.features", self.preprocessor.features)
        factor = ("encoder.subsampling_factor", encoder.subsampling_factor)
        books = ("quantizer.num_books", quantizer.num_books)
        squeeze = ("quantizer.squeeze_single", quantizer.squeeze_single)
        pairs = [
            ("encoder.feat_in", encoder.feat_in, bands),
            ("masking.feat_in", self.masking.feat_in, bands),
            ("quantizer.feat_in", quantizer.feat_in, bands),
            ("quantizer.combine_time_steps", quantizer.combine_time_steps, factor),
            ("loss.combine_time_steps", loss.combine_time_steps, factor),
            ("decoder.feat_in", decoder.feat_in, ("encoder's output width", encoder.width_out)),
            ("decoder.num_decoders", decoder.num_decoders, books),
            ("loss.num_decoders", loss.num_decoders, books),
        ]
        if quantizer.num_books == 1:
            # with several books squeezing does nothing, and NeMo lets the three differ
            pairs.append(("decoder.squeeze_single", decoder.squeeze_single, squeeze))
            pairs.append(("loss.squeeze_single", loss.squeeze_single, squeeze))
        for where, value, (source, expected) in pairs:
            if value != expected:
                invalid(where, value, f"{source} = {expected}")
        if decoder.num_classes < quantizer.num_classes:
            minimum = f"at least quantizer.num_classes = {quantizer.num_classes}"
            invalid("decoder.num_classes", decoder.num_classes, minimum)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a plain model config and append what NeMo needs to restore it; present keys stay.

    NeMo instantiates each section by `_target_`, wants `spec_augment`, reads `num_books` and
    `squeeze_single` at the top level when it checks its outputs, and picks the class by `target`.
    """
    full: dict[str, Any] = copy.deepcopy(dict(config))
    for section in _SECTIONS:
        values = full[section.name]
        if values.get("_target_") is None:
            values.pop("_target_", None)
            target = section.nemo_package + section.nemo_class
            full[section.name] = {"_target_": target, **values}
    quantizer = full["quantizer"]
    if full.get("spec_augment") is None:
        full["spec_augment"] = dict(_SPEC_AUGMENT)
    full.setdefault("num_books", quantizer["num_books"])
    full.setdefault("squeeze_single", quantizer.get("squeeze_single", False))
    if not str(full.get("target", "")).startswith("nemo."):
        full["target"] = NEMO_TARGET
    full.setdefault("nemo_version", NEMO_VERSION)
    return full
