"""What a golden is: a fingerprint, where it came from, and its history."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from harness.checkpoint.sources.paths import AnyPath, is_there, is_url, to_path
from harness.fingerprints.fingerprint import Fingerprint
from harness.golden.project import project_of, roots_of
from harness.text.folding import shortened

SUFFIX = ".safetensors"
# Begins a source that is below one of the project's roots, outside of the project.
_BELOW_ROOT = "root:"

PartName = Literal["weights", "buffers", "outputs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One entry of a golden's history: the root that was replaced, and why."""

    root: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LiveRecord:
    """What the code under test made of the checkpoint when the golden was recorded.

    `target` builds the model (`package.module:Name`, None for what the registry has); `config`,
    `inputs` and `base` (of an adapter) are files, relative to the golden's folder as its source is;
    `parameters` are names and requires_grad in the order of the optimizer; `buffers` are the
    non-persistent ones, `outputs` the inputs and outputs of every submodule in execution order.
    """

    target: str | None
    stages: tuple[str, ...]
    config: str | None = None
    inputs: str | None = None
    base: str | None = None
    parameters: tuple[tuple[str, bool], ...] = ()
    buffers: Fingerprint | None = None
    outputs: Fingerprint | None = None

    def __repr__(self) -> str:
        return f"<LiveRecord {shortened(self.target or 'as registered', 80)}: {self.stages[-1]}>"

    def tells_as(self, other: LiveRecord | None) -> bool:
        """Whether both are of the same code, and of the same bits of what it made."""

        def told(record: LiveRecord) -> list[object]:
            parts = (record.buffers, record.outputs)
            roots = [None if p is None else (p.root, *p.tensors) for p in parts]
            return [replace(record, buffers=None, outputs=None), *roots]

        return other is not None and told(self) == told(other)


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A fingerprint in a file.

    `source` is the checkpoint's path relative to the golden's folder; outside of the project,
    `root:` and its path below a root (see `golden.project`), else its bare name; its URL without
    secrets; "" where it was no file. `section` is what the user asked for, None for the state
    dict; `live` is there where the golden was recorded with a model.
    """

    path: AnyPath
    fingerprint: Fingerprint
    source: str
    section: str | None = None
    history: tuple[Update, ...] = ()
    live: LiveRecord | None = None

    def __repr__(self) -> str:
        found, live = self.fingerprint, self.live
        more = "" if live is None else f", {live.stages[-1]}"
        return (
            f"<Golden {shortened(str(self.path), 80)}: {len(found.tensors):,} tensors"
            f"{more}, root {found.root.hex()[:16]}>"
        )

    def beside(self, source: str | None) -> Path | None:
        """A file that the golden names, as a path from here."""
        if source is None or not isinstance(self.path, Path):
            return None
        # A link may lead to another depth; without one, what was typed is what is shown.
        real = real_path(self.path)
        path = self.path if real == _spelled_out(self.path) else real
        return Path(os.path.normpath(path.parent / source))

    @property
    def parts(self) -> dict[PartName, Fingerprint]:
        """The fingerprints in the file, by name."""
        found: dict[PartName, Fingerprint] = {"weights": self.fingerprint}
        if self.live is not None and self.live.buffers is not None:
            found["buffers"] = self.live.buffers
        if self.live is not None and self.live.outputs is not None:
            found["outputs"] = self.live.outputs
        return found

    def following(self, golden: Golden, reason: str) -> Golden:
        """The same with the history of the golden that it replaces, and why it does.

        A reason that comes later, when nothing else is new, is added to the last one.
        """
        *earlier, last = golden.history or (None,)
        if self.fingerprint.root != golden.fingerprint.root or self.live is not golden.live:
            entry = Update(root=golden.fingerprint.root.hex(), reason=reason)
            return replace(self, history=(*golden.history, entry))
        if last is None or not reason or reason in last.reason.split("; "):
            return replace(self, history=golden.history)
        said = "; ".join(part for part in (last.reason, reason) if part)
        return replace(self, history=(*earlier, replace(last, reason=said)))

    @property
    def checkpoint(self) -> AnyPath | None:
        """Where the recorded checkpoint should be, if the golden knows."""
        if is_url(self.source):
            return to_path(self.source)
        if self.source.startswith(_BELOW_ROOT):
            if not isinstance(self.path, Path):
                return None
            below = self.source.removeprefix(_BELOW_ROOT)
            there = [root / below for root in roots_of(real_path(self.path).parent)]
            return next((path for path in there if is_there(path)), there[0] if there else None)
        path = self.beside(self.source or None)
        return path if path is not None and ("/" in self.source or is_there(path)) else None


def source_of(checkpoint: AnyPath, golden: AnyPath) -> str:
    """The checkpoint's path as a golden may keep it: no path of this machine, and no secret."""
    if not isinstance(checkpoint, Path):
        return str(checkpoint)
    if not isinstance(golden, Path):
        return checkpoint.name
    folder, real = real_path(golden).parent, real_path(checkpoint)
    project = project_of(folder)
    # A link inside of the project keeps its name: where it leads to may be of this machine.
    named = _spelled_out(checkpoint)
    if not named.is_relative_to(project) or real_path(named) != real:
        named = real
    if not named.is_relative_to(project):
        root = next((root for root in roots_of(folder) if real.is_relative_to(root)), None)
        if root is not None:
            return f"{_BELOW_ROOT}{PurePosixPath(*real.relative_to(root).parts)}"
        return checkpoint.name
    relative = os.path.relpath(named, folder)
    return PurePosixPath(*Path(relative).parts).as_posix()


def _spelled_out(path: Path) -> Path:
    """An absolute path without dots, and with the links that are in it."""
    return Path(os.path.normpath(path.absolute()))


def real_path(path: Path) -> Path:
    """A path without links; where they go round in circles, with them."""
    return Path(os.path.realpath(path))
