"""Lightning under either name: `lightning.pytorch` and `pytorch_lightning`, of any version.

In: a class or module, and a `.ckpt`. Out: the package that it is of, a Trainer that can save it,
and the checkpoint as plain data for its `load_from_checkpoint`. Refused (ModelError): what the
file asks to have imported. Lightning unpickles checkpoints (below 2.6 without any restriction) and
imports what `_instantiator` and `class_path` name: it is given a file that holds neither.
"""

from __future__ import annotations

import argparse
import inspect
import io
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import omegaconf
import torch
from torch import nn

from harness.checkpoint.formats.torchfile import read_torch_legacy, read_torch_zip
from harness.checkpoint.sources.access import open_source
from harness.checkpoint.sources.source import read
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.inert import Global, Record
from harness.comparison.findings import Finding
from harness.errors import CheckpointError, ModelError
from harness.model.state import as_torch
from harness.text.disclosure import disclosed

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# Where Lightning has kept hyperparameters, and what LightningCLI adds to them.
_HYPERPARAMETERS = ("hyper_parameters", "hparams", "module_arguments")
_OF_CLI = ("_instantiator", "_class_path")
# Classes that are data, whatever the file that names them says.
_DATA: Mapping[str, Any] = {
    "omegaconf.dictconfig.DictConfig": omegaconf.DictConfig,
    "argparse.Namespace": argparse.Namespace,
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"}


def lightning_of(kind: object) -> Any | None:
    """The Lightning package whose LightningModule a class, or a module, is of; else None."""
    if not isinstance(kind, type):
        kind = type(kind) if isinstance(kind, nn.Module) else object
    for base in kind.__mro__:
        package = base.__module__.partition(".core.")[0]
        if base.__name__ == "LightningModule" and package in PACKAGES:
            return sys.modules[package]
    return None


def trainer_of(module: Any) -> Any:
    """A silent Trainer with the module attached: what `save_checkpoint` needs, and no more."""
    lightning = lightning_of(module)
    assert lightning is not None, f"{type(module).__name__} is no LightningModule"
    from importlib import import_module

    environments = import_module(f"{lightning.__name__}.plugins.environments")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # What a job's scheduler or launcher says is of other processes, and may be refused.
        plugins=[environments.LightningEnvironment()],
    )
    trainer.strategy.connect(module)
    module.trainer = trainer
    return trainer


def load_lightning(
    make: Any,
    path: Path,
    state: Mapping[str, torch.Tensor] | None,
    folder: Path,
    keywords: Mapping[str, Any],
) -> Any:
    """Call a class's own `load_from_checkpoint`, on a file in `folder` that is nothing but data.

    `state` is the state dict to load; without one, the file itself is given, which is then
    unpickled and may import anything: for files that the user trusts.
    """
    load = make.load_from_checkpoint
    options = dict(keywords)
    # Lightning 2.6 has the keyword, and a class of its own may take any.
    if "weights_only" in inspect.signature(load).parameters:
        options["weights_only"] = False
    if state is None:
        return load(str(path), map_location="cpu", **options)
    handed = folder / "handed.ckpt"
    # Weights alone name no version, which Lightning needs; they are as of the one that reads them.
    version = {"pytorch-lightning_version": getattr(lightning_of(make), "__version__", "2.0.0")}
    torch.save({**version, **data_of(path, make), "state_dict": dict(state)}, handed)
    try:
        return load(str(handed), map_location="cpu", **options)
    finally:
        handed.unlink()


def data_of(path: Path, make: type) -> dict[str, Any]:
    """Everything in a Lightning checkpoint but weights and optimizers, as plain data for a class.

    Read by the harness. An entry that holds something else than data is left out; ModelError where
    a hyperparameter does, or names what only LightningCLI would import: a class of another package
    than those that this one is of.
    """
    own = {base.__module__.partition(".")[0] for base in make.__mro__} | {"__main__"}
    handed: dict[str, Any] = {}
    with _entries(path) as entries:
        for key, value in entries.items():
            if not isinstance(key, str) or key in ("state_dict", "optimizer_states"):
                continue
            try:
                handed[key] = _Reading().of(value)
            except _NoDataError as error:
                if key in _HYPERPARAMETERS:
                    raise _refused(path, [str(error)]) from None
    for key in _HYPERPARAMETERS:
        values = handed.get(key)
        if isinstance(values, dict) and any(name in values for name in _OF_CLI):
            named = sorted({*_instantiator(values), *_class_paths(values), *_strange(values, own)})
            if named:
                raise _refused(path, named)
            handed[key] = plain_hyperparameters(values)
    return handed


def training_of(path: Path) -> dict[str, list[Any]]:
    """The states of optimizers and schedulers, as plain data; ModelError where they are none."""
    with _entries(path) as entries:
        try:
            return {
                key: _Reading().of(entries.get(key, []))
                for key in ("optimizer_states", "lr_schedulers")
            }
        except _NoDataError as error:
            raise _refused(path, [str(error)]) from None


def values_in(path: Path, section: str, keys: Collection[str]) -> dict[str, Any]:
    """Entries of a state dict that are no tensors, as plain data; without those that are none."""
    found: dict[str, Any] = {}
    with _entries(path) as entries:
        held: Any = entries
        for part in section.split(".") if section else ():
            held = held.get(part) if isinstance(held, Mapping) else None
        for key in keys:
            if isinstance(held, Mapping) and key in held:
                with suppress(_NoDataError):
                    found[key] = _Reading().of(held[key])
    return found


