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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from harness import __version__
from harness.errors import GoldenError, HarnessError, UsageError

if TYPE_CHECKING:
    from harness.compare import Comparison, Policy
    from harness.golden import Golden
    from harness.report.text import Style

_WORST_FIRST = (2, 1, 3, 0)
_PATH = click.Path(path_type=Path)
_GOLDEN = click.option("-g", "--golden", type=_PATH, help="The golden file.")
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
@click.argument("checkpoint", type=_PATH)
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
@click.option("--overwrite", is_flag=True, help="Replace a golden, and forget its history.")
@_JOBS
def record(
    checkpoint: Path,
    golden: Path | None,
    section: str | None,
    block_size: int | None,
    values: Any,
    overwrite: bool,
    jobs: int | None,
) -> None:
    """Record the golden of CHECKPOINT (default: golden/<stem>.safetensors)."""
    from harness import api
    from harness.sketch import DEFAULT_BLOCK_NBYTES

    with _progress(checkpoint) as progress:
        recorded = api.record(
            checkpoint,
            golden,
            section=section,
            block_nbytes=DEFAULT_BLOCK_NBYTES if block_size is None else block_size,
            values=values,
            overwrite=overwrite,
            jobs=jobs,
            progress=progress,
        )
    found = recorded.fingerprint
    nbytes = recorded.path.stat().st_size
    total = sum(t.nbytes for t in found.tensors.values() if t.alias_of is None)
    click.echo(
        f"recorded {recorded.path}: {len(found.tensors):,} tensors of {checkpoint} "
        f"({found.container}), root {found.root.hex()[:16]}, {nbytes:,} bytes "
        f"({100 * nbytes / max(1, total):.1f} % of the weights)"
    )
    command = f"harness verify {shlex.quote(str(checkpoint))}"
    click.echo(f"next: {command}{_golden_option(recorded.path, checkpoint)}")


def _golden_option(golden: Path, checkpoint: Path) -> str:
    from harness.api import golden_path

    return "" if golden == golden_path(checkpoint) else f" -g {shlex.quote(str(golden))}"


class _Pairs(click.ParamType[tuple[str, str]]):
    """`LEFT=RIGHT`, split at the last or the first equals sign."""

    name = "LEFT=RIGHT"

    def __init__(self, *, at_last: bool) -> None:
        self.at_last = at_last

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        left, sign, right = value.rpartition("=") if self.at_last else value.partition("=")
        if not sign or not left:
            self.fail(f"{value!r} is not of the form {param.metavar}", param, ctx)
        return left, right


def _tolerance(ctx: click.Context, param: click.Parameter, pairs: Any) -> Any:
    found = []
    for glob, numbers in pairs:
        try:
            atol, *rest = (float(number) for number in numbers.split(","))
            rtol = rest.pop() if rest else None
            if rest:
                raise ValueError
        except ValueError:
            raise click.BadParameter(
                f"{numbers!r} is not ATOL or ATOL,RTOL", ctx=ctx, param=param
            ) from None
        found.append((glob, atol, rtol))
    return tuple(found)


_POLICY_OPTIONS = [
    click.option("--atol", type=float, default=1e-5, show_default=True, help="As in allclose."),
    click.option("--rtol", type=float, default=1e-5, show_default=True, help="As in allclose."),
    click.option("--exact", is_flag=True, help="Allow no difference at all."),
    click.option("--ignore", multiple=True, metavar="GLOB", help="Leave out keys. Repeatable."),
    click.option(
        "--tolerance",
        "tolerances",
        multiple=True,
        type=_Pairs(at_last=True),
        callback=_tolerance,
        metavar="GLOB=ATOL[,RTOL]",
        help="Another tolerance for some keys; the last that fits wins. Repeatable.",
    ),
    click.option(
        "--map",
        "key_map",
        multiple=True,
        type=_Pairs(at_last=False),
        metavar="OLD=NEW",
        help="The golden's key OLD is now NEW; prefixes end in a dot. Repeatable.",
    ),
    click.option("--strip-prefix", default="", metavar="P", help="Take P off the new keys."),
    click.option("--no-check-dtype", is_flag=True, help="Compare values across dtypes."),
]


def _policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_POLICY_OPTIONS):
        command = option(command)
    return command


def _policy(options: dict[str, Any]) -> Policy:
    from harness.compare import Policy

    return Policy(
        atol=options["atol"],
        rtol=options["rtol"],
        exact=options["exact"],
        ignore=options["ignore"],
        tolerances=tuple(
            (glob, atol, options["rtol"] if rtol is None else rtol)
            for glob, atol, rtol in options["tolerances"]
        ),
        key_map=options["key_map"],
        strip_prefix=options["strip_prefix"],
        check_dtype=not options["no_check_dtype"],
    )


