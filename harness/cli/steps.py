"""The next steps at the end of a report, as options and whole lines of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.comparison.comparison import Comparison
from harness.report.steps import advice, converted, ways_past
from harness.text.shell import command_line, quoted


def as_options(policy: Mapping[str, Any]) -> list[str]:
    """Fields of a policy as `harness verify` and `harness diff` take them."""
    options: list[str] = []
    for old, new in policy.get("key_map", ()):
        options += ["--map", f"{old}={new}"]
    if "strip_prefix" in policy:
        options += ["--strip-prefix", policy["strip_prefix"]]
    for glob in policy.get("ignore", ()):
        options += ["--ignore", glob]
    if "accept" in policy:
        options += ["--accept", ",".join(dict.fromkeys(policy["accept"]))]
    if policy.get("check_dtype") is False:
        options.append("--no-check-dtype")
    return options


def lines_past(comparison: Comparison | None, command: Sequence[str]) -> list[str]:
    """Lines that run a command again, so that it looks past what was found."""
    lines: list[str] = []
    if comparison is None or comparison.count("damaged"):
        return lines
    for what, policy in ways_past(comparison):
        flags = ["--map", "--map-file"] if "key_map" in policy else []
        again = without(command, [*flags, *(f"--{name.replace('_', '-')}" for name in policy)])
        options = command_line(as_options(policy))
        lines.append(f"to {what}:  {with_options(again, options)}")
    return lines


def past_lines(comparison: Comparison, command: Sequence[str]) -> list[str]:
    """The same, and what else to do."""
    lines = lines_past(comparison, command)
    names, said = converted(comparison), advice(comparison)
    if names is not None:
        golden, options = quoted(comparison.expected.name), command_line(as_options(names))
        again = f"harness verify CONVERTED_CKPT -g {golden} {options}"
        lines.append(
            f"if the model was changed on purpose, convert the checkpoint to its keys:  {again}"
        )
    return lines if said is None else [*lines, said]


def without(command: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command without these options, each of which takes a value."""
    kept: list[str] = []
    rest = iter(command)
    for argument in rest:
        if argument == "--":
            return [*kept, argument, *rest]
        if argument in options:
            next(rest, None)
        elif not argument.startswith(tuple(f"{option}=" for option in options)):
            kept.append(argument)
    return kept


def with_options(command: Sequence[str], options: str) -> str:
    """A command with more options, which are quoted already, as a shell takes it."""
    end = command.index("--") if "--" in command else len(command)
    parts = [command_line(command[:end]), options, command_line(command[end:])]
    return " ".join(part for part in parts if part)


def next_steps(
    comparison: Comparison,
    command: Sequence[str],
    update: Sequence[str],
    reference: str = "RECORDED_CKPT",
    record: Sequence[str] = (),
) -> list[str]:
    """What to do about a stage that does not pass: decide it, look past what it found, accept it.

    `command` verifies again, `update` accepts; `reference` is the recorded checkpoint, where it is
    known; `record` makes a golden that decides more, where one can.
    """
    if comparison.ok:
        return []
    lines = past_lines(comparison, command)
    if advice(comparison) is not None:
        return lines
    if comparison.verdict == "undecided" and comparison.stage == "file":
        decide = with_options(command, f"--reference {quoted(reference)}")
        lines.insert(0, f"to decide exactly:  {decide}")
        if record:
            lines.insert(1, f"to decide without it, from now on:  {command_line(record)}")
    accept = with_options(update, '--update-golden --reason "why"')
    return [*lines, f"if this change is intended:  {accept}"]
