"""The live stages: load, reload and outputs, each compared with the golden or with the file.

In: a checkpoint, what to compare with, and which code is under test. Out: a `Comparison` per
stage; or, to record, a `LiveRecord`. The checkpoint is never written to: what is saved goes into a
temporary folder, or beside it under another name where it is to be kept.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from harness.checkpoint import open_checkpoint
from harness.checkpoint.keys import format_key
from harness.checkpoint.tensors import Checkpoint
from harness.comparison import buffers as buffers_of
from harness.comparison.causes.explain import with_causes
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.findings import FINDING_KINDS, Finding
from harness.comparison.matching import check_used
from harness.comparison.measuring import AgainstGolden
from harness.comparison.policy import STAGES, Policy, PolicyOfStages, fits
from harness.errors import NotRecorded
from harness.fingerprints.fingerprint import Fingerprint
from harness.fingerprints.scan import fingerprint
from harness.golden.golden import LiveRecord, source_of
from harness.model.activations import WhileRunning, compare_activations, renamed
from harness.model.inputs import NoInputs, inputs_of
from harness.model.lightning import lost_hyperparameters
from harness.model.loading import Loader, NotLoaded, Saved, compare_training_state
from harness.model.mismatch import brief_keys, of_failed_load
from harness.model.options import (
    LiveOptions,
    loader_of,
    output_policy,
    output_tolerance,
    selection_of,
)
from harness.model.outputs import outputs_of
from harness.model.pretrained import settings_of
from harness.model.state import as_checkpoint, on_meta, state_of, transient_buffers

_FIRST_SEED, _SECOND_SEED = 1, 2


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the stages are compared with: a golden's record, or the file itself (`roundtrip`).

    `section` is the part of the file that it is of, None for the state dict. `is_file` allows for
    another section of the file, should that be the one that fits the model.
    """

    weights: Fingerprint
    live: LiveRecord | None = None
    section: str | None = None
    is_file: bool = False


def record_live(
    path: Path,
    checkpoint: Checkpoint,
    options: LiveOptions,
    stage: str,
    golden: Path,
    weights: Fingerprint,
    *,
    before: LiveRecord | None,
    room: float,
) -> LiveRecord:
    """Load the checkpoint and record what the model makes of it, up to a stage.

    `golden` is the file that the record goes into: the files that it names are kept relative to it.
    Of buffers as much is kept as of its `weights`, of outputs as much as in the record `before`, or
    as fits into `room` bytes (`outputs_of`). Their tolerance, where none is asked for, is that of
    the record before.
    """
    loader = loader_of(options, checkpoint)
    module = loader.load(path, seed=_FIRST_SEED, section=checkpoint.section)
    buffers = transient_buffers(module)
    outputs = None
    if stage == "outputs":
        old = None if before is None else before.outputs
        outputs = outputs_of(
            module,
            inputs_of(module, options.inputs),
            tolerance=output_tolerance(options, old),
            room=room if old is None else math.inf if old.bits == 8 else 0,
        )
    return LiveRecord(
        target=options.target,
        stages=STAGES[: STAGES.index(stage) + 1],
        config=None if options.config is None else source_of(options.config, golden),
        inputs=None if options.inputs is None else source_of(options.inputs, golden),
        base=None if options.base is None else source_of(options.base, golden),
        parameters=_parameters(module),
        buffers=replace(
            fingerprint(
                as_checkpoint(buffers, "buffers"),
                block_nbytes=weights.block_nbytes,
                tolerance=weights.tolerance,
                bits=weights.bits,
            ),
            container="live buffers",
            keeps_aliases=False,
        )
        if buffers
        else None,
        outputs=outputs,
    )


