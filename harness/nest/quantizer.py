"""Targets and masks of the pre-training task: the frozen random quantizer and the block masking.

In: features `(B, M, T)`. Out: tokens `(B, T', H)` of the clean features; masked features and
masks `(B, M, T)` of the noisy ones. Refused: a T that is no multiple of `combine_time_steps`
(ValueError).

Source of the numbers and of the order of random draws: NVIDIA NeMo 3.0.0,
EncDecDenoiseMaskedTokenPredModel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from harness.nest.config import MaskingConfig, QuantizerConfig

_MIN_NORM = 1e-12
_CHUNK_NUMEL = 1 << 22
"""Float64 differences held at once (32 MiB); all at once would be gigabytes for long audio."""


class RandomProjectionQuantizer(nn.Module):
    """Project stacked frames and find the nearest random codebook entry.

    `codebooks (H, V, Q)` stay float64 through `.half()`, `.bfloat16()` and `.float()`: rounding
    them would change the targets. `proj.weight (H Q, M c)` with c = `combine_time_steps`. Both
    are frozen where the config says so.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        stacked = config.feat_in * config.combine_time_steps
        proj = nn.Linear(stacked, config.num_books * config.code_dim, bias=False)
        nn.init.xavier_normal_(proj.weight)
        shape = (config.num_books, config.num_classes, config.code_dim)
        # drawn once in float32 and thrown away, as in NeMo: a seed then gives NeMo's weights
        codebooks = torch.randn(shape).to(torch.float64).normal_()
        codebooks = codebooks / codebooks.norm(dim=-1, keepdim=True).clamp_min(_MIN_NORM)
        self.codebooks = nn.Parameter(codebooks)
        self.proj = proj
        if config.freeze:
            self.requires_grad_(False)
            self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.codebooks.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.codebooks.dtype != torch.float64:
            self.codebooks.data = exact.to(self.codebooks.device)
        return self

    @torch.no_grad()
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize `(B, M, T)` into vectors `(B, Q, T', H)` float64 and tokens `(B, T', H)` int64.

        T' = T / `combine_time_steps`. With `squeeze_single` and one book the last axis is gone.
        Features that are 0, as in padding, are equally far from all entries: their token, which
        NeMo leaves to rounding, is 0.
        """
        books, width = self.config.num_books, self.config.code_dim
        batch, _, num_frames = features.shape
        steps = self.config.combine_time_steps
        if num_frames % steps:
            raise ValueError(
                f"features: {num_frames} frames are no multiple of combine_time_steps, {steps}; "
                f"set preprocessor.pad_to to a multiple of {steps}"
            )
        # time slow, band fast; then book slow
        stacked = features.transpose(1, 2).reshape(batch, num_frames // steps, -1)
        z = self.proj(stacked).view(batch, num_frames // steps, books, width)
        z = z / z.norm(dim=-1, keepdim=True).clamp_min(_MIN_NORM)
        tokens = self._nearest(z)
        # NeMo gathers in the order (item, book, frame) and reads the rows as (frame, code, book):
        # right for one book, scrambled for several. The model never uses these vectors.
        rows = [self.codebooks[book][tokens[:, :, book]] for book in range(books)]
        vectors = torch.stack(rows, dim=1).reshape(batch, -1, width, books).transpose(1, 2)
        if self.config.squeeze_single and books == 1:
            return vectors.squeeze(-1), tokens.squeeze(-1)
        return vectors, tokens

    def _nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest entry, the first of equals, `(B, T', H)`; distances in float64."""
        # all equally far: without a rule of its own the token would differ between machines
        silent = (z == 0).all(dim=-1)
        entries = self.codebooks.transpose(1, 2)  # (H, Q, V)
        frames = z.flatten(0, 1)
        chunk = max(1, _CHUNK_NUMEL // entries.numel())
        found = [
            (part.unsqueeze(-1) - entries).norm(dim=-2).argmin(dim=-1)
            for part in torch.split(frames, chunk)
        ]
        return torch.cat(found).view(z.shape[:3]).masked_fill(silent, 0)


class RandomBlockMasking(nn.Module):
    """Replace random blocks of frames by `mask_embedding (M,)`; the draws are NeMo 3.0.0's."""

    def __init__(self, config: MaskingConfig) -> None:
        super().__init__()
        self.config = config
        frozen = config.freeze
        if config.mask_value is None:
            embedding = torch.randn(config.feat_in) * 0.1
        else:
            embedding = torch.full((config.feat_in,), config.mask_value)
            frozen = True
        self.mask_embedding = nn.Parameter(embedding, requires_grad=not frozen)
        if frozen:
            self.eval()

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mask `(B, M, T)` of `frames (B,)`; return features and masks (1.0 masked), same shape."""
        if self.config.allow_overlap:
            masked = self._overlapping(features, frames)
        else:
            masked = self._disjoint(features, frames)
        masked = masked.unsqueeze(1)
        embedding = self.mask_embedding.to(features.dtype)[:, None]
        masks = masked.to(features.dtype).expand_as(features).contiguous()
        return torch.where(masked, embedding, features), masks

    def _overlapping(self, features: Tensor, frames: Tensor) -> Tensor:
        """Start a block at each frame where one fits, with `mask_prob`; `(B, T)` bool."""
        batch, _, num_frames = features.shape
        size = self.config.block_size
        draw = torch.rand(batch, num_frames, device=features.device)
        frame = torch.arange(num_frames, device=features.device)
        starts = (draw < self.config.mask_prob) & (frame + size <= frames.unsqueeze(1))
        # a frame is masked when a block started in the `size` frames up to it
        begun = starts.to(torch.int64).cumsum(dim=1)
        before = torch.nn.functional.pad(begun, (size, 0))[:, :num_frames]
        return begun > before

    def _disjoint(self, features: Tensor, frames: Tensor) -> Tensor:
        """Fill `mask_prob` of each item with blocks in distinct slots; `(B, T)` bool."""
        batch, _, num_frames = features.shape
        masked = torch.zeros(batch, num_frames, dtype=torch.bool, device=features.device)
        for item, count in enumerate(frames.tolist()):
            size = self.config.block_size
            blocks = math.ceil(count * self.config.mask_prob / size)
            if (blocks + 1) * size > count:
                size = max(1, count // (blocks + 1))
            slots = max(0, count // size - 1)
            chosen = torch.randperm(slots)[: min(blocks, slots)]
            offset = int(torch.rand(1) * size)
            for slot in chosen.tolist():
                start = slot * size + offset
                masked[item, start : start + size] = True
        return masked
