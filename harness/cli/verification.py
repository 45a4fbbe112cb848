"""One run of `harness verify`: each golden in turn, stage by stage, and the next steps.

In: what was asked for on the command line. Out: an `Outcome` per golden, each stage of which is
printed as it ends; an updated golden where that is asked for. Refused (GoldenError): a folder
without goldens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources.access import read_file
from harness.checkpoint.sources.paths import AnyPath
from harness.cli.live import live_of, stage_of
from harness.cli.options import (
    NOT_ON_UPDATE,
    Invocation,
    check_update,
    expanded,
    policy_of,
    without_operands,
)
from harness.cli.progress import progress_bar
from harness.cli.terminal import (
    asked_again,
    echo_stage,
    echo_steps,
    echo_total,
    ended,
    finish,
    told,
)
from harness.comparison.comparison import Comparison
from harness.comparison.policy import STAGES, Policy
from harness.errors import GoldenError, HarnessError, ModelError, NotRecorded, UsageError
from harness.golden.budget import size_that_decides
from harness.golden.file import is_golden, read_golden
from harness.golden.folder import goldens_below
from harness.golden.golden import SUFFIX, Golden, source_of
from harness.golden.places import GOLDEN_FOLDER, choose_golden, is_same, other_reference
from harness.golden.project import project_of
from harness.report.outcome import Outcome, Result, worst_stage
from harness.text.folding import escaped
from harness.text.shell import quoted

if TYPE_CHECKING:
    from harness.model.options import LiveOptions
    from harness.streaming.workers import Group


class Target(NamedTuple):
    """One golden to verify, and the checkpoint that was given for it, if any."""

    checkpoint: AnyPath | None
    golden: AnyPath
    is_named: bool = True


def targets_of(checkpoints: Sequence[AnyPath], golden: AnyPath | None) -> Sequence[Target]:
    """What to verify: each checkpoint with its golden, or each golden with what it names."""
    is_folder = golden is None or (isinstance(golden, Path) and golden.is_dir())
    if checkpoints:
        if len(checkpoints) > 1 and not is_folder:
            raise UsageError(
                f"-g {golden}: one golden for {len(checkpoints)} checkpoints",
                hint="give the folder of their goldens with -g, or leave it out",
            )
        return [Target(one, choose_golden(one, golden), not is_folder) for one in checkpoints]
    if golden is not None and not is_folder:
        return [Target(None, golden)]
    folder = GOLDEN_FOLDER if golden is None else golden
    assert isinstance(folder, Path)
    return [Target(None, path) for path in _goldens_to_verify(folder)]


def _goldens_to_verify(folder: Path) -> Sequence[Path]:
    if folder.is_dir():
        next(folder.iterdir(), None)  # raises where the search would silently find nothing
    paths, num_of_tests = goldens_below(folder)
    if num_of_tests:
        said = "1 golden belongs" if num_of_tests == 1 else f"{num_of_tests:,} goldens belong"
        click.echo(f"note: {said} to tests, which verify what they make: pytest", err=True)
    if not paths and not num_of_tests:
        raise _no_goldens(folder)
    return [path for path in paths if not _is_left_out(path)]


def _no_goldens(folder: Path) -> GoldenError:
    project = project_of(Path.cwd())
    parents = [path for path in Path.cwd().parents if path.is_relative_to(project)]
    above = next((path for path in parents if any((path / folder).rglob(f"*{SUFFIX}"))), None)
    where = "of the current folder" if folder == Path("golden") else ""
    return GoldenError(
        f"no goldens in {folder}/ {where}".rstrip(),
        hint="record one: harness record CHECKPOINT"
        if above is None or folder.is_absolute()
        else f"go to where they are: cd {quoted(os.path.relpath(above))}",
    )


def _is_left_out(path: Path) -> bool:
    """Whether a file among the goldens, in good order, is nothing to verify here; says so.

    Such as inputs of a model, or the golden of a live one, which a test or a script verifies.
    """
    try:
        if not is_golden(path):
            open_checkpoint(path).close()
            why = "is no golden"
        elif not read_golden(path).source:
            why = "was recorded from a live model, names no checkpoint"
        else:
            return False
    except HarnessError:  # told when it is verified
        return False
    click.echo(escaped(f"note: {path} {why}, and is left out"), err=True)
    return True


def verify_each(
    asked: Invocation,
    checkpoints: tuple[AnyPath, ...],
    golden: AnyPath | None,
    options: dict[str, Any],
) -> int:
    """Compare each checkpoint with its golden, and report; returns the exit code of all."""
    updating, form = options["update_golden"], options["form"]
    if options["reason"] and not updating:
        raise UsageError("--reason needs --update-golden", hint="add --update-golden")
    if options["section"] is not None and updating:
        raise UsageError(
            "--section cannot be combined with --update-golden, which keeps the golden's section",
            hint="record the other section: harness record CKPT --section NAME -g GOLDEN",
        )
    policy = policy_of(options)
    if updating:
        check_update(policy)
    given = expanded(checkpoints)
    try:
        targets = targets_of(given, golden)
    except HarnessError as error:
        actual = given[0] if given else None
        outcomes: tuple[Outcome, ...] = (ended(error, form, expected=golden, actual=actual),)
    else:
        typed = asked.arguments
        run = Verification(
            policy=policy,
            options=options,
            group=asked.group,
            form=form,
            updating=updating,
            arguments=typed if len(given) < 2 else without_operands(typed, checkpoints),
            names_one=len(targets) == 1 and (golden is not None or bool(given)),
        )
        outcomes = tuple(run.outcome(target) for target in targets)
        if len(outcomes) > 1 and form == "text":
            echo_total(outcomes)
    return finish(Result(command="verify", outcomes=outcomes), form, options["reports"])


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One invocation of verify: what is asked for, for each golden in turn.

    `names_one` says that the arguments name one checkpoint or golden alone.
    """

    policy: Policy
    options: dict[str, Any]
    group: Group | None
    form: str
    updating: bool
    arguments: list[str]
    names_one: bool

    def outcome(self, target: Target) -> Outcome:
        """Verify one golden and report each stage as it ends; update it if that is asked for."""
        checkpoint, golden = target.checkpoint, target.golden
        stages: list[Comparison] = []
        steps: tuple[str, ...] = ()
        recorded, updated, error = None, None, None
        try:
            recorded = api.read_golden(golden)
            self._say_whose(recorded, target)
            try:
                self._verify(checkpoint, recorded, stages)
            except NotRecorded:
                if not self.updating:
                    raise
            if self.updating:
                updated = self._update(checkpoint, recorded)
                # What a golden cannot hold is still there: it holds the file, not the code.
                if any(not s.ok for s in stages if not s.can_be_recorded):
                    stages.clear()
                    self._verify(checkpoint, api.read_golden(golden), stages)
            else:
                steps = self._next_steps(stages, target, recorded)
        except HarnessError as found:
            error = told(found, self.form)
            # After a ModelError they would end in the same.
            if recorded is not None and not (self.updating or isinstance(found, ModelError)):
                steps = self._next_steps(stages, target, recorded)
        echo_steps(steps, self.form)
        name = stages[0].actual.name if stages else None
        return Outcome(
            expected=str(golden),
            actual=name if name is not None or checkpoint is None else str(checkpoint),
            stages=tuple(stages),
            error=error,
            updated=updated,
            next_steps=steps,
        )

    def _verify(
        self, checkpoint: AnyPath | None, recorded: Golden, stages: list[Comparison]
    ) -> None:
        stage = self._stage(checkpoint, recorded)
        with ExitStack() as reading:
            progress = reading.enter_context(progress_bar(checkpoint or recorded.checkpoint))
            for comparison in api.verify_stages(
                checkpoint,
                recorded,
                **{
                    name: self.options[name] for name in ("section", "reference", "adapter", "jobs")
                },
                policy=self.policy,
                stage=stage,
                live=self._live(recorded, stage),
                progress=progress,
                group=self.group,
            ):
                reading.close()  # the bar is of the file; the report has the terminal to itself
                comparison = self._with_note(comparison, stage, recorded)
                echo_stage(comparison, self.form, stages)
                stages.append(comparison)

    def _update(self, checkpoint: AnyPath | None, recorded: Golden) -> bool:
        """Accept what is there now; returns whether the golden changed."""
        from harness.report.table import told as told_entry

        stage = self._stage(checkpoint, recorded)
        before = read_file(recorded.path)
        with progress_bar(checkpoint or recorded.checkpoint) as progress:
            updated = api.update(
                checkpoint,
                recorded,
                reason=self.options["reason"],
                stage=stage,
                live=self._live(recorded, stage),
                jobs=self.options["jobs"],
                progress=progress,
                group=self.group,
            )
        changed = read_file(recorded.path) != before
        if self.form == "text" and not changed:
            click.echo(escaped(f"{recorded.path} is already up to date"))
        elif self.form == "text":
            roots = (recorded.fingerprint.root.hex()[:16], updated.fingerprint.root.hex()[:16])
            said = "is unchanged" if roots[0] == roots[1] else f"is now {roots[1]}"
            click.echo(escaped(f"updated {recorded.path}: root {roots[0]} {said}"))
            if updated.source != recorded.source:
                was, now = recorded.source or "memory", updated.source or "memory"
                click.echo(escaped(f"  source {was} is now {now}"))
            for entry in updated.history:
                click.echo(f"  replaced {told_entry(entry)}")
        return changed

    def _stage(self, checkpoint: AnyPath | None, golden: Golden) -> Any:
        """How far to go: as asked for, else as the golden remembers where no file is named.

        An update records anew all that the golden remembers, and shows all of it before.
        """
        remembered = _last_stage(golden)
        repeats = checkpoint is None or self.updating
        stage = stage_of(self.options["stage"], self.options, remembered if repeats else "file")
        if self.updating and STAGES.index(stage) < STAGES.index(remembered):
            raise UsageError(
                f"--{stage} cannot be combined with --update-golden: the golden also holds "
                f"{remembered}, which an update records anew",
                hint=f"leave out --{stage}",
            )
        return stage

    def _with_note(self, comparison: Comparison, stage: Any, golden: Golden) -> Comparison:
        """Say at the last stage what a golden knows beyond it, unless it was asked to end there."""
        remembered = _last_stage(golden)
        beyond = STAGES[STAGES.index(stage) + 1 : STAGES.index(remembered) + 1]
        if comparison.stage != stage or self.options["stage"] is not None or not beyond:
            return comparison
        them = "them" if len(beyond) > 1 else "it"
        note = f"the golden also holds {', '.join(beyond)}: add --{remembered} to compare {them}"
        return replace(comparison, notes=(*comparison.notes, note))

    def _live(self, golden: Golden, stage: Any) -> LiveOptions | None:
        if stage == "file":
            return None
        from harness.model.options import remembered

        return live_of(self.options, remembered(golden))

    def _next_steps(
        self, stages: Sequence[Comparison], target: Target, golden: Golden
    ) -> tuple[str, ...]:
        from harness.cli.steps import next_steps

        checkpoint = target.checkpoint
        found = worst_stage(stages)
        if found is None or found.ok:
            return ()
        if checkpoint and found.no_common_key:
            own, typed = api.golden_path(checkpoint), quoted(str(checkpoint))
            if not own.exists():
                return (
                    f"if it is another model, give it a golden of its own:  harness record {typed}",
                )
            if not is_same(own, golden.path):
                return (
                    f"if it is another model, it has a golden of its own:  harness verify {typed}",
                )
        if _is_of_another(golden, target):
            typed = quoted(str(checkpoint))
            return (f"to give it a golden of its own:  harness record {typed}",)
        # As it was asked, so that the same question is asked again.
        which = self._which(target)
        there = other_reference(golden, checkpoint)
        return tuple(
            next_steps(
                found,
                command=["harness", *asked_again(self.arguments), *which],
                update=["harness", *self._updating_arguments(), *which],
                record=_recording(golden, found, there),
                **({} if there is None else {"reference": str(there)}),
            )
        )

    def _say_whose(self, golden: Golden, target: Target) -> None:
        if _is_of_another(golden, target) and self.form == "text":
            source = golden.checkpoint or golden.source
            click.echo(escaped(f"note: {golden.path} was recorded from another file: {source}"))

    def _which(self, target: Target) -> list[str]:
        """What narrows a command of several down to one golden."""
        if self.names_one:
            return []
        there = [] if target.checkpoint is None else [str(target.checkpoint)]
        return [*there, "-g", str(target.golden)]

    def _updating_arguments(self) -> list[str]:
        """What was asked, as an update takes it: it goes as far as the golden does."""
        shorter = [f"--{stage}" for stage in STAGES[:-1]]
        asked = asked_again(self.arguments, but=NOT_ON_UPDATE)
        return [argument for argument in asked if argument not in shorter]


