"""The optimizer's section of a config, and the schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from harness.errors import ModelError
from harness.model.config import load_config
from harness.nest import RECIPE
from harness.nest.config import ModelConfig
from harness.nest.optim import NoamAnnealing, OptimConfig


def test_the_recipe_s_optimizer_is_read() -> None:
    optim = OptimConfig.read(load_config(RECIPE))
    assert (optim.lr, optim.betas, optim.weight_decay, optim.eps) == (5.0, (0.9, 0.98), 1e-3, 1e-8)
    assert (optim.noam, optim.d_model, optim.warmup_steps) == (True, 512, 25000)
    assert (optim.warmup_ratio, optim.min_lr) == (None, 1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "sgd"}, "optim.name = 'sgd'"),
        ({"lr": None}, r"optim\.lr"),
        ({"lr": 1e-8}, r"optim\.lr"),
        ({"betas": [0.9]}, r"optim\.betas"),
        ({"sched": {"name": "CosineAnnealing"}}, "CosineAnnealing"),
        ({"sched": {"name": "NoamAnnealing"}}, "d_model"),
        (
            {
                "sched": {
                    "name": "NoamAnnealing",
                    "d_model": 1,
                    "warmup_steps": 1,
                    "warmup_ratio": 1,
                }
            },
            "only one of the two",
        ),
    ],
)
def test_other_optimizers_are_refused_when_asked_for(
    nemo_config: dict[str, Any], change: dict[str, Any], match: str
) -> None:
    nemo_config["optim"] |= change
    ModelConfig.read(nemo_config)
    with pytest.raises(ModelError, match=match):
        OptimConfig.read(nemo_config)


def test_a_model_without_optim_says_so(nemo_config: dict[str, Any]) -> None:
    del nemo_config["optim"]
    with pytest.raises(ModelError, match="cannot train"):
        OptimConfig.read(nemo_config)


def rates(config: OptimConfig, steps: int, max_steps: int = -1) -> Iterator[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = NoamAnnealing(optimizer, config, max_steps)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_noam_rises_to_the_warmup_and_falls_to_the_floor() -> None:
    config = OptimConfig(lr=5.0, noam=True, d_model=64, warmup_steps=4, min_lr=0.2)
    found = list(rates(config, 13))
    steps = [1, *range(1, 13)]
    expected = [5.0 / 8 * min(n**-0.5, n * 4**-1.5) for n in steps]
    expected = [max(e, 0.2) if n > 4 else e for e, n in zip(expected, steps, strict=True)]
    assert found == pytest.approx(expected)
    assert found[0] == found[1] < 0.2
    assert found[-1] == 0.2


def test_noam_without_warmup_and_with_a_ratio() -> None:
    none = OptimConfig(lr=1.0, noam=True, d_model=4)
    assert list(rates(none, 5)) == pytest.approx([0.5 * n**-0.5 for n in (1, 1, 2, 3, 4)])
    ratio = OptimConfig(lr=1.0, noam=True, d_model=4, warmup_ratio=0.25)
    fixed = OptimConfig(lr=1.0, noam=True, d_model=4, warmup_steps=2)
    assert list(rates(ratio, 9, max_steps=8)) == list(rates(fixed, 9))


def test_noam_peaks_at_the_known_rate_for_large() -> None:
    config = OptimConfig(lr=5.0, noam=True, d_model=512, warmup_steps=25000, min_lr=1e-6)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = NoamAnnealing(optimizer, config, 500_000)
    scheduler.last_epoch = 25000
    assert scheduler.get_lr()[0] == pytest.approx(1.40e-3, rel=5e-3)
