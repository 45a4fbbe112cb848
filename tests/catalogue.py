"""A state dict of every kind of tensor, its mutations, and what a comparison of them found."""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding

State = dict[str, torch.Tensor]


def state() -> State:
    g = torch.Generator().manual_seed(0)
    tied = torch.randn(20, 8, generator=g)
    return {
        "embed.weight": tied,
        "encoder.0.weight": torch.randn(8, 6, generator=g),
        "encoder.0.bias": torch.zeros(8),
        "encoder.1.weight": torch.randn(8, 8, generator=g),
        "encoder.1.bias": torch.zeros(8),
        "encoder.1.large": torch.randn(100, 100, generator=g),
        "norm.half": torch.randn(30, generator=g).half(),
        "norm.brain": torch.randn(30, generator=g).bfloat16(),
        "norm.double": torch.randn(30, generator=g, dtype=torch.float64),
        "norm.complex": torch.randn(30, generator=g, dtype=torch.complex64),
        "norm.float8": torch.randn(30, generator=g).to(torch.float8_e4m3fn),
        "norm.steps": torch.tensor(12),
        "norm.mask": torch.tensor([True, False, True]),
        "head.weight": tied,
    }


NUM_TENSORS = len(state())
Compared = Callable[..., Comparison]


def named(comparison: Comparison) -> list[tuple[str, str]]:
    return [(finding.kind, finding.key) for finding in comparison.findings]


def renamed_keys(rename: Callable[[str], str]) -> State:
    return {rename(key): tensor for key, tensor in state().items()}


def without(*keys: str) -> State:
    return {key: tensor for key, tensor in state().items() if key not in keys}


def having(**changes: torch.Tensor) -> State:
    found = state()
    return found | {key.replace("__", "."): tensor for key, tensor in changes.items()}


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    found = state()
    found[key] = change(found[key])
    return found


def one(comparison: Comparison) -> Finding:
    [finding] = comparison.findings
    return finding