def live_stages(
    path: Path, expected: Expected, policy: PolicyOfStages, options: LiveOptions, last: str | None
) -> Iterator[Comparison]:
    """Yield the comparison of each stage after `file`, up to `last`; None: as far as can be gone.

    That is to reload for a model without example inputs, which a note says.
    Raises ModelError and CheckpointError where a stage cannot be run at all, and UsageError at the
    end for what of the policy fitted no stage.
    """
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path, section=expected.section))
        loader = loader_of(options, checkpoint)
        stages = _Live(path, checkpoint, loader, expected, policy, stack)
        try:
            module = loader.load(path, seed=_FIRST_SEED, section=checkpoint.section)
        except NotLoaded as error:
            if expected.is_file and error.fitting is not None:
                first = checkpoint.section or "what is at its top"
                yield from _of_section(error.fitting, first, path, policy, options, last)
                return
            yield of_failed_load(error, expected.weights.name, policy.policy, "load")
            return
        load = stages.compare_load(module)
        if expected.is_file and expected.section is not None:
            load = _noted(load, f"section {expected.section} is taken, which fits the model")
        if on_meta(module):
            note = "the next stages did not run: what has no values is neither saved nor run"
            yield _noted(load, note)
            return
        yield load
        if last == "load":
            check_used(policy, load.expected, load.actual)
            return
        if options.keep:
            folder, stem = path.parent, f"{path.name.partition('.')[0]}.test"
        else:
            folder, stem = Path(stack.enter_context(tempfile.TemporaryDirectory())), "saved"
        saved = loader.save(module, folder, stem, original=path)
        try:
            again = loader.load(saved.path, seed=_SECOND_SEED)
        except NotLoaded as error:
            yield of_failed_load(error, expected.weights.name, policy.policy, "reload")
            return
        reload = stages.compare_reload(module, again, saved)
        if last is None:
            try:
                inputs_of(module, options.inputs)
            except NoInputs as error:
                note = f"outputs were not compared: {error}; {error.hint}"
                reload, last = _noted(reload, note), "reload"
        yield reload
        if last != "reload":
            yield _compare_outputs(module, again, expected, policy, options, is_same=reload.ok)
        check_used(policy, reload.expected, reload.actual)


def _of_section(
    section: str, first: str, path: Path, policy: PolicyOfStages, options: LiveOptions, last: Any
) -> Iterator[Comparison]:
    """The stages of the section that fits the model, where the one that is taken first does not."""
    with open_checkpoint(path, section=section) as checkpoint:
        weights = fingerprint(checkpoint, details=lambda tensor: False)
    note = f"section {section} is taken, which fits the model: {first} does not"
    expected = Expected(weights=weights, section=section)
    for comparison in live_stages(path, expected, policy, options, last):
        yield _noted(comparison, note)


