"""The verbs: record, verify, update and diff, from paths to values.

In: paths and policies. Out: `Golden` and `Comparison` values; nothing is printed, and a mismatch
is not an exception (`Comparison.raise_for_mismatch()` makes it one). Raises HarnessError where
something cannot be read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.checkpoint import Checkpoint, Tensor, open_checkpoint
from harness.compare import Comparison, Policy, compare
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.fingerprint import (
    MAX_KEPT_NUMEL,
    Fingerprint,
    outline,
)
from harness.fingerprint import fingerprint as fingerprint_checkpoint
from harness.golden import (
    SUFFIX,
    Golden,
    LiveRecord,
    Update,
    is_golden,
    read_golden,
    source_of,
    write_golden,
)
from harness.measuring import AgainstCheckpoint, AgainstGolden, BySketches, part
from harness.sketch import DEFAULT_BLOCK_NBYTES
from harness.streaming import CHUNK_NBYTES, Progress

if TYPE_CHECKING:
    from harness.model.stages import LiveOptions

__all__ = [
    "choose_golden",
    "diff",
    "fingerprint",
    "golden_path",
    "open_checkpoint",
    "read_golden",
    "record",
    "roundtrip",
    "update",
    "verify",
    "verify_stages",
]

Stage = Literal["file", "load", "reload", "outputs"]
KeptValues = Literal["small", "all", "none"]
_KEEP: Mapping[KeptValues, Callable[[Tensor], bool]] = {
    "small": lambda tensor: tensor.numel <= MAX_KEPT_NUMEL,
    "all": lambda tensor: True,
    "none": lambda tensor: False,
}
_NOTHING = _KEEP["none"]
GOLDEN_FOLDER = Path("golden")
_SUFFIXES = (".index.json", ".safetensors", ".nemo", ".ckpt", ".pth", ".pt", ".bin", ".gz")


def golden_path(checkpoint: str | Path) -> Path:
    """Where the golden of a checkpoint goes by default: golden/<stem>.safetensors."""
    path = Path(checkpoint)
    name = path.resolve().name if path.name in ("", "..") else path.name
    for suffix in (*_SUFFIXES, *_SUFFIXES):
        name = name.removesuffix(suffix)
    return GOLDEN_FOLDER / f"{name or path.name}{SUFFIX}"


def fingerprint(
    path: str | Path,
    *,
    section: str | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Fingerprint:
    """Fingerprint a checkpoint in full. Memory: see `harness.fingerprint.fingerprint`."""
    with open_checkpoint(path, section=section) as checkpoint:
        return fingerprint_checkpoint(checkpoint, jobs=jobs, progress=progress)


def record(
    path: str | Path,
    golden: str | Path | None = None,
    *,
    section: str | None = None,
    block_nbytes: int = DEFAULT_BLOCK_NBYTES,
    values: KeptValues = "small",
    stage: Stage = "file",
    live: LiveOptions | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Golden:
    """Record the golden of a checkpoint, by default at `golden_path(path)`.

    `block_nbytes` (a power of two, 1024 to 1 MiB) of a tensor share one row of the sketch: less
    localises and proves more, more makes the golden smaller. `stage` beyond "file" also records
    what the model of `live` makes of the checkpoint, and "outputs" what it computes. Raises
    CheckpointError, ModelError, and GoldenError where a golden is there already and `overwrite`
    is not given.
    """
    target = golden_path(path) if golden is None else Path(golden)
    if not 1024 <= block_nbytes <= CHUNK_NBYTES // 4 or block_nbytes & (block_nbytes - 1):
        raise UsageError(
            f"--block-size {block_nbytes}: must be a power of two from 1024 to {CHUNK_NBYTES // 4}",
            hint=f"leave it out for {DEFAULT_BLOCK_NBYTES}",
        )
    if target.exists() and not overwrite:
        raise GoldenError(
            f"{target}: a golden is recorded there already",
            hint=f"to replace it: harness verify {path} -g {target} --update-golden --reason WHY",
        )
    with open_checkpoint(path, section=section) as checkpoint:
        found = fingerprint_checkpoint(
            checkpoint,
            keep_values=_KEEP[values],
            block_nbytes=block_nbytes,
            check_integrity=True,
            jobs=jobs,
            progress=progress,
        )
        recorded = Golden(
            path=target,
            fingerprint=replace(found, config=checkpoint.config),
            source=source_of(Path(path), target),
            section=section,
            live=_record_live(Path(path), checkpoint, target, stage, live),
        )
    write_golden(recorded, overwrite=overwrite)
    return recorded


def _record_live(
    path: Path, checkpoint: Checkpoint, golden: Path, stage: Stage, live: LiveOptions | None
) -> LiveRecord | None:
    if stage == "file":
        return None
    from harness.model.stages import LiveOptions, record_live

    return record_live(path, checkpoint, live or LiveOptions(), stage, golden)


def verify(
    path: str | Path | None = None,
    golden: str | Path | Golden | None = None,
    *,
    policy: Policy | None = None,
    reference: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a checkpoint with its golden; without `path`, the checkpoint that the golden names.

    `reference` is the checkpoint that the golden was recorded from: where it is at hand, changed
    tensors are compared with it element by element. Raises CheckpointError and GoldenError.
    """
    policy = policy or Policy()
    recorded = golden if isinstance(golden, Golden) else read_golden(choose_golden(path, golden))
    with ExitStack() as stack:
        actual = stack.enter_context(_opened(path, recorded))
        beside = None
        if reference is not None:
            beside = stack.enter_context(open_checkpoint(reference, section=recorded.section))
        found = fingerprint_checkpoint(actual, details=_NOTHING, jobs=jobs, progress=progress)
        measure = AgainstGolden(
            golden=recorded.fingerprint,
            actual=actual,
            reference=beside,
            jobs=jobs,
            progress=progress,
        )
        return compare(recorded.fingerprint, found, policy, measure)


