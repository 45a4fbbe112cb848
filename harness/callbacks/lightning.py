"""Verify what a Trainer really wrote: `Trainer(callbacks=[GoldenCheckpoint()])`.

In: the saves of a Lightning Trainer. Out: nothing while they are good, else an error on every rank,
or a warning. Refused (UsageError): strategies that write shards, and options that do not fit.

Lightning has no hook after a write, and none before one with `save_weights_only`. Every save goes
through `Trainer.save_checkpoint`, on all ranks, so that is where the callback stands: it copies the
weights before anything else happens to them, lets Lightning save, and then reads the file back with
the reader of the harness. Of AsyncCheckpointIO it uses the one writing thread: what is handed to
that behind a save runs when the bytes are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from harness.model import not_installed

if error := not_installed("torch", "lightning_utilities"):
    raise error

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from harness.api import roundtrip
from harness.callbacks.saves import (
    OnMismatch,
    VerifiedSave,
    as_golden,
    as_held,
    check_asked,
    copied,
    frozen_of,
    verified,
)
from harness.checkpoint import open_checkpoint
from harness.checkpoint.tensors import Checkpoint
from harness.comparison.comparison import Comparison
from harness.comparison.policy import Policy, Stage
from harness.errors import CheckpointError, GoldenMismatch, UsageError
from harness.golden.file import read_golden
from harness.model.lightning import PACKAGES
from harness.model.options import LiveOptions
from harness.model.state import as_checkpoint
from harness.model.values import with_values

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback as _Callback
else:

    def _bases() -> tuple[type, ...]:
        """The Callback of every package that there is: a Trainer refuses that of another."""
        found = []
        for package in PACKAGES:
            try:
                found.append(import_module(package).Callback)
            except ImportError:
                if package in sys.modules:
                    raise
        if not found:
            raise not_installed("pytorch_lightning")
        return tuple(found)

    _Callback = type("_Callback", _bases(), {})

# By name: `lightning.pytorch` has classes of its own.
_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
# Where WeightAveraging and EMAWeightAveraging put what is trained.
_AVERAGED = "current_model_state"
_NEXT = (
    "see what stands between state_dict() and the file: on_save_checkpoint hooks, plugins, the "
    "disk; what is meant goes into policy= or section="
)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What the model held when a save began: a copy, so that nothing in the save can touch it."""

    weights: Checkpoint
    frozen: frozenset[str]
    target: str
    global_step: int
    keeps_ties: bool


