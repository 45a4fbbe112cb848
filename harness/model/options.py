"""What the live stages are asked for: which code is under test, on what, and what must agree.

In: what a user gives, or a golden remembers. Out: a frozen `LiveOptions`, and what follows from it:
a loader, the tolerances of outputs. Refused: targets, files and globs that are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harness.checkpoint import open_checkpoint
from harness.checkpoint.tensors import Checkpoint
from harness.comparison.policy import Policy, Tolerance, fits
from harness.errors import UsageError
from harness.fingerprints.fingerprint import Fingerprint
from harness.golden.golden import Golden
from harness.model.activations import Activations, OutputPolicy, Selection
from harness.model.config import load_config
from harness.model.loading import Loader
from harness.model.outputs import OutputTolerance
from harness.model.targets import resolve


@dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """Which code is under test, and on what.

    `target` is `package.module:Name`, None for what the registry has; `config` is a YAML
    that replaces the model's configuration; `inputs` is a safetensors file of keyword arguments;
    `base` is the folder of the model that an adapter is for; `keep` leaves the saved checkpoint
    beside the original as `NAME.test.*`; `trust` lets Lightning unpickle. `output_rel`
    (a share of each activation's own rms, which is added to `output_atol`) and `output_rtol` are
    the tolerance of outputs, None that of the golden, or 1e-4; `output_tolerances` (GLOB, ATOL,
    RTOL) that of some. `activations` and `only`: see `harness.model.activations.Selection`.
    """

    target: str | None = None
    config: Path | None = None
    inputs: Path | None = None
    base: Path | None = None
    keep: bool = False
    trust: bool = False
    output_atol: float | None = None
    output_rtol: float | None = None
    output_rel: float | None = None
    output_tolerances: tuple[tuple[str, float, float | None], ...] = ()
    activations: Activations = "common"
    only: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UsageError, ModelError or CheckpointError for what is none of what is asked for."""
        Policy(atol=self.output_atol, rtol=self.output_rtol, tolerances=self.output_tolerances)
        Policy(atol=self.output_rel)
        Selection(activations=self.activations)
        if self.target is not None:
            resolve(self.target)
        if self.config is not None:
            load_config(self.config)
        for file in (self.inputs, self.base):
            if file is not None:
                open_checkpoint(file).close()


def output_tolerance(options: LiveOptions, recorded: Fingerprint | None = None) -> OutputTolerance:
    """As asked for, else as recorded; whoever asks for one of atol and rel has no other."""
    found = OutputTolerance()
    if recorded is not None:
        atol, rtol = recorded.tolerance
        found = OutputTolerance(atol=atol, rtol=rtol, rel=recorded.rel)
    if options.output_rtol is not None:
        found = replace(found, rtol=options.output_rtol)
    if options.output_atol is None and options.output_rel is None:
        return found
    return replace(found, atol=options.output_atol or 0.0, rel=options.output_rel or 0.0)


def output_policy(options: LiveOptions, recorded: Fingerprint, policy: Policy) -> OutputPolicy:
    """The tolerances of outputs, and of single activations, which differ in scale."""
    allowed = output_tolerance(options, recorded)
    atol, rtol = allowed.atol, allowed.rtol
    by_key = {}
    if allowed.rel and not policy.exact:
        for key, tensor in recorded.tensors.items():
            shown = float(f"{atol + allowed.rel * tensor.rms:.2e}")  # as a report has it
            by_key[key] = Tolerance(atol=shown, rtol=rtol)
    globs = () if policy.exact else options.output_tolerances
    for key in recorded.tensors if globs else ():
        for glob, its_atol, its_rtol in globs:
            if fits(glob, [key]):
                its_rtol = rtol if its_rtol is None else its_rtol
                by_key[key] = Tolerance(atol=its_atol, rtol=its_rtol)
    for glob, *_ in globs:
        if not fits(glob, recorded.tensors):
            raise UsageError(
                f"--output-tolerance {glob}: matches no activation",
                hint=f"names look like {[*recorded.tensors, 'nothing'][0]}",
            )
    return OutputPolicy(
        atol=atol,
        rtol=rtol,
        exact=policy.exact,
        check_dtype=policy.check_dtype,
        by_key=by_key,
    )


def selection_of(options: LiveOptions) -> Selection:
    """Which activations are compared."""
    return Selection(activations=options.activations, only=options.only)


def loader_of(options: LiveOptions, checkpoint: Checkpoint) -> Loader:
    """What builds the model of a checkpoint."""
    config = None if options.config is None else load_config(options.config)
    return Loader(
        checkpoint, target=options.target, config=config, base=options.base, trust=options.trust
    )


def remembered(golden: Golden) -> LiveOptions:
    """The options under which a golden was recorded, but for tolerances, which its outputs have."""
    if golden.live is None:
        return LiveOptions()
    return LiveOptions(
        target=golden.live.target,
        config=golden.beside(golden.live.config),
        inputs=golden.beside(golden.live.inputs),
        base=golden.beside(golden.live.base),
    )
