"""The pytest plugin: the fixture `checkpoint_golden`, `--golden-mode`, and a summary of the run.

In: what tests give to `checkpoint_golden.verify`: paths, open checkpoints, modules, state dicts.
Out: comparisons; goldens in the folder `golden_dir`, where the mode asks for them; failures that
show the harness's own report and end with the command that accepts it. Refused: names that are no
file names, and tests of one run that disagree on what a golden holds.

Every pytest run of everyone who has the harness loads this module, so it imports pytest and the
errors alone; the rest comes when a test asks for it. Under pytest-xdist each test tells what it did
in its own reports: no process waits for another, or shares anything with it but the goldens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import pytest

from harness.errors import GoldenError, HarnessError, NotRecorded, UsageError
from harness.pytest_tally import SUFFIX, Event, Folder, Tally, Verb, events_of, golden_name, node_of
from harness.shell import command_line

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from harness.api import KeptValues
    from harness.compare import Comparison
    from harness.golden import Golden
    from harness.model.stages import LiveOptions
    from harness.policy import Policy, Stage
    from harness.subjects import Subject

__all__ = ["CheckpointGolden", "PolicyKeywords", "golden_name"]


class PolicyKeywords(TypedDict, total=False):
    """The fields of `harness.Policy`, as keywords."""

    atol: float
    rtol: float
    exact: bool
    ignore: tuple[str, ...]
    tolerances: tuple[tuple[str, float, float], ...]
    key_map: tuple[tuple[str, str], ...]
    strip_prefix: str
    check_dtype: bool


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the command line and the configuration say.

    `options` are those by which pytest finds the goldens; `written` are those that this process
    has written, and the tests that did it.
    """

    mode: str
    reason: str
    root: Path
    folder: Folder
    options: tuple[str, ...]
    written: dict[str, str] = field(default_factory=dict)

    def command(self, node: str, mode: str) -> str:
        """The command that runs one test again, in another mode."""
        path, sign, test = node.partition("::")
        here = os.path.relpath(self.root / path, self.folder.invoked)
        options = [*self.options, f"--golden-mode={mode}"]
        command = command_line(["pytest", f"{here}{sign}{test}", *options])
        return f'{command} --golden-reason "why"' if mode == "update" else command


