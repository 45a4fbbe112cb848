"""Load a checkpoint into a model, and save it back, each by what its class offers.

In: a path and a target. Out: a module, or a file. The table, first row that fits:

    the class has                           loads by                    saves by
    `restore_from` (a `.nemo`)              `restore_from`              `save_to`
    `from_pretrained` (a folder with its    `from_pretrained(FOLDER)`   `save_pretrained`
      config)
    Lightning's `load_from_checkpoint`      that, of either package     the package's Trainer
    anything else                           `load_state_dict`           `torch.save`, safetensors

All files are read by the harness: what a class is given holds tensors and plain data, or is a
folder from which nothing is imported. Refused: pickled classes that are no data, unless trusted.
"""

from __future__ import annotations

import inspect
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from harness.checkpoint import open_checkpoint
from harness.checkpoint.keys import format_key
from harness.checkpoint.tensors import Checkpoint
from harness.comparison.compare import compare
from harness.comparison.findings import Finding
from harness.comparison.measuring import AgainstCheckpoint
from harness.comparison.policy import Policy
from harness.errors import CheckpointError, ModelError, NoSection
from harness.fingerprints.scan import fingerprint
from harness.model.lightning import (
    data_of,
    lightning_of,
    load_lightning,
    quiet,
    trainer_of,
    training_of,
    values_in,
)
from harness.model.mismatch import brief_mismatch
from harness.model.pretrained import folder_of, is_pretrained, load_pretrained, offline
from harness.model.state import put_together, tensors_of, unwrapped
from harness.model.targets import check_named_classes, registered, resolve, user_code
from harness.text.shell import quoted

_LIGHTNING = "Lightning checkpoint"
_MAX_SECTIONS = 32  # that are looked at


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


class NotLoaded(ModelError):  # noqa: N818 - reads as what happened
    """A state dict that does not fit the module: both sides, and what torch says of it.

    `fitting` is another section of the file, whose keys and shapes are those of the module.
    """

    def __init__(
        self,
        message: str,
        *,
        module: nn.Module,
        state: Mapping[str, Any],
        fitting: str | None,
        hint: str,
    ) -> None:
        super().__init__(message, hint=hint)
        self.module = module
        self.state = state
        self.fitting = fitting


class Saved(NamedTuple):
    """A saved checkpoint, and what became of the state of its training.

    `refusal` says why the optimizers did not take it, `unbuilt` why there are none to take it, as
    where configure_optimizers() asks for the data of the training. `keeps_training` tells whether
    the way of saving keeps hyperparameters and optimizers at all.
    """

    path: Path
    refusal: str | None = None
    unbuilt: str | None = None
    keeps_training: bool = True