@contextmanager
def _entries(path: Path) -> Iterator[Mapping[Any, Any]]:
    """What a file holds at its top, as the inert reader has it; nothing of a folder."""
    if path.is_dir():
        yield {}
        return
    with closing(open_source(path)) as source:
        is_zip = read(source, 0, min(2, source.nbytes)) == b"PK"
        try:
            root = (read_torch_zip if is_zip else read_torch_legacy)(source).root
        except CheckpointError:
            root = None  # of another kind: the weights are all that it holds
        yield root if isinstance(root, dict) else {}


def plain_hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters without what LightningCLI adds, which says how to build, not what."""
    return {key: value for key, value in values.items() if key not in _OF_CLI}


def lost_hyperparameters(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, kind: type
) -> list[Finding]:
    """What the original's configuration says and the saved one does not say, or says otherwise.

    A subclass, of the `kind` that was saved, may go by another name.
    """
    named = {base.__name__ for base in kind.__mro__}

    def is_name(value: Any) -> bool:
        return {str(one) for one in (value if isinstance(value, list) else [value])} <= named

    ours, theirs = (
        dict(_leaves(disclosed(plain_hyperparameters(side or {})))) for side in (before, after)
    )
    return [
        Finding(
            kind="hyperparameter",
            key=key,
            expected=repr(value),
            actual=repr(theirs[key]) if key in theirs else "nothing",
        )
        for key, value in ours.items()
        # NaN is no other than itself
        if key not in theirs
        or (
            (theirs[key] != value and repr(theirs[key]) != repr(value))
            and not (is_name(value) and is_name(theirs[key]))
        )
    ]


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping) and config:
        for key, child in config.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, config


def _refused(path: Path, names: list[str]) -> ModelError:
    return ModelError(
        f"{path}: loading it by Lightning would import {', '.join(names)[:500]}",
        hint="if you trust the file, load it with --trust-checkpoint; or give --model a function "
        "that returns the model, which is loaded by its state dict",
    )


def _instantiator(values: Mapping[str, Any]) -> Iterator[str]:
    """The function that Lightning would import to build the class, unless it is its own."""
    named = values.get("_instantiator")
    if named not in (None, *(f"{package}.cli.instantiate_module" for package in PACKAGES)):
        yield str(named)


def _strange(values: Mapping[str, Any], own: Set[str]) -> Iterator[str]:
    """The class that the file says it is of, where it is of none of our `own` packages."""
    named = values.get("_class_path")
    if named is not None and str(named).partition(".")[0] not in own:
        yield str(named)


def _class_paths(value: Any) -> Iterator[str]:
    """The classes that LightningCLI would import to build the arguments of another."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for child in value.values():
            yield from _class_paths(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _class_paths(child)


class _NoDataError(Exception):
    """What a pickle holds that is not data: the name of what it would call."""


class _Reading:
    """Turns what the inert reader has made of a pickle into values; imports and calls nothing."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # what stands in several places is made once

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return value
        if isinstance(value, Global):
            return self._named(value)
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, dict):
            mapping: dict[Any, Any] = {}
            self._made[id(value)] = mapping
            mapping.update((self.of(key), self.of(child)) for key, child in value.items())
            return mapping
        if isinstance(value, list):
            items: list[Any] = []
            self._made[id(value)] = items
            items.extend(map(self.of, value))
            return items
        if isinstance(value, tuple):
            made: Any = tuple(map(self.of, value))
        elif isinstance(value, Tensor):
            made = as_torch(value)
        elif isinstance(value, Record):
            made = self._record(value)
        else:
            raise _NoDataError(type(value).__name__)
        self._made[id(value)] = made
        return made

    def _named(self, name: Global) -> Any:
        dtype = getattr(torch, name.name, None) if name.module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if str(name) in _DATA:
            return _DATA[str(name)]
        raise _NoDataError(str(name))

    def _record(self, record: Record) -> Any:
        callee = record.callee
        if not isinstance(callee, Global):
            raise _NoDataError("an object")
        if callee.module.startswith("omegaconf."):
            return omegaconf.OmegaConf.create(self._configured(record))
        if callee.module.partition(".")[0] == "pathlib" and callee.name in _PATHS:
            return pathlib.Path(*(part for part in record.args if isinstance(part, str)))
        if str(callee) == "argparse.Namespace" and isinstance(record.state, dict):
            values = self.of(record.state)
            return argparse.Namespace(**{str(key): value for key, value in values.items()})
        if str(callee) == "_io.BytesIO" and isinstance(record.state, tuple):
            return io.BytesIO(record.state[0])
        if callee.name == "AttributeDict" and callee.module.endswith(".utilities.parsing"):
            return self.of(record.pairs)
        raise _NoDataError(str(callee))

    def _configured(self, value: Any) -> Any:
        """What an omegaconf container or node holds; of a pickled class, nothing is made."""
        if isinstance(value, Record):
            state = value.state if isinstance(value.state, dict) else {}
            if "_content" in state:
                return self._configured(state["_content"])
            if "_val" in state:
                return self.of(state["_val"])
            raise _NoDataError(str(value.callee))
        if isinstance(value, dict):
            return {self.of(key): self._configured(child) for key, child in value.items()}
        if isinstance(value, list):
            return [self._configured(child) for child in value]
        return self.of(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's tips, and its warnings of its own version, out of the report."""
    import logging
    import warnings

    loggers = [
        logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")
    ]
    for package in (*PACKAGES, "lightning.fabric", "lightning_fabric"):
        loggers += [logging.getLogger(f"{package}.utilities.rank_zero"), logging.getLogger(package)]
    loggers.append(logging.getLogger("lightning.utilities.rank_zero"))
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
