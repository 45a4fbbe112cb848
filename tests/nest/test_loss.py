"""The loss against plain sums: which frames count, and what they add up to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.nest.config import LossConfig
from harness.nest.model import MaskedTokenLoss


def loss(**changes: Any) -> MaskedTokenLoss:
    return MaskedTokenLoss(LossConfig(**({"combine_time_steps": 8} | changes)))


def masks_of(*masked: int) -> Tensor:
    """One item `(1, 3, 8 n)` whose n stacked frames have so many masked mel frames."""
    row = torch.cat([(torch.arange(8) < count).float() for count in masked])
    return row.expand(1, 3, -1)


def test_a_frame_counts_when_seven_of_eight_are_masked() -> None:
    counted = loss().counted(masks_of(0, 5, 6, 7, 8))
    assert counted.tolist() == [[False, False, False, True, True]]


def test_the_loss_is_the_mean_over_counted_frames_and_books() -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(2, 3, 5, 2).log_softmax(2)
    tokens = torch.randint(5, (2, 3, 2))
    masks = torch.cat([masks_of(8, 0, 8), masks_of(0, 7, 0)])
    chosen = [(0, 0), (0, 2), (1, 1)]
    expected = 0.0
    for book in range(2):
        picked = [-float(log_probs[b, t, tokens[b, t, book], book]) for b, t in chosen]
        expected += sum(picked) / 3 / 2
    assert float(loss(num_decoders=2)(masks, tokens, log_probs)) == pytest.approx(expected)


def test_squeezed_shapes_and_other_lengths_of_tokens() -> None:
    log_probs = torch.randn(1, 3, 5).log_softmax(2)
    masks, tokens = masks_of(8, 0, 8), torch.tensor([[4, 1, 2]])
    expected = -(log_probs[0, 0, 4] + log_probs[0, 2, 2]) / 2
    torch.testing.assert_close(loss()(masks, tokens, log_probs), expected)
    longer = torch.tensor([[4, 1, 2, 3]])
    torch.testing.assert_close(loss()(masks, longer, log_probs), expected)
    expected = -(log_probs[0, 0, 4] + log_probs[0, 2, 0]) / 2
    torch.testing.assert_close(loss()(masks, tokens[:, :2], log_probs), expected)


def test_no_counted_frame_is_nan_as_in_nemo() -> None:
    value = loss()(masks_of(6, 0), torch.zeros(1, 2, 1).long(), torch.zeros(1, 2, 5, 1))
    assert math.isnan(float(value))
