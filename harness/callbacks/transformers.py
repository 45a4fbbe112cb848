"""Verify what a Trainer of transformers really wrote: `callbacks=[GoldenTrainerCallback()]`.

In: the checkpoints that a `transformers.Trainer` writes while it trains. Out: nothing while they
are good, else an error, or a warning. Refused (UsageError): FSDP and DeepSpeed, which write shards.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.model import not_installed

if error := not_installed("torch", "transformers"):
    raise error

from torch import nn

from harness.callbacks.saves import (
    OnMismatch,
    VerifiedSave,
    as_golden,
    as_held,
    check_asked,
    frozen_of,
    verified,
)
from harness.checkpoint import open_checkpoint
from harness.comparison.comparison import Comparison
from harness.comparison.policy import Policy
from harness.errors import UsageError
from harness.golden.file import read_golden
from harness.model.pretrained import is_pretrained, load_pretrained
from harness.model.state import as_checkpoint
from harness.model.targets import user_code

if TYPE_CHECKING:
    # Not installed where types are checked.
    class _TrainerCallback:
        pass
else:
    from transformers import TrainerCallback as _TrainerCallback

_NEXT = (
    "see what stands between state_dict() and the file: a save_model() of your own, "
    "_keys_to_ignore_on_save, the disk; what is meant goes into policy="
)


class GoldenTrainerCallback(_TrainerCallback):
    """Verify each checkpoint of a Trainer against the model in memory; stop at the first bad one.

    The weights that were written must be those of the model, to the bit: every key, shape, dtype
    and value. Of a model of peft, those of its adapter. Where the class writes other keys than it
    holds (experts that are stacked in memory), the folder is loaded by `from_pretrained`, and that
    is compared. `policy` says what may differ.

    `golden` adds a golden to compare with: keys, shapes and dtypes of all tensors, and the values
    of parameters that are frozen. `every` verifies each n-th checkpoint, beginning with the first.
    `on_mismatch="raise"` stops the run: GoldenMismatch with the report as its message, or
    CheckpointError where the files cannot be read. "warn" goes on. `saves` lists what was verified.

    Seen: the `checkpoint-N` folders, on rank 0. Not seen: `trainer.save_model()` after the
    training, optimizer states. `save_total_limit` has deleted older checkpoints before that.
    Memory: none beside the model's, unless its folder has to be loaded.
    """

    def __init__(
        self,
        golden: str | Path | None = None,
        *,
        every: int = 1,
        on_mismatch: OnMismatch = "raise",
        policy: Policy | None = None,
    ) -> None:
        check_asked("GoldenTrainerCallback", every, on_mismatch=(on_mismatch, OnMismatch))
        self.saves: list[VerifiedSave] = []
        self._golden = None if golden is None else read_golden(Path(golden))
        self._every = every
        self._on_mismatch = on_mismatch
        self._policy = policy or Policy(exact=True)
        self._num_saves = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise UsageError(
                    f"GoldenTrainerCallback: {name} writes shards, and no rank "
                    "holds the whole model",
                    hint="leave it out, and verify the checkpoint with `harness verify`",
                )

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._num_saves += 1
        if (self._num_saves - 1) % self._every:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        comparisons = self._comparisons(model, folder, state.global_step)
        save = verified(folder, state.global_step, comparisons, lambda: _NEXT)
        self.saves.append(save)
        if save.error is not None and self._on_mismatch == "raise":
            raise save.error
        if save.error is not None:
            hint = getattr(save.error, "hint", None) or _NEXT
            warnings.warn(f"GoldenTrainerCallback: {save.error}\n  next: {hint}", stacklevel=2)

    def _comparisons(self, model: nn.Module, folder: Path, step: int) -> Iterator[Comparison]:
        name = f"{type(model).__name__} in memory at step {step}"
        held = as_checkpoint(_state_of(model), name)
        with open_checkpoint(folder) as written:
            saved = as_held(held, written, self._policy)
        if _has_other_keys(saved) and is_pretrained(type(model)) and not _is_adapted(model):
            with user_code(f"{folder}: loading it", "load it by from_pretrained to see where"):
                loaded = as_checkpoint(_state_of(load_pretrained(type(model), folder)), str(folder))
            whole = as_held(held, loaded, self._policy)
            # Of a key that was only left out, the file says more than what stands for it now.
            if whole.ok or saved.count("unexpected"):
                saved = whole
        yield saved
        if self._golden is not None:
            with open_checkpoint(folder, section=self._golden.section) as written:
                golden = self._golden.fingerprint
                yield as_golden(golden, written, held, self._policy, frozen_of(model))


def _state_of(model: nn.Module) -> dict[str, Any]:
    """The tensors that a save of the model is to hold; of an adapted one, the adapter's."""
    state: Mapping[str, Any]
    if _is_adapted(model):
        state = sys.modules["peft"].get_peft_model_state_dict(model)
    else:
        state = model.state_dict()
    return {key: value for key, value in state.items() if hasattr(value, "untyped_storage")}


def _is_adapted(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft, which saves the adapter alone."""
    return any(base.__name__ == "PeftModel" for base in type(model).__mro__)


def _has_other_keys(compared: Comparison) -> bool:
    return any(f.kind in ("missing", "unexpected", "renamed", "prefix") for f in compared.findings)
