"""How NEST trains: AdamW, with the learning rate annealed as in NeMo.

In: the `model:` level of a config. Out: `OptimConfig`, and the schedule `NoamAnnealing`. Refused
with a `ModelError`: another optimizer, another schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from harness.nest.schema import invalid, read_present, refuse


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with, where `noam` is true, the learning rate annealed by `NoamAnnealing`.

    `lr` is the base rate that the schedule scales; `warmup_steps` counts optimizer steps.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    noam: bool = False
    d_model: int = 1
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    min_lr: float = 0.0

    @classmethod
    def read(cls, model: Mapping[str, Any]) -> Self:
        """Read the section `optim`; `ModelError` for another optimizer or another schedule."""
        given = model.get("optim")
        if not isinstance(given, Mapping):
            invalid("optim", given, "a section (mapping), without which the model cannot train")
        if str(given.get("name", "")).lower() != "adamw":
            refuse("optim.name", given.get("name"), "'adamw'")
        if model.get("optim_param_groups"):
            refuse("optim_param_groups", model["optim_param_groups"], "null")
        values = read_present(given, "optim", {"lr": float, "eps": float, "weight_decay": float})
        if "lr" not in values:
            invalid("optim.lr", None, "a base learning rate")
        if (betas := given.get("betas")) is not None:
            if not (isinstance(betas, list) and len(betas) == 2):
                invalid("optim.betas", betas, "two numbers")
            values["betas"] = (float(betas[0]), float(betas[1]))
        if isinstance(sched := given.get("sched"), Mapping):
            if sched.get("name") != "NoamAnnealing":
                refuse("optim.sched.name", sched.get("name"), "'NoamAnnealing'")
            kinds = {"d_model": int, "warmup_steps": int, "warmup_ratio": float, "min_lr": float}
            values |= read_present(sched, "optim.sched", kinds) | {"noam": True}
            if "d_model" not in values:
                invalid("optim.sched.d_model", None, "the encoder's d_model")
        return cls(**values)

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            both = (self.warmup_steps, self.warmup_ratio)
            invalid("optim.sched.warmup_steps, warmup_ratio", both, "only one of the two")
        if self.noam and self.lr < self.min_lr:
            invalid("optim.lr", self.lr, f"not below optim.sched.min_lr, {self.min_lr}")


class NoamAnnealing(LRScheduler):
    """Rise for `warmup_steps`, then fall with the root of the step, scaled by `d_model ** -0.5`.

    Attribute names are NeMo's, so that its scheduler states load.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int
    ) -> None:
        self._normalize = config.d_model ** (-0.5)
        self.max_steps = max_steps
        if config.warmup_ratio is not None:
            self.warmup_steps = int(config.warmup_ratio * max_steps)
        else:
            self.warmup_steps = config.warmup_steps or 0
        self.min_lr = config.min_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group for the step to come; the first two steps have the same."""
        step = max(1, self.last_epoch)
        scale = step**-0.5
        if self.warmup_steps > 0:
            scale = min(scale, step * self.warmup_steps**-1.5)
        rates = [base * self._normalize * scale for base in self.base_lrs]
        return [max(rate, self.min_lr) if step > self.warmup_steps else rate for rate in rates]
