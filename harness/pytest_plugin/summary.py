"""What the tests of a run did to goldens, and which goldens are left over.

In: the events that the fixture `checkpoint_golden` notes in a test's stash, and the reports of
pytest. Out: the lines of the terminal's summary. Refused: a run in which two tests that passed
disagree on what a golden holds; its exit code is that of a failed one.

The process that runs a test adds the test's events to its reports; the process that prints, the
same one or the controller of pytest-xdist, gathers them. So no process waits for another.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from harness.errors import HarnessError
from harness.text.shell import command_line

FIXTURE = "checkpoint_golden"
SUFFIX = ".safetensors"
_UNSAFE = re.compile(r"^\.|[^A-Za-z0-9_.-]")
_MAX_PART = 120

Verb = Literal["failed", "updated", "created", "verified"]
# Of several tests that share a golden, the first of these is what is said of it.
_VERBS: tuple[Verb, ...] = ("failed", "updated", "created", "verified")


class Event(NamedTuple):
    """What one call did to a golden: `root` is that of the golden when it was done, "" if none."""

    golden: str
    verb: Verb
    root: str


EVENTS = pytest.StashKey[list[Event]]()


def events_of(item: pytest.Item) -> list[Event]:
    """The list for what an attempt at a test does; what one before it failed at counts no more."""
    item.stash[EVENTS] = [event for event in item.stash.get(EVENTS, []) if event.verb != "failed"]
    return item.stash[EVENTS]


def node_of(item: pytest.Item) -> str:
    """The id of a test, without the group that `--dist loadgroup` of pytest-xdist adds to it."""
    return item.nodeid if item.parent is None else f"{item.parent.nodeid}::{item.name}"


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where goldens are, and where pytest was started."""

    path: Path
    invoked: Path

    def file(self, golden: str) -> Path:
        return self.path / f"{golden}{SUFFIX}"

    def spelled_otherwise(self, golden: str) -> str | None:
        """The file or folder that is there and has this name but for upper and lower case.

        A file system that does not tell them apart, as of macOS, has one file for both.
        """
        folder, *parts = (self.path, *golden.split("/")[:-1], self.file(golden).name)
        for part in parts:
            there = folder.iterdir() if folder.is_dir() else ()
            alike = [p for p in there if p.name.casefold() == part.casefold() and p.name != part]
            if alike:
                return str(min(alike).relative_to(self.path))
            folder /= part
        return None

    def shown(self, golden: str) -> str:
        """A golden's file as a person would name it."""
        return os.path.relpath(self.file(golden), self.invoked)


@dataclass(frozen=True, kw_only=True)
class Settings:
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


def golden_name(node: str, number: int = 1) -> str:
    """The golden of a test: a folder for its module, and a file name that no other test has.

    `tests/test_net.py::TestNet::test_saves[fp16]` has `tests/test_net/TestNet.test_saves-fp16`.
    What a file name should not hold is replaced, and a digest keeps such names apart. A module,
    which has no test, has its folder.
    """
    file, _, test = node.partition("::")
    names, bracket, parameters = test.partition("[")
    own = names.replace("::", ".") + (f"-{parameters.removesuffix(']')}" if bracket else "")
    parts = [_safe(part) for part in (*file.removesuffix(".py").split("/"), own) if part]
    return "/".join(parts) + (f"+{number}" if number > 1 else "")


def _safe(part: str) -> str:
    safe = _UNSAFE.sub("_", part)[:_MAX_PART]
    return safe if safe == part else f"{safe}~{sha256(part.encode()).hexdigest()[:8]}"


def _may_own(node: str, golden: str) -> bool:
    """Whether a golden without a given name may be of a test, or of one in a class or module."""
    own = golden_name(node)
    return golden == own or golden.startswith((f"{own}+", f"{own}/", f"{own}."))


