"""What every callback of a trainer needs: a copy of the weights, and what one save came to.

In: a state dict, a written checkpoint, a golden. Out: copies that nothing in the save can touch,
comparisons of what was written. Imports no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from harness.checkpoint.keys import format_key
from harness.checkpoint.tensors import Checkpoint
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison, headline, render
from harness.comparison.difference import Difference
from harness.comparison.measuring import (
    AgainstCheckpoint,
    AgainstGolden,
    Triple,
    nothing,
    part,
)
from harness.comparison.policy import Policy, Tolerance
from harness.errors import GoldenMismatch, UsageError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint, structure
from harness.fingerprints.scan import fingerprint

OnMismatch = Literal["raise", "warn"]


@dataclass(frozen=True, kw_only=True)
class VerifiedSave:
    """What one save came to: a line per comparison, and the error where it is not good."""

    path: str
    global_step: int
    headlines: tuple[str, ...] = ()
    error: BaseException | None = None


def check_asked(callback: str, every: int, **choices: tuple[object, object]) -> None:
    """Raise UsageError for what counts no saves, and for a value that is none of a Literal's."""
    if every < 1:
        raise UsageError(
            f"{callback}(every={every}): must be at least 1",
            hint="leave it out to verify every save",
        )
    for name, (value, literal) in choices.items():
        if value not in get_args(literal):
            raise UsageError(
                f"{callback}({name}={value!r}): must be one of {', '.join(get_args(literal))}",
                hint=f"leave it out for {get_args(literal)[0]!r}",
            )


def verified(
    path: str | Path, step: int, comparisons: Iterable[Comparison], hint: Callable[[], str]
) -> VerifiedSave:
    """What comparisons of a save come to, up to the first that fails; never raises."""
    headlines: list[str] = []
    error: BaseException | None = None
    try:
        for comparison in comparisons:
            headlines.append(headline(comparison))
            if not comparison.ok:
                raise GoldenMismatch(render(comparison), hint=hint(), comparison=comparison)
    except Exception as problem:
        error = problem
    return VerifiedSave(path=str(path), global_step=step, headlines=tuple(headlines), error=error)


def as_held(held: Checkpoint, written: Checkpoint, policy: Policy) -> Comparison:
    """Compare what was written with what was in memory."""
    measure = AgainstCheckpoint(expected=held, actual=written)
    return compare(structure(held), structure(written), policy, measure, stage="save")


def frozen_of(module: nn.Module) -> frozenset[str]:
    """The keys of the parameters that are not trained."""
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(format_key((key,)) for key, one in named if not one.requires_grad)


def copied(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Copy the tensors to the CPU, tied ones once, so that they stay tied.

    Sparse and quantized ones, which have no single storage, are left out.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    found = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_quantized:
            continue
        if tensor.layout == torch.strided:
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = tensor.detach().to("cpu", copy=True)
            found[key] = copies[place]
    return found


def as_golden(
    golden: Fingerprint,
    written: Checkpoint,
    held: Checkpoint,
    policy: Policy,
    frozen: frozenset[str],
) -> Comparison:
    """Compare keys, shapes and dtypes of all tensors, but values of frozen parameters only.

    Globs that fit only what is `held` in memory are no typing errors.
    """
    policy = policy.at_stage({*golden.tensors, *written.tensors}, held.tensors)
    digests = fingerprint(part(written, {*frozen}), details=nothing).tensors
    found = structure(written)
    tensors = {
        key: replace(tensor, digest=digests[key].digest) if key in digests else tensor
        for key, tensor in found.tensors.items()
    }
    against = AgainstGolden(golden=golden, actual=written)

    def measure(triples: Sequence[Triple]) -> list[Difference]:
        kept = [triple for triple in triples if triple[1].key in frozen]
        measured = iter(against(kept))
        return [
            next(measured) if actual.key in frozen else _unmeasured(expected, tolerance)
            for expected, actual, tolerance in triples
        ]

    comparison = compare(golden, replace(found, tensors=tensors), policy, measure)
    findings = tuple(
        finding
        for finding in comparison.findings
        if finding.kind != "close" or (finding.actual_key or finding.key) in frozen
    )
    trained = len(comparison.findings) - len(findings)
    note = f"the values of {trained:,} tensors were not compared, since they are not frozen"
    notes = (*comparison.notes, note) if trained else comparison.notes
    return replace(comparison, findings=findings, notes=notes)


def _unmeasured(expected: TensorFingerprint, tolerance: Tolerance) -> Difference:
    """Stands for values that nobody looked at; its finding is left out."""
    anything = (0.0, math.inf)
    return Difference(
        verdict="close",
        why="not compared",
        is_exact=False,
        tolerance=tolerance,
        numel=expected.numel,
        max_abs=anything,
        min_atol=anything,
        rms=math.nan,
    )
