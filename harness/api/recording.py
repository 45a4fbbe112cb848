"""Verbs that make fingerprints and write goldens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from harness.checkpoint.sources.paths import Location, path_of
from harness.comparison.measuring import nothing
from harness.comparison.policy import Policy, Stage
from harness.errors import UsageError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.residues import DEFAULT_TOLERANCE
from harness.fingerprints.scan import fingerprint as fingerprint_checkpoint
from harness.fingerprints.scan import with_settings
from harness.golden.budget import KeptValues as KeptValues
from harness.golden.budget import Sizes, choose, default_max_nbytes, held_by
from harness.golden.file import replace_golden, write_golden
from harness.golden.golden import Golden, source_of
from harness.golden.places import named_source, new_golden, source_after
from harness.streaming.workers import Group, Progress, Workers
from harness.subjects import (
    Subject,
    golden_of,
    live_record,
    of_live_ones_too,
    only_of_files,
    opened,
    opened_for,
)

if TYPE_CHECKING:
    from harness.model.options import LiveOptions


@of_live_ones_too
def fingerprint(
    subject: Subject,
    *,
    section: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Fingerprint:
    """Fingerprint a checkpoint in full. Memory: see `harness.fingerprint.fingerprint`."""
    only_of_files(subject, section=section)
    with opened(subject, section) as checkpoint:
        return fingerprint_checkpoint(
            checkpoint, workers=Workers(jobs=jobs, progress=progress, group=group)
        )


@of_live_ones_too
def record(
    subject: Subject,
    golden: Location | None = None,
    *,
    section: str | None = None,
    max_size: int | None = None,
    values: KeptValues = "small",
    atol: float = DEFAULT_TOLERANCE[0],
    rtol: float = DEFAULT_TOLERANCE[1],
    stage: Stage = "file",
    live: LiveOptions | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Golden:
    """Record the golden of a checkpoint, by default at `golden_path(subject)`.

    What is no path needs `golden`, and has no `section` and no live stages.

    It holds as much of the weights as fits into `max_size` bytes, by default 8 MB, or 1 % of the
    checkpoint where that is more, at most 100 MB: residues, which decide allclose at `atol` and
    `rtol`, or sketches alone (`harness.golden.budget`). `values` "all" keeps every value, "none"
    none. `atol` and `rtol` are also what a later `verify` allows by default.

    `stage` beyond "file" also records what the model of `live` makes of the checkpoint, and
    "outputs" what it computes: with 8 bits of each element where `max_size` has room for that
    beside the weights, else with 4, which come on top. Raises CheckpointError,
    ModelError, UsageError for what does not fit, and GoldenError where a golden is there already
    and `overwrite` is not given.
    """
    only_of_files(subject, golden, section=section, stage=stage)
    path = path_of(subject)
    if values not in get_args(KeptValues):
        known = ", ".join(get_args(KeptValues))
        raise UsageError(f"values={values!r}: no such choice", hint=f"one of {known}")
    if values == "all" and max_size is not None:
        raise UsageError(
            "--max-size has no effect with --values all, which keeps every value",
            hint="leave out one of them",
        )
    Policy(atol=atol, rtol=rtol)  # raises for what is no tolerance
    target = new_golden(
        subject, golden, section=section, live=_as_options(stage, live), overwrite=overwrite
    )
    with opened(subject, section) as checkpoint:
        holding = choose(checkpoint, max_size, values, (atol, rtol))
        found = fingerprint_checkpoint(
            checkpoint,
            keep_values=holding.keeps,
            block_nbytes=holding.block_nbytes,
            tolerance=(atol, rtol),
            bits=holding.bits,
            hashes=True,
            check_integrity=True,
            workers=Workers(jobs=jobs, progress=progress, group=group),
        )
        recorded = Golden(
            path=target,
            fingerprint=with_settings(found, checkpoint),
            source="" if path is None else source_of(path, target),
            section=section,
        )
        made = live_record(recorded, path, checkpoint, stage, live, room=holding.room)
        recorded = replace(recorded, live=made)
    write_golden(recorded, overwrite=overwrite)
    return recorded


def _as_options(stage: Stage, live: LiveOptions | None) -> list[str]:
    """Stage and code under test as the command line takes them."""
    if stage == "file":
        return []
    flags = {"--model": "target", "--config": "config", "--inputs": "inputs", "--base": "base"}
    options = [f"--{stage}"]
    for flag, name in flags.items():
        if (value := getattr(live, name, None)) is not None:
            options += [flag, str(value)]
    return options


@of_live_ones_too
def update(
    subject: Subject | None,
    golden: Location | Golden | None = None,
    *,
    reason: str = "",
    stage: Stage | None = None,
    live: LiveOptions | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Golden:
    """Replace a golden with what the checkpoint holds now; the old root and `reason` are kept.

    What the golden remembers of the model, or what `stage` and `live` say, is recorded anew.
    Rows of unchanged tensors are copied, so that the file changes only where the weights did.
    What is no path has no live stages (UsageError), and leaves the golden without a source. Raises
    GoldenError where another process has updated the golden since it was read.
    """
    workers = Workers(jobs=jobs, progress=progress, group=group)
    golden = golden_of(subject, golden)
    old = golden.fingerprint
    found_at = named_source(golden) if subject is None else subject
    last = _last_stage(golden, stage)
    only_of_files(found_at, golden.path, stage=last)
    path = path_of(found_at)
    with opened_for(golden, found_at) as actual:
        digests = fingerprint_checkpoint(actual, details=nothing, workers=workers)
        was = {key: tensor.digest for key, tensor in old.tensors.items()}
        same = {k for k, t in digests.tensors.items() if k in was and was[k] == t.digest}
        holding = held_by(old)
        found = fingerprint_checkpoint(
            actual,
            details=lambda tensor: tensor.key not in same,
            keep_values=holding.keeps,
            block_nbytes=holding.block_nbytes,
            tolerance=old.tolerance,
            bits=holding.bits,
            hashes=True,
            check_integrity=True,
            workers=workers,
        )
        tensors: dict[str, TensorFingerprint] = {}
        for key, tensor in found.tensors.items():
            if tensor.alias_of is not None:  # of one that stands before it
                tensor = replace(tensors[tensor.alias_of], key=key, alias_of=tensor.alias_of)
            elif key in same:
                tensor = replace(old.tensors[key], alias_of=None)
            tensors[key] = tensor
        found = replace(with_settings(found, actual), tensors=tensors)
        updated = replace(golden, fingerprint=found, source=source_after(subject, golden))
        room = default_max_nbytes(actual) - Sizes(actual, old.tolerance).of(holding)
        made = live_record(updated, path, actual, last, live, room=room)
        updated = replace(updated, live=made)
    if updated.live is not None and updated.live.tells_as(golden.live):
        updated = replace(updated, live=golden.live)  # whose sketches may have other last bits
    updated = updated.following(golden, reason)
    replace_golden(golden, updated)
    return updated


def _last_stage(golden: Golden, stage: Stage | None) -> str:
    """How far an update goes: as far as the golden remembers, further where it is asked to."""
    known = golden.live.stages if golden.live is not None else ("file",)
    return stage if stage is not None and stage not in known else known[-1]
