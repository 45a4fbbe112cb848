"""The command line: arguments in, reports and exit codes out; all else is in `harness.api`.

Exit codes: 0 all identical or close, 1 something differs, 2 could not tell (unreadable, usage),
3 nothing differs but something is undecided. Of several goldens the worst counts: 2, 1, 3, 0.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from harness import __version__
from harness.errors import GoldenError, HarnessError, UsageError
from harness.options import (
    PATH,
    live_of,
    live_options,
    policy_of,
    policy_options,
    run_options,
    stage_options,
)
from harness.progress import progress_bar

if TYPE_CHECKING:
    from harness.compare import Policy
    from harness.golden import Golden
    from harness.model.stages import LiveOptions
    from harness.report.text import Style

_WORST_FIRST = (2, 1, 3, 0)
_GOLDEN = click.option("-g", "--golden", type=PATH, help="The golden file.")
_FORMAT = click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
_JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), help="Threads; all the cores allowed by default."
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command and exit with its code; a crash is a 2, never a 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(arguments, prog_name="harness", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except (HarnessError, click.ClickException) as error:
        code = 2
        if {"--json", "--format=json", "json"} & set(arguments):
            _echo_json(_failure(error))
        elif isinstance(error, HarnessError):
            _echo_error(error)
        else:
            error.show()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    except Exception:  # exit code 1 would say that a checkpoint differs
        traceback.print_exc()
        click.echo("error: this is a bug in the harness; please report it", err=True)
        code = 2
    sys.exit(code or 0)


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
    checkpoint: Path,
    golden: Path | None,
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
    from harness.sketch import DEFAULT_BLOCK_NBYTES

    stage = stage or ("load" if options["target"] else "file")
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
    nbytes = recorded.path.stat().st_size
    total = sum(t.nbytes for t in found.tensors.values() if t.alias_of is None)
    beside = f" ({100 * nbytes / max(1, total):.1f} % of the weights)"
    if recorded.live is not None and recorded.live.outputs is not None:
        beside = f", with {len(recorded.live.outputs.tensors):,} inputs and outputs of submodules"
    click.echo(
        f"recorded {recorded.path}: {len(found.tensors):,} tensors of {checkpoint} "
        f"({found.container}), root {found.root.hex()[:16]}, {nbytes:,} bytes{beside}"
    )
    # Without the checkpoint, verify repeats the stages that were recorded.
    given = f" {shlex.quote(str(checkpoint))}" if recorded.live is None else ""
    click.echo(f"next: harness verify{given}{_golden_option(recorded.path, checkpoint)}")


def _golden_option(golden: Path, checkpoint: Path) -> str:
    from harness.api import golden_path

    return "" if golden == golden_path(checkpoint) else f" -g {shlex.quote(str(golden))}"


@cli.command()
@click.argument("checkpoint", type=PATH, required=False)
@_GOLDEN
@policy_options
@click.option(
    "--reference", type=PATH, metavar="CKPT", help="The recorded checkpoint: decides exactly."
)
@click.option("--update-golden", is_flag=True, help="Show the differences, then accept them.")
@click.option("--reason", default="", help="Why the golden is updated; kept in its history.")
@stage_options
@live_options
@run_options
@_FORMAT
@_JOBS
def verify(
    checkpoint: Path | None,
    golden: Path | None,
    reference: Path | None,
    update_golden: bool,
    reason: str,
    stage: Any,
    form: str,
    jobs: int | None,
    **options: Any,
) -> int:
    """Compare CHECKPOINT with its golden.

    Without CHECKPOINT, every golden in golden/ is compared with the checkpoint that it names, in
    all the stages that it was recorded with.
    """
    from harness.report.json import error_as_json

    if reason and not update_golden:
        raise UsageError("--reason goes with --update-golden")
    if stage is None and checkpoint is not None:
        stage = "load" if options["target"] else "file"
    run = _Run(
        policy=policy_of(options),
        stage=stage,
        options=options,
        reference=reference,
        jobs=jobs,
        form=form,
    )
    results: list[dict[str, Any]] = []
    codes = []
    for target in _goldens(checkpoint, golden):
        result: dict[str, Any] = {"golden": str(target), "checkpoint": None}
        results.append(result)
        try:
            code = run.verify(checkpoint, target, result, updating=update_golden)
            if update_golden:
                result["updated"] = run.update(checkpoint, target, reason)
                code = 0
            codes.append(code)
        except HarnessError as error:
            if checkpoint is not None or golden is not None:
                raise
            codes.append(2)
            result["error"] = error_as_json(error)
            result.setdefault("stages", [])
            if form == "text":
                _echo_error(error)
    exit_code = min(codes, key=_rank)
    if form == "json":
        _echo_json({"exit_code": exit_code, "goldens": results})
    return exit_code


def _goldens(checkpoint: Path | None, golden: Path | None) -> list[Path]:
    from harness.api import GOLDEN_FOLDER, choose_golden
    from harness.golden import SUFFIX

    if checkpoint is not None or golden is not None:
        return [choose_golden(checkpoint, golden)]
    found = sorted(GOLDEN_FOLDER.glob(f"*{SUFFIX}"))
    if not found:
        raise GoldenError(
            f"no goldens in {GOLDEN_FOLDER}/ of the current folder",
            hint="record one: harness record CHECKPOINT",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One invocation of verify: what is asked for, for each golden in turn."""

    policy: Policy
    stage: Any
    options: dict[str, Any]
    reference: Path | None
    jobs: int | None
    form: str

    def verify(
        self, checkpoint: Path | None, golden: Path, result: dict[str, Any], *, updating: bool
    ) -> int:
        """Run the stages of one golden, reporting each as it ends; returns the worst exit code."""
        from harness import api
        from harness.report.json import comparison_as_json
        from harness.report.text import how_to_accept, render

        recorded = api.read_golden(golden)
        result["stages"] = []
        worst = None
        with progress_bar(checkpoint or recorded.checkpoint) as progress:
            for comparison in api.verify_stages(
                checkpoint,
                recorded,
                policy=self.policy,
                stage=self.stage,
                live=self._live(recorded),
                reference=self.reference,
                jobs=self.jobs,
                progress=progress,
            ):
                if comparison.stage == "file":
                    result["checkpoint"] = comparison.actual.name
                    result["root"] = {
                        "expected": comparison.expected.root.hex(),
                        "actual": comparison.actual.root.hex(),
                    }
                result["stages"].append(comparison_as_json(comparison))
                if self.form == "text":
                    click.echo(render(comparison, _style()))
                if worst is None or _rank(comparison.exit_code) < _rank(worst.exit_code):
                    worst = comparison
        assert worst is not None
        if self.form == "text" and not updating:
            there = recorded.checkpoint
            known = [shlex.quote(str(there))] if there is not None and there.exists() else []
            for line in how_to_accept(worst, self._command(checkpoint, golden), *known):
                click.echo(f"\n  {line}")
        return worst.exit_code

    def update(self, checkpoint: Path | None, golden: Path, reason: str) -> bool:
        """Accept what is there now; returns whether the golden changed."""
        from harness import api

        recorded, before = api.read_golden(golden), golden.read_bytes()
        with progress_bar(checkpoint or recorded.checkpoint) as progress:
            updated = api.update(
                checkpoint,
                recorded,
                reason=reason,
                stage=self.stage,
                live=self._live(recorded),
                jobs=self.jobs,
                progress=progress,
            )
        changed = golden.read_bytes() != before
        if self.form == "text" and not changed:
            click.echo(f"{golden} is up to date, and was not touched")
        elif self.form == "text":
            roots = (recorded.fingerprint.root.hex()[:16], updated.fingerprint.root.hex()[:16])
            click.echo(f"updated {golden}: root {roots[0]} is now {roots[1]}")
            for entry in updated.history:
                click.echo(f"  replaced {entry.root[:16]}  {entry.reason or '(no reason given)'}")
        return changed

    def _live(self, golden: Golden) -> LiveOptions | None:
        if self.stage == "file" or (self.stage is None and golden.live is None):
            return None
        from harness.model.stages import remembered

        return live_of(self.options, remembered(golden))

    def _command(self, checkpoint: Path | None, golden: Path) -> str:
        parts = ["harness", "verify", *([str(checkpoint)] if checkpoint else [])]
        parts += ["-g", str(golden)]
        if checkpoint and self.stage != "file":
            parts.append(f"--{self.stage}")
        if self.options["target"]:
            parts += ["--model", self.options["target"]]
        return shlex.join(parts)


