"""`harness inputs`: write the example inputs of a model, so that another one gets the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.live import code_options, live_of
from harness.cli.options import Command
from harness.text.folding import escaped
from harness.text.shell import quoted


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write."
)
@code_options
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def inputs(model: str, output: Path, overwrite: bool, **options: Any) -> None:
    """Write the example inputs of MODEL as safetensors.

    MODEL is a checkpoint, or the MODULE:NAME of a class or function that takes no arguments. Give
    the file to 'harness record --outputs --inputs FILE', here or with another implementation.

    Example: harness inputs nest.nemo -o inputs.safetensors
    """
    from harness import api

    written = api.write_inputs(model, output, live=live_of(options), overwrite=overwrite)
    names = ", ".join(f"{name} {list(shape)}" for name, shape in written.items())
    click.echo(escaped(f"wrote {output}: {names}"))
    which = quoted(model) if Path(model).exists() else f"CKPT --model {quoted(model)}"
    click.echo(f"next: harness record {which} --outputs --inputs {quoted(str(output))}")
