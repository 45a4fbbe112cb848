"""What the verbs are given, and which golden belongs to it.

In: subjects (a path or URL, an open checkpoint, a module, a state dict), and paths of goldens. Out:
open checkpoints, and the path that a golden is read from or written to. Refused: a golden in the
place of a checkpoint (UsageError) and the other way round (GoldenError), what cannot be looked at,
and URLs where live stages need a file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from functools import wraps
from inspect import BoundArguments
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypeVar

from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources.paths import AnyPath, Location, path_of, to_local
from harness.checkpoint.tensors import Checkpoint
from harness.comparison.policy import STAGES, Policy, check_stage, check_type
from harness.errors import NoSection, UsageError
from harness.fingerprints.scan import fingerprint
from harness.golden.file import read_golden
from harness.golden.golden import Golden, LiveRecord
from harness.golden.places import GOLDEN_FOLDER, check_not_golden, choose_golden
from harness.text.shell import quoted

if TYPE_CHECKING:
    from harness.model.live import Live
    from harness.model.options import LiveOptions


Subject: TypeAlias = "Location | Checkpoint | Live"
"""What can be fingerprinted: a path or URL, an open checkpoint, a module, a state dict."""
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


# What live stages need on this machine, in the words of an error.
LOADED = "a checkpoint that a model loads"
KEPT = "the golden of a model"


def only_of_files(
    subject: Subject,
    golden: Location | None = None,
    *,
    section: str | None = None,
    stage: str = "file",
) -> None:
    """Refuse what only a path has, of a subject that is none, and a URL; raises UsageError."""
    check_stage(stage)
    path = path_of(subject)
    if path is not None:
        if stage != "file":
            to_local(path, LOADED)
            to_local(golden or GOLDEN_FOLDER, KEPT)
        return
    if section is not None:
        raise UsageError(
            f"section {section!r}: only a file has sections", hint="leave it out, or give the path"
        )
    if stage != "file":
        raise UsageError(
            f"the stage {stage!r} loads a file, and this checkpoint is in memory",
            hint="give the path of the checkpoint, or a golden of the file stage alone",
        )


@contextmanager
def opened(subject: Subject, section: str | None) -> Iterator[Checkpoint]:
    """Open a path as long as the context lasts; what is open already stays so."""
    path = path_of(subject)
    if path is None:
        assert isinstance(subject, Checkpoint)  # of_live_ones_too has opened all others
        yield subject
    else:
        check_not_golden(path)
        with open_checkpoint(path, section=section) as checkpoint:
            yield checkpoint


@contextmanager
def opened_for(
    golden: Golden, subject: Subject, section: str | None = None
) -> Iterator[Checkpoint]:
    """Open what is compared with a golden: of a path, the section that the golden holds.

    A file without sections is what was exported of it. `section` names another one.
    """
    if section is not None and path_of(subject) is not None:
        _check_all(golden, subject, section)
    with opened_part(subject, golden.section if section is None else section, section) as found:
        yield found


def _check_all(golden: Golden, subject: Subject, section: str) -> None:
    """All of a file is compared with all of a file: raise UsageError for one part of it."""
    if (section == ".") == (golden.section == "."):
        return
    part = f"section {golden.fingerprint.section}" if golden.fingerprint.section else "one part"
    all_of_it = f"harness record {quoted(str(path_of(subject)))} --all-sections"
    is_all = golden.section == "."
    raise UsageError(
        f"{golden.path}: was recorded from {'all sections' if is_all else part}",
        hint="leave out --section"
        if is_all
        else f"record all of it: {all_of_it} -g OTHER.safetensors",
    )


@contextmanager
def opened_part(
    subject: Subject, section: str | None, named: str | None = None
) -> Iterator[Checkpoint]:
    """Open a section, or all of a file that has none: the weights may have been exported.

    Not so where the section was `named` by the user.
    """
    with ExitStack() as stack:
        try:
            checkpoint = stack.enter_context(opened(subject, section))
        except NoSection as error:
            if section in (None, ".") or named is not None:
                raise
            exported = None
            with suppress(NoSection):
                exported = stack.enter_context(opened(subject, None))
            if exported is None or exported.section:
                raise NoSection(
                    f"{error}; the golden holds that section",
                    hint="give a checkpoint that has it, or say which one holds the same weights: "
                    "--section NAME",
                ) from error
            checkpoint = exported
        yield checkpoint


def live_record(
    golden: Golden,
    path: AnyPath | None,
    checkpoint: Checkpoint,
    stage: str,
    live: LiveOptions | None,
    room: float,
) -> LiveRecord | None:
    """What a golden of this checkpoint says of its model, None where it says nothing.

    Of an open module: the buffers that no file holds. Of a file: what the model of `live`, by
    default the one that the golden remembers, makes of it up to a stage; `room` bytes are left for
    what it computes.
    """
    weights = golden.fingerprint
    if checkpoint.buffers:
        buffers = fingerprint(
            replace(checkpoint, name="buffers", tensors=checkpoint.buffers, unread=()),
            block_nbytes=weights.block_nbytes,
            tolerance=weights.tolerance,
            bits=weights.bits,
        )
        return LiveRecord(target=None, stages=("file",), buffers=buffers)
    if stage == "file" or path is None:
        return None
    from harness.model.options import remembered
    from harness.model.stages import record_live

    place = to_local(golden.path, KEPT)
    options, before = live or remembered(golden), golden.live
    path = to_local(path, LOADED)
    return record_live(path, checkpoint, options, stage, place, weights, before=before, room=room)


# What the arguments of verbs are; paths are told by `to_path`.
_ARGUMENTS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("section", "section_b", "reason", "values"), (str, "a text")),
    "stage": (str, f"one of {', '.join(STAGES)}"),
    "policy": (Policy, "a Policy"),
    "jobs": (int, "a number of threads"),
    "max_size": (int, "a number of bytes"),
    **dict.fromkeys(("overwrite", "stats"), (bool, "True or False")),
}


def checked(verb: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let a verb refuse arguments of other types, before it does anything; raises UsageError."""
    signature = inspect.signature(verb)

    @wraps(verb)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        _checked(verb.__name__, signature, *args, **kwargs)
        return verb(*args, **kwargs)

    return call


