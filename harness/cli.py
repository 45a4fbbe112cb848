"""The command line: arguments in, reports and exit codes out; all else is in `harness.api`.

Exit codes: 0 all identical or close, 1 something differs, 2 could not tell (unreadable, usage),
3 nothing differs but something is undecided. Of several goldens the worst counts: 2, 1, 3, 0.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from harness import __version__
from harness.errors import GoldenError, HarnessError, NotRecorded, UsageError
from harness.options import (
    PATH,
    live_of,
    live_options,
    policy_of,
    policy_options,
    report_options,
    run_options,
    stage_of,
    stage_options,
)
from harness.progress import progress_bar

if TYPE_CHECKING:
    from harness.checkpoint.paths import AnyPath
    from harness.compare import Comparison, Policy
    from harness.golden import Golden
    from harness.model.stages import LiveOptions
    from harness.report.outcome import Outcome, Result
    from harness.report.text import Style

_GOLDEN = click.option("-g", "--golden", type=PATH, help="The golden file.")
_JOBS = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Threads; by default all the cores allowed, shared among ranks.",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command and exit with its code; a crash is a 2, never a 1."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    def command() -> int:
        return cli.main(arguments, prog_name="harness", standalone_mode=False, obj=arguments) or 0

    try:
        if not _is_one_of_several():
            return command()
        _import_numpy()
        from harness.model.launched import run_on_ranks

        return run_on_ranks(command, arguments)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return 130
    except (HarnessError, click.ClickException) as error:
        if {"--json", "--format=json", "json"} & set(arguments):
            _echo_json(_failure(error))
        elif isinstance(error, HarnessError):
            _echo_error(error)
        else:
            text = io.StringIO()
            error.show(file=text)
            click.echo(_without_secrets(text.getvalue()), err=True, nl=False)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as stopped:
        # Click's own: after shell completion, and by 1, which would say that a checkpoint differs,
        # where the reader has seen enough.
        return 2 if stopped.code else 0
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        _echo_error(UsageError(f"{what}{error.strerror or error}", hint="check the path"))
    except Exception:  # exit code 1 would say that a checkpoint differs
        traceback.print_exc()
        click.echo("error: this is a bug in the harness; please report it", err=True)
    return 2


def _is_one_of_several() -> bool:
    """Whether torchrun, or whoever sets its variables, has started several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 identical or close, 1 different, 2 could not tell, 3 undecided.",
)
@click.version_option(__version__, prog_name="harness")
def cli() -> None:
    """Tell from a small golden fingerprint whether a checkpoint still is what it was."""
    _import_numpy()


def _import_numpy() -> None:
    """Keep OpenBLAS to one thread: the harness runs its own, and torch later needs the variable."""
    if "numpy" in sys.modules or "OPENBLAS_NUM_THREADS" in os.environ:
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        import numpy  # noqa: F401 - reads the variable once, now
    finally:
        del os.environ["OPENBLAS_NUM_THREADS"]


