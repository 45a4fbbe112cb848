"""FastConformer encoder: strided depthwise subsampling, relative positions, conformer layers.

In: features `(B, M, T)` with frame counts `(B,)`. Out: `(B, D, T')` with counts `(B,)`, where T'
is T halved (rounding up) once per stage and D is `feat_out` or `d_model`. Output frames from an
item's count on are finite and mean nothing. Configs that this does not implement are refused by
`EncoderConfig`.

Source of keys, numbers and order of random draws: NVIDIA NeMo 3.0.0,
EncDecDenoiseMaskedTokenPredModel. Attributes carry NeMo's names because they are the state-dict
keys, and are registered in NeMo's order because optimizer states count parameters by it.
"""

from __future__ import annotations

import math
import random
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from harness.nest.config import EncoderConfig

_FORBIDDEN_SCORE = -10000.0


def frames_after_stride(frames: Tensor) -> Tensor:
    """Count frames after one convolution of kernel 3, stride 2, padding 1; 0 stays 0."""
    return torch.div(frames - 1, 2, rounding_mode="floor") + 1


def _size_after_strides(size: int, num_stages: int) -> int:
    for _ in range(num_stages):
        size = (size - 1) // 2 + 1
    return size


class ConvSubsampling(nn.Module):
    """Halve time and frequency once per stage, then project each frame to `d_model`.

    `conv` alternates strided 3x3 and pointwise 1x1 convolutions with ReLU; all of them have biases
    whatever `use_bias` says.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        channels = config.num_channels
        bands = _size_after_strides(config.feat_in, config.num_stages)
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()]
        for _ in range(config.num_stages - 1):
            layers += [
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        # drawn after the convolutions, registered before them: both orders are NeMo's
        self.out = nn.Linear(channels * bands, config.d_model)
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Subsample `(B, T, M)` with `frames (B,)` into `(B, T', d)` with counts `(B,)` int64.

        Frames beyond the count are set to 0 around every convolution, so an item's output does not
        depend on its padding; after `out` they are its bias.
        """
        x = _zero_padding(x.unsqueeze(1), frames)
        for layer in self.conv:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                if layer.stride[0] == 2:
                    frames = frames_after_stride(frames)
                x = _zero_padding(x, frames)
        flat = x.transpose(1, 2).flatten(2)  # element c * bands + f: the channel is the slow index
        return cast("Tensor", self.out(flat)), frames


def _zero_padding(x: Tensor, frames: Tensor) -> Tensor:
    """Zero `(B, C, T, F)` from each item's frame count on."""
    inside = torch.arange(x.shape[2], device=x.device) < frames.unsqueeze(1)
    return x * inside[:, None, :, None].to(x.dtype)