def _checked(
    verb: str, signature: inspect.Signature, *args: object, **kwargs: object
) -> BoundArguments:
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as error:
        of_policy = {field.name for field in fields(Policy)} - signature.parameters.keys()
        known = [name for name in kwargs if name in of_policy and "policy" in signature.parameters]
        said = f": give policy=Policy({known[0]}=…)" if known else ""
        raise TypeError(f"{verb}() {error}{said}") from None
    for name, value in given.arguments.items():
        default = signature.parameters[name].default
        if name in _ARGUMENTS and value is not default:
            check_type(name, value, *_ARGUMENTS[name])
        takes_none = "None" in signature.parameters[name].annotation
        if name == "subject" and value is None and not takes_none:
            raise UsageError(
                "None is not a checkpoint",
                hint="give a path, an open checkpoint, a torch.nn.Module, or its state_dict()",
            )
    return given


def of_live_ones_too(verb: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let a verb that takes open checkpoints as its `subject` take modules and state dicts, too.

    Where one is spread over ranks, all of them call the verb, and it runs on one of them.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        given = _checked(verb.__name__, signature, *args, **kwargs)
        subject = given.arguments.get("subject")
        if subject is None or isinstance(subject, Checkpoint) or path_of(subject) is not None:
            return verb(*args, **kwargs)
        from harness.model.live import call_with

        def call_opened(checkpoint: Checkpoint) -> _Result:
            given.arguments["subject"] = checkpoint
            return verb(*given.args, **given.kwargs)

        return call_with(subject, call_opened)

    return call


def golden_of(subject: Subject | None, golden: Location | Golden | None) -> Golden:
    """The golden that is given, or named, or else that of the checkpoint's name."""
    return golden if isinstance(golden, Golden) else read_golden(choose_golden(subject, golden))
