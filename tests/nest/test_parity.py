"""The local model computes NeMo's own numbers from NeMo's weights, and draws its weights alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.model.config import load_config
from harness.nest import RECIPE
from harness.nest.encoder import ConformerEncoder
from harness.nest.model import EncDecDenoiseMaskedTokenPredModel, MultiSoftmaxDecoder

# Correct float32 code differs by the order of operations only; measured on one machine: 0 with as
# many threads as the reference, 2.6e-6 at most with another number. A weight that is wrong by 1e-3
# gives 6e-3 and more.
LIMITS = {"mel": 2e-5, "pre_encode": 1e-5, "encoder": 2e-5, "log_probs": 2e-5, "loss": 1e-5}


@contextmanager
def captured(model: EncDecDenoiseMaskedTokenPredModel) -> Iterator[dict[str, Any]]:
    """Keep what every module returns, by name."""
    outputs: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
        for name, module in model.named_modules()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float((actual.double() - expected.double()).abs().max())


@torch.no_grad()
def parity(
    model: EncDecDenoiseMaskedTokenPredModel, reference: dict[str, Tensor]
) -> list[tuple[str, float, float]]:
    """Greatest absolute difference and limit of every reference tensor, in order of execution."""
    signals = {
        key: reference[key]
        for key in (
            "input_signal",
            "input_signal_length",
            "noisy_input_signal",
            "noisy_input_signal_length",
        )
    }
    rows: list[tuple[str, float, float]] = []

    def compare(name: str, actual: Tensor, limit: float) -> None:
        rows.append((name, difference(actual, reference[name]), limit))

    mel, frames = model.preprocessor(signals["input_signal"], signals["input_signal_length"])
    compare("mel", mel, LIMITS["mel"])
    compare("mel_length", frames, 0)
    noisy = model.preprocessor(signals["noisy_input_signal"], signals["noisy_input_signal_length"])
    compare("noisy_mel", noisy[0], LIMITS["mel"])
    compare("noisy_mel_length", noisy[1], 0)
    # the reference's intermediates are the encoder's on the clean features
    with captured(model) as outputs:
        encoded, lengths = model.encoder(mel, frames)
        log_probs = model.decoder(encoded)
        vectors, tokens = model.quantizer(mel)
    for name in (key for key in reference if key.startswith("inter.")):
        path = name.removeprefix("inter.")
        part = 1 if path.endswith((".lengths", ".pos_emb")) else 0
        output = outputs[path.removesuffix(".lengths").removesuffix(".pos_emb")]
        if isinstance(output, tuple):
            output = output[part]
        kind = "pre_encode" if "pre_encode" in name else "encoder"
        compare(name, output, 0 if output.dtype == torch.int64 else LIMITS[kind])
    compare("encoded", encoded, LIMITS["encoder"])
    compare("encoded_length", lengths, 0)
    compare("log_probs", log_probs, LIMITS["log_probs"])
    # tokens of padded frames are decided by rounding
    inside = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
    rows.append(("tokens", difference(tokens[inside], reference["tokens"][inside]), 0))
    by_frame = vectors.permute(0, 2, 3, 1)[inside]
    expected = reference["quantized"].permute(0, 2, 3, 1)[inside]
    rows.append(("quantized", difference(by_frame, expected), 0))

    torch.manual_seed(77)
    masked, masks = model.mask_processor(*noisy)
    compare("masked_mel_seed77", masked, LIMITS["mel"])
    compare("masks_seed77", masks, 0)
    torch.manual_seed(77)
    outputs_masked = model(**signals, apply_mask=True)
    compare("log_probs_masked_seed77", outputs_masked.log_probs, LIMITS["log_probs"])
    loss = model.loss(outputs_masked.masks, outputs_masked.tokens, outputs_masked.log_probs)
    compare("loss_masked_seed77", loss, LIMITS["loss"])

    length = signals["input_signal_length"][1:]
    alone = model.preprocessor(signals["input_signal"][1:, : int(length)], length)
    compare("mel_single1", alone[0], LIMITS["mel"])
    compare("mel_length_single1", alone[1], 0)
    encoded_alone = model.encoder(*alone)
    compare("encoded_single1", encoded_alone[0], LIMITS["encoder"])
    compare("encoded_length_single1", encoded_alone[1], 0)
    return rows


@pytest.mark.parametrize("threads", [2, 1])
def test_every_tensor_of_nemo_is_reproduced(
    model: EncDecDenoiseMaskedTokenPredModel, reference: dict[str, Tensor], threads: int
) -> None:
    torch.set_num_threads(threads)  # NeMo had two
    rows = parity(model, reference)
    # shown with `pytest -s`, and when the test fails
    for name, found, limit in rows:
        print(f"{name:45} {found:9.3g}  limit {limit:g}")  # noqa: T201 - the parity table
    compared = {name for name, _, _ in rows}
    assert compared | {
        "input_signal",
        "input_signal_length",
        "noisy_input_signal",
        "noisy_input_signal_length",
    } == set(reference)
    assert [row for row in rows if not row[1] <= row[2]] == []


def test_forward_returns_the_four_outputs(
    model: EncDecDenoiseMaskedTokenPredModel, reference: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        log_probs, encoded_length, masks, tokens = model(
            input_signal=reference["input_signal"],
            input_signal_length=reference["input_signal_length"],
            noisy_input_signal=reference["input_signal"],
            noisy_input_signal_length=reference["input_signal_length"],
        )
    # the reference's log_probs are those of the clean signal, so it is given as the noisy one
    assert difference(log_probs, reference["log_probs"]) <= LIMITS["log_probs"]
    assert torch.equal(encoded_length, reference["encoded_length"])
    assert torch.equal(masks, torch.zeros(2, 80, 208))
    assert torch.equal(tokens[0, :25], reference["tokens"][0, :25])


def test_a_weight_off_by_1e_3_is_caught(
    model: EncDecDenoiseMaskedTokenPredModel, reference: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    weight = model.encoder.layers[1].feed_forward1.linear2.weight
    with torch.no_grad():
        weight += 1e-3 * torch.randn_like(weight)
    late = {name for name, found, limit in parity(model, reference) if not found <= limit}
    assert "inter.encoder.layers.1.feed_forward1" in late
    assert "log_probs" in late
    assert "inter.encoder.layers.0" not in late


def test_keys_order_shapes_dtypes_and_kinds_are_nemo_s(
    model: EncDecDenoiseMaskedTokenPredModel, nemo_keys: list[dict[str, Any]]
) -> None:
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    found = []
    for key, value in state.items():
        row = {"key": key, "shape": list(value.shape), "dtype": str(value.dtype)}
        if key in parameters:
            row |= {"kind": "parameter", "requires_grad": parameters[key].requires_grad}
        else:
            row |= {"kind": "buffer"}
        found.append(row)
    assert json.dumps(found, indent=0) == json.dumps(nemo_keys, indent=0)
    # optimizer states count parameters in this order
    assert list(parameters) == [row["key"] for row in nemo_keys if row["kind"] == "parameter"]


def test_a_seed_draws_nemo_s_own_weights(
    nemo_config: dict[str, Any], nemo_state: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    # NeMo builds an encoder and a decoder first and throws them away
    config = EncDecDenoiseMaskedTokenPredModel(nemo_config).config
    torch.manual_seed(0)
    ConformerEncoder(config.encoder)
    MultiSoftmaxDecoder(config.decoder)
    drawn = EncDecDenoiseMaskedTokenPredModel(nemo_config).state_dict()
    assert [key for key in drawn if not torch.equal(drawn[key], nemo_state[key])] == []


def test_the_recipe_is_nest_large() -> None:
    with torch.device("meta"):
        large = EncDecDenoiseMaskedTokenPredModel(load_config(RECIPE))
    counts = [(p.numel(), p.requires_grad) for p in large.parameters()]
    assert sum(n for n, _ in counts) == 113_106_000
    assert sum(n for n, trainable in counts if trainable) == 112_964_608
    assert len(large.state_dict()) == 699
    assert large.config.encoder.n_layers == 17
    assert large.config.encoder.d_model == 512


def test_the_tiny_model_has_the_known_number_of_parameters(
    model: EncDecDenoiseMaskedTokenPredModel,
) -> None:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert sum(n for n, _ in counts) == 246_160
    assert sum(n for n, trainable in counts if trainable) == 233_792
