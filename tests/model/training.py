"""Trainings to verify: a small model, and all that can go wrong between it and its files.

As a program, a training on two processes: `python -m tests.model.training FOLDER`. What they print
is in FOLDER/rank0.out, rank0.err and so on; their exit codes are printed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness import GoldenCheckpoint, GoldenMismatch

Checkpoint = dict[str, Any]


class Tuned(pl.LightningModule):
    """A frozen layer, a norm with statistics, and a trained layer whose weight is tied to a head"""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.body.weight

    def forward(self, batch: Tensor) -> Tensor:
        made: Tensor = self.head(self.body(self.norm(self.frozen(batch))))
        return made

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(16, 4, generator=generator)), batch_size=4)


class Forgetful(Tuned):
    """Its load leaves one weight as it was initialised."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        fitting = {key: value for key, value in state.items() if key != "norm.weight"}
        torch.nn.init.normal_(self.norm.weight)
        return super().load_state_dict(fitting, strict=False, assign=assign)


class Fails(Tuned):
    """Fails in its third step."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 2:
            raise ZeroDivisionError("the batch is bad")
        return super().training_step(batch, index)


class Alters(TorchCheckpointIO):
    """Writes something else than what it was given; from the `start`-th save on."""

    def __init__(self, alter: Callable[[Checkpoint], None], start: int = 1) -> None:
        self.alter, self.start, self.count = alter, start, 0

    def save_checkpoint(
        self, checkpoint: Checkpoint, path: Any, storage_options: Any = None
    ) -> None:
        self.count += 1
        if self.count >= self.start:
            self.alter(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)


class Truncates(TorchCheckpointIO):
    """Loses the end of what it wrote."""

    def save_checkpoint(
        self, checkpoint: Checkpoint, path: Any, storage_options: Any = None
    ) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        with open(path, "r+b") as file:
            file.truncate(Path(path).stat().st_size - 200)


class Waits(TorchCheckpointIO):
    """Writes nothing before it is told to, and may fail then."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self.error = error

    def save_checkpoint(
        self, checkpoint: Checkpoint, path: Any, storage_options: Any = None
    ) -> None:
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        super().save_checkpoint(checkpoint, path, storage_options)


class Hook(pl.Callback):
    """Another callback that alters what is about to be saved."""

    def __init__(self, alter: Callable[[Checkpoint], None]) -> None:
        self.alter = alter

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Checkpoint) -> None:
        self.alter(checkpoint)


def zero(checkpoint: Checkpoint) -> None:
    """A copy with one tensor zeroed."""
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {**state, "head.bias": torch.zeros(4)}


def zero_in_place(checkpoint: Checkpoint) -> None:
    """Zero a tensor of the model itself."""
    checkpoint["state_dict"]["head.bias"].zero_()


def halve(checkpoint: Checkpoint) -> None:
    checkpoint["state_dict"]["head.bias"] = checkpoint["state_dict"]["head.bias"].half()


def drop(checkpoint: Checkpoint) -> None:
    del checkpoint["state_dict"]["head.bias"]


def tear(checkpoint: Checkpoint) -> None:
    """Untie the two weights."""
    checkpoint["state_dict"]["head.weight"] = checkpoint["state_dict"]["head.weight"].clone()


def trainer(folder: Path, *callbacks: pl.Callback, steps: int = 2, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**(settings | options))


def saving(folder: Path, **options: Any) -> pl.callbacks.ModelCheckpoint:
    """Save after every step, as `step=1.ckpt`."""
    settings = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    return pl.callbacks.ModelCheckpoint(dirpath=folder, **(settings | options))


def train_together(folder: Path) -> None:
    """On each of two ranks: a good training, one whose asynchronous, and one whose save is bad."""

    def fit(name: str, callback: pl.Callback, *plugins: Any) -> pl.Trainer:
        made = trainer(
            folder,
            callback,
            saving(folder / name),
            steps=4,
            devices=2,
            strategy="ddp",
            plugins=list(plugins),
        )
        made.fit(Tuned())
        return made

    good = GoldenCheckpoint(stages="reload")
    rank = fit("good", good).global_rank
    for save in good.saves:
        sys.stdout.write("\n".join(("good", *save.headlines, "")))
    try:
        fit("async", GoldenCheckpoint(), AsyncCheckpointIO(Alters(zero, start=4)))
    except GoldenMismatch as error:
        sys.stdout.write(f"rank {rank} stopped: {str(error).partition(chr(10))[0]}\n")
    fit("bad", GoldenCheckpoint(), Alters(halve, start=2))
    sys.stdout.write("went on\n")