class Loader:
    """Loads one checkpoint, or one saved from it, as often as wanted, under different seeds.

    `target` is `package.module:Name`, or None for what the registry has for the checkpoint's own
    config. `config` replaces the configuration that the file carries; `base` is the folder of the
    model that an adapter is for. Raises ModelError where no class is known.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        target: str | None,
        config: Mapping[str, Any] | None = None,
        base: Path | None = None,
        trust: bool = False,
    ) -> None:
        found = target or registered(checkpoint.config)
        if found is None:
            raise ModelError(
                f"{checkpoint.name}: its model is unknown",
                hint="give --model package.module:ClassOrFactory",
            )
        self.target = found
        self.container = checkpoint.container
        self._make = resolve(found)
        if self._restores and not trust:
            check_named_classes(checkpoint, found)
        self._keywords = {} if config is None else {"cfg": config}
        self._config = config
        self._base = base
        self._trust = trust

    @property
    def _restores(self) -> bool:
        return self.container == "nemo" and hasattr(self._make, "restore_from")

    def _pretrained(self, path: Path) -> Path | None:
        return folder_of(path) if is_pretrained(self._make) else None

    def has_own_folder(self, path: Path) -> bool:
        """Whether the class itself loads a folder, by keys that need not be those of its state."""
        return self._pretrained(path) is not None

    def is_strict(self, module: nn.Module) -> bool:
        """Whether torch has checked that every key of the module was given to it."""
        kind, lightning = type(module), lightning_of(module)
        if self._restores or hasattr(kind, "from_pretrained"):
            return False
        if lightning is None:
            return _defines(kind, "load_state_dict") is nn.Module
        return (
            _defines(kind, "load_state_dict") is nn.Module
            and _defines(kind, "load_from_checkpoint") is lightning.LightningModule
            and bool(module.strict_loading)
        )

    def load(self, path: Path, *, seed: int, section: str | None = None) -> nn.Module:
        """Build the model under a seed and load a section of the file into it.

        Raises NotLoaded where keys or shapes do not fit, ModelError where anything else fails.
        """
        try:
            with (
                user_code(
                    f"{path}: loading it into {self.target}",
                    "see where with --traceback",
                    brief_mismatch,
                ),
                seeded(seed),
                quiet(),
            ):
                return _a_module(self._load(path, section), self.target)
        except ModelError as error:
            sides = _unfit(error.__cause__)
            if sides is None:
                raise
            module, state = sides
            fitting = _fitting_section(path, module)
            hint = (
                "load it with the code that fits it, or save it under the keys of the model"
                if fitting is None
                else f"another section of the file fits the model: --section {quoted(fitting)}"
            )
            raise NotLoaded(
                str(error), module=module, state=state, fitting=fitting, hint=hint
            ) from error

    def _load(self, path: Path, section: str | None) -> Any:
        if self._restores:
            keywords = {} if self._config is None else {"override_config": self._config}
            return self._make.restore_from(str(path), **keywords)  # type: ignore[attr-defined]
        folder = self._pretrained(path)
        if folder is not None:
            return load_pretrained(self._make, folder, base=self._base)
        if isinstance(self._make, type) and lightning_of(self._make) is not None:
            trusted = self._trust and self.container == _LIGHTNING
            state = None if trusted else _state_in(path, section)
            with tempfile.TemporaryDirectory() as name:
                return load_lightning(self._make, path, state, Path(name), self._keywords)
        _check_arguments(self._make, self._keywords, self.target)
        module = _a_module(self._make(**self._keywords), self.target)
        state = put_together(module, _state_in(path, section))
        if self.container == _LIGHTNING and lightning_of(module) is not None:
            handed = {**data_of(path, type(module)), "state_dict": state}
            module.on_load_checkpoint(handed)  # type: ignore[operator]
            state = handed["state_dict"]
        inner = unwrapped(module, state)
        values = _with_values(inner, with_tied(inner, state), path, section)
        inner.load_state_dict(values, strict=True)
        return module

    def save(self, module: nn.Module, folder: Path, stem: str, *, original: Path) -> Saved:
        """Save the model by its own way, in the checkpoint's container where that is free.

        Where `original` holds the state of a training, that is restored and saved as well.
        """
        with user_code(f"saving {self.target}", "see where with --traceback"), quiet():
            return self._save(module, folder, stem, original)

    def _save(self, module: nn.Module, folder: Path, stem: str, original: Path) -> Saved:
        if self.container == "nemo" and hasattr(module, "save_to"):
            path = folder / f"{stem}.nemo"
            save_to: Any = module.save_to
            save_to(str(path))
            return Saved(path)
        if self._pretrained(original) is not None:
            path = folder / stem
            save_pretrained: Any = module.save_pretrained
            with offline():
                save_pretrained(str(path))
            return Saved(path)
        if self.container == _LIGHTNING and lightning_of(module) is not None:
            path = folder / f"{stem}.ckpt"
            trainer = trainer_of(module)
            try:
                refusal, unbuilt = self._restore_training(trainer, original)
                trainer.save_checkpoint(path)
            finally:
                # With one that does not run, `log` in its forward fails.
                module.trainer = None  # type: ignore[assignment]
            return Saved(path, refusal, unbuilt)
        if "safetensors" in self.container:
            from safetensors.torch import save_model

            path = folder / f"{stem}.safetensors"
            save_model(module, str(path))
        else:
            path = folder / f"{stem}.pt"
            torch.save(module.state_dict(), path)
        return Saved(path, keeps_training=False)

    def _restore_training(self, trainer: Any, original: Path) -> tuple[str | None, str | None]:
        """Give the trainer the optimizers and schedulers of a full checkpoint, as `fit` would.

        Returns why the optimizers refuse it, if they do, and why there are none, if so.
        """
        if not has_optimizers(original):
            return None, None
        if self._trust:
            state = torch.load(original, map_location="cpu", weights_only=False)
        else:
            state = training_of(original)
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


def _defines(kind: type, name: str) -> type | None:
    """The class that a method comes from."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def _state_in(path: Path, section: str | None) -> dict[str, torch.Tensor]:
    with open_checkpoint(path, section=section or None) as checkpoint:
        return tensors_of(checkpoint)


