"""The next steps: each is a command that does what it says."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.cli.steps import next_steps, past_lines
from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding
from harness.comparison.policy import Policy
from tests.conftest import Harness, Run
from tests.report.samples import comparison, side
from tests.report_html.results import filled

VERIFY = ["harness", "verify", "x"]
ANY = Policy()


def told(*findings: Finding, policy: Policy = ANY, **rest: Any) -> Comparison:
    """A comparison of the tensors that are in its findings."""
    ours, theirs = ["same"], ["same"]
    for finding in findings:
        if finding.kind == "prefix":
            prefixed = theirs if finding.expected == "no prefix" else ours
            for keys in (ours, theirs):
                keys.append(
                    f"{policy.strip_prefix if keys is theirs else ''}"
                    f"{finding.key if keys is prefixed else ''}prefixed"
                )
            continue
        ours += [finding.key] * (finding.kind != "unexpected")
        theirs += [finding.actual_key or finding.key] * (finding.kind != "missing")
    expected, actual = (
        replace(side(name), tensors={key: filled(key, 1.0, 2) for key in keys})
        for name, keys in (("golden", ours), ("file", theirs))
    )
    found = comparison(*findings, **rest)
    return replace(found, expected=expected, actual=actual, policy=policy)


def steps(*findings: Finding, stage: str = "file") -> list[str]:
    return next_steps(told(*findings, stage=stage), VERIFY, VERIFY)


def renamed(*pairs: tuple[str, str]) -> list[str]:
    return steps(*(Finding(kind="renamed", key=old, actual_key=new) for old, new in pairs))


def test_a_prefix_to_strip_is_quoted_as_a_shell_needs_it() -> None:
    found = Finding(kind="prefix", key="a b;c.", expected="no prefix", actual="prefix 'a b;c.'")
    assert steps(found)[0] == "to ignore the prefix:  harness verify x --strip-prefix 'a b;c.'"


def test_a_name_in_a_command_never_reaches_the_terminal_as_it_is() -> None:
    first, _ = renamed(("a", "b\x1bc\n\u202e"))
    assert first.isprintable()
    assert first.endswith(r"--map $'a=b\033c\012\342\200\256'")


def test_other_dtypes_alone_lead_to_a_comparison_of_their_values() -> None:
    dtype = Finding(kind="dtype", key="a", expected="float32", actual="bfloat16")
    missing = Finding(kind="missing", key="b", expected="float32 [2]")
    first, last = steps(dtype)
    assert first == "to ignore the dtype:  harness verify x --no-check-dtype"
    assert last == 'if this change is intended:  harness verify x --update-golden --reason "why"'
    assert len(steps(dtype, missing)) == 1
    assert len(steps(dtype, stage="outputs")) == 1


def test_a_few_new_names_alone_lead_to_a_map_of_them() -> None:
    first, last = renamed(("a", "b"), ("c d", "e"))
    assert first == "to accept the new names:  harness verify x --map a=b --map 'c d=e'"
    assert last.startswith("if this change is intended:")
    assert len(renamed(*((f"a{n}", f"b{n}") for n in range(13)))) == 1
    assert len(renamed(("a", "a"))) == 1  # a map that did not fit
    assert len(renamed(("a=b", "c"))) == 1  # which no map can say


def test_many_new_names_lead_to_a_map_of_their_prefixes() -> None:
    moved = [(f"encoder.layers.{n}.weight", f"enc.blocks.{n}.weight") for n in range(9)]
    first, _ = renamed(*moved)
    assert first == "to accept the new names:  harness verify x --map encoder.layers.=enc.blocks."
    first, _ = renamed(*((old, old.replace("weight", "w.raw")) for old, _ in moved))
    assert first.endswith("--map 'encoder.layers.*.weight=encoder.layers.*.w.raw'")


def test_a_module_under_another_name_and_with_other_weights_may_be_a_new_name() -> None:
    def found(old: str, new: str, said: str) -> list[Finding]:
        return [
            Finding(kind="missing", key=old, expected="float32 [2]"),
            Finding(kind="unexpected", key=new, actual=said),
        ]

    moved = [
        one
        for n in range(5)
        for one in found(f"enc.{n}.weight", f"encoder.{n}.weight", "float32 [2]")
    ]
    first, last = steps(*moved)
    assert first == "to accept the new names, if they are renamed:  " + (
        "harness verify x --map enc.=encoder."
    )
    assert last.startswith("if this change is intended:")
    other = found("enc.9.weight", "encoder.9.weight", "float32 [3]")
    assert len(steps(*moved, *other)) == 1  # of another shape
    assert len(steps(*moved, other[0])) == 1  # and one that is gone
    assert len(steps(*found("weight", "bias", "float32 [2]"))) == 1


@pytest.mark.parametrize(
    ("stage", "words"), [("file", ["exactly", "intended"]), ("outputs", ["intended"])]
)
def test_undecided_is_decided_by_a_reference_or_accepted(stage: str, words: list[str]) -> None:
    found = steps(Finding(kind="undecided", key="a.weight", expected="float32 [2]"), stage=stage)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))
    assert stage != "file" or found[0].endswith("harness verify x --reference RECORDED_CKPT")


def test_options_stand_before_what_is_no_option() -> None:
    undecided = comparison(Finding(kind="undecided", key="a", expected="float32 [2]"))
    command = ["harness", "verify", "-g", "WHY", "--", "-x.pt"]
    assert next_steps(undecided, command, command) == [
        "to decide exactly:  harness verify -g WHY --reference RECORDED_CKPT -- -x.pt",
        "if this change is intended:  "
        'harness verify -g WHY --update-golden --reason "why" -- -x.pt',
    ]


def test_a_second_prefix_is_added_to_the_one_that_is_taken_off() -> None:
    prefix = Finding(kind="prefix", key="model.", expected="no prefix", actual="prefix 'model.'")
    found = told(prefix, policy=Policy(strip_prefix="module."))
    command = ["harness", "verify", "x", "--strip-prefix", "module."]
    assert past_lines(found, command) == [
        "to ignore the prefix:  harness verify x --strip-prefix module.model."
    ]


def test_what_the_code_makes_of_a_file_is_not_for_a_golden_to_accept() -> None:
    (line,) = steps(Finding(kind="missing", key="a", expected="float32 [2]"), stage="load")
    assert "fix the code" in line


def test_places_in_a_computation_are_renamed_by_no_policy() -> None:
    moved = Finding(kind="renamed", key="act.:out", actual_key="body:out")
    (line,) = steps(moved, stage="outputs")
    assert line.startswith("if this change is intended:")


def test_two_checkpoints_have_nothing_to_update() -> None:
    different = Finding(kind="missing", key="a", expected="float32 [2]")
    assert past_lines(comparison(different), ["harness", "diff", "a", "b"]) == []


Keys = Callable[[str], str]
CHANGES: dict[str, tuple[Keys, Keys]] = {
    "a prefix is there": (str, lambda key: f"model.{key}"),
    "a prefix is gone": (lambda key: f"model.{key}", str),
    "a module has another name": (str, lambda key: key.replace("encoder", "enc")),
    "one tensor has another name": (str, lambda key: key.replace("head.bias", "head.b")),
}


@pytest.fixture
def changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: Harness
) -> Callable[..., Run]:
    """Record a checkpoint, save its tensors under other keys, verify or diff that."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(7)
    names = [f"encoder.{n}.{part}" for n in range(4) for part in ("weight", "bias")]
    weights = {name: draw.standard_normal(6, "f4") for name in [*names, "head.weight", "head.bias"]}

    def run(*command: str, before: Keys = str, after: Keys = str) -> Run:
        save_file({before(key): value for key, value in weights.items()}, "old.safetensors")
        assert harness("record", "old.safetensors", "-g", "g.safetensors").code == 0
        save_file({after(key): value for key, value in weights.items()}, "new.safetensors")
        return harness(*command)

    return run


