"""Verbs that compare."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.checkpoint.sources.paths import Location, is_there, to_local, to_path
from harness.comparison import buffers as buffers_of
from harness.comparison.causes.explain import with_causes
from harness.comparison.compare import compare, with_damages
from harness.comparison.comparison import Comparison
from harness.comparison.matching import check_mapped
from harness.comparison.measuring import AgainstCheckpoint, AgainstGolden, BySketches, nothing, part
from harness.comparison.policy import Policy, PolicyOfStages, Stage, check_stage
from harness.errors import NoSection
from harness.fingerprints.fingerprint import structure
from harness.fingerprints.integrity import damages
from harness.fingerprints.scan import fingerprint as fingerprint_checkpoint
from harness.fingerprints.scan import with_digests, with_settings
from harness.golden.budget import KeptValues as KeptValues
from harness.golden.budget import held_by
from harness.golden.file import is_golden, read_golden
from harness.golden.golden import Golden
from harness.golden.places import check_reference, named_source
from harness.streaming.workers import Group, Progress, Workers
from harness.subjects import (
    LOADED,
    Subject,
    checked,
    golden_of,
    of_live_ones_too,
    opened,
    opened_for,
    opened_part,
)

if TYPE_CHECKING:
    from harness.model.options import LiveOptions


@of_live_ones_too
def verify(
    subject: Subject | None = None,
    golden: Location | Golden | None = None,
    *,
    section: str | None = None,
    policy: Policy | None = None,
    reference: Location | None = None,
    adapter: Location | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Comparison:
    """Compare a checkpoint with its golden; without one, the checkpoint that the golden names.

    `section` is the part of the checkpoint to look at, by default the one that the golden is of.

    `reference` is the checkpoint that the golden was recorded from: changed tensors are compared
    with it element by element. `adapter` is one of LoRA that may explain them. What is no path
    needs `golden`. Raises CheckpointError, GoldenError, and UsageError for options that fit
    nothing.
    """
    return _verify(
        subject,
        golden_of(subject, golden),
        policy or Policy(),
        section=section,
        reference=reference,
        adapter=adapter,
        workers=Workers(jobs=jobs, progress=progress, group=group),
    )


def _verify(
    subject: Subject | None,
    recorded: Golden,
    policy: Policy,
    *,
    stages: PolicyOfStages | None = None,
    section: str | None,
    reference: Location | None,
    adapter: Location | None,
    workers: Workers,
) -> Comparison:
    """As `verify`; where other `stages` follow, what fits nothing here is left to them."""
    started = time.monotonic()
    with ExitStack() as stack:
        actual = stack.enter_context(
            opened_for(recorded, named_source(recorded) if subject is None else subject, section)
        )
        beside = None
        if reference is not None:
            check_reference(to_path(reference), recorded, subject)
            beside = stack.enter_context(opened_for(recorded, reference))
        buffers = recorded.parts.get("buffers")
        sides = buffers_of.joined(recorded.fingerprint, buffers, actual)
        expected, actual = sides.expected, sides.actual
        found = fingerprint_checkpoint(actual, details=nothing, workers=workers)
        found = with_settings(found, actual, recorded.fingerprint)
        measure = AgainstGolden(
            golden=expected,
            actual=actual,
            reference=beside if actual.buffers is None else None,
            partial_reference=beside,
            workers=workers,
        )
        # What fits buffers alone, which the live stages compare, is no typo. Outputs have a
        # tolerance of their own, and none of them is left out.
        here = {*expected.tensors, *found.tensors}
        policy = policy.at_stage(here, () if buffers is None else buffers.tensors)
        notes = sides.notes
        if stages is not None:
            policy = stages.at(expected.tensors, found.tensors)
            notes = (*notes, *stages.note(policy))
        compared = compare(expected, found, policy, measure)
        compared = replace(compared, notes=(*compared.notes, *notes))
        compared = buffers_of.named(compared, buffers, actual)
        compared = with_damages(compared, lambda keys: damages(actual, keys, workers))
        return with_causes(
            compared,
            actual,
            beside,
            started=started,
            known=measure.details,
            adapter=adapter,
            workers=workers,
        )


@checked
def verify_stages(
    path: Location | None,
    golden: Location | Golden | None = None,
    *,
    section: str | None = None,
    policy: Policy | None = None,
    stage: Stage | None = None,
    live: LiveOptions | None = None,
    reference: Location | None = None,
    adapter: Location | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Iterator[Comparison]:
    """Yield the comparison of each stage up to `stage`, by default what the golden remembers.

    `live` says which code is under test, by default what the golden remembers. Raises as `verify`,
    and ModelError where the model cannot be built, loaded, saved or run.
    """
    policy, golden = policy or Policy(), golden_of(path, golden)
    last = stage or (golden.live.stages[-1] if golden.live is not None else "file")
    check_stage(last)
    stages = PolicyOfStages(policy)
    check_mapped(policy, _names(golden), golden.fingerprint.name)
    yield _verify(
        path,
        golden,
        policy,
        stages=None if last == "file" else stages,
        section=section,
        reference=reference,
        adapter=adapter,
        workers=Workers(jobs=jobs, progress=progress, group=group),
    )
    if last == "file":
        return
    from harness.model.options import remembered
    from harness.model.stages import Expected, live_stages

    expected = Expected(weights=golden.fingerprint, live=golden.live, section=golden.section)
    source = to_local(named_source(golden) if path is None else path, LOADED)
    yield from live_stages(source, expected, stages, live or remembered(golden), last)


def _names(golden: Golden) -> list[str]:
    """The keys that a map may be of: of weights, buffers, and the modules that were run."""
    parts = golden.parts
    keys = [key for name in ("weights", "buffers") if name in parts for key in parts[name].tensors]
    run = parts["outputs"].tensors if "outputs" in parts else ()
    return [*keys, *(f"{key.partition(':')[0].partition('@')[0]}." for key in run)]


@checked
def roundtrip(
    path: Location,
    *,
    section: str | None = None,
    policy: Policy | None = None,
    stage: Stage | None = None,
    live: LiveOptions | None = None,
) -> Iterator[Comparison]:
    """Load, save, reload and run a checkpoint, each compared with the file itself; no golden.

    `stage` is the last: without it, outputs, or reload for a model without example inputs.
    """
    from harness.model.options import LiveOptions
    from harness.model.stages import Expected, live_stages

    source, taken = to_local(path, LOADED), section
    with ExitStack() as stack:
        try:
            checkpoint = stack.enter_context(opened(source, section))
        except NoSection as error:
            if section is not None or not error.sections:
                raise
            taken = error.sections[0]  # the model decides
            checkpoint = stack.enter_context(opened(source, taken))
        weights = fingerprint_checkpoint(checkpoint, details=nothing)
    expected = Expected(weights=weights, section=taken, is_file=section is None)
    stages = PolicyOfStages(policy or Policy())
    check_mapped(stages.policy, list(weights.tensors), weights.name)
    yield from live_stages(source, expected, stages, live or LiveOptions(), stage)


def write_inputs(
    model: Location, file: Path, *, live: LiveOptions | None = None, overwrite: bool = False
) -> dict[str, tuple[int, ...]]:
    """Write a model's example inputs as safetensors; returns their names and shapes.

    `model` is a checkpoint, or `package.module:Name` of what is built without arguments. Raises
    ModelError for a model without inputs, UsageError for a file that is there.
    """
    from harness.model.config import load_config
    from harness.model.inputs import write_inputs as write
    from harness.model.loading import built
    from harness.model.options import LiveOptions, loader_of

    live = live or LiveOptions()
    if ":" in str(model) and not is_there(to_path(model)):
        module = built(str(model), None if live.config is None else load_config(live.config))
    else:
        source = to_local(model, LOADED)
        with opened(source, None) as checkpoint:
            module = loader_of(live, checkpoint).load(source, seed=1, section=checkpoint.section)
    written = write(module, Path(file), overwrite=overwrite)
    return {name: tuple(tensor.shape) for name, tensor in written.items()}


@checked
def diff(
    expected: Location,
    actual: Location,
    *,
    section: str | None = None,
    section_b: str | None = None,
    policy: Policy | None = None,
    stats: bool = False,
    adapter: Location | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Comparison:
    """Compare two checkpoints element by element, or goldens with either by their sketches.

    `section` is the part of both checkpoints to look at, `section_b` that of the second.
    `stats` also measures the statistics of what differs between two checkpoints; `adapter` is as in
    `verify`. Raises CheckpointError, GoldenError, and UsageError for options of the policy that fit
    nothing.
    """
    policy, started = policy or Policy(), time.monotonic()
    workers = Workers(jobs=jobs, progress=progress, group=group)
    one, other = to_path(expected), to_path(actual)
    if is_golden(other):
        recorded = read_golden(other)
        if is_golden(one):
            found = read_golden(one).fingerprint
        else:
            with opened_for(recorded, one, section) as checkpoint:
                found = fingerprint_checkpoint(
                    checkpoint,
                    keep_values=held_by(recorded.fingerprint).keeps,
                    block_nbytes=recorded.fingerprint.block_nbytes,
                    workers=workers,
                )
        compared = compare(found, recorded.fingerprint, policy, BySketches(found.block_nbytes))
        return with_causes(
            compared,
            started=started,
            adapter=adapter,
            side="the first golden" if is_golden(one) else "the first file",
            workers=workers,
        )
    if is_golden(one):
        return verify(
            other,
            read_golden(one),
            section=section if section_b is None else section_b,
            policy=policy,
            adapter=adapter,
            jobs=jobs,
            progress=progress,
            group=group,
        )
    with (
        opened(one, section) as left,
        opened_part(other, section if section_b is None else section_b, section_b) as right,
    ):
        ours = with_settings(structure(left), left)
        theirs = with_settings(structure(right), right, ours)
        # Renames are told by digest: only keys that stand on one side alone need one.
        alone = set(left.tensors) ^ set(right.tensors)
        ours = with_digests(ours, part(left, alone), workers)
        theirs = with_digests(theirs, part(right, alone), workers)
        measure = AgainstCheckpoint(expected=left, actual=right, stats=stats, workers=workers)
        compared = compare(ours, theirs, policy, measure)
        compared = with_damages(compared, lambda k: damages(left, k, workers), "expected")
        compared = with_damages(compared, lambda k: damages(right, k, workers))
        return with_causes(
            compared,
            right,
            left,
            started=started,
            adapter=adapter,
            side="the first file",
            workers=workers,
        )
