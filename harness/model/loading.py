"""Load a checkpoint into a model, and save it back, each in the container's own way.

In: a path and a target. Out: a module, or a file. A `.nemo` goes through the class's `restore_from`
and `save_to`; a Lightning `.ckpt` through `load_from_checkpoint` and `Trainer.save_checkpoint`; all
others through `load_state_dict(strict=True)` of the factory's module, from bytes that the harness
reads itself. Refused: pickled classes other than omegaconf's, unless trusted by name of the user.
"""

from __future__ import annotations

import collections
import inspect
import logging
import pickle
import random
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import omegaconf
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import nn

from harness.checkpoint import open_checkpoint
from harness.checkpoint.tensors import Checkpoint, Tensor
from harness.comparison.compare import compare
from harness.comparison.findings import Finding
from harness.comparison.measuring import AgainstCheckpoint
from harness.comparison.policy import Policy
from harness.errors import CheckpointError, ModelError
from harness.fingerprints.scan import fingerprint
from harness.model.mismatch import brief_mismatch
from harness.model.targets import registered, resolve, user_code

# What Lightning's checkpoints of DictConfig models hold besides tensors; all inert.
SAFE_GLOBALS: list[Any] = [
    omegaconf.dictconfig.DictConfig,
    omegaconf.listconfig.ListConfig,
    omegaconf.base.ContainerMetadata,
    omegaconf.base.Metadata,
    omegaconf.nodes.AnyNode,
    omegaconf.nodes.BooleanNode,
    omegaconf.nodes.FloatNode,
    omegaconf.nodes.IntegerNode,
    omegaconf.nodes.StringNode,
    typing.Any,
    collections.defaultdict,
    collections.OrderedDict,
    dict,
    list,
    int,
    float,
    str,
    bool,
]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with Python's, numpy's and torch's random states from a seed, then put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's tips, and its warnings of its own version, out of the report."""
    loggers = [logging.getLogger(n) for n in ("pytorch_lightning", "lightning_fabric", "lightning")]
    loggers += [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Saved(NamedTuple):
    """A saved checkpoint, and what became of the state of its training.

    `refusal` says why the optimizers did not take it, `unbuilt` why there are none to take it, as
    where configure_optimizers() asks for the data of the training.
    """

    path: Path
    refusal: str | None = None
    unbuilt: str | None = None


class Loader:
    """Loads one checkpoint, or one saved from it, as often as wanted, under different seeds.

    `target` is `package.module:Name`, or None for what the registry has for the checkpoint's own
    config. `config` replaces the configuration that the file carries. Raises ModelError where no
    class is known.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        target: str | None,
        config: Mapping[str, Any] | None = None,
        trust: bool = False,
    ) -> None:
        found = target or registered(checkpoint.config)
        if found is None:
            raise ModelError(
                f"{checkpoint.name}: which model it belongs to is not known",
                hint="give --model package.module:ClassOrFactory",
            )
        self.target = found
        self.container = checkpoint.container
        self.section = checkpoint.section
        self._make = resolve(found)
        self._config = config
        self._trust = trust

    def load(self, path: Path, *, seed: int) -> nn.Module:
        """Build the model under a seed and load the file into it."""
        with (
            user_code(
                f"{path}: loading it into {self.target}",
                "run the same load in a Python shell for its traceback",
                brief_mismatch,
            ),
            seeded(seed),
            quiet(),
        ):
            return self._load(path)

    def _load(self, path: Path) -> nn.Module:
        if self.container == "nemo" and hasattr(self._make, "restore_from"):
            keywords = {} if self._config is None else {"override_config": self._config}
            return _a_module(self._make.restore_from(str(path), **keywords), self.target)
        lightning = isinstance(self._make, type) and issubclass(self._make, pl.LightningModule)
        if self.container == "Lightning checkpoint" and lightning:
            return self._load_lightning(path)
        keywords = {} if self._config is None else {"cfg": self._config}
        _refuse_arguments(self._make, keywords, self.target)
        module = _a_module(self._make(**keywords), self.target)
        with open_checkpoint(path) as checkpoint:
            state = tensors_of(checkpoint)
        for key, value in module.state_dict().items():
            if key.endswith("_extra_state") and key not in state and not torch.is_tensor(value):
                raise ModelError(
                    f"{path}: {key} of {self.target} is a {type(value).__name__}, and only tensors "
                    "are read of a file",
                    hint="give it as a tensor in get_extra_state(), or --model a function that "
                    "returns a model without it",
                )
        module.load_state_dict(state, strict=True)
        return module

    def _load_lightning(self, path: Path) -> nn.Module:
        keywords: dict[str, Any] = {} if self._config is None else {"cfg": self._config}
        load: Callable[..., Any] = self._make.load_from_checkpoint  # type: ignore[attr-defined]
        try:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                model = load(
                    str(path), map_location="cpu", weights_only=not self._trust, **keywords
                )
        except pickle.UnpicklingError as error:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            raise ModelError(
                f"{path}: loading it by Lightning would import {', '.join(sorted(names))}",
                hint="if you trust the file, load it all the same with --trust-checkpoint",
            ) from error
        return _a_module(model, self.target)

    def save(self, module: nn.Module, folder: Path, stem: str, *, original: Path) -> Saved:
        """Save the model in the checkpoint's container, its own way.

        Where `original` holds the state of a training, that is restored and saved as well.
        """
        hint = "run the same save in a Python shell for its traceback"
        with user_code(f"saving {self.target}", hint), quiet():
            return self._save(module, folder, stem, original)

    def _save(self, module: nn.Module, folder: Path, stem: str, original: Path) -> Saved:
        refusal = unbuilt = None
        if self.container == "nemo" and hasattr(module, "save_to"):
            path = folder / f"{stem}.nemo"
            save_to: Any = module.save_to
            save_to(str(path))
        elif self.container == "Lightning checkpoint" and isinstance(module, pl.LightningModule):
            path = folder / f"{stem}.ckpt"
            trainer = trainer_of(module)
            try:
                refusal, unbuilt = self._restore_training(trainer, original)
                trainer.save_checkpoint(path)
            finally:
                module.trainer = None  # with one that does not run, `log` in its forward fails
        elif "safetensors" in self.container:
            from safetensors.torch import save_model

            path = folder / f"{stem}.safetensors"
            save_model(module, str(path))
        else:
            path = folder / f"{stem}.pt"
            torch.save(module.state_dict(), path)
        return Saved(path, refusal, unbuilt)

    def _restore_training(
        self, trainer: pl.Trainer, original: Path
    ) -> tuple[str | None, str | None]:
        """Give the trainer the optimizers and schedulers of a full checkpoint, as `fit` would.

        Returns why the optimizers refuse it, if they do, and why there are none, if so.
        """
        if not _has_optimizers(original):
            return None, None
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            state = torch.load(original, map_location="cpu", weights_only=not self._trust)
        try:
            with user_code("configure_optimizers()", "it needs a training"):
                trainer.strategy.setup_optimizers(trainer)
        except ModelError as error:
            return None, str(error)
        try:
            trainer.strategy.load_optimizer_state_dict(state)
        except (ValueError, KeyError, RuntimeError) as error:
            return f"refused by the optimizer: {error}", None
        # As many as there are, as Lightning does: a callback may have brought its own.
        pairs = zip(trainer.lr_scheduler_configs, state["lr_schedulers"], strict=False)
        for config, saved in pairs:
            config.scheduler.load_state_dict(saved)
        return None, None