@cli.command()
@click.argument("checkpoint", type=PATH)
@_GOLDEN
@click.option("--section", help="Another part than the state dict; '.' for every tensor.")
@click.option(
    "--block-size",
    type=int,
    metavar="BYTES",
    help="Bytes of a tensor that share a row of the sketch (default 32768).",
)
@click.option(
    "--values",
    type=click.Choice(["small", "all", "none"]),
    default="small",
    show_default=True,
    help="Which tensors are kept in full (small: up to 4096 elements).",
)
@stage_options
@live_options
@click.option("--overwrite", is_flag=True, help="Replace a golden, and forget its history.")
@_JOBS
def record(
    checkpoint: AnyPath,
    golden: AnyPath | None,
    section: str | None,
    block_size: int | None,
    values: Any,
    stage: Any,
    overwrite: bool,
    jobs: int | None,
    **options: Any,
) -> None:
    """Record the golden of CHECKPOINT.

    It goes to golden/<stem>.safetensors unless --golden says otherwise.
    """
    from harness import api
    from harness.checkpoint.sources import read_file
    from harness.sketch import DEFAULT_BLOCK_NBYTES

    stage = stage_of(stage, options)
    with progress_bar(checkpoint) as progress:
        recorded = api.record(
            checkpoint,
            golden,
            section=section,
            block_nbytes=DEFAULT_BLOCK_NBYTES if block_size is None else block_size,
            values=values,
            stage=stage,
            live=live_of(options) if stage != "file" else None,
            overwrite=overwrite,
            jobs=jobs,
            progress=progress,
        )
    found = recorded.fingerprint
    nbytes = len(read_file(recorded.path))
    total = sum(t.nbytes for t in found.tensors.values() if t.alias_of is None)
    beside = f" ({100 * nbytes / max(1, total):.1f} % of the weights)"
    if recorded.live is not None and recorded.live.outputs is not None:
        beside = f", with {len(recorded.live.outputs.tensors):,} inputs and outputs of submodules"
    click.echo(
        f"recorded {recorded.path}: {len(found.tensors):,} tensors of {checkpoint} "
        f"({found.container}), root {found.root.hex()[:16]}, {nbytes:,} bytes{beside}"
    )
    # Without the checkpoint, verify repeats the stages that were recorded.
    there = recorded.live is not None and recorded.checkpoint is not None
    given = "" if there else f" {shlex.quote(str(checkpoint))}"
    click.echo(f"next: harness verify{given}{_golden_option(recorded.path, checkpoint)}")


def _golden_option(golden: AnyPath, checkpoint: AnyPath) -> str:
    from harness.api import golden_path

    return "" if golden == golden_path(checkpoint) else f" -g {shlex.quote(str(golden))}"


@cli.command()
@click.argument("checkpoint", type=PATH, required=False)
@_GOLDEN
@policy_options
@click.option(
    "--reference", type=PATH, metavar="CKPT", help="The recorded checkpoint: decides exactly."
)
@click.option(
    "--cache", is_flag=True, help="Do not read again what did not change since the last --cache."
)
@click.option("--update-golden", is_flag=True, help="Show the differences, then accept them.")
@click.option("--reason", default="", help="Why the golden is updated; kept in its history.")
@stage_options
@live_options
@run_options
@report_options
@_JOBS
@click.pass_obj
def verify(
    arguments: list[str],
    /,
    checkpoint: AnyPath | None,
    golden: AnyPath | None,
    reference: AnyPath | None,
    cache: bool,
    update_golden: bool,
    reason: str,
    stage: Any,
    form: str,
    reports: tuple[Path, ...],
    jobs: int | None,
    **options: Any,
) -> int:
    """Compare CHECKPOINT with its golden.

    Without CHECKPOINT, every golden in golden/ is compared with the checkpoint that it names, in
    all the stages that it was recorded with.
    """
    from harness.cache import default_cache
    from harness.report.outcome import Result

    if reason and not update_golden:
        raise UsageError("--reason goes with --update-golden")
    run = _Run(
        policy=policy_of(options),
        stage=stage,
        options=options,
        reference=reference,
        cache=default_cache() if cache else None,
        jobs=jobs,
        form=form,
        updating=update_golden,
        reason=reason,
        arguments=arguments,
    )
    try:
        goldens = _goldens(checkpoint, golden)
    except HarnessError as error:
        outcomes: tuple[Outcome, ...] = (_ended(error, form, expected=golden, actual=checkpoint),)
    else:
        outcomes = tuple(run.outcome(checkpoint, target) for target in goldens)
    return _finish(Result(command="verify", outcomes=outcomes), form, reports)


