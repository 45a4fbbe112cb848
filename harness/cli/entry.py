"""Where the command line begins: the command runs, and whatever ends it becomes an exit code.

Exit codes: 0 all identical or close, 1 something differs, 2 could not be checked (unreadable,
usage), 3 nothing differs but something is undecided. Of several goldens the worst counts:
2, 1, 3, 0.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from harness.cli.commands import cli, import_numpy
from harness.cli.options import Invocation
from harness.cli.terminal import echo_error, echo_json, failure, show_plainly, without_secrets
from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from harness.streaming.workers import Group


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command and exit with its code; a crash is a 2, never a 1."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: nobody reads it, and no file must get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, show_plainly(getattr(sys, name)))
    if arguments is None:
        # Opening a checkpoint makes many objects that stay: looking through them takes 7 ms of 600
        # tensors. What is used once leaves by reference counts.
        gc.set_threshold(100_000)
    code = _run(list(sys.argv[1:] if arguments is None else arguments))
    if arguments is None:
        gc.freeze()  # else the interpreter looks through every object for cycles before it ends
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    def command(group: Group | None = None) -> int:
        asked = Invocation(arguments=arguments, group=group)
        return cli.main(arguments, prog_name="harness", standalone_mode=False, obj=asked) or 0

    try:
        if not _is_one_of_several():
            return command()
        import_numpy()
        from harness.model.distributed.group import run_on_ranks

        return run_on_ranks(command, arguments)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return 130
    except (HarnessError, click.ClickException) as error:
        if {"--json", "--format=json", "json"} & set(arguments):
            echo_json(failure(error))
        elif isinstance(error, HarnessError):
            echo_error(error)
        else:
            text = io.StringIO()
            error.show(file=text)
            click.echo(without_secrets(text.getvalue()), err=True, nl=False)
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
    except SystemExit as stopped:
        # Click's own: after shell completion, and by 1, which would say that a checkpoint differs,
        # where the reader has seen enough.
        return 2 if stopped.code else 0
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        hint = "check the path" if what else "see where the output goes: it cannot be written there"
        if not what:
            _drop_output()
        echo_error(UsageError(f"{what}{error.strerror or error}", hint=hint))
    except MemoryError:
        echo_error(UsageError("out of memory", hint="use fewer threads: --jobs 1"))
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return 130
    except BaseException:  # exit code 1 would say that a checkpoint differs
        traceback.print_exc()
        click.echo("error: this is a bug in the harness; please report it", err=True)
    return 2


def _drop_output() -> None:
    """Let what is still to be written go nowhere: Python would fail by it at the end, with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_one_of_several() -> bool:
    """Whether torchrun, or whoever sets its variables, has started several ranks."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1 and "RANK" in os.environ
