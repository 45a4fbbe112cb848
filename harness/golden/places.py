"""Which golden belongs to a checkpoint, and where a new one is written."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NoReturn

from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources.paths import AnyPath, Location, is_there, is_url, path_of, to_path
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.fingerprints.scan import fingerprint
from harness.golden.file import check_is_golden, is_golden, read_golden, similar_golden
from harness.golden.folder import names_of
from harness.golden.golden import SUFFIX, Golden, real_path, source_of
from harness.golden.project import roots_of
from harness.text.shell import command_line, quoted

GOLDEN_FOLDER = Path("golden")
_MAX_MOVED = 100  # files of one name that are looked at


def golden_path(checkpoint: Location, folder: AnyPath = GOLDEN_FOLDER) -> AnyPath:
    """Where the golden of a checkpoint goes by default: golden/<stem>.safetensors.

    A stem that says nothing (`model`, `checkpoint-500`) begins with the name of its folder.
    """
    return folder / names_of(to_path(checkpoint))[0]


def own_golden(checkpoint: AnyPath, folder: AnyPath = GOLDEN_FOLDER) -> AnyPath | None:
    """The golden of a checkpoint's name that was recorded from it, or else from a file unknown."""
    there = [path for name in names_of(checkpoint) if (path := folder / name).exists()]
    if len(there) > 1:
        there = [p for p in there if recorded_from(p) == source_of(checkpoint, p)] or there
    return there[0] if there else None


def recorded_from(golden: AnyPath) -> str:
    """The source of a golden; "" where it names none, or is damaged."""
    try:
        return read_golden(golden).source
    except GoldenError:
        return ""


def choose_golden(subject: object, golden: Location | None) -> AnyPath:
    """The golden to verify against: the one given, else the default one of the checkpoint."""
    path = None if subject is None else path_of(subject)
    if golden is not None:
        chosen = to_path(golden)
        with _as_golden_error(chosen):
            if path is not None and chosen.is_file() and not is_golden(chosen) and is_golden(path):
                raise UsageError(
                    f"{path} is a golden, and -g {chosen} is not: they are swapped",
                    hint=f"harness verify {_typed(chosen)} -g {_typed(path)}",
                )
            if path is not None and not chosen.exists() and similar_golden(chosen) is None:
                _no_golden(chosen, path, named=f" -g {_typed(chosen)}")
            if path is not None and isinstance(chosen, Path) and chosen.is_dir():
                return _in_folder(path, chosen)
        return chosen
    if subject is None:
        raise UsageError("give a checkpoint, a golden, or both")
    if path is None:
        raise _unnamed()
    check_not_golden(path)
    return _in_folder(path, GOLDEN_FOLDER)


def _in_folder(checkpoint: AnyPath, folder: AnyPath) -> AnyPath:
    with _as_golden_error(folder):
        own = own_golden(checkpoint, folder)
        if own is None:
            named = "" if folder == GOLDEN_FOLDER else f" -g {_typed(folder)}"
            _no_golden(golden_path(checkpoint, folder), checkpoint, named=named)
    return own


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
        f"{chosen}: no golden is recorded for {path}", hint=f"harness record {_typed(path)}{named}"
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
    check_not_golden(path)
    target = GOLDEN_FOLDER if golden is None else to_path(golden)
    if path is None and golden is None:
        raise _unnamed()
    with _as_golden_error(target):
        is_named = golden is not None
        if path is not None and (
            golden is None or (target.is_dir() and not (is_there(path) and is_same(target, path)))
        ):
            target, is_named = _free_name(path, target), False
        if not target.exists():
            return target
        if path is not None and is_there(path) and is_same(target, path):
            beside = target.with_name(f"{target.name.removesuffix(SUFFIX)}.golden{SUFFIX}")
            raise GoldenError(
                f"{target}: is the checkpoint itself, which its golden must not replace",
                hint=f"harness record {_typed(path)} -g {_typed(beside)}",
            )
        check_is_golden(target)
    if overwrite:
        return target
    raise _is_taken(target, path, section, live, is_named=is_named)


def new_places(
    checkpoints: Sequence[AnyPath], golden: AnyPath | None
) -> list[tuple[AnyPath, AnyPath | None]]:
    """Where to record several checkpoints: what has one name takes those of its folders into it.

    `golden` is the folder of all; a file for one alone.
    """
    if len(checkpoints) == 1:
        return [(checkpoints[0], golden)]
    folder = GOLDEN_FOLDER if golden is None else golden
    if golden is not None and golden.is_file():
        raise UsageError(
            f"-g {golden}: one golden for {len(checkpoints)} checkpoints",
            hint="give a folder with -g, or leave it out",
        )
    names = {path: names_of(path) for path in checkpoints}
    first = Counter(own[0] for own in names.values())
    alike = {path: own for path, own in names.items() if first[own[0]] > 1}
    depth = next(
        (
            depth
            for depth in range(1, max(map(len, alike.values()), default=0))
            if len({own[min(depth, len(own) - 1)] for own in alike.values()}) == len(alike)
        ),
        0,
    )

    def place(path: AnyPath, own: list[str]) -> AnyPath | None:
        if path in alike and depth:
            return folder / own[min(depth, len(own) - 1)]
        return None if golden is None else folder / own[0]

    return [(path, place(path, own)) for path, own in names.items()]