class Summary:
    """Gathers what tests did.

    Tests that were skipped or failed may have more goldens than they told of, and so may modules
    that were skipped as a whole.
    """

    def __init__(self, config: pytest.Config, folder: Folder) -> None:
        self._config = config
        self._folder = folder
        # Where tests run.
        self._num_collected = 0  # before any is deselected
        # Where reports come together.
        self._told: dict[str, list[Event]] = {}  # by test
        self._passed: set[str] = set()
        self._finished: set[str] = set()
        self._skipped: set[str] = set()
        self._num_expected = 0
        self._collects_all = True

    def pytest_itemcollected(self) -> None:
        self._num_collected += 1

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, None]:
        report = (yield).get_result()
        events = item.stash.get(EVENTS, None)
        if events is not None or FIXTURE in getattr(item, "fixturenames", ()):
            # Plain data: reports may go to another process.
            vars(report)[FIXTURE] = {
                "node": node_of(item),
                "events": [tuple(event) for event in events or ()],
                "num_collected": self._num_collected,
            }

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._collects_all &= not report.failed
        if report.skipped:
            self._skipped.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = vars(report).get(FIXTURE)
        if told is not None:
            # Each report of a test, and of another attempt at it, tells all that the last one did.
            self._told[told["node"]] = [Event(*event) for event in told["events"]]
            self._num_expected = told["num_collected"]
            if report.when == "call" and report.passed:
                self._passed.add(told["node"])
        if report.when == "teardown":
            self._finished.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._disagreements() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._told:
            return
        unused, num_unknown = self._unaccounted()
        verbs = [
            next(verb for verb in _VERBS if any(event.verb == verb for _, event in events))
            for events in self._events().values()
        ]
        counts: dict[str, int] = {verb: verbs.count(verb) for verb in reversed(_VERBS)}
        counts |= {"unused": len(unused), "unknown": num_unknown}
        said = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        if not said:
            return
        why = " (of tests that were skipped or failed)" if num_unknown else ""
        terminalreporter.write_line(f"checkpoint goldens: {said}{why}")
        for golden in unused:
            terminalreporter.write_line(f"  unused: {self._folder.shown(golden)}")
        for golden, nodes in self._disagreements().items():
            terminalreporter.write_line(
                f"  error: {self._folder.shown(golden)}: tests that passed disagree on what it "
                f"holds: {', '.join(nodes)}"
            )
            terminalreporter.write_line(
                "    next: give one of them another name, or run them again to see which fails"
            )

    def _events(self) -> Mapping[str, list[tuple[str, Event]]]:
        """What was done to each golden, and by which test."""
        found = defaultdict(list)
        for node, events in self._told.items():
            for event in events:
                found[event.golden].append((node, event))
        return found

    def _disagreements(self) -> dict[str, list[str]]:
        """Goldens that were written in this run, where not all tests passed against the same."""
        found = {}
        for golden, events in self._events().items():
            passed = [(node, event) for node, event in events if event.verb != "failed"]
            written = any(event.verb != "verified" for _, event in passed)
            if written and len({event.root for _, event in passed}) > 1:
                found[golden] = sorted({node for node, _ in passed})
        return found

    def _unaccounted(self) -> tuple[list[str], int]:
        """Goldens that no test of the whole suite uses, and how many an unfinished one may use."""
        from harness.golden.file import is_golden

        if not self._collects_all or not _asks_for_all(self._config):
            return [], 0
        if len(self._finished) != self._num_expected:  # deselected, or stopped before
            return [], 0
        unfinished = self._skipped | (self._told.keys() - self._passed)
        used = self._events()
        unused, num_unknown = [], 0
        for path in sorted(self._folder.path.rglob(f"*{SUFFIX}")):
            golden = path.relative_to(self._folder.path).as_posix().removesuffix(SUFFIX)
            given = "/" not in golden
            if golden in used or not is_golden(path) or (given and _is_for_command(path)):
                continue
            # Which names a test would have given, nobody knows.
            if any(given or _may_own(node, golden) for node in unfinished):
                num_unknown += 1
            else:
                unused.append(golden)
        return unused, num_unknown


def _asks_for_all(config: pytest.Config) -> bool:
    """Whether the command line leaves out nothing before it is collected."""
    if any(config.getoption(option, None) for option in ("lf", "ignore", "ignore_glob")):
        return False
    if config.args_source is config.ArgsSource.TESTPATHS:
        return True
    given = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    suite = {(config.rootpath / path).resolve() for path in config.getini("testpaths")}
    return config.rootpath.resolve() in given or (bool(suite) and suite <= given)


def _is_for_command(path: Path) -> bool:
    """Whether `harness verify` finds a golden's checkpoint: then it needs no test to use it.

    What is behind a URL is not asked for: a summary waits for no server.
    """
    from harness.checkpoint.sources.paths import is_there
    from harness.golden.file import read_golden

    try:
        checkpoint = read_golden(path).checkpoint
    except HarnessError:
        return False
    return checkpoint is not None and (not isinstance(checkpoint, Path) or is_there(checkpoint))
