"""`harness record`: a golden of one checkpoint, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness import api
from harness.checkpoint.sources.access import open_source
from harness.cli.live import live_of, stage_of
from harness.cli.progress import progress_bar
from harness.cli.terminal import echo_error
from harness.errors import HarnessError
from harness.golden.budget import said_of
from harness.golden.golden import real_path
from harness.golden.places import new_places, own_golden
from harness.golden.project import project_of
from harness.text.folding import escaped, in_section
from harness.text.shell import quoted

if TYPE_CHECKING:
    from harness.checkpoint.sources.paths import AnyPath


def record_each(checkpoints: Sequence[AnyPath], golden: AnyPath | None, **options: Any) -> int:
    """Record a golden of each, and say what comes next; returns the exit code of all."""
    places = new_places(checkpoints, golden)
    if len(places) == 1:
        click.echo(f"next: {_record(*places[0], **options)}")
        return 0
    code = 0
    for checkpoint, place in places:
        try:
            _record(checkpoint, place, **options)
        except HarnessError as error:
            echo_error(error)
            code = 2
    folder = "" if golden is None else f" -g {quoted(str(golden))}"
    click.echo(f"next: harness verify{folder}")
    return code


def _record(checkpoint: AnyPath, golden: AnyPath | None, **options: Any) -> str:
    """Record a golden, and say what it is and what it decides; returns the command to verify it."""
    stage = stage_of(options["stage"], options)
    names = ("section", "max_size", "values", "overwrite", "jobs", "group")
    asked = {name: options[name] for name in names}
    asked |= {name: options[name] for name in ("atol", "rtol") if options[name] is not None}
    live = live_of(options) if stage != "file" else None
    with progress_bar(checkpoint) as progress:
        recorded = api.record(
            checkpoint, golden, stage=stage, live=live, progress=progress, **asked
        )
    found = recorded.fingerprint
    with closing(open_source(recorded.path)) as written:
        nbytes = written.nbytes
    total = sum(t.nbytes for t in found.tensors.values() if t.alias_of is None)
    beside = f" ({100 * nbytes / max(1, total):.1f} % of the weights)"
    if recorded.live is not None and recorded.live.outputs is not None:
        beside = f", with {len(recorded.live.outputs.tensors):,} inputs and outputs of submodules"
    section = in_section(found.section)
    num_values = sum(tensor.dtype.is_value for tensor in found.tensors.values())
    num_tensors = len(found.tensors) - num_values
    entries = f"{num_tensors:,} tensor{'s' * (num_tensors != 1)}"
    if num_values:
        entries += f" and {num_values:,} value{'s' if num_values > 1 else ''}"
    said = (
        f"recorded {recorded.path}: {entries} of {checkpoint} "
        f"({found.container}{section}), root {found.root.hex()[:16]}, {nbytes:,} bytes{beside}"
    )
    click.echo(escaped(said))
    click.echo(said_of(found))
    if isinstance(checkpoint, Path) and recorded.checkpoint is None:
        # A golden by URL is of no project.
        project = project_of(real_path(Path(str(recorded.path))).parent)
        click.echo(
            f"note: {escaped(str(checkpoint))} is outside of the golden's project "
            f"({escaped(os.path.relpath(project))}): give its path to verify, or a folder above it "
            'with --root, or as root = "…" in [tool.harness]'
        )
    # Without the checkpoint, verify repeats the stages that were recorded.
    there = recorded.live is not None and recorded.checkpoint is not None
    given = "" if there else f" {quoted(str(checkpoint))}"
    is_own = recorded.path == own_golden(checkpoint)
    return f"harness verify{given}{'' if is_own else f' -g {quoted(str(recorded.path))}'}"