def _free_name(checkpoint: AnyPath, folder: AnyPath) -> AnyPath:
    """The first name that no other checkpoint's golden has."""
    for name in names_of(checkpoint):
        path = folder / name
        if not path.exists() or recorded_from(path) in ("", source_of(checkpoint, path)):
            return path
    return golden_path(checkpoint, folder)


def _unnamed() -> UsageError:
    return UsageError(
        "a checkpoint in memory has no default golden",
        hint=f"give one, such as golden='{GOLDEN_FOLDER}/NAME{SUFFIX}'",
    )


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


def is_same(one: AnyPath, other: AnyPath) -> bool:
    """Whether two paths that are there lead to one file."""
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


def check_not_golden(path: AnyPath | None) -> None:
    """Raise UsageError for a golden, or a folder of goldens, in the place of a checkpoint."""
    if path is None:
        return
    kind = "golden" if is_golden(path) else "folder of goldens" if _holds_goldens(path) else None
    if kind is not None:
        raise UsageError(
            f"{path}: is a {kind}, not a checkpoint", hint=f"harness verify -g {_typed(path)}"
        )


def _holds_goldens(path: AnyPath) -> bool:
    """Whether a folder holds goldens and nothing else."""
    try:
        files = list(path.iterdir()) if isinstance(path, Path) and path.is_dir() else []
        return bool(files) and all(f.name.endswith(SUFFIX) and is_golden(f) for f in files)
    except OSError:  # told where it is opened
        return False


def check_reference(path: AnyPath, golden: Golden, subject: object) -> None:
    """Refuse a golden in the place of the checkpoint that was recorded; raises UsageError."""
    if is_golden(path):
        there = other_reference(golden, subject)
        instead = "give the checkpoint that was recorded, or leave it out"
        raise UsageError(
            f"--reference {path}: is a golden, not the checkpoint that was recorded",
            hint=instead if there is None else f"--reference {_typed(there)}",
        )


def other_reference(golden: Golden, subject: object) -> AnyPath | None:
    """The recorded checkpoint, where it is there and not the very one that is verified."""
    there = golden.checkpoint
    if there is None or subject is None:
        return None
    if isinstance(there, Path) and not is_there(there):  # of a URL it is not worth asking
        return None
    path = path_of(subject)
    return None if path is not None and is_same(there, path) else there


def named_source(golden: Golden) -> AnyPath:
    """The checkpoint that a golden names, or where it was moved to below a root of the project.

    Raises CheckpointError where it names none or it is gone.
    """
    if not golden.source:
        raise CheckpointError(
            f"{golden.path}: was recorded from a live model, so it names no checkpoint",
            hint=f"harness verify CKPT -g {_typed(golden.path)}",
        )
    source = golden.checkpoint
    if source is not None and is_there(source):
        return source
    moved = _moved(golden)
    if moved is None:
        raise CheckpointError(
            f"{golden.path}: its checkpoint does not exist: {source or golden.source}",
            hint=f"harness verify CKPT -g {_typed(golden.path)}",
        )
    return moved


def source_after(subject: object, golden: Golden) -> str:
    """The source of an updated golden: another than before, if another subject was given."""
    if subject is None:
        return golden.source
    path = path_of(subject)
    return "" if path is None else source_of(path, golden.path)


def _moved(golden: Golden) -> Path | None:
    """The file of the recorded name below the roots; of several, that of the same weights."""
    if not isinstance(golden.path, Path) or is_url(golden.source):
        return None
    name = PurePosixPath(golden.source.removeprefix("root:")).name
    roots = roots_of(real_path(golden.path).parent)
    found = [path for root in roots for path in islice(root.rglob(glob.escape(name)), _MAX_MOVED)]
    if len(found) < 2:
        return found[0] if found else None
    return next((path for path in found if _root_of(path, golden) == golden.fingerprint.root), None)


def _root_of(path: Path, golden: Golden) -> bytes | None:
    try:
        with open_checkpoint(path, section=golden.section) as checkpoint:
            return fingerprint(checkpoint, details=lambda tensor: False).root
    except CheckpointError:
        return None
