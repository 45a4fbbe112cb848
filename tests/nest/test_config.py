"""Every config is built as NeMo builds it or refused by name; nothing is ignored in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from harness.errors import ModelError
from harness.model.config import load_config, parse, resolve
from harness.nest.config import (
    NEMO_TARGET,
    EncoderConfig,
    ModelConfig,
    PreprocessorConfig,
    complete,
)

REFUSED: list[tuple[str, Any]] = [
    ("preprocessor.window", "kaiser"),
    ("preprocessor.window", None),
    ("preprocessor.normalize", "all_features"),
    ("preprocessor.exact_pad", True),
    ("preprocessor.frame_splicing", 2),
    ("preprocessor.nb_augmentation_prob", 0.5),
    ("preprocessor.use_torchaudio", True),
    ("preprocessor.pad_to", "max"),
    ("preprocessor.pad_to", -1),
    ("preprocessor.n_window_size", 400),
    ("preprocessor.n_window_stride", 160),
    ("preprocessor.n_fft", 256),
    ("preprocessor.log_zero_guard_type", "max"),
    ("preprocessor.log_zero_guard_value", "small"),
    ("preprocessor.mel_norm", "htk"),
    ("preprocessor.features", "80"),
    ("preprocessor.log", 1),
    ("preprocessor.dither", True),
    ("encoder.subsampling", "striding"),
    ("encoder.subsampling", "vggnet"),
    ("encoder.causal_downsampling", True),
    ("encoder.self_attention_model", "abs_pos"),
    ("encoder.self_attention_model", "rel_pos_local_attn"),
    ("encoder.att_context_style", "chunked_limited"),
    ("encoder.att_context_probs", [0.5, 0.5]),
    ("encoder.att_chunk_context_size", [70, 13]),
    ("encoder.conv_context_style", "dcc"),
    ("encoder.reduction", "pooling"),
    ("encoder.global_tokens", 1),
    ("encoder.global_attn_separate", True),
    ("encoder.conv_norm_type", "instance_norm"),
    ("encoder.conv_norm_type", "fused_batch_norm"),
    ("encoder.conv_norm_type", "group_norm7"),
    ("encoder.conv_norm_type", "group_norm0"),
    ("encoder.conv_context_size", [4, 3]),
    ("encoder.conv_context_size", "symmetric"),
    ("encoder.conv_kernel_size", 8),
    ("encoder.att_context_size", [4]),
    ("encoder.att_context_size", [[4, 2], 3]),
    ("encoder.att_context_size", "full"),
    ("encoder.n_heads", 7),
    ("encoder.subsampling_factor", 6),
    ("encoder.dropout", 1.5),
    ("encoder.stochastic_depth_mode", "cosine"),
    ("encoder.stochastic_depth_start_layer", 0),
    ("encoder.n_layers", 0),
    ("encoder.subsampling_conv_channels", 0),
    ("masking.mask_prob", 1.5),
    ("masking.feat_in", 64),
    ("quantizer.dist_fn", "cosine"),
    ("quantizer.time_ahead", True),
    ("quantizer.combine_time_steps", 4),
    ("quantizer.feat_in", 64),
    ("quantizer.num_classes", 129),
    ("decoder.init_mode", "orthogonal"),
    ("decoder.num_decoders", 2),
    ("decoder.feat_in", 48),
    ("decoder.squeeze_single", True),
    ("loss.num_decoders", 2),
    ("loss.combine_time_steps", 1),
    ("loss.squeeze_single", True),
    ("encoder._target_", "nemo.collections.asr.modules.ConvASREncoder"),
    ("loss._target_", "nemo.collections.asr.losses.CTCLoss"),
]
SECTIONS = ("preprocessor", "encoder", "masking", "quantizer", "decoder", "loss")


@pytest.mark.parametrize(("where", "value"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(
    nemo_config: dict[str, Any], where: str, value: Any
) -> None:
    section, key = where.split(".")
    nemo_config[section][key] = value
    with pytest.raises(ModelError) as caught:
        ModelConfig.read(nemo_config)
    message = str(caught.value)
    assert section in message
    assert key in message
    assert repr(value) in message
    assert caught.value.hint


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_keys_of_a_section_are_refused(nemo_config: dict[str, Any], section: str) -> None:
    nemo_config[section]["frobnicate"] = 1
    with pytest.raises(ModelError, match=f"unknown keys in {section}: frobnicate"):
        ModelConfig.read(nemo_config)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_refused(nemo_config: dict[str, Any], section: str) -> None:
    del nemo_config[section]
    with pytest.raises(ModelError, match=f"{section} = None is not valid"):
        ModelConfig.read(nemo_config)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("mask_position", "post_conv", "mask_position = 'post_conv'"),
        ("loss_list", None, "loss_list"),
        ("target", "nemo.collections.asr.models.EncDecCTCModel", "EncDecCTCModel"),
    ],
)
def test_another_model_is_refused(
    nemo_config: dict[str, Any], key: str, value: Any, match: str
) -> None:
    nemo_config[key] = value
    with pytest.raises(ModelError, match=match):
        ModelConfig.read(nemo_config)


@pytest.mark.parametrize(
    ("section", "key", "meaning"),
    [("encoder", "subsampling", "'striding'"), ("quantizer", "dist_fn", "'cosine'")],
)
def test_an_absent_key_means_nemo_s_default_even_where_that_is_refused(
    nemo_config: dict[str, Any], section: str, key: str, meaning: str
) -> None:
    del nemo_config[section][key]
    with pytest.raises(ModelError, match=f"{section}.{key} is absent, which means {meaning}"):
        ModelConfig.read(nemo_config)


def test_a_required_key_is_asked_for(nemo_config: dict[str, Any]) -> None:
    del nemo_config["encoder"]["d_model"]
    with pytest.raises(ModelError, match=r"encoder\.d_model is required"):
        ModelConfig.read(nemo_config)


def test_defaults_are_nemo_s() -> None:
    encoder = EncoderConfig.read(
        {"encoder": {"feat_in": 80, "n_layers": 2, "d_model": 64, "subsampling": "dw_striding"}}
    )
    assert (encoder.subsampling_factor, encoder.conv_kernel_size, encoder.n_heads) == (4, 31, 4)
    assert (encoder.xscaling, encoder.untie_biases, encoder.use_bias) == (True, True, True)
    assert encoder.att_contexts == ((-1, -1),)
    assert encoder.num_channels == 64
    assert encoder.conv_padding == (15, 15)
    mel = PreprocessorConfig.read({"preprocessor": {}})
    assert (mel.win_length, mel.hop_length, mel.fft_length, mel.features) == (320, 160, 512, 64)
    assert (mel.preemph, mel.log_zero_guard_value, mel.pad_multiple) == (0.97, 2**-24, 16)


def test_window_lengths_are_truncated_not_rounded() -> None:
    mel = PreprocessorConfig.read({"preprocessor": {"window_size": 0.0249999, "n_fft": None}})
    assert mel.win_length == 399
    assert mel.fft_length == 512


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ((-1, -1),)),
        ([4, 2], ((4, 2),)),
        ([[70, 13], [70, 0]], ((70, 13), (70, 0))),
    ],
)
def test_attention_contexts_come_as_one_pair_or_several(
    nemo_config: dict[str, Any], given: Any, expected: Any
) -> None:
    nemo_config["encoder"]["att_context_size"] = given
    assert ModelConfig.read(nemo_config).encoder.att_contexts == expected


@pytest.mark.parametrize(
    ("given", "expected"), [(None, (4, 4)), ("causal", (8, 0)), ([6, 2], (6, 2))]
)
def test_convolution_contexts(nemo_config: dict[str, Any], given: Any, expected: Any) -> None:
    nemo_config["encoder"]["conv_context_size"] = given
    assert ModelConfig.read(nemo_config).encoder.conv_padding == expected


def test_keys_without_effect_are_accepted(nemo_config: dict[str, Any]) -> None:
    nemo_config["preprocessor"] |= {"rng": None, "stft_conv": False, "use_torchaudio": False}
    nemo_config["encoder"] |= {"use_pytorch_sdpa": True, "subsampling_conv_chunking_factor": 2}
    nemo_config["masking"]["max_mask_ratio"] = 0.8
    nemo_config["something_of_the_parent_class"] = {"feature_penalty": 1.0}
    nemo_config["train_ds"] = None
    del nemo_config["validation_ds"]
    ModelConfig.read(nemo_config)


def test_load_config_returns_the_resolved_model_section(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("size: 1e-5\nmodel:\n  a: ${size}\n  b: ${model.a}\n", encoding="utf-8")
    assert load_config(path) == {"a": 1e-5, "b": 1e-5}
    path.write_text("a: 3\nb: ${a}\n", encoding="utf-8")
    assert load_config(path) == {"a": 3, "b": 3}


@pytest.mark.parametrize("text", ["a: ${nowhere}", "a: [1", "- 1\n- 2", "model: 3", "a: 1\na: 2"])
def test_load_config_refuses_what_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError):
        load_config(path)


def test_load_config_says_which_file_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_resolve_keeps_order_and_follows_parents() -> None:
    root = OmegaConf.create({"n": 4, "model": {"z": "${n}", "a": [1, "${n}"]}})
    plain = resolve(root.model)
    assert plain == {"z": 4, "a": [1, 4]}
    assert list(plain) == ["z", "a"]
    assert type(plain["a"]) is list


def test_complete_adds_what_nemo_needs_and_keeps_the_rest(nemo_config: dict[str, Any]) -> None:
    assert complete(nemo_config) == nemo_config
    assert list(complete(nemo_config)) == list(nemo_config)
    bare = copy.deepcopy({key: nemo_config[key] for key in SECTIONS})
    for section in SECTIONS:
        del bare[section]["_target_"]
    full = complete(bare)
    for section in (*SECTIONS, "spec_augment"):
        assert full[section]["_target_"] == nemo_config[section]["_target_"]
        assert next(iter(full[section])) == "_target_"
    assert (full["num_books"], full["squeeze_single"]) == (1, False)
    assert full["target"] == NEMO_TARGET
    assert full["nemo_version"] == "3.0.0"
    assert "_target_" not in bare["encoder"]


def test_a_local_target_is_written_as_nemo_s(nemo_config: dict[str, Any]) -> None:
    nemo_config["target"] = "harness.nest.EncDecDenoiseMaskedTokenPredModel"
    ModelConfig.read(nemo_config)
    assert complete(nemo_config)["target"] == NEMO_TARGET


def test_numbers_in_yaml_are_numbers() -> None:
    assert parse("a: 1e-5\nb: True\nc: 1.0e-05", "text") == {"a": 1e-5, "b": True, "c": 1e-5}