def _is_of_another(golden: Golden, target: Target) -> bool:
    """Whether a golden that was chosen by its name says that it is of another file."""
    checkpoint = target.checkpoint
    if checkpoint is None or target.is_named:
        return False
    return golden.source not in ("", source_of(checkpoint, golden.path))


def _last_stage(golden: Golden) -> str:
    return golden.live.stages[-1] if golden.live is not None else "file"


def _recording(golden: Golden, found: Comparison, reference: AnyPath | None) -> list[str]:
    """The command that records a golden which decides what this one leaves undecided."""
    undecided = [f.key for f in found.findings if f.kind == "undecided"]
    weights = {} if found.stage == "outputs" else golden.fingerprint.tensors
    tensors = [weights[key] for key in undecided if key in weights]
    kept = [tensor.residues for tensor in tensors if tensor.sketch is not None]
    if all(residues is not None and residues.grid.bits == 8 for residues in kept):
        return []
    size = size_that_decides(golden.fingerprint, 4 if None in kept else 8)
    command = ["harness", "record", str(reference or "RECORDED_CKPT"), "-g", str(golden.path)]
    command += [] if golden.section is None else ["--section", golden.section]
    if golden.live is not None:
        live = golden.live
        files = {"--config": live.config, "--inputs": live.inputs, "--base": live.base}
        given = {flag: str(golden.beside(file)) for flag, file in files.items() if file is not None}
        given |= {} if golden.live.target is None else {"--model": golden.live.target}
        command += [f"--{golden.live.stages[-1]}", *chain.from_iterable(given.items())]
    return [*command, "--overwrite", "--max-size", size]
