"""What the verbs are given, and which golden belongs to it.

In: subjects (a path, an open checkpoint, a module, a state dict), and paths of goldens. Out: open
checkpoints, and the path that a golden is read from or written to. Refused: a golden in the place
of a checkpoint (UsageError) and the other way round (GoldenError), and what cannot be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from harness.checkpoint import Checkpoint, open_checkpoint
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.golden import (
    SUFFIX,
    Golden,
    is_golden,
    is_there,
    read_golden,
    refuse_other,
    source_of,
)

if TYPE_CHECKING:
    from harness.model.live import Live

Subject: TypeAlias = "str | Path | Checkpoint | Live"
"""What can be fingerprinted: a path, an open checkpoint, a torch.nn.Module, a state dict."""
GOLDEN_FOLDER = Path("golden")
_SUFFIXES = (".index.json", ".safetensors", ".nemo", ".ckpt", ".pth", ".pt", ".bin", ".gz")


def golden_path(checkpoint: str | Path) -> Path:
    """Where the golden of a checkpoint goes by default: golden/<stem>.safetensors."""
    path = Path(checkpoint)
    name = path.resolve().name if path.name in ("", "..") else path.name
    for suffix in (*_SUFFIXES, *_SUFFIXES):
        name = name.removesuffix(suffix)
    return GOLDEN_FOLDER / f"{name or path.name}{SUFFIX}"


def choose_golden(subject: Subject | None, golden: str | Path | None) -> Path:
    """The golden to verify against: the one given, else the default one of the checkpoint."""
    if golden is not None:
        return Path(golden)
    if subject is None:
        raise UsageError("give a checkpoint, a golden, or both")
    chosen, path = _default_golden(subject), path_of(subject)
    _refuse_golden(path)
    with _as_golden_error(chosen):
        if not chosen.exists():
            if path is not None and not is_there(path):
                open_checkpoint(path).close()  # says what is wrong with the path
            raise GoldenError(
                f"{chosen}: no golden is recorded for {path}", hint=f"harness record {path}"
            )
    return chosen


def new_golden(subject: Subject, golden: str | Path | None, *, overwrite: bool) -> Path:
    """Where to record a golden; GoldenError where something is that it must not replace."""
    path = path_of(subject)
    target = _default_golden(subject) if golden is None else Path(golden)
    _refuse_golden(path)
    with _as_golden_error(target):
        if not target.exists():
            return target
        if path is not None and is_there(path) and target.samefile(path):
            beside = target.with_name(f"{target.name.removesuffix(SUFFIX)}.golden{SUFFIX}")
            raise GoldenError(
                f"{target}: is the checkpoint itself, and no place for its golden",
                hint=f"harness record {path} -g {beside}",
            )
        if target.is_dir():
            name = "NAME" + SUFFIX if path is None else golden_path(path).name
            raise GoldenError(f"{target}: a folder, not a golden", hint=f"-g {target / name}")
        refuse_other(target)
    if overwrite:
        return target
    source = None if path is None else _other_source(target, path)
    raise GoldenError(
        f"{target}: a golden is recorded there already{f', from {source}' if source else ''}",
        hint=f"to replace it: harness verify {path or 'CKPT'} -g {target} --update-golden "
        "--reason WHY"
        if golden is not None or source is None
        else f"give yours another name: harness record {path} "
        f"-g {target.with_name('OTHER' + SUFFIX)}",
    )


def _other_source(target: Path, path: Path) -> Path | None:
    """The checkpoint that a golden names, where that is another one than `path`."""
    try:
        recorded = read_golden(target)
    except GoldenError:  # damaged: then nobody knows
        return None
    if recorded.source in ("", source_of(path, target)):
        return None
    return recorded.checkpoint or Path(recorded.source)


@contextmanager
def _as_golden_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GoldenError(
            f"{path}: {(error.strerror or 'cannot be looked at').lower()}",
            hint="give another place with -g, or check its permissions",
        ) from error


def _default_golden(subject: Subject) -> Path:
    path = path_of(subject)
    if path is None:
        raise UsageError(
            "what is in memory has no golden of its own name",
            hint=f"give one as well, such as golden='{GOLDEN_FOLDER}/NAME{SUFFIX}'",
        )
    return golden_path(path)


def _refuse_golden(path: Path | None) -> None:
    if path is not None and is_golden(path):
        raise UsageError(f"{path}: is a golden, not a checkpoint", hint=f"harness verify -g {path}")


def path_of(subject: Subject) -> Path | None:
    """The path that a subject is, None for what is open or in memory."""
    return Path(subject) if isinstance(subject, (str, Path)) else None


def only_of_files(subject: Subject, *, section: str | None = None, stage: str = "file") -> None:
    """Refuse what only a path has, of a subject that is none; raises UsageError."""
    if path_of(subject) is not None:
        return
    if section is not None:
        raise UsageError(
            f"section {section!r}: only a file has sections", hint="leave it out, or give the path"
        )
    if stage != "file":
        raise UsageError(
            f"the stage {stage!r} loads a file, which something in memory is not",
            hint="give the path of the checkpoint, or a golden of the file stage alone",
        )


@contextmanager
def opened(subject: Subject, section: str | None) -> Iterator[Checkpoint]:
    """Open a path as long as the context lasts; what is open already stays so."""
    if isinstance(subject, Checkpoint):
        yield subject
    elif isinstance(subject, (str, Path)):
        _refuse_golden(Path(subject))
        with open_checkpoint(subject, section=section) as checkpoint:
            yield checkpoint
    else:
        from harness.model.live import open_live

        yield open_live(subject)


def named_source(golden: Golden) -> Path:
    """The checkpoint that a golden names; CheckpointError where it names none or it is gone."""
    if not golden.source:
        raise CheckpointError(
            f"{golden.path}: was recorded from a live model, so it names no checkpoint",
            hint=f"harness verify CKPT -g {golden.path}",
        )
    source = golden.checkpoint
    if source is None or not is_there(source):
        raise CheckpointError(
            f"{golden.path}: the checkpoint that it was recorded from is not there: "
            f"{golden.source}",
            hint=f"harness verify CKPT -g {golden.path}",
        )
    return source


def source_after(subject: Subject | None, golden: Golden) -> str:
    """The source of an updated golden: another than before, if another subject was given."""
    if subject is None:
        return golden.source
    path = path_of(subject)
    return "" if path is None else source_of(path, golden.path)