def with_one_that_has_none(key: str) -> str:
    return "head.weight" if key == "head.bias" else f"model.{key}"


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        # Without the prefix two keys would be one.
        (str, with_one_that_has_none, ()),
        (with_one_that_has_none, str, ()),
        # Without the prefix, the new name in the map is not there.
        (str, lambda key: f"model.{key}", ("--map", "head.bias=model.head.bias")),
    ],
)
def test_no_way_past_is_offered_that_would_be_refused(
    changed: Callable[..., Run], harness: Harness, before: Keys, after: Keys, options: Any
) -> None:
    run = changed(*VERIFIED, *options, before=before, after=after)
    assert "prefix: the same keys under another prefix" in run.out
    assert "to accept" not in run.out
    assert "to ignore" not in run.out


def paste(harness: Harness, text: str, begins: str | tuple[str, ...]) -> Run:
    """Run the one command that a report offers under these words."""
    [line] = [line for line in text.splitlines() if line.strip().startswith(begins)]
    program, *arguments = shlex.split(line.partition(":  ")[2])
    assert program == "harness"
    return harness(*arguments)


VERIFIED = ("verify", "new.safetensors", "-g", "g.safetensors")


@pytest.mark.parametrize("command", [VERIFIED, ("diff", "old.safetensors", "new.safetensors")])
@pytest.mark.parametrize("change", CHANGES)
def test_the_way_past_passes_when_it_is_pasted(
    changed: Callable[..., Run], harness: Harness, change: str, command: tuple[str, ...]
) -> None:
    before, after = CHANGES[change]
    run = changed(*command, before=before, after=after)
    assert run.code == 1
    assert paste(harness, run.out, ("to accept", "to ignore")).code == 0


def test_after_the_update_that_is_offered_the_next_run_passes(
    changed: Callable[..., Run], harness: Harness
) -> None:
    options = ("--ignore", "head.*", "--map=encoder.=enc.", "--strip-prefix", "model.")
    run = changed(*VERIFIED, *options, after=lambda key: f"model.{key.replace('encoder', 'enc')}x")
    assert run.code == 1
    assert paste(harness, run.out, "if this change is intended").code == 0
    assert harness(*VERIFIED).code == 0