_SETTINGS = pytest.StashKey[_Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("checkpoint-harness", "golden fingerprints of checkpoints")
    group.addoption(
        "--golden-mode",
        dest="checkpoint_golden_mode",
        choices=["verify", "create", "update"],
        default="verify",
        help="Verify goldens (the default); also create those that are missing; or also update "
        "those that do not pass.",
    )
    group.addoption(
        "--golden-reason",
        dest="checkpoint_golden_reason",
        default="",
        metavar="TEXT",
        help="Why goldens are updated; kept in their history.",
    )
    parser.addini("golden_dir", "Folder of the goldens, relative to rootdir.", default="golden")


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("checkpoint_golden_mode")
    reason = config.getoption("checkpoint_golden_reason")
    if reason and mode != "update":
        raise pytest.UsageError("--golden-reason goes with --golden-mode=update")
    folder = Folder(
        path=config.rootpath / config.getini("golden_dir"), invoked=config.invocation_params.dir
    )
    config.stash[_SETTINGS] = _Settings(
        mode=mode,
        reason=reason,
        root=config.rootpath,
        folder=folder,
        options=tuple(_finding_options(config)),
    )
    config.pluginmanager.register(Tally(config, folder), "checkpoint_harness_tally")


def _finding_options(config: pytest.Config) -> Iterator[str]:
    for option, name in (("-c", "inifilename"), ("--rootdir", "rootdir")):
        if (value := config.getoption(name, None)) is not None:
            yield from (option, str(value))
    for setting in config.getoption("override_ini", None) or ():
        if setting.startswith("golden_dir="):
            yield from ("-o", setting)


@pytest.fixture
def checkpoint_golden(request: pytest.FixtureRequest) -> CheckpointGolden:
    """Verify checkpoints, modules and state dicts against committed goldens.

    checkpoint_golden.verify("model.pt"), or of a module or a state dict. The first time, run
    pytest --golden-mode=create.
    """
    return CheckpointGolden(
        _settings=request.config.stash[_SETTINGS],
        _node=node_of(request.node),
        _events=events_of(request.node),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointGolden:
    """The fixture: holds what a test has made against the goldens that belong to it."""

    _settings: _Settings
    _node: str
    _events: list[Event]
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def verify(
        self,
        subject: Subject,
        name: str | None = None,
        *,
        policy: Policy | None = None,
        reference: str | Path | None = None,
        section: str | None = None,
        values: KeptValues = "small",
        **keywords: Unpack[PolicyKeywords],
    ) -> Comparison:
        """Compare a path, an open checkpoint, a module or a state dict with its golden.

        With a name the golden is NAME.safetensors in `golden_dir`, which tests may share; without,
        it is this test's own, and each further call without a name has one of its own, too.
        `policy`, or its fields as keywords, says what counts as the same; `reference` is the
        recorded checkpoint, which decides exactly; `section` and `values` are as in
        `harness.record`, for when the golden is created. Fails the test unless the verdict is
        identical or close.
        """
        __tracebackhide__ = True
        case = _Case(
            subject=subject,
            policy=_policy_of(policy, keywords),
            reference=reference,
            section=section,
            values=values,
        )
        return self._settle(case, name)[0]

    def verify_stages(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        stage: Stage,
        live: LiveOptions | None = None,
        policy: Policy | None = None,
        reference: str | Path | None = None,
        section: str | None = None,
        values: KeptValues = "small",
        **keywords: Unpack[PolicyKeywords],
    ) -> tuple[Comparison, ...]:
        """Compare a file, then what the model makes of it, up to `stage`; one comparison for each.

        `live` says which code is under test, by default what the golden remembers; all else is as
        in `verify`.
        """
        __tracebackhide__ = True
        case = _Case(
            subject=path,
            policy=_policy_of(policy, keywords),
            reference=reference,
            section=section,
            values=values,
            stage=stage,
            live=live,
        )
        return self._settle(case, name)

    def _settle(self, case: _Case, name: str | None) -> tuple[Comparison, ...]:
        """Do what the mode asks for, keep account of it, and fail the test unless it passes."""
        __tracebackhide__ = True
        own = golden_name(self._node, next(self._numbers)) if name is None else _named(name)
        attempt = _Attempt(settings=self._settings, node=self._node, case=case, golden=own)
        attempt.run()
        self._events.append(attempt.event)
        if not attempt.passes:
            pytest.fail("\n".join(attempt.report()), pytrace=False)
        return tuple(attempt.stages)


def _named(name: str) -> str:
    """Check a name that a test gives: a file of `golden_dir` itself, folders are for tests' own."""
    __tracebackhide__ = True
    from harness.report.folding import error_lines

    golden = name.removesuffix(SUFFIX)
    if golden and golden[0] != "." and golden.isprintable() and not set(golden) & set("/\\"):
        return golden
    error = UsageError(
        f"a golden's name is that of a file, not {name!r}",
        hint="give a name without folders, or none: then the golden is the test's own",
    )
    pytest.fail("\n".join(error_lines(error)), pytrace=False)


def _policy_of(policy: Policy | None, keywords: PolicyKeywords) -> Policy:
    __tracebackhide__ = True
    from harness.policy import Policy
    from harness.report.folding import error_lines

    try:
        if policy is not None and keywords:
            raise UsageError("give policy=… or its fields as keywords, not both")
        return policy or Policy(**keywords)
    except UsageError as error:
        text = "\n".join(error_lines(error))
    pytest.fail(text, pytrace=False)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What a test asks for: a subject, and how it is compared and recorded."""

    subject: Subject
    policy: Policy
    reference: str | Path | None
    section: str | None
    values: KeptValues
    stage: Stage = "file"
    live: LiveOptions | None = None

    def compare(self, golden: Golden) -> Iterator[Comparison]:
        from harness import api
        from harness.subjects import only_of_files

        if self.section not in (None, golden.section):
            raise UsageError(
                f"{golden.fingerprint.name}: holds "
                f"{'the state dict' if golden.section is None else f'section {golden.section!r}'}, "
                f"not section {self.section!r}",
                hint="give this one another name",
            )
        if self.stage == "file":
            yield api.verify(self.subject, golden, policy=self.policy, reference=self.reference)
            return
        only_of_files(self.subject, stage=self.stage)
        yield from api.verify_stages(
            cast("str | Path", self.subject),
            golden,
            policy=self.policy,
            stage=self.stage,
            live=self.live,
            reference=self.reference,
        )

    def record(self, path: Path) -> None:
        from harness import api

        api.record(
            self.subject,
            path,
            section=self.section,
            values=self.values,
            stage=self.stage,
            live=self.live,
        )

    def update(self, golden: Golden, reason: str) -> None:
        from harness import api

        stage = None if self.stage == "file" else self.stage
        api.update(self.subject, golden, reason=reason, stage=stage, live=self.live)


@dataclass(kw_only=True)
class _Attempt:
    """What one call comes to: `run` fills it in."""

    settings: _Settings
    node: str
    case: _Case
    golden: str
    verb: Verb = "verified"
    recorded: Golden | None = None
    stages: list[Comparison] = field(default_factory=list)
    error: HarnessError | None = None

    @property
    def passes(self) -> bool:
        return self.error is None and all(stage.ok for stage in self.stages)

    @property
    def event(self) -> Event:
        root = "" if self.recorded is None else self.recorded.fingerprint.root.hex()
        return Event(self.golden, self.verb if self.passes else "failed", root)

    def run(self) -> None:
        try:
            self._create_missing()
            try:
                self._compare()
            except NotRecorded as error:
                hint = self.settings.command(self.node, "update")
                self.error = NotRecorded(str(error), hint=hint)
            # What this run has written stands: who differs from it disagrees with another test.
            first = self.golden not in self.settings.written
            if self.settings.mode == "update" and not self.passes and first and self.recorded:
                self.error = None
                self.case.update(self.recorded, self.settings.reason)
                self._wrote("updated")
                self._compare()  # what is accepted has to pass from now on
        except HarnessError as error:
            self.error = error

    def _create_missing(self) -> None:
        from harness.golden import is_there

        path = self.settings.folder.file(self.golden)
        if is_there(path):
            return
        if self.settings.mode == "verify":
            raise GoldenError(
                f"{self.settings.folder.shown(self.golden)}: no golden is recorded for this test",
                hint=self.settings.command(self.node, "create"),
            )
        try:
            self.case.record(path)
        except GoldenError:
            if not is_there(path):
                raise
        else:  # or else another process was first, and its golden counts
            self._wrote("created")

    def _wrote(self, verb: Verb) -> None:
        self.verb = verb
        self.settings.written[self.golden] = self.node

    def _compare(self) -> None:
        """Hold the subject against the golden as it is now."""
        from harness.api import read_golden

        golden = read_golden(self.settings.folder.file(self.golden))
        shown = replace(golden.fingerprint, name=self.settings.folder.shown(self.golden))
        self.recorded = golden = replace(golden, fingerprint=shown)
        self.stages.clear()
        for stage in self.case.compare(golden):
            self.stages.append(stage)

    def report(self) -> Iterator[str]:
        """What a person reads: every stage, what went wrong, and the next step last."""
        from harness.report.folding import error_lines
        from harness.report.text import render

        for stage in self.stages:
            yield from (render(stage), "")
        if self.error is None:
            yield from (f"  {step}" for step in self._next_steps())
        else:
            yield from error_lines(self.error)

    def _next_steps(self) -> Iterator[str]:
        from harness.report.outcome import worst_stage
        from harness.report.steps import GET_IT_AGAIN, MEND_THE_CODE, is_of_the_code, ways_past

        found = worst_stage(self.stages)
        if found is None:
            return
        writer = self.settings.written.get(self.golden)
        if found.count("damaged"):
            yield GET_IT_AGAIN
        elif is_of_the_code(found):
            yield MEND_THE_CODE
        elif self.verb != "verified":
            yield (
                f"the golden was {self.verb} from this, and it does not pass: look at key_map and "
                "strip_prefix, or for what differs from run to run"
            )
        elif writer is not None:
            yield f"{writer} has written this golden in this run: give one of the two another name"
        else:
            if found.verdict == "undecided" and found.stage == "file":
                yield f"to decide exactly:  verify(…, reference={self._reference()!r})"
            for what, policy in ways_past(found):
                keywords = ", ".join(f"{name}={value!r}" for name, value in policy.items())
                yield f"to look past {what}:  verify(…, {keywords})"
            yield f"if this is meant:  {self.settings.command(self.node, 'update')}"

    def _reference(self) -> str:
        """The recorded checkpoint as a test would name it, where it is not what is verified."""
        from harness.subjects import other_reference

        there = other_reference(self.recorded, self.case.subject) if self.recorded else None
        if not isinstance(there, Path):
            return "RECORDED_CKPT" if there is None else str(there)
        return os.path.relpath(there, self.settings.folder.invoked)