def verify_stages(
    path: str | Path | None,
    golden: Golden,
    *,
    policy: Policy | None = None,
    stage: Stage | None = None,
    live: LiveOptions | None = None,
    reference: str | Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Comparison]:
    """Yield the comparison of each stage up to `stage`, by default what the golden remembers.

    `live` says which code is under test, by default what the golden remembers. Raises as `verify`,
    and ModelError where the model cannot be built, loaded, saved or run.
    """
    policy = policy or Policy()
    yield verify(path, golden, policy=policy, reference=reference, jobs=jobs, progress=progress)
    last = stage or (golden.live.stages[-1] if golden.live is not None else "file")
    if last == "file":
        return
    from harness.model.stages import Expected, live_stages, remembered

    expected = Expected(weights=golden.fingerprint, live=golden.live)
    source = _source(path, golden)
    yield from live_stages(source, expected, policy, live or remembered(golden), last)


def roundtrip(
    path: str | Path, *, policy: Policy | None = None, live: LiveOptions | None = None
) -> Iterator[Comparison]:
    """Load, save, reload and run a checkpoint, each compared with the file itself; no golden."""
    from harness.model.stages import Expected, LiveOptions, live_stages

    with open_checkpoint(path) as checkpoint:
        weights = fingerprint_checkpoint(checkpoint, details=_NOTHING)
    expected = Expected(weights=weights)
    yield from live_stages(
        Path(path), expected, policy or Policy(), live or LiveOptions(), "outputs"
    )


