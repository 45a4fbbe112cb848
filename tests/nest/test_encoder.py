"""The encoder against plain loops, and the configurations beyond the recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.nest.config import EncoderConfig
from harness.nest.encoder import (
    ConformerEncoder,
    ConformerLayer,
    ConvModule,
    ConvSubsampling,
    RelativeAttention,
    RelativePositions,
    drop_probabilities,
)
from harness.nest.model import EncDecDenoiseMaskedTokenPredModel

MakeModel = Callable[..., EncDecDenoiseMaskedTokenPredModel]
SMALL = EncoderConfig(
    feat_in=16,
    n_layers=2,
    d_model=12,
    n_heads=3,
    subsampling_factor=8,
    subsampling_conv_channels=4,
    conv_kernel_size=5,
    dropout_emb=0.0,
)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def small(**changes: Any) -> EncoderConfig:
    return dataclasses.replace(SMALL, **changes)


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """Evaluation mode with no parameter left at 0 or 1, where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def random_frames(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_by_loops(
    module: RelativeAttention, x: Tensor, forbidden: Tensor, table: Tensor
) -> Tensor:
    """Attention of one item `(T', d)`, one score at a time, float64."""
    heads, width = module.num_heads, module.head_width

    def linear(layer: nn.Linear, value: Tensor) -> Tensor:
        out = value @ layer.weight.double().T
        return out if layer.bias is None else out + layer.bias.double()

    num_frames = x.shape[0]
    q, k, v = (linear(f, x.double()) for f in (module.linear_q, module.linear_k, module.linear_v))
    p = linear(module.linear_pos, table[0].double())
    joined = torch.zeros(num_frames, heads * width, dtype=torch.float64)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        bias_u, bias_v = module.pos_bias_u[head].double(), module.pos_bias_v[head].double()
        for i in range(num_frames):
            scores = torch.full((num_frames,), -math.inf, dtype=torch.float64)
            for j in range(num_frames):
                if not forbidden[i, j]:
                    row = p[num_frames - 1 - (i - j), own]
                    score = (q[i, own] + bias_u) @ k[j, own] + (q[i, own] + bias_v) @ row
                    scores[j] = score / math.sqrt(width)
            if not forbidden[i].all():
                joined[i, own] = scores.softmax(0) @ v[:, own]
    return linear(module.linear_out, joined)


@torch.no_grad()
@pytest.mark.parametrize("context", [[-1, -1], [2, 1], [0, 0], [3, -1]])
def test_attention_is_content_plus_relative_position(context: list[int]) -> None:
    config = small(att_context_size=context)
    module = randomised(RelativeAttention(config, None, None))
    lengths, num_frames = torch.tensor([7, 4]), 7
    _, forbidden = ConformerEncoder(config).eval()._masks(lengths, num_frames)
    for item, length in enumerate(lengths.tolist()):
        for i in range(num_frames):
            for j in range(num_frames):
                seen = i < length and j < length
                seen &= context[0] < 0 or j >= i - context[0]
                seen &= context[1] < 0 or j <= i + context[1]
                assert bool(forbidden[item, i, j]) == (not seen)
    x = random_frames(2, num_frames, 12)
    table = RelativePositions(config).table(num_frames, x)
    out = module(x, forbidden, table)
    for item in range(2):
        expected = attention_by_loops(module, x[item], forbidden[item], table)
        torch.testing.assert_close(out[item].double(), expected, **TOLERANCE)
    # a padded query sees nothing and gets the bias, exactly
    assert torch.equal(out[1, 4:], module.linear_out.bias.expand(3, -1))


def test_one_of_several_contexts_is_drawn_in_training_and_the_first_serves_in_eval() -> None:
    encoder = ConformerEncoder(small(att_context_size=[[1, 0], [-1, -1]]))
    lengths = torch.tensor([5])

    def counts() -> set[int]:
        return {int((~encoder._masks(lengths, 5)[1]).sum()) for _ in range(40)}

    encoder.eval()
    assert counts() == {9}
    encoder.train()
    assert counts() == {9, 25}


def test_the_position_table_runs_from_last_to_first() -> None:
    table = RelativePositions(SMALL).table(4, torch.zeros(1))
    assert table.shape == (1, 7, 12)
    for row, position in enumerate(range(3, -4, -1)):
        for i in range(6):
            angle = position * math.exp(-2 * i * math.log(10000) / 12)
            assert float(table[0, row, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[0, row, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize(("xscaling", "factor"), [(True, math.sqrt(12)), (False, 1.0)])
def test_xscaling_multiplies_by_the_root_of_the_width(xscaling: bool, factor: float) -> None:
    x = random_frames(1, 3, 12)
    out, _ = RelativePositions(small(xscaling=xscaling)).eval()(x)
    assert torch.equal(out, x * factor)


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_subsampling_flattens_channels_slow_and_ignores_padding(factor: int) -> None:
    module = randomised(ConvSubsampling(small(subsampling_factor=factor)))
    x = random_frames(2, 32, 16)
    frames = torch.tensor([31, 13])
    out, lengths = module(x, frames)
    halved = frames
    for _ in range(int(math.log2(factor))):
        halved = (halved + 1) // 2
    assert torch.equal(lengths, halved)
    assert out.shape == (2, 32 // factor, 12)
    # the same item without the padding, by torch's own convolutions
    item = x[1:, :13].unsqueeze(1)
    for layer in module.conv:
        item = layer(item)
    flat = torch.stack([item[0, :, t, :].reshape(-1) for t in range(item.shape[2])])
    expected = flat @ module.out.weight.T + module.out.bias
    torch.testing.assert_close(out[1, : len(expected)], expected, **TOLERANCE)
    assert torch.equal(out[1, len(expected) :], module.out.bias.expand_as(out[1, len(expected) :]))


@torch.no_grad()
@pytest.mark.parametrize("context", [None, "causal", [3, 1]])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "group_norm3"])
def test_convolution_by_loops(context: Any, norm: str) -> None:
    config = small(conv_context_size=context, conv_norm_type=norm)
    module = randomised(ConvModule(config))
    if norm == "batch_norm":
        module.batch_norm.running_mean.normal_(generator=torch.Generator().manual_seed(3))
        module.batch_norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(4))
    x = random_frames(1, 6, 12)[0].double()
    padded = torch.tensor([False] * 4 + [True] * 2)
    left = {"causal": 4, None: 2}.get(context if not isinstance(context, list) else "", 3)
    module64 = module.double()
    wide = x @ module64.pointwise_conv1.weight[:, :, 0].T + module64.pointwise_conv1.bias
    gated = wide[:, :12] * torch.sigmoid(wide[:, 12:])
    gated[padded] = 0
    deep = torch.zeros(6, 12, dtype=torch.float64)
    for t in range(6):
        for tap in range(5):
            if 0 <= t + tap - left < 6:
                deep[t] += module64.depthwise_conv.weight[:, 0, tap] * gated[t + tap - left]
        deep[t] += module64.depthwise_conv.bias
    gain, offset = module64.batch_norm.weight, module64.batch_norm.bias
    if norm == "batch_norm":
        mean, var = module64.batch_norm.running_mean, module64.batch_norm.running_var
    elif norm == "layer_norm":
        mean, var = deep.mean(1, keepdim=True), deep.var(1, keepdim=True, unbiased=False)
    else:
        grouped = deep.view(6, 3, 4)
        mean = grouped.mean((0, 2)).repeat_interleave(4)
        var = grouped.var((0, 2), unbiased=False).repeat_interleave(4)
    normed = (deep - mean) / torch.sqrt(var + 1e-5) * gain + offset
    activated = normed * torch.sigmoid(normed)
    expected = activated @ module64.pointwise_conv2.weight[:, :, 0].T
    expected += module64.pointwise_conv2.bias
    out = module64(x.unsqueeze(0), padded.unsqueeze(0))
    torch.testing.assert_close(out[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_layer_is_four_residual_steps_and_a_norm() -> None:
    layer = randomised(ConformerLayer(SMALL, None, None))
    x = random_frames(1, 5, 12)
    padded, forbidden = ConformerEncoder(SMALL).eval()._masks(torch.tensor([5]), 5)
    table = RelativePositions(SMALL).table(5, x)
    out = layer(x, forbidden, table, padded)
    x = x + layer.feed_forward1(layer.norm_feed_forward1(x)) / 2
    x = x + layer.self_attn(layer.norm_self_att(x), forbidden, table)
    x = x + layer.conv(layer.norm_conv(x), padded)
    x = x + layer.feed_forward2(layer.norm_feed_forward2(x)) / 2
    torch.testing.assert_close(out, layer.norm_out(x), **TOLERANCE)
    assert all(m.eps == 1e-5 for m in layer.modules() if isinstance(m, nn.LayerNorm))


@torch.no_grad()
def test_valid_frames_do_not_depend_on_padding() -> None:
    encoder = randomised(ConformerEncoder(SMALL))
    x = random_frames(1, 16, 48)
    together, lengths = encoder(x, torch.tensor([29]))
    alone, _ = encoder(x[:, :, :32], torch.tensor([29]))
    torch.testing.assert_close(together[..., :4], alone[..., : int(lengths)], **TOLERANCE)
    changed = x.clone()
    changed[:, :, 29:] += 100
    assert torch.equal(encoder(changed, torch.tensor([29]))[0], together)


@pytest.mark.parametrize(
    ("prob", "mode", "start", "expected"),
    [
        (0.0, "linear", 1, [0, 0, 0, 0]),
        (0.3, "linear", 1, [0, 0.1, 0.2, 0.3]),
        (0.4, "linear", 2, [0, 0, 0.2, 0.4]),
        (0.4, "uniform", 2, [0, 0, 0.4, 0.4]),
        (0.4, "uniform", 4, [0, 0, 0, 0]),
        (0.4, "linear", 9, [0, 0, 0, 0]),
    ],
)
def test_stochastic_depth_grows_with_depth(
    prob: float, mode: str, start: int, expected: list[float]
) -> None:
    config = small(
        n_layers=4,
        stochastic_depth_drop_prob=prob,
        stochastic_depth_mode=mode,
        stochastic_depth_start_layer=start,
    )
    assert drop_probabilities(config) == pytest.approx(expected)


def test_a_dropped_layer_passes_its_input_on_and_a_kept_one_is_scaled_up() -> None:
    config = small(
        dropout=0.0,
        dropout_pre_encoder=0.0,
        conv_norm_type="layer_norm",
        stochastic_depth_drop_prob=0.5,
        stochastic_depth_mode="uniform",
    )
    encoder = randomised(ConformerEncoder(config))
    x, frames = random_frames(1, 16, 24), torch.tensor([24])
    with torch.no_grad():
        encoded = encoder(x, frames)[0]
        first: list[Tensor] = []
        encoder.layers[0].register_forward_hook(lambda _m, _i, out: first.append(out))
        encoder(x, frames)
        entered = first[0].transpose(1, 2)
        encoder.train()
        seen = []
        torch.manual_seed(0)
        for _ in range(20):
            out = encoder(x, frames)[0]
            dropped = torch.equal(out, entered)
            if not dropped:
                torch.testing.assert_close(out, entered + (encoded - entered) / 0.5, **TOLERANCE)
            seen.append(dropped)
    assert {True, False} == set(seen)


def test_construction_draws_torch_s_default_ranges(make_model: MakeModel) -> None:
    state = make_model().state_dict()
    for key, fan_in in (
        ("encoder.pre_encode.out.weight", 320),
        ("encoder.pre_encode.out.bias", 320),
        ("encoder.layers.0.feed_forward1.linear2.weight", 256),
        ("encoder.layers.1.self_attn.linear_pos.weight", 64),
        ("encoder.layers.1.conv.depthwise_conv.weight", 9),
        ("decoder.decoder_layers.0.bias", 64),
    ):
        bound = 1 / math.sqrt(fan_in)
        assert float(state[key].abs().max()) <= bound
        assert float(state[key].abs().max()) > 0.9 * bound
    assert float(state["encoder.layers.0.self_attn.pos_bias_u"].abs().max()) == 0
    bound = math.sqrt(6 / (64 + 128))
    assert 0.95 * bound < float(state["decoder.decoder_layers.0.weight"].abs().max()) <= bound


# configurations: their keys, and that they run

BIASES = ("linear1", "linear2", "pointwise_conv1", "depthwise_conv", "pointwise_conv2")
ATTENTION = ("linear_q", "linear_k", "linear_v", "linear_out")


def test_without_biases_eleven_keys_less_per_layer(
    make_model: MakeModel, nemo_keys: list[dict[str, Any]]
) -> None:
    keys = list(make_model(encoder__use_bias=False, encoder__xscaling=False).state_dict())
    lost = {f"{name}.bias" for name in (*BIASES, *ATTENTION)}
    expected = [
        row["key"]
        for row in nemo_keys
        if not (".layers." in row["key"] and ".".join(row["key"].split(".")[-2:]) in lost)
    ]
    assert keys == expected
    assert len(keys) == 77
    assert "encoder.pre_encode.out.bias" in keys
    assert "decoder.decoder_layers.0.bias" in keys


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm8"])
def test_other_norms_keep_the_name_and_lose_the_statistics(
    make_model: MakeModel, nemo_keys: list[dict[str, Any]], norm: str
) -> None:
    keys = list(make_model(encoder__conv_norm_type=norm).state_dict())
    lost = ("running_mean", "running_var", "num_batches_tracked")
    assert keys == [row["key"] for row in nemo_keys if not row["key"].endswith(lost)]
    assert len(keys) == 93


def test_tied_biases_are_one_storage_under_all_names(
    make_model: MakeModel, nemo_keys: list[dict[str, Any]]
) -> None:
    model = make_model(encoder__untie_biases=False)
    state = model.state_dict()
    assert list(state) == [row["key"] for row in nemo_keys]
    for name in ("pos_bias_u", "pos_bias_v"):
        tied = [state[f"encoder.layers.{layer}.self_attn.{name}"] for layer in (0, 1)]
        assert tied[0].data_ptr() == tied[1].data_ptr()
        assert not tied[0].any()
    assert len(list(model.parameters())) == 91 - 2
    names = [name for name, _ in model.named_parameters()]
    assert "encoder.layers.0.self_attn.pos_bias_u" in names
    assert "encoder.layers.1.self_attn.pos_bias_u" not in names
    assert model.to(torch.float64).encoder.layers[0].self_attn.pos_bias_u is (
        model.encoder.layers[1].self_attn.pos_bias_u
    )


def test_another_output_width_adds_a_projection_at_the_end_of_the_encoder(
    make_model: MakeModel,
) -> None:
    model = make_model(encoder__feat_out=48, decoder__feat_in=48, decoder__use_bias=False)
    keys = list(model.state_dict())
    assert keys[-6:] == [
        "encoder.out_proj.weight",
        "encoder.out_proj.bias",
        "quantizer.codebooks",
        "quantizer.proj.weight",
        "mask_processor.mask_embedding",
        "decoder.decoder_layers.0.weight",
    ]
    assert model.state_dict()["decoder.decoder_layers.0.weight"].shape == (128, 48, 1)
    with torch.no_grad():
        assert model(**model.golden_inputs()).log_probs.shape == (2, 20, 128, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"encoder__use_bias": False, "encoder__xscaling": False},
        {"encoder__untie_biases": False, "encoder__att_context_size": [4, 2]},
        {"encoder__conv_norm_type": "group_norm8", "encoder__conv_context_size": "causal"},
        {"encoder__conv_norm_type": "layer_norm", "encoder__conv_kernel_size": 5},
        {"encoder__subsampling_conv_channels": -1, "encoder__feat_out": 64},
        {"preprocessor__window": "hamming", "preprocessor__preemph": None},
        {"preprocessor__lowfreq": 50, "preprocessor__highfreq": 7000, "preprocessor__n_fft": None},
        {
            "encoder__subsampling_factor": 4,
            "quantizer__combine_time_steps": 4,
            "loss__combine_time_steps": 4,
        },
        {"quantizer__num_books": 2, "decoder__num_decoders": 2, "loss__num_decoders": 2},
        {
            "quantizer__squeeze_single": True,
            "decoder__squeeze_single": True,
            "loss__squeeze_single": True,
        },
        {"masking__mask_value": 0.5, "masking__freeze": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_configuration_runs_and_survives_its_own_file(
    make_model: MakeModel, changes: dict[str, Any], tmp_path: Any
) -> None:
    model = make_model(**changes)
    inputs = model.golden_inputs()
    before = model(**inputs)
    factor, books = model.config.encoder.subsampling_factor, model.config.quantizer.num_books
    squeezed = model.config.quantizer.squeeze_single
    frames = 160 // factor
    tail = () if squeezed else (books,)
    assert before.log_probs.shape == (2, frames, 128, *tail)
    assert before.tokens.shape == (2, frames, *tail)
    assert before.log_probs.isfinite().all()
    torch.testing.assert_close(before.log_probs.exp().sum(2), torch.ones(2, frames, *tail))
    model.save_to(tmp_path / "model.nemo")
    torch.manual_seed(99)
    again = EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "model.nemo").eval()
    assert list(again.state_dict()) == list(model.state_dict())
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
        assert value.dtype == model.state_dict()[key].dtype
    after = again(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