class RelativePositions(nn.Module):
    """Scale and drop the input, and make the table of relative positions; owns no tensors."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.width = config.d_model
        self.scale = math.sqrt(config.d_model) if config.xscaling else None
        self.dropout = nn.Dropout(config.dropout_pre_encoder)
        self.dropout_emb = nn.Dropout(config.dropout_emb) if config.dropout_emb > 0 else None

    def table(self, num_frames: int, like: Tensor) -> Tensor:
        """Sines and cosines `(1, 2 T' - 1, d)`; row j is the position T' - 1 - j."""
        positions = torch.arange(
            num_frames - 1, -num_frames, -1, dtype=torch.float32, device=like.device
        )
        even = torch.arange(0, self.width, 2, dtype=torch.float32, device=like.device)
        angles = positions.unsqueeze(1) * torch.exp(even * -(math.log(10000.0) / self.width))
        pairs = torch.stack((angles.sin(), angles.cos()), dim=2)
        return pairs.flatten(1).unsqueeze(0).to(like.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(B, T', d)` scaled and dropped, and the table `(1, 2 T' - 1, d)`."""
        if self.scale is not None:
            x = x * self.scale
        table = self.table(x.shape[1], x)
        # the table's draw comes first
        if self.dropout_emb is not None:
            table = self.dropout_emb(table)
        return self.dropout(x), table


class FeedForward(nn.Module):
    """linear1, SiLU, dropout, linear2 on `(B, T', d)`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        inner = config.d_model * config.ff_expansion_factor
        self.linear1 = nn.Linear(config.d_model, inner, bias=config.use_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.linear2 = nn.Linear(inner, config.d_model, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.linear2(self.dropout(F.silu(self.linear1(x)))))


class ConvModule(nn.Module):
    """Pointwise convolution, GLU, depthwise convolution in time, norm, SiLU, pointwise again."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, bias = config.d_model, config.use_bias
        self.padding = config.conv_padding
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(
            width, width, config.conv_kernel_size, groups=width, bias=bias
        )
        # called batch_norm whatever its kind: the name is a state-dict key
        self.batch_norm: nn.Module
        if config.num_norm_groups is not None:
            self.batch_norm = nn.GroupNorm(config.num_norm_groups, width)
        elif config.conv_norm_type == "layer_norm":
            self.batch_norm = nn.LayerNorm(width)
        else:
            self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """Convolve `(B, T', d)`; frames true in `padded (B, T')` are zeroed before depthwise.

        The norm sees the padded frames: BatchNorm's statistics include them, as in NeMo.
        """
        x = self.pointwise_conv1(x.transpose(1, 2))
        x = F.glu(x, dim=1)  # value first, gate second
        x = x.masked_fill(padded.unsqueeze(1), 0.0)
        x = self.depthwise_conv(F.pad(x, self.padding))
        if isinstance(self.batch_norm, nn.LayerNorm):
            x = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.batch_norm(x)
        x = self.pointwise_conv2(F.silu(x))
        return x.transpose(1, 2)


class RelativeAttention(nn.Module):
    """Multi-head attention whose scores add a term of content and one of relative position.

    `bias_u`, `bias_v` `(h, k)` are shared between layers where the config ties them. `linear_pos`
    never has a bias.
    """

    def __init__(
        self, config: EncoderConfig, bias_u: nn.Parameter | None, bias_v: nn.Parameter | None
    ) -> None:
        super().__init__()
        width, bias = config.d_model, config.use_bias
        self.num_heads = config.n_heads
        self.head_width = width // config.n_heads
        self.linear_q = nn.Linear(width, width, bias=bias)
        self.linear_k = nn.Linear(width, width, bias=bias)
        self.linear_v = nn.Linear(width, width, bias=bias)
        self.linear_out = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(config.dropout_att)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = zero_head_bias(config) if bias_u is None else bias_u
        self.pos_bias_v = zero_head_bias(config) if bias_v is None else bias_v

    def forward(self, x: Tensor, forbidden: Tensor, table: Tensor) -> Tensor:
        """Attend within `(B, T', d)`; `forbidden (B, T', T')` bool, `table (1, 2 T' - 1, d)`.

        A query that may see nothing gets `linear_out`'s bias exactly.
        """
        with _attention_precision(x):
            if torch.is_autocast_enabled(x.device.type):
                x, table = x.to(torch.float32), table.to(torch.float32)
            q, k, v = (self._split(f(x)) for f in (self.linear_q, self.linear_k, self.linear_v))
            p = self._split(self.linear_pos(table)).transpose(1, 2)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            content = torch.matmul((q + self.pos_bias_u).transpose(1, 2), k.transpose(-2, -1))
            position = torch.matmul((q + self.pos_bias_v).transpose(1, 2), p.transpose(-2, -1))
            position = relative_shift(position)
            scores = (content + position) / math.sqrt(self.head_width)
            # a finite fill and zeros after the softmax: -inf would make padded rows NaN
            masked = forbidden.unsqueeze(1)
            weights = scores.masked_fill(masked, _FORBIDDEN_SCORE).softmax(dim=-1)
            weights = self.dropout(weights.masked_fill(masked, 0.0))
            out: Tensor = self.linear_out(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """`(B, T', d)` to `(B, T', h, k)`: the head is the slow index."""
        return x.view(*x.shape[:2], self.num_heads, self.head_width)


def zero_head_bias(config: EncoderConfig) -> nn.Parameter:
    """Make a zero bias per head and channel, `(h, k)`."""
    return nn.Parameter(torch.zeros(config.n_heads, config.d_model // config.n_heads))


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by table row `(..., T', 2 T' - 1)` into scores by key frame `(..., T', T')`.

    Entry (i, j) of the result is entry (i, T' - 1 - i + j): the position i - j.
    """
    *lead, frames, positions = scores.shape
    padded = F.pad(scores, (1, 0)).view(*lead, positions + 1, frames)
    return padded[..., 1:, :].reshape(*lead, frames, positions)[..., :frames]


def _attention_precision(x: Tensor) -> AbstractContextManager[object]:
    """Replace float16 autocast, whose scores overflow, by bfloat16, or by float32 without it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.float16:
        return nullcontext()
    if device != "cuda" or torch.cuda.is_bf16_supported():
        return torch.autocast(device, dtype=torch.bfloat16)
    return torch.autocast(device, enabled=False)


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, each residual; then a norm."""

    def __init__(
        self, config: EncoderConfig, bias_u: nn.Parameter | None, bias_v: nn.Parameter | None
    ) -> None:
        super().__init__()
        width = config.d_model
        # the order of the keys, not of execution
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(config)
        self.norm_conv = nn.LayerNorm(width)
        self.conv = ConvModule(config)
        self.norm_self_att = nn.LayerNorm(width)
        self.self_attn = RelativeAttention(config, bias_u, bias_v)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor, forbidden: Tensor, table: Tensor, padded: Tensor) -> Tensor:
        """Transform `(B, T', d)`; masks and table as in `RelativeAttention` and `ConvModule`."""
        x = x + self.dropout(self.feed_forward1(self.norm_feed_forward1(x))) * 0.5
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), forbidden, table))
        x = x + self.dropout(self.conv(self.norm_conv(x), padded))
        x = x + self.dropout(self.feed_forward2(self.norm_feed_forward2(x))) * 0.5
        return cast("Tensor", self.norm_out(x))