@dataclass(frozen=True)
class _Live:
    path: Path
    checkpoint: Checkpoint
    loader: Loader
    expected: Expected
    policy: PolicyOfStages
    stack: contextlib.ExitStack

    def compare_load(self, module: nn.Module) -> Comparison:
        """The state after loading; what two loads leave different was never written."""
        found = self._compare_state(module, "load")
        suspects = [f for f in found.findings if f.kind in ("different", "unexpected")]
        if suspects:
            section, now = self.checkpoint.section, found.actual.tensors
            other = self._print(self.loader.load(self.path, seed=_SECOND_SEED, section=section))
            drawn = {k for k, t in other.tensors.items() if k in now and t.digest != now[k].digest}
            left = {id(f) for f in suspects if (f.actual_key or f.key) in drawn}
            findings = [
                replace(f, kind="unwritten") if id(f) in left else f for f in found.findings
            ]
            found = replace(found, findings=tuple(findings))
        if self.loader.is_strict(module):
            found = _restored(found)
        empty = [
            Finding(kind="unwritten", key=key, expected="values", actual="on the meta device")
            for key in on_meta(module)
        ]
        gradients = _changed_gradients(self._parameters_now(module), module)
        return _with(found, [*empty, *gradients])

    def compare_reload(self, module: nn.Module, again: nn.Module, saved: Saved) -> Comparison:
        """The state after saving and loading again, the optimizer's, the hyperparameters."""
        found = self._compare_state(again, "reload")
        if self.loader.is_strict(again):
            found = _restored(found)
        training = compare_training_state(self.path, saved)
        order = self._changed_order(module) if training is not None else []
        if saved.unbuilt is not None:
            found = _noted(found, f"the optimizers' state was not compared: {saved.unbuilt}")
        lost: list[Finding] = []
        own, kind = self.loader.has_own_folder(self.path), type(module)
        if own and (settings := settings_of(module)) is not None:
            lost = lost_hyperparameters(settings, settings_of(again), kind)
        elif saved.keeps_training:
            with open_checkpoint(saved.path) as written:
                lost = lost_hyperparameters(self.checkpoint.config, written.config, kind)
        elif self.checkpoint.config is not None or training:
            training = None
            note = f"a {kind.__name__} keeps no hyperparameters or optimizers: not compared"
            found = _noted(found, note)
        # What the load did to them is reported there.
        gradients = _changed_gradients(_parameters(module), again)
        return _with(found, [*gradients, *(training or []), *order, *lost])

    def _print(self, module: nn.Module) -> Fingerprint:
        state, _ = self._state(module)
        return fingerprint(state, details=lambda tensor: False)

    def _state(self, module: nn.Module) -> tuple[Checkpoint, Fingerprint]:
        """The module's state, and what it is compared with: buffers only where both have them."""
        weights, empty = self.expected.weights, on_meta(module)
        buffers = self.expected.live.buffers if self.expected.live is not None else None
        state = state_of(module, f"the loaded {type(module).__name__}")
        if not empty:  # else it cannot be saved
            state = self._as_saved(module, state)
        if buffers is not None:
            held = {k: v for k, v in transient_buffers(module).items() if k not in empty}
            transient = as_checkpoint(held, state.name)
            state = replace(state, tensors={**state.tensors, **transient.tensors})
            weights = replace(weights, tensors={**weights.tensors, **buffers.tensors})
        left = {key: tensor for key, tensor in weights.tensors.items() if key not in empty}
        return state, replace(weights, tensors=left) if empty else weights

    def _as_saved(self, module: nn.Module, state: Checkpoint) -> Checkpoint:
        """The state under the keys of the file, where the class writes others than it holds.

        As for experts that are stacked in memory, or an adapter, which is saved without its base.
        """
        held, wanted = state.tensors.keys(), self.expected.weights.tensors.keys()
        if held >= wanted or not self.loader.has_own_folder(self.path):
            return state
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        saved = self.loader.save(module, folder, "held", original=self.path)
        written = self.stack.enter_context(open_checkpoint(saved.path))
        if len(written.tensors.keys() & wanted) <= len(held & wanted):
            return state
        return replace(written, name=f"{state.name}, saved")

    def _compare_state(self, module: nn.Module, stage: str) -> Comparison:
        started = time.monotonic()
        state, expected = self._state(module)
        found = fingerprint(state, details=lambda tensor: False)
        # Where the file still is what was recorded, it decides exactly.
        measure = AgainstGolden(golden=expected, actual=state, partial_reference=self.checkpoint)
        policy = self.policy.at(expected.tensors, found.tensors)
        compared = compare(expected, found, policy, measure, stage=stage)
        compared = _noted(compared, *self.policy.note(policy))
        compared = with_causes(compared, state, started=started)
        live = self.expected.live
        if live is None or live.buffers is None:
            return compared
        return buffers_of.named(_without_alone(compared, live.buffers), live.buffers, state)

    def _parameters_now(self, module: nn.Module) -> tuple[tuple[str, bool], ...]:
        """The parameters that were recorded, by the names that they have in this model."""
        if self.expected.live is None:
            return ()
        policy, names = (
            self.policy.of_modules,
            dict(module.named_parameters(remove_duplicate=False)),
        )

        def now(name: str) -> str:
            new = policy.renamed(name)
            return next((n for n in (f"{policy.strip_prefix}{new}", new) if n in names), name)

        return tuple((now(name), grad) for name, grad in self.expected.live.parameters)

    def _changed_order(self, module: nn.Module) -> list[Finding]:
        """Optimizer state goes by index: another order of parameters gives it to others."""
        before = [name for name, _ in self._parameters_now(module)]
        after = [name for name, _ in _parameters(module)]
        return [
            Finding(
                kind="optimizer",
                key=name,
                expected=f"parameter {index} of the optimizer",
                actual=f"parameter {after.index(name)}, and takes another one's state",
            )
            for index, name in enumerate(before)
            if name in after and after.index(name) != index
        ]


def _noted(
    compared: Comparison, *notes: str, without: Sequence[Finding] = (), **changes: Any
) -> Comparison:
    """Add notes, which may stand in place of findings."""
    gone = set(map(id, without))  # of very many each is looked at once
    left = tuple(finding for finding in compared.findings if id(finding) not in gone)
    return replace(compared, findings=left, notes=(*compared.notes, *notes), **changes)


def _restored(compared: Comparison) -> Comparison:
    """Take what a module itself puts into the state dict that it loads as it says: a note.

    Only where torch has checked that every key was given: else it may have been left as it was.
    """
    own = [finding for finding in compared.findings if finding.kind == "unexpected"]
    note = f"in no file, put there by the module when it loads: {brief_keys([f.key for f in own])}"
    return _noted(compared, note, without=own) if own else compared


