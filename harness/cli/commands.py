"""The commands: arguments in, reports and exit codes out; what verbs do is in `harness.api`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.live import (
    code_options,
    last_of_roundtrip,
    live_of,
    live_options,
    live_stage_options,
    run_options,
    stage_options,
)
from harness.cli.options import (
    PATH,
    Command,
    Invocation,
    expanded,
    policy_of,
    policy_options,
    remember_roots,
    report_options,
    section_options,
    size,
)
from harness.cli.progress import progress_bar
from harness.cli.terminal import (
    asked_again,
    echo_changes,
    echo_json,
    echo_stage,
    echo_steps,
    ended,
    finish,
    told,
)
from harness.errors import HarnessError, UsageError
from harness.text.folding import escaped
from harness.text.shell import quoted
from harness.version import __version__

if TYPE_CHECKING:
    from harness.checkpoint.sources.paths import AnyPath
    from harness.streaming.workers import Group


_GOLDEN = click.option("-g", "--golden", type=PATH, help="The golden, or the folder of goldens.")
_ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path),
    multiple=True,
    expose_value=False,
    callback=remember_roots,
    help="A folder outside the project that holds checkpoints. Repeatable.",
)
_ADAPTER = click.option(
    "--adapter",
    type=PATH,
    metavar="FILE",
    help="A LoRA adapter: name the tensors that are the expected ones plus its scaled B·A.",
)
_JOBS = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Number of threads; by default all available cores, shared among ranks.",
)


# What other tools call it.
_MEANT = {
    **dict.fromkeys(("update", "accept"), "verify CKPT --update-golden --reason WHY"),
    **dict.fromkeys(("check", "test"), "verify CKPT"),
    **dict.fromkeys(("list", "info", "inspect"), "show FILE"),
    "create": "record CKPT",
    "compare": "diff EXPECTED ACTUAL",
    "log": "show GOLDEN",
    "help": "--help",
}


class _Commands(click.Group):
    """The commands in the order in which they are needed; others' names lead to them."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in _MEANT and not ctx.resilient_parsing:
            raise UsageError(f"no command {args[0]}", hint=f"harness {_MEANT[args[0]]}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 identical or close, 1 different, 2 could not be checked, 3 undecided.",
)
@click.version_option(__version__, prog_name="harness")
def cli() -> None:
    """Snapshot testing for model checkpoints.

    'harness record CHECKPOINT' writes a small golden; commit it. 'harness verify' then shows
    whether the weights, or the code that loads them, have changed, and how.
    """
    import_numpy()


def import_numpy() -> None:
    """Keep OpenBLAS to one thread: the harness runs its own, and torch later needs the variable."""
    if "numpy" in sys.modules or "OPENBLAS_NUM_THREADS" in os.environ:
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        import numpy  # noqa: F401 - reads the variable once, now
    finally:
        del os.environ["OPENBLAS_NUM_THREADS"]


@cli.command()
@click.argument("checkpoints", type=PATH, nargs=-1, required=True, metavar="CHECKPOINT...")
@_GOLDEN
@_ROOT
@section_options
@click.option(
    "--max-size",
    callback=size,
    metavar="SIZE",
    help="Largest size of the golden, such as 57MB; by default 8MB, or 1 % up to 100MB. Outputs "
    "that take more come on top, with half of the bits.",
)
@click.option(
    "--atol", type=float, help="Absolute tolerance that the golden decides; by default 1e-5."
)
@click.option(
    "--rtol", type=float, help="Relative tolerance that the golden decides; by default 1e-5."
)
@click.option(
    "--values",
    type=click.Choice(["small", "all", "none"]),
    default="small",
    show_default=True,
    help="Which tensors to keep in full; small ones have up to 4096 elements.",
)
@stage_options
@live_options
@click.option("--overwrite", is_flag=True, help="Replace an existing golden and its history.")
@_JOBS
@click.pass_obj
def record(
    asked: Invocation, /, checkpoints: tuple[AnyPath, ...], golden: AnyPath | None, **options: Any
) -> int:
    """Record a golden of each CHECKPOINT.

    Writes golden/<stem>.safetensors, or what --golden names.

    Example: harness record models/*.nemo
    """
    from harness.cli.recording import record_each

    return record_each(expanded(checkpoints), golden, group=asked.group, **options)


@cli.command()
@click.argument("checkpoints", type=PATH, nargs=-1, metavar="[CHECKPOINT]...")
@_GOLDEN
@_ROOT
@section_options
@policy_options
@click.option(
    "--reference", type=PATH, metavar="CKPT", help="The recorded checkpoint: decides every tensor."
)
@_ADAPTER
@click.option("--update-golden", is_flag=True, help="Show the differences, then record them.")
@click.option("--reason", default="", help="Why the golden changes; kept in its history.")
@stage_options
@live_options
@run_options
@report_options
@_JOBS
@click.pass_obj
def verify(
    asked: Invocation, /, checkpoints: tuple[AnyPath, ...], golden: AnyPath | None, **options: Any
) -> int:
    """Compare each CHECKPOINT with its golden.

    Without CHECKPOINT, compares every golden below golden/ (or below the folder given with -g) with
    the checkpoint that it was recorded from, in all the stages that it holds.

    Example: harness verify models/nest.nemo
    """
    from harness.cli.verification import verify_each

    return verify_each(asked, checkpoints, golden, options)