@cli.command()
@click.argument("checkpoint", type=_PATH, required=False)
@_GOLDEN
@_policy_options
@click.option(
    "--reference", type=_PATH, metavar="CKPT", help="The recorded checkpoint: decides exactly."
)
@click.option("--update-golden", is_flag=True, help="Show the differences, then accept them.")
@click.option("--reason", default="", help="Why the golden is updated; kept in its history.")
@_FORMAT
@_JOBS
def verify(
    checkpoint: Path | None,
    golden: Path | None,
    reference: Path | None,
    update_golden: bool,
    reason: str,
    form: str,
    jobs: int | None,
    **options: Any,
) -> int:
    """Compare CHECKPOINT with its golden; without it, every golden in golden/ with its source."""
    from harness.report.json import comparison_as_json, error_as_json

    if reason and not update_golden:
        raise UsageError("--reason goes with --update-golden")
    policy = _policy(options)
    results: list[dict[str, Any]] = []
    codes = []
    for target in _goldens(checkpoint, golden):
        result: dict[str, Any] = {"golden": str(target), "checkpoint": None}
        results.append(result)
        try:
            recorded, comparison = _verify_one(checkpoint, target, policy, reference, jobs)
            result["checkpoint"] = comparison.actual.name
            result["root"] = {
                "expected": comparison.expected.root.hex(),
                "actual": comparison.actual.root.hex(),
            }
            result["stages"] = [comparison_as_json(comparison)]
            code = comparison.exit_code
            if form == "text":
                _echo_comparison(comparison, checkpoint, target, updating=update_golden)
            if update_golden:
                result["updated"] = _update(checkpoint, recorded, comparison, reason, form, jobs)
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
    exit_code = min(codes, key=_WORST_FIRST.index)
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


def _verify_one(
    checkpoint: Path | None, golden: Path, policy: Policy, reference: Path | None, jobs: int | None
) -> tuple[Golden, Comparison]:
    from harness import api

    recorded = api.read_golden(golden)
    with _progress(checkpoint or recorded.checkpoint) as progress:
        return recorded, api.verify(
            checkpoint,
            recorded,
            policy=policy,
            reference=reference,
            jobs=jobs,
            progress=progress,
        )


def _update(
    checkpoint: Path | None,
    golden: Golden,
    comparison: Comparison,
    reason: str,
    form: str,
    jobs: int | None,
) -> bool:
    from harness import api

    before = golden.fingerprint.root.hex()
    if comparison.actual.root.hex() == before and comparison.verdict == "identical":
        if form == "text":
            click.echo(f"{golden.path} is up to date, and was not touched")
        return False
    with _progress(checkpoint or golden.checkpoint) as progress:
        updated = api.update(checkpoint, golden, reason=reason, jobs=jobs, progress=progress)
    if form == "text":
        click.echo(
            f"updated {golden.path}: root {before[:16]} is now "
            f"{updated.fingerprint.root.hex()[:16]}"
        )
        for entry in updated.history:
            click.echo(f"  replaced {entry.root[:16]}  {entry.reason or '(no reason given)'}")
    return True


@cli.command()
@click.argument("expected", type=_PATH)
@click.argument("actual", type=_PATH)
@_policy_options
@_FORMAT
@_JOBS
def diff(expected: Path, actual: Path, form: str, jobs: int | None, **options: Any) -> int:
    """Compare two checkpoints element by element; either may be a golden instead."""
    from harness import api
    from harness.report.json import comparison_as_json
    from harness.report.text import render

    with _progress(expected) as progress:
        comparison = api.diff(
            expected, actual, policy=_policy(options), jobs=jobs, progress=progress
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
@click.argument("file", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with stats.")
@click.option("--stats", is_flag=True, help="Add statistics of the values.")
@click.option("--section", help="Another part than the state dict; '.' for every tensor.")
@_JOBS
def show(file: Path, as_json: bool, stats: bool, section: str | None, jobs: int | None) -> None:
    """List the tensors of FILE, a golden or a checkpoint (fit for git's textconv)."""
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
        with _progress(file) as progress, api.open_checkpoint(file, section=section) as opened:
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


def _echo_comparison(
    comparison: Comparison, checkpoint: Path | None, golden: Path, *, updating: bool
) -> None:
    from harness.report.text import how_to_accept, render

    click.echo(render(comparison, _style()))
    if not updating:
        given = f" {shlex.quote(str(checkpoint))}" if checkpoint is not None else ""
        command = f"harness verify{given} -g {shlex.quote(str(golden))}"
        for line in how_to_accept(comparison, command):
            click.echo(f"\n  {line}")


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


@contextmanager
def _progress(path: Path | None) -> Iterator[Callable[[int], None] | None]:
    """Show a bar on a terminal, for work that takes longer than a second."""
    if not sys.stderr.isatty():
        yield None
        return
    import time

    started = time.monotonic()
    bar: Any = None
    done = 0
    total = path.stat().st_size if path is not None and path.is_file() else None

    def advance(nbytes: int) -> None:
        nonlocal bar, done
        done += nbytes
        if bar is None and time.monotonic() - started > 1:
            bar = _start_bar(path, total)
        if bar is not None:
            bar.update(0, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(path: Path | None, total: int | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(_printable(path.name) if path else "", total=total)
    bar.start()
    return bar