def _rank(code: int) -> int:
    return _WORST_FIRST.index(code)


@cli.command()
@click.argument("checkpoint", type=PATH)
@policy_options
@live_options
@run_options
@_FORMAT
def roundtrip(checkpoint: Path, form: str, **options: Any) -> int:
    """Load, save, reload and run CHECKPOINT.

    Each is compared with the file itself, and the outputs with each other: no golden is needed.
    """
    from harness import api
    from harness.report.json import comparison_as_json
    from harness.report.text import render

    stages, codes = [], []
    for comparison in api.roundtrip(checkpoint, policy=policy_of(options), live=live_of(options)):
        stages.append(comparison_as_json(comparison))
        codes.append(comparison.exit_code)
        if form == "text":
            click.echo(render(comparison, _style()))
    exit_code = min(codes, key=_rank)
    if form == "json":
        result = {"golden": None, "checkpoint": str(checkpoint), "stages": stages}
        _echo_json({"exit_code": exit_code, "goldens": [result]})
    return exit_code


@cli.command()
@click.argument("expected", type=PATH)
@click.argument("actual", type=PATH)
@policy_options
@_FORMAT
@_JOBS
def diff(expected: Path, actual: Path, form: str, jobs: int | None, **options: Any) -> int:
    """Compare two checkpoints, or goldens.

    Two checkpoints are compared element by element, a golden by what it keeps.
    """
    from harness import api
    from harness.report.json import comparison_as_json
    from harness.report.text import render

    with progress_bar(expected) as progress:
        comparison = api.diff(
            expected, actual, policy=policy_of(options), jobs=jobs, progress=progress
        )
    if form == "json":
        result = {
            "golden": str(expected),
            "checkpoint": str(actual),
            "stages": [comparison_as_json(comparison)],
        }
        _echo_json({"exit_code": comparison.exit_code, "goldens": [result]})
    else:
        click.echo(render(comparison, _style()))
    return comparison.exit_code


@cli.command()
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with stats.")
@click.option("--stats", is_flag=True, help="Add statistics of the values.")
@click.option("--section", help="Another part than the state dict; '.' for every tensor.")
@_JOBS
def show(file: Path, as_json: bool, stats: bool, section: str | None, jobs: int | None) -> None:
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
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return Style(color=terminal and not plain, unicode=terminal and utf8)


def _echo_error(error: HarnessError) -> None:
    click.echo(f"error: {_printable(str(error))}", err=True)
    if error.hint:
        click.echo(f"  next: {_printable(error.hint)}", err=True)


def _printable(text: str) -> str:
    """Names from a file may hold control characters or lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _failure(error: HarnessError | click.ClickException) -> dict[str, Any]:
    from harness.report.json import error_as_json

    if isinstance(error, click.ClickException):
        error = UsageError(error.format_message(), hint="harness --help")
    return {"exit_code": 2, "error": error_as_json(error)}


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))
