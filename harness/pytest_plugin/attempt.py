"""One use of the fixture `checkpoint_golden`: verify, create or update."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness import api
from harness.api import KeptValues
from harness.checkpoint.sources.paths import is_there
from harness.comparison.comparison import Comparison, render
from harness.comparison.policy import Policy, Stage
from harness.errors import GoldenError, HarnessError, NotRecorded, UsageError
from harness.golden.file import read_golden
from harness.golden.golden import Golden
from harness.golden.places import other_reference
from harness.pytest_plugin.summary import Event, Settings, Verb
from harness.report.outcome import worst_stage
from harness.report.steps import advice, ways_past
from harness.subjects import Subject, only_of_files
from harness.text.folding import error_lines

if TYPE_CHECKING:
    from harness.model.options import LiveOptions


@dataclass(kw_only=True)
class Attempt:
    """One call of the fixture: a subject, how it is compared and recorded, and what it comes to.

    `run` fills in the latter, from `verb` on.
    """

    settings: Settings
    node: str
    golden: str
    subject: Subject
    policy: Policy
    reference: str | Path | None
    section: str | None
    values: KeptValues
    stage: Stage = "file"
    live: LiveOptions | None = None
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
            self._check_spelling()
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
                stage = None if self.stage == "file" else self.stage
                reason = self.settings.reason
                api.update(self.subject, self.recorded, reason=reason, stage=stage, live=self.live)
                self._wrote("updated")
                self._compare()  # what is accepted has to pass from now on
        except HarnessError as error:
            self.error = error

    def _check_spelling(self) -> None:
        """Two goldens of which some file systems would make one are an error on all."""
        folder = self.settings.folder
        other = folder.spelled_otherwise(self.golden)
        if other is not None:
            raise GoldenError(
                f"{folder.shown(self.golden)}: differs only in upper and lower case from "
                f"{os.path.relpath(folder.path / other, folder.invoked)}, which is there: some "
                "file systems have one file for both",
                hint="give the test, or the golden, another name; or remove the file that is there",
            )

    def _create_missing(self) -> None:
        path = self.settings.folder.file(self.golden)
        if is_there(path):
            return
        if self.settings.mode == "verify":
            raise GoldenError(
                f"{self.settings.folder.shown(self.golden)}: no golden is recorded for this test",
                hint=self.settings.command(self.node, "create"),
            )
        try:
            api.record(
                self.subject,
                path,
                section=self.section,
                values=self.values,
                stage=self.stage,
                live=self.live,
            )
        except GoldenError:
            if not is_there(path):
                raise
        else:  # or else another process was first, and its golden counts
            self._wrote("created")

    def _wrote(self, verb: Verb) -> None:
        self.verb = verb
        self.settings.written[self.golden] = self.node

    def _compare(self) -> None:
        """Hold the subject against the current golden."""
        golden = read_golden(self.settings.folder.file(self.golden))
        shown = replace(golden.fingerprint, name=self.settings.folder.shown(self.golden))
        self.recorded = golden = replace(golden, fingerprint=shown)
        self.stages.clear()
        if self.section not in (None, golden.section):
            held = "the state dict" if golden.section is None else f"section {golden.section!r}"
            raise UsageError(
                f"{golden.fingerprint.name}: holds {held}, not section {self.section!r}",
                hint="give this one another name",
            )
        how: dict[str, Any] = {"policy": self.policy, "reference": self.reference}
        if self.stage == "file":
            self.stages.append(api.verify(self.subject, golden, **how))
            return
        only_of_files(self.subject, stage=self.stage)
        path = cast("str | Path", self.subject)
        for stage in api.verify_stages(path, golden, stage=self.stage, live=self.live, **how):
            self.stages.append(stage)

    def report(self) -> Iterator[str]:
        """What a person reads: every stage, what went wrong, and the next step last."""
        for stage in self.stages:
            yield from (render(stage), "")
        if self.error is None:
            yield from (f"  {step}" for step in self._next_steps())
        else:
            yield from error_lines(self.error)

    def _next_steps(self) -> Iterator[str]:
        found = worst_stage(self.stages)
        if found is None:
            return
        writer = self.settings.written.get(self.golden)
        said = advice(found)
        if said is not None:
            yield said
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
                yield f"to {what}:  verify(…, {keywords})"
            yield f"if this change is intended:  {self.settings.command(self.node, 'update')}"

    def _reference(self) -> str:
        """The recorded checkpoint as a test would name it, where it is not what is verified."""
        there = other_reference(self.recorded, self.subject) if self.recorded else None
        if not isinstance(there, Path):
            return "RECORDED_CKPT" if there is None else str(there)
        return os.path.relpath(there, self.settings.folder.invoked)
