"""Which golden belongs to a checkpoint, and where a new one is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources.paths import AnyPath, Location, is_there, path_of, to_path
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.golden.file import check_is_golden, is_golden, read_golden, similar_golden
from harness.golden.golden import SUFFIX, Golden, source_of
from harness.text.shell import command_line, quoted

GOLDEN_FOLDER = Path("golden")
_SUFFIXES = (".index.json", ".safetensors", ".nemo", ".ckpt", ".pth", ".pt", ".bin", ".gz")


def golden_path(checkpoint: Location) -> Path:
    """Where the golden of a checkpoint goes by default: golden/<stem>.safetensors."""
    path = to_path(checkpoint)
    name = path.name
    if isinstance(path, Path) and name in ("", ".."):
        name = path.resolve().name
    for suffix in (*_SUFFIXES, *_SUFFIXES):
        name = name.removesuffix(suffix)
    return GOLDEN_FOLDER / f"{name or path.name}{SUFFIX}"


def choose_golden(subject: object, golden: Location | None) -> AnyPath:
    """The golden to verify against: the one given, else the default one of the checkpoint."""
    path = None if subject is None else path_of(subject)
    if golden is not None:
        chosen = to_path(golden)
        with _as_golden_error(chosen):
            if path is not None and not chosen.exists() and similar_golden(chosen) is None:
                _no_golden(chosen, path, named=f" -g {_typed(chosen)}")
            if path is not None and isinstance(chosen, Path):  # of a URL it is not worth asking
                own = chosen / golden_path(path).name
                if own.exists():
                    raise _a_folder(chosen, own)
        return chosen
    if subject is None:
        raise UsageError("give a checkpoint, a golden, or both")
    chosen = _default_golden(subject)
    check_not_golden(path)
    with _as_golden_error(chosen):
        if not chosen.exists():
            _no_golden(chosen, path)
    return chosen


def _typed(path: AnyPath | None) -> str:
    """A path as a shell takes it."""
    return "CKPT" if path is None else quoted(str(path))


def _no_golden(chosen: AnyPath, path: AnyPath | None, *, named: str = "") -> NoReturn:
    if path is not None:
        close = None if is_there(path) else similar_golden(path)
        if close is not None:
            raise CheckpointError(
                f"{path}: no such file or directory", hint=f"harness verify -g {_typed(close)}"
            )
        open_checkpoint(path).close()  # what cannot be opened cannot be recorded
    raise GoldenError(
        f"{chosen}: no golden is recorded for {path}",
        hint=f"harness record {_typed(path)}{named}",
    )


def new_golden(
    subject: object,
    golden: Location | None,
    *,
    section: str | None,
    live: Sequence[str],
    overwrite: bool,
) -> AnyPath:
    """Where to record a golden; GoldenError where something is that it must not replace.

    `section` and `live`, as options of the command line, are what is to be recorded.
    """
    path = path_of(subject)
    target = _default_golden(subject) if golden is None else to_path(golden)
    check_not_golden(path)
    with _as_golden_error(target):
        if not target.exists():
            return target
        if path is not None and is_there(path) and _is_same(target, path):
            beside = target.with_name(f"{target.name.removesuffix(SUFFIX)}.golden{SUFFIX}")
            raise GoldenError(
                f"{target}: is the checkpoint itself, and no place for its golden",
                hint=f"harness record {_typed(path)} -g {_typed(beside)}",
            )
        if target.is_dir():
            name = "NAME" + SUFFIX if path is None else golden_path(path).name
            raise _a_folder(target, target / name)
        check_is_golden(target)
    if overwrite:
        return target
    raise _is_taken(target, path, section, live, is_named=golden is not None)


def _is_taken(
    target: AnyPath,
    path: AnyPath | None,
    section: str | None,
    live: Sequence[str],
    *,
    is_named: bool,
) -> GoldenError:
    what, updates = ("", True) if path is None else _held(target, path, section, is_named=is_named)
    if updates:
        place = ["-g", str(target)] if is_named else []
        options = [*place, *live, "--update-golden", "--reason", "WHY"]
        hint = "to replace it: harness verify"
    else:
        part = [] if section is None else ["--section", section]
        options = ["-g", str(target.with_name(f"OTHER{SUFFIX}")), *part, *live]
        hint = "give yours another name: harness record"
    return GoldenError(
        f"{target}: a golden is recorded there already{what}",
        hint=f"{hint} {_typed(path)} {command_line(options)}",
    )


def _held(
    target: AnyPath, path: AnyPath, section: str | None, *, is_named: bool
) -> tuple[str, bool]:
    """What a golden is of, where that is something else, and whether an update may replace it."""
    try:
        recorded = read_golden(target)
    except GoldenError:  # damaged: then nobody knows
        return "", True
    if recorded.section != section:
        part = "the state dict" if recorded.section is None else f"section {recorded.section!r}"
        return f", of {part}", False
    if recorded.source in ("", source_of(path, target)):
        return "", True
    return f", from {recorded.checkpoint or to_path(recorded.source)}", is_named


def _a_folder(path: AnyPath, meant: AnyPath) -> GoldenError:
    return GoldenError(f"{path}: a folder, not a golden", hint=f"-g {_typed(meant)}")


def _is_same(one: AnyPath, other: AnyPath) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.samefile(other)
    return str(one) == str(other)


@contextmanager
def _as_golden_error(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GoldenError(
            f"{path}: {(error.strerror or 'cannot be looked at').lower()}",
            hint="give another place with -g, or check its permissions",
        ) from error


def _default_golden(subject: object) -> Path:
    path = path_of(subject)
    if path is None:
        raise UsageError(
            "what is in memory has no golden of its own name",
            hint=f"give one as well, such as golden='{GOLDEN_FOLDER}/NAME{SUFFIX}'",
        )
    return golden_path(path)


def check_not_golden(path: AnyPath | None) -> None:
    if path is not None and is_golden(path):
        raise UsageError(
            f"{path}: is a golden, not a checkpoint", hint=f"harness verify -g {_typed(path)}"
        )


def check_reference(path: AnyPath, golden: Golden, subject: object) -> None:
    """Refuse a golden in the place of the checkpoint that was recorded; raises UsageError."""
    if is_golden(path):
        there = other_reference(golden, subject)
        raise UsageError(
            f"--reference {path}: is a golden, not the checkpoint that was recorded",
            hint=f"--reference {_typed(there)}"
            if there is not None
            else "give the checkpoint that was recorded, or leave it out",
        )


def other_reference(golden: Golden, subject: object) -> AnyPath | None:
    """The recorded checkpoint, where it is there and not the very one that is verified."""
    there = golden.checkpoint
    if there is None or subject is None:
        return None
    if isinstance(there, Path) and not is_there(there):  # of a URL it is not worth asking
        return None
    path = path_of(subject)
    return None if path is not None and _is_same(there, path) else there


def named_source(golden: Golden) -> AnyPath:
    """The checkpoint that a golden names; CheckpointError where it names none or it is gone."""
    if not golden.source:
        raise CheckpointError(
            f"{golden.path}: was recorded from a live model, so it names no checkpoint",
            hint=f"harness verify CKPT -g {_typed(golden.path)}",
        )
    source = golden.checkpoint
    if source is None or not is_there(source):
        raise CheckpointError(
            f"{golden.path}: the checkpoint that it was recorded from is not there: "
            f"{golden.source}",
            hint=f"harness verify CKPT -g {_typed(golden.path)}",
        )
    return source


def source_after(subject: object, golden: Golden) -> str:
    """The source of an updated golden: another than before, if another subject was given."""
    if subject is None:
        return golden.source
    path = path_of(subject)
    return "" if path is None else source_of(path, golden.path)
