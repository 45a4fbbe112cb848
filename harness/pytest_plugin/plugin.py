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

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import pytest

from harness.errors import UsageError
from harness.pytest_plugin.summary import (
    SUFFIX,
    Event,
    Folder,
    Settings,
    Summary,
    events_of,
    golden_name,
    node_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from harness.api import KeptValues
    from harness.comparison.comparison import Comparison
    from harness.comparison.policy import Policy, Stage
    from harness.model.options import LiveOptions
    from harness.subjects import Subject


__all__ = ["CheckpointGolden", "PolicyKeywords", "golden_name"]


class PolicyKeywords(TypedDict, total=False):
    """The fields of `harness.Policy`, as keywords."""

    atol: float | None
    rtol: float | None
    exact: bool
    ignore: tuple[str, ...]
    tolerances: tuple[tuple[str, float, float | None], ...]
    key_map: tuple[tuple[str, str], ...]
    strip_prefix: str
    check_dtype: bool
    accept: tuple[str, ...]
    check_config: bool
    cast: str | None
    must_change: tuple[str, ...]


_SETTINGS = pytest.StashKey[Settings]()


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
    config.stash[_SETTINGS] = Settings(
        mode=mode,
        reason=reason,
        root=config.rootpath,
        folder=folder,
        options=tuple(_finding_options(config)),
    )
    config.pluginmanager.register(Summary(config, folder), "checkpoint_harness_summary")


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

    _settings: Settings
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
        given = {"subject": subject, "reference": reference, "section": section, "values": values}
        return self._settle(name, policy, keywords, **given)[0]

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
        given = {"subject": path, "reference": reference, "section": section, "values": values}
        return self._settle(name, policy, keywords, stage=stage, live=live, **given)

    def _settle(
        self, name: str | None, policy: Policy | None, keywords: PolicyKeywords, **given: Any
    ) -> tuple[Comparison, ...]:
        """Do what the mode asks for, keep account of it, and fail the test unless it passes."""
        __tracebackhide__ = True
        from harness.comparison.policy import Policy
        from harness.pytest_plugin.attempt import Attempt
        from harness.text.folding import error_lines

        failed: Iterator[str]
        try:
            if policy is not None and keywords:
                raise UsageError("give policy=… or its fields as keywords, not both")
            policy = policy or Policy(**keywords)
            own = golden_name(self._node, next(self._numbers)) if name is None else _named(name)
        except UsageError as error:
            failed = error_lines(error)
        else:
            attempt = Attempt(
                settings=self._settings, node=self._node, golden=own, policy=policy, **given
            )
            attempt.run()
            self._events.append(attempt.event)
            if attempt.passes:
                return tuple(attempt.stages)
            failed = attempt.report()
        pytest.fail("\n".join(failed), pytrace=False)


def _named(name: str) -> str:
    """Check a name that a test gives: a file of `golden_dir` itself, folders are for tests' own."""
    golden = name.removesuffix(SUFFIX)
    if golden and golden[0] != "." and golden.isprintable() and not set(golden) & set("/\\"):
        return golden
    raise UsageError(
        f"not a golden's name: {name!r}",
        hint="give a name without folders, or none: then the golden is the test's own",
    )