def _unfit(error: BaseException | None) -> tuple[nn.Module, Mapping[str, Any]] | None:
    """The module that refused a state dict, and that state dict, from torch's own error."""
    if not isinstance(error, RuntimeError) or "Error(s) in loading state_dict" not in str(error):
        return None
    trace, found = error.__traceback__, None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code is nn.Module.load_state_dict.__code__:
            found = frame.f_locals["self"], dict(frame.f_locals["state_dict"])
        trace = trace.tb_next
    return found


def _fitting_section(path: Path, module: nn.Module) -> str | None:
    """The first other section of a file whose keys and shapes are those of a module."""
    wanted = {
        format_key((k,)): v.shape for k, v in module.state_dict().items() if torch.is_tensor(v)
    }
    try:
        with open_checkpoint(path) as checkpoint:
            # Also what has keys that begin so: of a flat state dict, or of a folder's parts.
            words = dict.fromkeys(key.partition(".")[0] for key in checkpoint.tensors)
            named = (name for name, count in checkpoint.others if count != 0)
            others = [*named, *words][:_MAX_SECTIONS]
    except NoSection as error:
        others = [*error.sections]
    for name in others:
        with suppress(CheckpointError), open_checkpoint(path, section=name) as other:
            tensors = other.tensors.values()
            if {t.key: t.shape for t in tensors if not t.dtype.is_value} == wanted:
                return name
    return None


def with_tied(module: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict, and what its saver left out since the module ties it to what is there."""
    own = {k: v for k, v in module.state_dict(keep_vars=True).items() if torch.is_tensor(v)}
    there = {id(value): key for key, value in own.items() if key in state}
    filled = {
        key: state[there[id(value)]]
        for key, value in own.items()
        if key not in state and id(value) in there
    }
    return {**state, **filled}


def _with_values(
    module: nn.Module, state: Mapping[str, torch.Tensor], path: Path, section: str | None
) -> dict[str, Any]:
    """A state dict, and what of it is no tensor but plain data, for a module that asks for that."""
    own = module.state_dict().items()
    lacking = {k: v for k, v in own if k not in state and v is not None and not torch.is_tensor(v)}
    if not lacking:
        return dict(state)
    with open_checkpoint(path, section=section or None) as checkpoint:
        found = values_in(path, checkpoint.section or "", lacking)
        there = [*checkpoint.tensors, *checkpoint.unread]
    for key, value in lacking.items():
        if key not in found and any(name.startswith(format_key((key,))) for name in there):
            raise ModelError(
                f"{path}: {key} of {type(module).__name__} is a {type(value).__name__}, which is "
                "made by what a file says, and only tensors and plain data are read of a file",
                hint="give it as a tensor in get_extra_state(), or --model a function that "
                "returns a model without it",
            )
    return {**state, **found}


def has_optimizers(path: Path) -> bool:
    try:
        open_checkpoint(path, section="optimizer_states").close()
    except CheckpointError:
        return False
    return True


def compare_training_state(original: Path, saved: Saved) -> list[Finding] | None:
    """Compare the optimizers' state in two checkpoints; None where there is nothing to compare."""
    if saved.unbuilt is not None or not has_optimizers(original):
        return None
    if saved.refusal is not None or not has_optimizers(saved.path):
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


def _check_arguments(make: Callable[..., Any], keywords: Mapping[str, Any], target: str) -> None:
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


def built(target: str, config: Mapping[str, Any] | None) -> nn.Module:
    """Build a model without a checkpoint, from a configuration or from nothing."""
    make, keywords = resolve(target), {} if config is None else {"cfg": config}
    _check_arguments(make, keywords, target)
    with user_code(f"building {target}", "see where with --traceback"), seeded(1), quiet():
        return _a_module(make(**keywords), target)