class GoldenCheckpoint(_Callback):
    """Verify each save of a Trainer against the model in memory, and stop at the first bad one.

    For Trainers of `lightning.pytorch` and of `pytorch_lightning`, of version 2.4 and later.

    What was written must be what `state_dict()` of the LightningModule held when the save began,
    to the bit: every key, shape, dtype and value, and nothing else beside them. `policy` says what
    may differ (`Policy(exact=True, ignore=("backbone.*",))` for a hook that leaves keys out on
    purpose), `section` where in the file the model's own weights are (`current_model_state` with
    Lightning's WeightAveraging, which puts the average into `state_dict`).

    `golden` adds a golden to compare with: keys, shapes and dtypes of all tensors, and the values
    of parameters that are frozen (`requires_grad` False at the save). What is trained changes.
    `stages` says how far each file is followed after that: "load", "reload" and "outputs" load it
    into a fresh model, save that and run it, each compared with the file, as `harness roundtrip`
    does; `live` says how to build the model, by default the LightningModule's class.
    `every` verifies the saves of each n-th step that saves, beginning with the first.

    `on_mismatch="raise"` stops the run: GoldenMismatch with the report as its message, or
    CheckpointError where the file cannot be read; on all ranks, with the report on the first. The
    bad file stays, and `save_top_k` has not yet deleted the good one before it. "warn" goes on. On
    rank 0, `saves` lists what was verified.

    Seen: every `Trainer.save_checkpoint` after the Trainer's `setup`, by any ModelCheckpoint,
    `save_last`, `save_weights_only`, by hand, before preemption and after `fit` as well; on one
    process and under DDP. An asynchronous save is verified in the thread that writes it: an error
    shows after the batch (under DDP, at the next save or end of an epoch) and at the latest when
    `fit` ends; a checkpoint is deleted only after it was verified. After an exception, the
    first bad save is a warning, so that the exception stays the one that is raised.
    Not seen: what `state_dict()` itself leaves out or alters (`stages="reload"` is for that); ties
    that AsyncCheckpointIO loses, as it always does; optimizer states; the link of
    `save_last="link"`, whose target is verified; writes past the Trainer
    (`strategy.save_checkpoint`, `torch.save`); a plugin of your own that writes in a thread of its
    own; what happens to the file later: it is read back at once, from the page cache.

    Cost: a copy of the weights until the save is verified, and processor time: about a quarter of
    that of a save with Adam's state, about that of a save with `save_weights_only` (435 MB of
    weights, two cores). A golden reads what is frozen once more; live stages load and save anew.
    """

    def __init__(
        self,
        golden: str | Path | None = None,
        *,
        stages: Stage = "file",
        every: int = 1,
        on_mismatch: OnMismatch = "raise",
        policy: Policy | None = None,
        section: str | None = None,
        live: LiveOptions | None = None,
    ) -> None:
        choices = {"stages": (stages, Stage), "on_mismatch": (on_mismatch, OnMismatch)}
        check_asked("GoldenCheckpoint", every, **choices)
        self.saves: list[VerifiedSave] = []
        self._golden = None if golden is None else read_golden(Path(golden))
        self._stages = stages
        self._every = every
        self._on_mismatch = on_mismatch
        self._policy = policy or Policy(exact=True)
        self._section = section
        self._live = live
        self._watched: WeakSet[pl.Trainer] = WeakSet()
        self._pending: list[tuple[str, Future[VerifiedSave]]] = []
        self._last_step, self._num_steps = -1, 0

    def __getstate__(self) -> dict[str, Any]:
        """What goes to processes that a strategy spawns: of Trainers, each has its own."""
        return {name: value for name, value in vars(self).items() if name != "_watched"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _watched=WeakSet())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stand in the way of the Trainer's saves, for as long as it lives."""
        if trainer in self._watched:
            return
        strategy = trainer.strategy
        if _SHARDED & {base.__name__ for base in type(strategy).__mro__}:
            raise UsageError(
                f"GoldenCheckpoint: {type(strategy).__name__} writes shards, and no rank "
                "holds the whole model",
                hint="leave it out, and verify the checkpoint with `harness verify`",
            )
        if self._stages != "file" and _asynchronous(trainer) is not None:
            raise UsageError(
                f'GoldenCheckpoint(stages="{self._stages}") with AsyncCheckpointIO: a model that '
                "is built in the writing thread would draw from the training's random numbers",
                hint='give stages="file", or save without AsyncCheckpointIO',
            )
        if self._stages != "file" and self._live is None and "<locals>" in _target(pl_module):
            raise UsageError(
                f'GoldenCheckpoint(stages="{self._stages}"): {_target(pl_module)} is a class of a '
                "function, and cannot be built again",
                hint='give live=LiveOptions(target="package.module:ClassOrFactory")',
            )
        self._watched.add(trainer)
        # Lightning offers no other place that sees all saves, on all ranks.
        save, remove = trainer.save_checkpoint, strategy.remove_checkpoint
        trainer.save_checkpoint = partial(self._save, trainer, save)  # type: ignore[method-assign]
        strategy.remove_checkpoint = partial(self._remove, remove)  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.world_size == 1:  # to ask the other ranks would hold up each of their steps
            self._collect(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._collect(trainer, wait=True)
        if stage == "fit":
            failed = sum(save.error is not None for save in self.saves)
            rank_zero_info(f"GoldenCheckpoint: saves verified: {len(self.saves)}, bad: {failed}")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._collect(trainer, wait=True, raised=exception)

    def _save(
        self,
        trainer: pl.Trainer,
        save: Callable[..., None],
        filepath: str | Path,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """In place of `Trainer.save_checkpoint`: save, and verify, at once or behind the write."""
        due = self._is_due(trainer)
        held = _held(trainer) if due and trainer.is_global_zero else None
        save(filepath, *args, **kwargs)
        if not due:
            return
        writer = _asynchronous(trainer)
        if writer is None:
            self._conclude(trainer, [] if held is None else [self._verified(held, filepath)])
            return
        if held is not None:
            told = writer._executor.submit(self._verified, held, filepath, writer)
            self._pending.append((str(filepath), told))
        self._collect(trainer, wait=trainer.state.status != "running")

    def _remove(self, remove: Callable[..., None], filepath: str | Path) -> None:
        """In place of the strategy's `remove_checkpoint`: not before it was verified."""
        for path, told in self._pending:
            if path == str(filepath):
                told.result()
        remove(filepath)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Count steps, not saves: `save_last` would make each second one a `last.ckpt`."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._num_steps += 1
        return (self._num_steps - 1) % self._every == 0

    def _collect(
        self, trainer: pl.Trainer, *, wait: bool = False, raised: BaseException | None = None
    ) -> None:
        """Take in what the writing thread has verified; all ranks must call this alike."""
        if _asynchronous(trainer) is None:
            return
        ended = [(path, one) for path, one in self._pending if wait or one.done()]
        self._pending = [pair for pair in self._pending if pair not in ended]
        self._conclude(trainer, [told.result() for _, told in ended], raised)

    def _conclude(
        self,
        trainer: pl.Trainer,
        saves: list[VerifiedSave],
        raised: BaseException | None = None,
    ) -> None:
        """Warn, or raise on all ranks; only the first of them knows of `saves`."""
        is_told = any(save.error is not None for save in self.saves)
        self.saves += saves
        bad = [save for save in saves if save.error is not None]
        if self._on_mismatch == "warn":
            _warn(bad)
        elif trainer.state.status == "interrupted":
            # Ranks are no longer in step, and one error is on its way already.
            _warn([] if is_told else [save for save in bad if save.error is not raised])
        else:
            path = trainer.strategy.broadcast(bad[0].path if bad else None)
            if bad and bad[0].error is not None:
                if getattr(bad[0].error, "hint", None) is None:  # else it says so itself
                    bad[0].error.add_note(f"next: {_NEXT}")
                raise bad[0].error
            if path is not None:
                raise GoldenMismatch(f"{path}: a bad save, see the report of rank 0", hint=_NEXT)

    def _verified(
        self, held: _Held, filepath: str | Path, writer: Any | None = None
    ) -> VerifiedSave:
        """Compare a file that is there with what was held. Never raises: other ranks wait."""
        if writer is not None and writer._error:
            return VerifiedSave(
                path=str(filepath), global_step=held.global_step, error=writer._error
            )
        comparisons = self._comparisons(held, filepath)
        return verified(filepath, held.global_step, comparisons, partial(self._next, filepath))

    def _next(self, path: str | Path) -> str:
        """What to do about a bad save; averages of the weights have a section of their own."""
        if self._section is None:
            with suppress(CheckpointError), open_checkpoint(path, section=_AVERAGED):
                return (
                    "the file holds averaged weights, and the model's own in another section: "
                    f'GoldenCheckpoint(section="{_AVERAGED}") verifies those'
                )
        return _NEXT

    def _comparisons(self, held: _Held, path: str | Path) -> Iterator[Comparison]:
        with open_checkpoint(path, section=self._section) as written:
            written = replace(written, keeps_aliases=held.keeps_ties)
            yield as_held(held.weights, written, self._policy)
        if self._golden is not None:
            with open_checkpoint(path, section=self._golden.section) as written:
                written = replace(written, keeps_aliases=held.keeps_ties)
                golden = self._golden.fingerprint
                yield as_golden(golden, written, held.weights, self._policy, held.frozen)
        if self._stages != "file":
            live = self._live or LiveOptions(target=held.target)
            for comparison in roundtrip(path, policy=self._policy, live=live):
                yield comparison
                if comparison.stage == self._stages:
                    return


def _asynchronous(trainer: pl.Trainer) -> Any | None:
    """Lightning's AsyncCheckpointIO, among the plugins around one another; None without it."""
    plugin: Any = trainer.strategy.checkpoint_io
    while plugin is not None and not hasattr(plugin, "_executor"):
        plugin = getattr(plugin, "checkpoint_io", None)
    return plugin


def _held(trainer: pl.Trainer) -> _Held:
    module, step = trainer.lightning_module, trainer.global_step
    state = module.state_dict()
    name = f"{type(module).__name__} in memory at step {step}"
    return _Held(
        weights=with_values(as_checkpoint(copied(state), name), state),
        frozen=frozen_of(module),
        target=_target(module),
        global_step=step,
        # AsyncCheckpointIO clones each tensor for itself.
        keeps_ties=_asynchronous(trainer) is None,
    )


def _target(module: pl.LightningModule) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def _warn(saves: list[VerifiedSave]) -> None:
    for save in saves:
        rank_zero_warn(f"GoldenCheckpoint: {save.error}\n  next: {_hint(save)}")


def _hint(save: VerifiedSave) -> str:
    return getattr(save.error, "hint", None) or _NEXT
