"""The options of the stages that run models: how far to go, which code is under test, on what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import Place, flag_of, together, tolerances, under
from harness.cli.terminal import TRACEBACK
from harness.comparison.policy import STAGES
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.model.options import LiveOptions


_of_model, _of_outputs = under("Model"), under("Outputs")


_stages = [
    _of_model(f"--{name}", "stage", flag_value=name, help=text)
    for name, text in {
        "file": "Only the file: run no model code.",
        "load": "Also load the file into the model.",
        "reload": "Also save the loaded model, and load that.",
        "outputs": "Also run the model: inputs and outputs of every module.",
    }.items()
]
stage_options = together(*_stages)
live_stage_options = together(*_stages[1:])  # where no file is compared alone


# Which class or factory is loaded.
code_options = together(
    _of_model(
        "--model",
        "target",
        metavar="MODULE:NAME",
        help="The model's class, or a function that returns the model.",
    ),
    _of_model(
        "--config",
        type=Place("--config"),
        metavar="YAML",
        help="Configuration to use in place of the checkpoint's.",
    ),
    _of_model(
        "--base", type=Place("--base"), metavar="FOLDER", help="The base model of an adapter."
    ),
    _of_model(
        "--trust-checkpoint",
        is_flag=True,
        help="Let Lightning unpickle the file, which can run code from it.",
    ),
    _of_model(
        "--traceback",
        is_flag=True,
        expose_value=False,
        callback=lambda ctx, param, wanted: ctx.meta.update({TRACEBACK: wanted}),
        help="Show the traceback where the model's code fails.",
    ),
)
# Which code is under test, and on what.
live_options = together(
    code_options,
    _of_outputs(
        "--inputs",
        type=Place("--inputs"),
        metavar="FILE",
        help="A safetensors file of forward's keyword arguments.",
    ),
    _of_outputs(
        "--output-atol", type=float, help="Absolute tolerance. By default as recorded, or 1e-4."
    ),
    _of_outputs(
        "--output-rel",
        type=float,
        help="In place of the absolute tolerance, this share of each activation's own rms.",
    ),
    _of_outputs(
        "--output-rtol", type=float, help="Relative tolerance. By default as recorded, or 1e-4."
    ),
)
# How the stages are run and compared.
run_options = together(
    _of_model(
        "--keep", is_flag=True, help="Keep the file that the reload saves, beside the checkpoint."
    ),
    _of_outputs(
        "--output-tolerance",
        "output_tolerances",
        multiple=True,
        callback=tolerances,
        metavar="GLOB=ATOL[,RTOL]",
        help="Tolerance for matching activations. Repeatable.",
    ),
    _of_outputs(
        "--activations",
        type=click.Choice(["common", "all", "final"]),
        help="Which must agree: those of modules that both sides have (the default), all, or only "
        "the model's own outputs.",
    ),
    _of_outputs(
        "--only", multiple=True, metavar="GLOB", help="Compare only these activations. Repeatable."
    ),
)

# The first stage at which an option has an effect.
_NEEDED_BY = {
    **dict.fromkeys(("target", "config", "base", "trust_checkpoint"), "load"),
    "keep": "reload",
    **dict.fromkeys(("inputs", "output_atol", "output_rtol", "output_rel"), "outputs"),
    **dict.fromkeys(("output_tolerances", "activations", "only"), "outputs"),
}


def stage_of(given: str | None, options: dict[str, Any], otherwise: str = "file") -> Any:
    """How far to go: as asked for, else as far as the options have an effect.

    Raises UsageError for an option that would be silently without one.
    """
    last = given or otherwise
    for name, needed in _NEEDED_BY.items():
        if options.get(name) in (None, False, ()) or STAGES.index(needed) <= STAGES.index(last):
            continue
        if given is not None:
            raise UsageError(
                f"{flag_of(name)} has no effect with --{given}",
                hint=f"leave it out, or give --{needed} in place of --{given}",
            )
        last = needed
    return last


def last_of_roundtrip(options: dict[str, Any]) -> Any:
    """The stage that is asked for, by name or by what needs it; None: as far as it goes."""
    given = options["stage"]
    last = stage_of(given, options)
    return last if given is not None or last == "outputs" else None


def live_of(options: dict[str, Any], base: LiveOptions | None = None) -> LiveOptions:
    """What the options say of the code under test; what they leave out is as in `base`.

    Raises ModelError and CheckpointError for what is typed and cannot be used: before minutes of
    reading, not after. Imports torch: call it only where a live stage is wanted.
    """
    from dataclasses import replace

    from harness.model.options import LiveOptions

    names = {"trust_checkpoint": "trust"}
    given = {
        names.get(name, name): options[name]
        for name in _NEEDED_BY
        if options.get(name) not in (None, ())
    }
    LiveOptions(**given).check()
    return replace(base or LiveOptions(), **given)