def _without_alone(compared: Comparison, buffers: Fingerprint) -> Comparison:
    """Take what another implementation built beside its weights, and this one does not: a note."""
    alone = [f for f in compared.findings if f.kind == "missing" and f.key in buffers.tensors]
    names = brief_keys([finding.key for finding in alone])
    note = f"structure, in no file: non-persistent buffers only in the golden: {names}"
    return _noted(compared, note, without=alone) if alone else compared


def _parameters(module: nn.Module, *, every_name: bool = False) -> tuple[tuple[str, bool], ...]:
    """Parameters in order, tied ones by their first name or by every one; and if trainable."""
    named = module.named_parameters(remove_duplicate=not every_name)
    return tuple((format_key((name,)), parameter.requires_grad) for name, parameter in named)


def _changed_gradients(
    before: tuple[tuple[str, bool], ...], module: nn.Module
) -> Iterator[Finding]:
    """Parameters that are frozen, unfrozen, or no longer parameters but buffers."""
    now = dict(_parameters(module, every_name=True))
    state = {format_key((name,)) for name in module.state_dict()}
    words = {True: "trainable", False: "frozen", None: "a buffer"}
    for name, grad in before:
        if now.get(name) != grad and (name in now or name in state):
            yield Finding(
                kind="requires_grad", key=name, expected=words[grad], actual=words[now.get(name)]
            )


def _with(comparison: Comparison, findings: Iterable[Finding]) -> Comparison:
    joined = [*comparison.findings, *findings]
    joined.sort(key=lambda finding: FINDING_KINDS.index(finding.kind))
    return replace(comparison, findings=tuple(joined))


_NO_OUTPUTS = (
    "no golden of outputs: the model is compared with itself after a reload "
    "(harness record --outputs makes one)"
)
_DRAWN = (
    "the reloaded model was built under another seed and computes something else: is something in "
    "it drawn at random, and in no file?"
)


def _compare_outputs(
    module: nn.Module,
    again: nn.Module,
    expected: Expected,
    asked: PolicyOfStages,
    options: LiveOptions,
    *,
    is_same: bool,
) -> Comparison:
    """What the loaded model computes, against the golden; without one, against the reloaded's.

    Where the reloaded model's state `is_same`, it has to compute the same, too: a difference is
    reported whatever the golden says, for no golden could hold it.
    """

    policy, recorded = asked.policy, None if expected.live is None else expected.live.outputs
    tolerance = output_tolerance(options, recorded)

    def computed(model: nn.Module, measure: WhileRunning | None = None) -> Fingerprint:
        # Of one model: the other may have drawn others when it was built.
        found = outputs_of(
            model,
            inputs_of(module, options.inputs),
            tolerance=tolerance,
            see=None if measure is None else measure.see,
        )
        return replace(
            found, name=f"the {'re' if model is again else ''}loaded {type(model).__name__}"
        )

    def beside(
        ours: Fingerprint, model: nn.Module, former: Mapping[str, str] = MappingProxyType({})
    ) -> Comparison:
        allowed = output_policy(options, ours, policy)
        measure = WhileRunning(expected=ours, policy=allowed, former=former)
        theirs = computed(model, measure)
        keys = {*ours.tensors, *theirs.tensors, *former.values()}
        ignore = tuple(glob for glob in policy.ignore if fits(glob, keys))
        asked.use(Policy(ignore=ignore))
        return compare_activations(measure, theirs, replace(selection_of(options), ignore=ignore))

    if expected.live is None:
        compared = beside(computed(module), again)
        drawn = (_DRAWN,) if is_same and not compared.ok else ()
        return _noted(compared, _NO_OUTPUTS, *drawn, is_of_reload=True)
    if recorded is None:
        raise NotRecorded(
            f"{expected.weights.name}: was recorded without outputs",
            hint="the same command with --update-golden records them",
        )
    modules = {name for name, _ in module.named_modules()}
    recorded = replace(recorded, name=expected.weights.name)
    recorded, former, used = renamed(recorded, asked.of_modules, modules)
    asked.use(used)
    compared = beside(recorded, module, former)
    if not is_same:
        return compared
    # Of two that part from the golden, what they agree on can be recorded.
    other = beside(recorded, again, former) if compared.ok else beside(compared.actual, again)
    return compared if other.ok else _noted(other, _DRAWN, is_of_reload=True)
