"""The fixed inputs that a model is run on: from a file, or the example that the model brings.

In: a module, and perhaps a safetensors file of keyword arguments. Out: arguments for `forward`; or
such a file, for another implementation to be run on. Refused (ModelError): a model without
example inputs, and arguments that are no tensors, which no such file holds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoint import open_checkpoint
from harness.errors import ModelError, UsageError
from harness.golden.atomic import write_whole
from harness.model.loading import seeded
from harness.model.state import tensors_of, unwrapped
from harness.model.targets import user_code

SEED = 0
# Where models keep example inputs: the user's own, Lightning's, transformers'.
_INPUTS = ("golden_inputs", "example_input_array", "dummy_inputs")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class NoInputs(ModelError):  # noqa: N818 - reads as what is the case
    """There is nothing to run a model on."""


def inputs_of(module: nn.Module, file: Path | None) -> Arguments:
    """The fixed inputs, as positional and keyword arguments of the model.

    From `file` (safetensors: keyword arguments by name), else the model's `golden_inputs()`, which
    may draw them, else Lightning's `example_input_array`, else the `dummy_inputs` of transformers.
    A copy: models write into their inputs.
    Raises ModelError where there are none.
    """
    if file is not None:
        with open_checkpoint(file) as checkpoint:
            return (), dict(tensors_of(checkpoint))
    doing, hint = f"the example inputs of {type(module).__name__}", "fix it, or give --inputs FILE"
    with user_code(doing, hint), seeded(SEED), torch.no_grad():
        found = None
        for name in _INPUTS:
            own: Any = getattr(module, name, None)
            own = getattr(unwrapped(module), name, None) if own is None else own
            found = copy.deepcopy(own() if callable(own) else own)
            if found is not None:
                break
    if found is None:
        raise NoInputs(
            f"{type(module).__name__}: no example inputs to run it on",
            hint="give the model a golden_inputs() method, or pass --inputs FILE.safetensors",
        )
    if isinstance(found, Mapping):
        return (), dict(found)
    return (tuple(found) if isinstance(found, (tuple, list)) else (found,)), {}


def named_arguments(
    module: nn.Module, positional: Sequence[Any], keyword: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names that `forward` has for them, however they were passed.

    By position where it has none.
    """
    found: dict[str, Any] = {}
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*positional, **keyword).arguments
    except (TypeError, ValueError):
        return {**{str(index): value for index, value in enumerate(positional)}, **keyword}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update((str(index), one) for index, one in enumerate(value, len(found)))
        else:
            found[name] = value
    return found


def write_inputs(module: nn.Module, file: Path, *, overwrite: bool) -> dict[str, torch.Tensor]:
    """Write a model's example inputs as safetensors of forward's keyword arguments.

    Arguments that are as `forward` has them by default are left out. Raises ModelError for a model
    without inputs, or with one that is no tensor, UsageError for a file that is there.
    """
    from safetensors.torch import save

    tensors = {}
    defaults = _defaults(module)
    try:
        arguments = inputs_of(module, None)
    except NoInputs as error:
        raise NoInputs(str(error), hint="give the model a golden_inputs() method") from None
    for name, value in named_arguments(module, *arguments).items():
        if isinstance(value, torch.Tensor):
            # Each in memory of its own, which safetensors asks for.
            tensors[name] = value.detach().cpu().contiguous().clone()
        elif name.isdigit() or value is not defaults.get(name, value):
            raise ModelError(
                f"{type(module).__name__}: its example input {name} is a {type(value).__name__}, "
                "and a file of inputs holds tensors by the names of forward's parameters",
                hint="give it as a tensor, or as the default of forward",
            )
    try:
        write_whole(file, save(tensors), overwrite=overwrite)
    except FileExistsError as error:
        raise UsageError(f"{file}: already exists", hint="to replace it, add --overwrite") from (
            error
        )
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror}") from error
    return tensors


def _defaults(module: nn.Module) -> dict[str, Any]:
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}