def _has_optimizers(path: Path) -> bool:
    try:
        open_checkpoint(path, section="optimizer_states").close()
    except CheckpointError:
        return False
    return True


def compare_training_state(original: Path, saved: Saved) -> list[Finding] | None:
    """Compare the optimizers' state in two checkpoints; None where there is nothing to compare."""
    if saved.unbuilt is not None or not _has_optimizers(original):
        return None
    if saved.refusal is not None or not _has_optimizers(saved.path):
        lost = saved.refusal or "lost by the save"
        return [Finding(kind="optimizer", key="optimizer_states", expected="kept", actual=lost)]
    with (
        open_checkpoint(original, section="optimizer_states") as before,
        open_checkpoint(saved.path, section="optimizer_states") as after,
    ):
        ours, theirs = (fingerprint(side, details=lambda tensor: False) for side in (before, after))
        measure = AgainstCheckpoint(expected=before, actual=after)
        found = compare(ours, theirs, Policy(exact=True), measure).findings
    return [
        Finding(
            kind="optimizer",
            key=f"optimizer_states{finding.key}",
            expected=finding.expected or "nothing",
            actual=finding.actual or "lost",
            difference=finding.difference,
        )
        for finding in found
    ]


def _refuse_arguments(make: Callable[..., Any], keywords: Mapping[str, Any], target: str) -> None:
    """Say what a factory lacks before it is called, where its signature can be looked at."""
    try:
        inspect.signature(make).bind(**keywords)
    except TypeError as error:
        given = ", ".join(keywords) or "no arguments"
        raise ModelError(
            f"--model {target}: cannot be called with {given}: {error}",
            hint="name a function without arguments that returns the model",
        ) from error
    except ValueError:
        return


def _a_module(made: Any, target: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"--model {target}: made a {type(made).__name__}, not a torch.nn.Module",
            hint="name a class, or a function without arguments that returns the model",
        )
    return made


def trainer_of(module: pl.LightningModule) -> pl.Trainer:
    """A silent Trainer with the module attached: what `save_checkpoint` needs, and no more."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # What a job's scheduler or launcher says is of other processes, and may be refused.
        plugins=[LightningEnvironment()],
    )
    trainer.strategy.connect(module)
    module.trainer = trainer
    return trainer


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a file as torch tensors, read by the harness: torch unpickles nothing."""
    made: dict[str, torch.Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        made[key] = made[tensor.alias_of] if tensor.alias_of else _as_torch(tensor)
    return made


def _as_torch(tensor: Tensor) -> torch.Tensor:
    dtype = getattr(torch, tensor.dtype.name)
    if tensor.numel == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    tensor.read_into(0, data.numpy().data)
    return data.view(dtype).reshape(tensor.shape)
