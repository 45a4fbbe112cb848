"""The options of the command line, in groups, and what they mean as values of the core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.terminal import echo_traceback
from harness.comparison.cause import ACCEPTABLE, CASTS
from harness.comparison.mapping import read_map
from harness.comparison.policy import Policy
from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from harness.checkpoint.sources.paths import AnyPath
    from harness.streaming.workers import Group


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What was typed, and the ranks that it was typed for."""

    arguments: list[str]
    group: Group | None


class Place(click.Path):
    """A path or a URL; a path alone for an option that is named.

    Not checked by click, whose complaints lack the next step.
    """

    def __init__(self, local_for: str | None = None) -> None:
        super().__init__(path_type=Path, readable=False)
        self.local_for = local_for

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from harness.checkpoint.sources.paths import to_local, to_path

        return to_path(value) if self.local_for is None else to_local(value, self.local_for)


PATH = Place()


def expanded(paths: Sequence[AnyPath]) -> list[AnyPath]:
    """The paths, with those that are patterns and no files as what fits them, in their order.

    The files of all ranks of one save are one checkpoint.
    """
    from harness.checkpoint.rankfiles import with_sets
    from harness.golden.folder import natural

    found: list[AnyPath] = []
    for path in paths:
        if isinstance(path, Path) and any(c in str(path) for c in "*?[") and not path.exists():
            base = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor))
            fitting = sorted(base.glob(pattern), key=natural)
            if not fitting:
                raise UsageError(f"{path}: no file matches", hint="check the pattern")
            found += fitting
        else:
            found.append(path)
    return with_sets(found)


def without_operands(arguments: Sequence[str], operands: Sequence[AnyPath]) -> list[str]:
    """The words of a command without the paths that it was given."""
    typed = {str(path) for path in operands}
    return [word for word in arguments if str(PATH.convert(word, None, None)) not in typed]


def remember_roots(ctx: click.Context, param: click.Parameter, roots: tuple[Path, ...]) -> None:
    """Let the roots of the command line stand in place of the project's, for this command."""
    from harness.golden.project import ROOT_VARIABLE

    for root in roots:
        if not root.is_dir():
            raise UsageError(f"--root {root}: no such folder", hint="check the path")
    if roots:
        before = os.environ.get(ROOT_VARIABLE)

        def restore() -> None:
            os.environ.pop(ROOT_VARIABLE)
            if before is not None:
                os.environ[ROOT_VARIABLE] = before

        ctx.call_on_close(restore)
        os.environ[ROOT_VARIABLE] = os.pathsep.join(str(root.absolute()) for root in roots)