def _goldens(checkpoint: AnyPath | None, golden: AnyPath | None) -> Sequence[AnyPath]:
    from harness.api import GOLDEN_FOLDER, choose_golden
    from harness.golden import SUFFIX

    if checkpoint is not None or golden is not None:
        return [choose_golden(checkpoint, golden)]
    found = [path for path in sorted(GOLDEN_FOLDER.glob(f"*{SUFFIX}")) if not _is_other(path)]
    if not found:
        above = next(
            (p for p in Path.cwd().parents if any(p.glob(f"{GOLDEN_FOLDER}/*{SUFFIX}"))), None
        )
        raise GoldenError(
            f"no goldens in {GOLDEN_FOLDER}/ of the current folder",
            hint="record one: harness record CHECKPOINT"
            if above is None
            else f"go to where they are: cd {shlex.quote(os.path.relpath(above))}",
        )
    return found


def _is_other(path: Path) -> bool:
    """Whether a file among the goldens is something else in good order, such as inputs."""
    from harness.api import open_checkpoint
    from harness.golden import is_golden

    if is_golden(path):
        return False
    try:
        open_checkpoint(path).close()
    except HarnessError:
        return False
    click.echo(f"note: {path} is no golden, and is left out", err=True)
    return True


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One invocation of verify: what is asked for, for each golden in turn."""

    policy: Policy
    stage: Any
    options: dict[str, Any]
    reference: AnyPath | None
    cache: Path | None
    jobs: int | None
    form: str
    updating: bool
    reason: str
    arguments: list[str]

    def outcome(self, checkpoint: AnyPath | None, golden: AnyPath) -> Outcome:
        """Verify one golden and report each stage as it ends; update it if that is asked for."""
        from harness import api
        from harness.report.outcome import Outcome

        stages: list[Comparison] = []
        steps: tuple[str, ...] = ()
        updated, error = None, None
        try:
            recorded = api.read_golden(golden)
            try:
                self._verify(checkpoint, recorded, stages)
            except NotRecorded:
                if not self.updating:
                    raise
            if self.updating:
                updated = self._update(checkpoint, recorded)
                # What a golden cannot hold is still there: it holds the file, not the code.
                if any(not s.ok for s in stages if s.stage in ("load", "reload")):
                    stages.clear()
                    self._verify(checkpoint, api.read_golden(golden), stages)
            else:
                steps = self._next_steps(stages, checkpoint, recorded)
        except HarnessError as found:
            error = _told(found, self.form)
        for line in steps if self.form == "text" else ():
            click.echo(f"\n  {line}")
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
        from harness import api

        stage = self._stage(checkpoint, recorded)
        with progress_bar(checkpoint or recorded.checkpoint) as progress:
            for comparison in api.verify_stages(
                checkpoint,
                recorded,
                policy=self.policy,
                stage=stage,
                live=self._live(recorded, stage),
                reference=self.reference,
                cache=self.cache,
                jobs=self.jobs,
                progress=progress,
            ):
                stages.append(comparison)
                _echo_stage(comparison, self.form)

    def _update(self, checkpoint: AnyPath | None, recorded: Golden) -> bool:
        """Accept what is there now; returns whether the golden changed."""
        from harness import api
        from harness.checkpoint.sources import read_file

        stage = self._stage(checkpoint, recorded)
        before = read_file(recorded.path)
        with progress_bar(checkpoint or recorded.checkpoint) as progress:
            updated = api.update(
                checkpoint,
                recorded,
                reason=self.reason,
                stage=stage,
                live=self._live(recorded, stage),
                jobs=self.jobs,
                progress=progress,
            )
        changed = read_file(recorded.path) != before
        if self.form == "text" and not changed:
            click.echo(f"{recorded.path} is up to date, and was not touched")
        elif self.form == "text":
            roots = (recorded.fingerprint.root.hex()[:16], updated.fingerprint.root.hex()[:16])
            said = "is as it was" if roots[0] == roots[1] else f"is now {roots[1]}"
            click.echo(f"updated {recorded.path}: root {roots[0]} {said}")
            for entry in updated.history:
                click.echo(f"  replaced {entry.root[:16]}  {entry.reason or '(no reason given)'}")
        return changed

    def _stage(self, checkpoint: AnyPath | None, golden: Golden) -> Any:
        """How far to go: as asked for, else as the golden remembers where no file is named."""
        remembered = golden.live.stages[-1] if golden.live is not None else "file"
        return stage_of(self.stage, self.options, remembered if checkpoint is None else "file")

    def _live(self, golden: Golden, stage: Any) -> LiveOptions | None:
        if stage == "file":
            return None
        from harness.model.stages import remembered

        return live_of(self.options, remembered(golden))

    def _next_steps(
        self, stages: Sequence[Comparison], checkpoint: AnyPath | None, golden: Golden
    ) -> tuple[str, ...]:
        from harness import api
        from harness.report.outcome import worst
        from harness.report.text import how_to_accept

        code = worst(stage.exit_code for stage in stages)
        found = next(stage for stage in stages if stage.exit_code == code)
        kinds = {finding.kind for finding in found.findings if finding.fails}
        strangers = kinds == {"missing", "unexpected"} and not found.num_identical
        if checkpoint and strangers and not api.golden_path(checkpoint).exists():
            return (
                "if it is another model, give it a golden of its own:  "
                f"harness record {shlex.quote(str(checkpoint))}",
            )
        if found.stage in ("load", "reload") and kinds - {"requires_grad"}:
            return (
                "the golden holds the file, not what the code makes of it: mend the code, "
                "or save what it makes as a checkpoint and record that",
            )
        there = golden.checkpoint
        # Of a URL it is not worth asking.
        known = there is not None and (not isinstance(there, Path) or there.exists())
        # As it was asked, so that the same question is asked again.
        which = [] if checkpoint or self._names_golden() else ["-g", str(golden.path)]
        asked = map(_without_secrets, _without_reports(self.arguments))
        command = shlex.join(["harness", *asked, *which])
        reference = [shlex.quote(str(there))] if known else []
        return tuple(how_to_accept(found, command, *reference))

    def _names_golden(self) -> bool:
        return any(a == "-g" or a.startswith("--golden") for a in self.arguments)


def _without_reports(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without those that only say how to report."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--report", "--format"):
            next(rest, None)
        elif not argument.startswith(("--report=", "--format=")):
            kept.append(argument)
    return kept


def _without_secrets(text: str) -> str:
    """What a person typed may hold a URL with a password or a signature."""
    from harness.checkpoint.remote import redacted

    return redacted(text)


def _echo_stage(comparison: Comparison, form: str) -> None:
    from harness.report.text import render

    if form == "text":
        click.echo(render(comparison, _style()))


def _told(error: HarnessError, form: str) -> HarnessError:
    """What ended an outcome early; printed at once in a text report."""
    if form == "text":
        _echo_error(error)
    return error


def _ended(
    error: HarnessError, form: str, *, expected: AnyPath | None, actual: AnyPath | None
) -> Outcome:
    """The outcome of what ended before anything was compared."""
    from harness.report.outcome import Outcome

    return Outcome(
        expected=None if expected is None else str(expected),
        actual=None if actual is None else str(actual),
        error=_told(error, form),
    )


def _finish(result: Result, form: str, reports: Sequence[Path]) -> int:
    """Print the JSON, write the reports, and give the exit code of all."""
    from harness.report.files import append_step_summary, write_report
    from harness.report.json import result_as_json

    code = result.exit_code
    if form == "json":
        _echo_json(result_as_json(result))
    for path in reports:
        try:
            write_report(result, path)
        except HarnessError as error:  # the others are still wanted
            _echo_error(error)
            code = 2
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        try:
            append_step_summary(result, Path(summary))
        except HarnessError as error:  # no reason for a run to fail
            click.echo(f"note: {error}", err=True)
    return code


@cli.command()
@click.argument("checkpoint", type=PATH)
@policy_options
@live_options
@run_options
@report_options
def roundtrip(checkpoint: AnyPath, form: str, reports: tuple[Path, ...], **options: Any) -> int:
    """Load, save, reload and run CHECKPOINT.

    Each is compared with the file itself, and the outputs with each other: no golden is needed.
    """
    from harness import api
    from harness.report.outcome import Outcome, Result

    stages, error = [], None
    try:
        for comparison in api.roundtrip(
            checkpoint, policy=policy_of(options), live=live_of(options)
        ):
            stages.append(comparison)
            _echo_stage(comparison, form)
    except HarnessError as found:
        error = _told(found, form)
    outcome = Outcome(expected=None, actual=str(checkpoint), stages=tuple(stages), error=error)
    return _finish(Result(command="roundtrip", outcomes=(outcome,)), form, reports)


@cli.command()
@click.argument("expected", type=PATH)
@click.argument("actual", type=PATH)
@policy_options
@report_options
@_JOBS
def diff(
    expected: AnyPath,
    actual: AnyPath,
    form: str,
    reports: tuple[Path, ...],
    jobs: int | None,
    **options: Any,
) -> int:
    """Compare two checkpoints, or goldens.

    Two checkpoints are compared element by element, a golden by what it keeps.
    """
    from harness import api
    from harness.report.outcome import Outcome, Result

    policy = policy_of(options)
    try:
        with progress_bar(expected) as progress:
            comparison = api.diff(
                expected,
                actual,
                policy=policy,
                stats=bool(reports),
                jobs=jobs,
                progress=progress,
            )
    except HarnessError as error:
        outcome = _ended(error, form, expected=expected, actual=actual)
    else:
        _echo_stage(comparison, form)
        outcome = Outcome(expected=str(expected), actual=str(actual), stages=(comparison,))
    return _finish(Result(command="diff", outcomes=(outcome,)), form, reports)


@cli.command()
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with stats.")
@click.option("--stats", is_flag=True, help="Add statistics of the values.")
@click.option("--section", help="Another part than the state dict; '.' for every tensor.")
@_JOBS
def show(file: AnyPath, as_json: bool, stats: bool, section: str | None, jobs: int | None) -> None:
    """List the tensors of a golden or checkpoint.

    The table is fit for git's textconv.
    """
    from harness import api
    from harness.fingerprint import fingerprint
    from harness.golden import is_golden
    from harness.report.json import fingerprint_as_json
    from harness.report.table import render_table

    history = None
    if is_golden(file):
        recorded = api.read_golden(file)
        found, history = recorded.fingerprint, recorded.history
    else:
        wanted = as_json or stats
        with progress_bar(file) as progress, api.open_checkpoint(file, section=section) as opened:
            found = fingerprint(
                opened,
                details=lambda tensor: wanted,
                keep_values=lambda tensor: True,
                jobs=jobs,
                progress=progress,
            )
    if as_json:
        data = fingerprint_as_json(found)
        if history is not None:
            data["history"] = [{"root": u.root, "reason": u.reason} for u in history]
        _echo_json(data)
    else:
        click.echo(render_table(found, history=history or (), stats=stats))


def _style() -> Style:
    from harness.report.text import Style

    terminal = sys.stdout.isatty()
    color = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    width = shutil.get_terminal_size().columns if terminal else None
    return Style(color=color, unicode=terminal and utf8, width=width)


def _echo_error(error: HarnessError) -> None:
    from harness.report.folding import escaped

    click.echo(f"error: {escaped(str(error))}", err=True)
    if error.hint:
        click.echo(f"  next: {escaped(error.hint)}", err=True)


def _failure(error: HarnessError | click.ClickException) -> dict[str, Any]:
    from harness.report.json import error_as_json

    if isinstance(error, click.ClickException):
        error = UsageError(_without_secrets(error.format_message()), hint="harness --help")
    return {"exit_code": 2, "error": error_as_json(error)}


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))