def update(
    path: str | Path | None,
    golden: Golden,
    *,
    reason: str = "",
    stage: Stage | None = None,
    live: LiveOptions | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Golden:
    """Replace a golden with what the checkpoint holds now; the old root and `reason` are kept.

    What the golden remembers of the model, or what `stage` and `live` say, is recorded anew.
    Rows of unchanged tensors are copied, so that the file changes only where the weights did.
    """
    old = golden.fingerprint
    with _opened(path, golden) as actual:
        digests = fingerprint_checkpoint(actual, details=_NOTHING, jobs=jobs, progress=progress)
        same = {
            key
            for key, tensor in digests.tensors.items()
            if key in old.tensors and old.tensors[key].digest == tensor.digest
        }
        keeps = _kept_as_before(old)
        found = fingerprint_checkpoint(
            actual,
            details=lambda tensor: tensor.key not in same,
            keep_values=keeps,
            block_nbytes=old.block_nbytes,
            check_integrity=True,
            jobs=jobs,
        )
        tensors = {
            key: replace(old.tensors[key], alias_of=tensor.alias_of) if key in same else tensor
            for key, tensor in found.tensors.items()
        }
        updated = replace(
            golden,
            fingerprint=replace(found, tensors=tensors, config=actual.config),
            source=golden.source if path is None else source_of(Path(path), golden.path),
            live=_update_live(_source(path, golden), actual, golden, stage, live),
        )
    if updated.fingerprint.root != old.root or updated.live != golden.live:
        entry = Update(root=old.root.hex(), reason=reason)
        updated = replace(updated, history=(*golden.history, entry))
    write_golden(updated, overwrite=True)
    return updated


def diff(
    expected: str | Path,
    actual: str | Path,
    *,
    policy: Policy | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two checkpoints element by element, or goldens with either by their sketches."""
    policy = policy or Policy()
    one, other = Path(expected), Path(actual)
    if is_golden(one):
        recorded = read_golden(one)
        if not is_golden(other):
            return verify(other, recorded, policy=policy, jobs=jobs, progress=progress)
        return compare(
            recorded.fingerprint,
            read_golden(other).fingerprint,
            policy,
            BySketches(recorded.fingerprint.block_nbytes),
        )
    if is_golden(other):
        recorded = read_golden(other)
        with open_checkpoint(one, section=recorded.section) as checkpoint:
            found = fingerprint_checkpoint(
                checkpoint,
                keep_values=_kept_as_before(recorded.fingerprint),
                block_nbytes=recorded.fingerprint.block_nbytes,
                jobs=jobs,
                progress=progress,
            )
        return compare(
            found, recorded.fingerprint, policy, BySketches(recorded.fingerprint.block_nbytes)
        )
    with open_checkpoint(one) as left, open_checkpoint(other) as right:
        ours, theirs = outline(left), outline(right)
        # Renames are told by digest: only keys that stand on one side alone need one.
        ours = _with_digests(ours, left, set(left.tensors) - set(right.tensors), jobs)
        theirs = _with_digests(theirs, right, set(right.tensors) - set(left.tensors), jobs)

        measure = AgainstCheckpoint(expected=left, actual=right, jobs=jobs, progress=progress)
        return compare(ours, theirs, policy, measure)


def choose_golden(path: str | Path | None, golden: str | Path | None) -> Path:
    """The golden to verify against: the one given, else the default one of the checkpoint."""
    if golden is not None:
        return Path(golden)
    if path is None:
        raise UsageError("give a checkpoint, a golden, or both")
    chosen = golden_path(path)
    if not chosen.exists():
        if not Path(path).exists():
            open_checkpoint(path).close()  # says what is wrong with the path
        raise GoldenError(
            f"{chosen}: no golden is recorded for {path}", hint=f"harness record {path}"
        )
    return chosen


def _update_live(
    path: Path, actual: Checkpoint, golden: Golden, stage: Stage | None, live: LiveOptions | None
) -> LiveRecord | None:
    """Record anew what the golden remembers of the model: other weights compute other outputs."""
    known = golden.live.stages if golden.live is not None else ("file",)
    last = stage if stage is not None and stage not in known else known[-1]
    if last == "file":
        return None
    from harness.model.stages import record_live, remembered

    return record_live(path, actual, live or remembered(golden), last, golden.path)


@contextmanager
def _opened(path: str | Path | None, golden: Golden) -> Iterator[Checkpoint]:
    with open_checkpoint(_source(path, golden), section=golden.section) as checkpoint:
        yield checkpoint


def _source(path: str | Path | None, golden: Golden) -> Path:
    """The checkpoint to verify: the one given, else the one that the golden names."""
    source = golden.checkpoint if path is None else Path(path)
    if source is None or (path is None and not source.exists()):
        raise CheckpointError(
            f"{golden.path}: the checkpoint that it was recorded from is not there: "
            f"{golden.source}",
            hint=f"harness verify CKPT -g {golden.path}",
        )
    return source


def _kept_as_before(old: Fingerprint) -> Callable[[Tensor], bool]:
    """Keep values or sketches as the golden at hand does, for new tensors as `record` does."""
    small = [t for t in old.tensors.values() if t.numel <= MAX_KEPT_NUMEL]
    large = [t for t in old.tensors.values() if t.numel > MAX_KEPT_NUMEL]
    if any(tensor.values is not None for tensor in large):
        return _KEEP["all"]
    if small and not any(tensor.values is not None for tensor in small):
        return _KEEP["none"]
    return _KEEP["small"]


def _with_digests(
    outlined: Fingerprint, checkpoint: Checkpoint, keys: set[str], jobs: int | None
) -> Fingerprint:
    digests = fingerprint_checkpoint(part(checkpoint, keys), details=_NOTHING, jobs=jobs).tensors
    return replace(
        outlined,
        tensors={
            key: replace(tensor, digest=digests[key].digest) if key in digests else tensor
            for key, tensor in outlined.tensors.items()
        },
    )