def drop_probabilities(config: EncoderConfig) -> list[float]:
    """Chance of each layer to be skipped in training (stochastic depth)."""
    prob, start = config.stochastic_depth_drop_prob, config.stochastic_depth_start_layer
    late = range(1, config.n_layers - start + 1)
    if config.stochastic_depth_mode == "linear":
        probabilities = [prob * j / len(late) for j in late]
    else:
        probabilities = [prob for _ in late]
    return ([0.0] * start + probabilities)[: config.n_layers]


class ConformerEncoder(nn.Module):
    """The encoder: `pre_encode`, `pos_enc`, `layers` and, for another output width, `out_proj`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.pre_encode = ConvSubsampling(config)
        self.pos_enc = RelativePositions(config)
        # tied: one pair under the same names in every layer, so the keys are the same either way
        bias_u = None if config.untie_biases else zero_head_bias(config)
        bias_v = None if config.untie_biases else zero_head_bias(config)
        self.layers = nn.ModuleList(
            ConformerLayer(config, bias_u, bias_v) for _ in range(config.n_layers)
        )
        self.out_proj: nn.Linear | None = None
        if config.width_out != config.d_model:
            self.out_proj = nn.Linear(config.d_model, config.width_out)
        self._drop_probabilities = drop_probabilities(config)

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encode `(B, M, T)` with `frames (B,)` into `(B, D, T')` with counts `(B,)` int64."""
        x, lengths = self.pre_encode(features.transpose(1, 2), frames.to(torch.int64))
        x, table = self.pos_enc(x)
        padded, forbidden = self._masks(lengths, x.shape[1])
        for layer, drop in zip(self.layers, self._drop_probabilities, strict=True):
            entered = x
            x = layer(x, forbidden, table, padded)
            if self.training and drop > 0.0:
                # drawn after the layer has run, so that its own draws do not depend on the outcome
                dropped = bool(torch.rand(1) < drop)
                x = entered if dropped else entered + (x - entered) / (1.0 - drop)
        if self.out_proj is not None:
            x = self.out_proj(x)
        return x.transpose(1, 2), lengths

    def _masks(self, lengths: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Padded frames `(B, T')` and forbidden pairs (query, key) `(B, T', T')`, both bool."""
        contexts = self.config.att_contexts
        left, right = contexts[0]
        if self.training and len(contexts) > 1:
            left, right = random.choice(contexts)
        frame = torch.arange(num_frames, device=lengths.device)
        valid = frame < lengths.unsqueeze(1)
        allowed = valid.unsqueeze(2) & valid.unsqueeze(1)
        ahead = frame.unsqueeze(0) - frame.unsqueeze(1)  # key minus query
        if left >= 0:
            allowed = allowed & (ahead >= -left)
        if right >= 0:
            allowed = allowed & (ahead <= right)
        return ~valid, ~allowed