@cli.command()
@click.argument("checkpoint", type=PATH)
@section_options
@policy_options
@live_stage_options
@live_options
@run_options
@report_options
@click.pass_obj
def roundtrip(
    asked: Invocation, /, checkpoint: AnyPath, form: str, reports: tuple[Path, ...], **options: Any
) -> int:
    """Load, save, reload and run CHECKPOINT.

    Compares each state with the file, and the outputs with each other. Needs no golden.

    Example: harness roundtrip models/nest.nemo
    """
    from harness import api
    from harness.cli.steps import lines_past
    from harness.report.outcome import Outcome, Result, worst_stage

    stages, error = [], None
    try:
        for comparison in api.roundtrip(
            checkpoint,
            section=options["section"],
            policy=policy_of(options),
            stage=last_of_roundtrip(options),
            live=live_of(options),
        ):
            stages.append(comparison)
            echo_stage(comparison, form)
    except HarnessError as found:
        error = told(found, form)
    worst = worst_stage(stages) if error is None else None
    echo_steps(lines_past(worst, ["harness", *asked_again(asked.arguments)]), form)
    outcome = Outcome(expected=None, actual=str(checkpoint), stages=tuple(stages), error=error)
    return finish(Result(command="roundtrip", outcomes=(outcome,)), form, reports)


@cli.command()
@click.argument("expected", type=PATH)
@click.argument("actual", type=PATH)
@section_options
@click.option("--section-b", metavar="NAME", help="The same for ACTUAL, where it differs.")
@_ADAPTER
@click.option("--table", is_flag=True, help="Show how much each tensor changed.")
@click.option("--unchanged", is_flag=True, help="List the tensors that did not change.")
@policy_options
@report_options
@_JOBS
@click.pass_obj
def diff(
    asked: Invocation,
    /,
    expected: AnyPath,
    actual: AnyPath,
    form: str,
    reports: tuple[Path, ...],
    **options: Any,
) -> int:
    """Compare two checkpoints or goldens.

    Compares two checkpoints element by element; a golden decides as much as it holds.

    Example: harness diff before.ckpt after.ckpt
    """
    from harness import api
    from harness.cli.steps import past_lines
    from harness.report.outcome import Outcome, Result

    policy, table, unchanged = policy_of(options), options["table"], options["unchanged"]
    try:
        with progress_bar(expected) as progress:
            comparison = api.diff(
                expected,
                actual,
                policy=policy,
                stats=bool(reports) or table,
                progress=progress,
                group=asked.group,
                **{name: options[name] for name in ("section", "section_b", "adapter", "jobs")},
            )
    except HarnessError as error:
        outcome = ended(error, form, expected=expected, actual=actual)
    else:
        echo_stage(comparison, form)
        if (table or unchanged) and form == "text":
            echo_changes(comparison, table=table, lists_unchanged=unchanged)
        steps = tuple(past_lines(comparison, ["harness", *asked_again(asked.arguments)]))
        echo_steps(steps, form)
        outcome = Outcome(
            expected=str(expected), actual=str(actual), stages=(comparison,), next_steps=steps
        )
    return finish(Result(command="diff", outcomes=(outcome,)), form, reports)


@cli.command()
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with statistics.")
@click.option("--stats", is_flag=True, help="Show statistics of the values.")
@section_options
@click.option("--textconv", is_flag=True, help="For git: a file that cannot be read is one line.")
@_JOBS
@click.pass_obj
def show(asked: Invocation, /, file: AnyPath, textconv: bool, **options: Any) -> None:
    """List what a golden or checkpoint holds.

    Example: harness show golden/nest.safetensors
    """
    try:
        _show(file, group=asked.group, **options)
    except HarnessError as error:
        if not textconv:
            raise
        click.echo(escaped(f"cannot be read: {error}"))  # else `git diff` ends for all files


@cli.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write."
)
@code_options
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def inputs(model: str, output: Path, overwrite: bool, **options: Any) -> None:
    """Write the example inputs of MODEL as safetensors.

    MODEL is a checkpoint, or the MODULE:NAME of a class or function that takes no arguments. Give
    the file to 'harness record --outputs --inputs FILE', here or with another implementation.

    Example: harness inputs nest.nemo -o inputs.safetensors
    """
    from harness import api

    written = api.write_inputs(model, output, live=live_of(options), overwrite=overwrite)
    names = ", ".join(f"{name} {list(shape)}" for name, shape in written.items())
    click.echo(escaped(f"wrote {output}: {names}"))
    which = quoted(model) if Path(model).exists() else f"CKPT --model {quoted(model)}"
    click.echo(f"next: harness record {which} --outputs --inputs {quoted(str(output))}")


def _show(
    file: AnyPath,
    *,
    as_json: bool,
    stats: bool,
    section: str | None,
    jobs: int | None,
    group: Group | None,
) -> None:
    from harness import api
    from harness.fingerprints.scan import fingerprint, with_settings
    from harness.golden.file import is_golden
    from harness.report.json import fingerprint_as_json
    from harness.report.table import render_table
    from harness.streaming.workers import Workers

    recorded = None
    if is_golden(file):
        if section is not None:
            raise UsageError(
                f"--section cannot be combined with {file}: a golden holds one section only",
                hint=f"harness show {quoted(str(file))}",
            )
        recorded = api.read_golden(file)
        found = recorded.fingerprint
    else:
        wanted = as_json or stats
        with progress_bar(file) as progress, api.open_checkpoint(file, section=section) as opened:
            found = fingerprint(
                opened,
                details=lambda tensor: wanted,
                keep_values=lambda tensor: True,
                workers=Workers(jobs=jobs, progress=progress, group=group),
            )
            found = with_settings(found, opened)
    if as_json:
        echo_json(fingerprint_as_json(found, recorded))
    else:
        click.echo(render_table(found, golden=recorded, stats=stats))


@cli.command()
def schema() -> None:
    """Print the JSON Schema of reports, of show --json, and of goldens' headers.

    Example: harness schema > harness.schema.json
    """
    from harness.report.json import schema

    echo_json(schema())