def size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Read a number of bytes, such as `57MB`, as a callback of an option."""
    from harness.text.sizes import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from None


def _pair(
    text: str, ctx: click.Context, param: click.Parameter, *, at_last: bool = False
) -> tuple[str, str]:
    """Split `LEFT=RIGHT` at the first or the last equals sign."""
    left, sign, right = text.rpartition("=") if at_last else text.partition("=")
    if not sign or not left:
        why = f"{text!r} is not of the form {param.metavar}"
        raise click.BadParameter(why, ctx=ctx, param=param)
    return left, right


def _key_map(ctx: click.Context, param: click.Parameter, texts: Any) -> Any:
    return tuple(_pair(text, ctx, param) for text in texts)


def tolerances(ctx: click.Context, param: click.Parameter, texts: Any) -> Any:
    found = []
    for text in texts:
        glob, numbers = _pair(text, ctx, param, at_last=True)
        try:
            atol, *rest = (float(number) for number in numbers.split(","))
            rtol = rest.pop() if rest else None
            if rest:
                raise ValueError
        except ValueError:
            why = f"{numbers!r} is not ATOL or ATOL,RTOL"
            raise click.BadParameter(why, ctx=ctx, param=param) from None
        found.append((glob, atol, rtol))
    return tuple(found)


def _words(ctx: click.Context, param: click.Parameter, given: Any) -> tuple[str, ...]:
    words = [word.strip() for one in given for word in one.split(",")]
    for word in words:
        if word not in ACCEPTABLE:
            why = f"{word!r} is none of {', '.join(ACCEPTABLE)}"
            raise click.BadParameter(why, ctx=ctx, param=param)
    return tuple(dict.fromkeys(words))


class Option(click.Option):
    """An option that `--help` shows under a heading."""

    def __init__(self, *args: Any, heading: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heading = heading


def under(heading: str) -> Callable[..., Any]:
    """As `click.option`, for options under one heading."""
    return partial(click.option, cls=Option, heading=heading)


def together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Options that commands take together, in their order, as one decorator."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_compared = under("Comparison")
policy_options = together(
    _compared(
        "--atol", type=float, show_default="as recorded", help="Absolute tolerance, as in allclose."
    ),
    _compared(
        "--rtol", type=float, show_default="as recorded", help="Relative tolerance, as in allclose."
    ),
    _compared("--exact", is_flag=True, help="Fail on any difference, however small."),
    _compared("--ignore", multiple=True, metavar="GLOB", help="Skip matching keys. Repeatable."),
    _compared(
        "--tolerance",
        "tolerances",
        multiple=True,
        callback=tolerances,
        metavar="GLOB=ATOL[,RTOL]",
        help="Tolerance for matching keys; the last match wins. Repeatable.",
    ),
    _compared(
        "--map",
        "key_map",
        multiple=True,
        callback=_key_map,
        metavar="OLD=NEW",
        help="The expected key OLD is now NEW. A prefix ends in a dot; * matches the same text on "
        "both sides, {1..3} on one the numbers in the same place on the other. Repeatable.",
    ),
    _compared(
        "--map-file",
        "map_files",
        multiple=True,
        type=Place("--map-file"),
        metavar="FILE",
        help="A file of such pairs: OLD and NEW in two columns, one pair a line. Repeatable.",
    ),
    _compared(
        "--strip-prefix", default="", metavar="PREFIX", help="Remove PREFIX from the actual keys."
    ),
    _compared(
        "--accept",
        multiple=True,
        callback=_words,
        metavar="CAUSE[,CAUSE]",
        help="Accept these changes where they are proved: renamed, moved, reshaped, transposed, "
        "joined, order, rows, rounded.",
    ),
    _compared(
        "--check-config",
        is_flag=True,
        help="Fail on a changed configuration, which is otherwise only noted.",
    ),
    _compared(
        "--cast",
        type=click.Choice(CASTS),
        metavar="DTYPE",
        help="Accept tensors that are the expected ones rounded to DTYPE.",
    ),
    _compared(
        "--must-change",
        multiple=True,
        metavar="GLOB",
        help="Fail if a matching key did not change. Repeatable.",
    ),
    _compared(
        "--no-check-dtype", is_flag=True, help="Compare values even where the dtypes differ."
    ),
)


def flag_of(name: str) -> str:
    """The flag of an option, by the name that it has as a value."""
    return f"--{name.replace('_', '-')}".replace("tolerances", "tolerance").replace(
        "target", "model"
    )


def policy_of(options: dict[str, Any]) -> Policy:
    """The policy that the options ask for."""
    both = (f"{of}{name}" for of in ("", "output_") for name in ("atol", "rtol", "tolerances"))
    for name in (*both, "output_rel") if options["exact"] else ():
        if options.get(name) not in (None, ()):
            raise UsageError(
                f"--exact cannot be combined with {flag_of(name)}",
                hint=f"leave out --exact, or {flag_of(name)}",
            )
    given = {f.name: options[f.name] for f in fields(Policy) if options.get(f.name) is not None}
    given["key_map"] += tuple(chain.from_iterable(map(read_map, options["map_files"])))
    return Policy(**given, check_dtype=not options["no_check_dtype"])


# An update accepts the whole checkpoint, under the keys that it has: nobody would have seen what
# these leave out, and the next run would not find what these rename.
NOT_ON_UPDATE = ("--ignore", "--map", "--map-file", "--strip-prefix")


def check_update(policy: Policy) -> None:
    """Raise UsageError for a policy that looks past what an update would accept."""
    given = (policy.ignore, policy.key_map, policy.key_map, policy.strip_prefix)
    for option, value in zip(NOT_ON_UPDATE, given, strict=True):
        if value:
            raise UsageError(
                f"{option} cannot be combined with --update-golden, which records the whole "
                "checkpoint under its own keys",
                hint=f"leave out {option}",
            )


def _report_paths(ctx: click.Context, param: click.Parameter, paths: Any) -> Any:
    for path in paths:
        from harness.report.files import check_report

        check_report(path)
    return paths


_reported = under("Report")
report_options = together(
    _reported(
        "--format",
        "form",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="What to print.",
    ),
    _reported(
        "--report",
        "reports",
        multiple=True,
        type=Place("--report"),
        callback=_report_paths,
        metavar="FILE",
        help="Also write a report to FILE, in the format of its suffix: .html, .md, .xml (JUnit) "
        "or .json. Repeatable.",
    ),
)

section_options = together(
    click.option(
        "--section",
        metavar="NAME",
        help="Read this part of the file instead of the model's weights, such as "
        "optimizer_states.0.",
    ),
    click.option("--all-sections", "section", flag_value=".", help="Read every part of the file."),
)


class Command(click.Command):
    """Shows its options under headings, and refuses one that is given twice.

    Of two the last one would silently win.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        seen: set[str] = set()
        if any(set(ctx.help_option_names) & set(param.opts) for param in order):
            order = []
        for param in order:
            if not isinstance(param, click.Option) or param.multiple or param.name is None:
                continue
            if param.name in seen and not ctx.resilient_parsing:
                flags = [o.opts[0] for o in order if o.name == param.name]
                raise UsageError(
                    f"{' and '.join(flags)}: only the last one would count",
                    hint=f"give one of them: harness {self.name} --help",
                )
            seen.add(param.name)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if row is not None:
                rows.setdefault(getattr(param, "heading", "Options"), []).append(row)
        for heading in sorted(rows, key=lambda heading: heading != "Options"):
            with formatter.section(heading):
                formatter.write_dl(rows[heading])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HarnessError as error:  # the rest is shown when the command has ended
            echo_traceback(error)
            raise
