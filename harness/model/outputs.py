"""What a model computes on fixed inputs: every submodule's inputs and outputs, in order.

In: a module and inputs. Out: a `Fingerprint` whose keys are places in the computation, in the
order in which they happened: `encoder.layers.0.norm_out:in.0`, `encoder.layers.0.norm_out:out`;
a second call of the same module is `norm_out@2`. Memory: the tensors of one call at a time, plus
what the fingerprint keeps. The model is in eval mode and without gradients, under a fixed seed and
deterministic algorithms; all of that is put back afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from harness.checkpoint.tensors import Tensor
from harness.errors import ModelError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.scan import fingerprint
from harness.model.activations import ROOT, is_final, is_output
from harness.model.inputs import SEED, Arguments, named_arguments
from harness.model.loading import seeded
from harness.model.state import as_checkpoint
from harness.model.targets import user_code
from harness.streaming.workers import Workers

OUTPUT_TOLERANCE = 1e-4, 1e-4  # atol, rtol
_MAX_KEPT_NUMEL = 256
_MAX_FINAL_NBYTES = 4 << 20  # of an output of the model itself
# Called with the inputs, or the outputs, of one call, and with their values.
See: TypeAlias = "Callable[[Mapping[str, TensorFingerprint], Mapping[str, Tensor]], None]"


def outputs_of(
    module: nn.Module,
    arguments: Arguments,
    *,
    tolerance: tuple[float, float] = OUTPUT_TOLERANCE,
    see: See | None = None,
) -> Fingerprint:
    """Run the model once and fingerprint what every submodule got and gave.

    `tolerance` (atol, rtol) is what residues are kept for. `see` is called with the inputs, or
    the outputs, of each call and their values, which are gone afterwards.
    """
    recorder = _Recorder(tolerance, see)
    positional, keyword = arguments
    with ExitStack() as stack:
        stack.enter_context(_quiet_mode(module))
        stack.enter_context(seeded(SEED))
        for path, child in module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):  # takes no hooks
                continue
            stack.callback(
                child.register_forward_pre_hook(recorder.before(path), with_kwargs=True).remove
            )
            # Also where the call raises, which the model around it may catch.
            after = child.register_forward_hook(recorder.after(path), always_call=True)
            stack.callback(after.remove)
        hint = "run the same forward in a Python shell for its traceback"
        running = f"running {type(module).__name__} on its inputs"
        with user_code(running, hint), torch.no_grad():
            if isinstance(module, torch.jit.ScriptModule):
                recorder.before("")(module, positional, keyword)
                recorder.after("")(module, positional, module(*positional, **keyword))
            else:
                module(*positional, **keyword)
    # A model that puts out nothing may still be compared by its modules.
    puts_out = is_final if recorder.kind != "NoneType" else is_output
    if not any(map(puts_out, recorder.prints)):
        raise ModelError(
            f"running {type(module).__name__} on its inputs: what it puts out "
            f"({recorder.kind}) holds no tensor to compare",
            hint="let its forward return tensors, or stop before outputs: --reload",
        )
    return Fingerprint(
        name="outputs",
        container="live outputs",
        section="",
        tensors=recorder.prints,
        keeps_aliases=False,
        tolerance=tolerance,
    )


class _Recorder:
    def __init__(
        self,
        tolerance: tuple[float, float],
        see: See | None,
    ) -> None:
        self._tolerance = tolerance
        self._see = see
        self.prints: dict[str, TensorFingerprint] = {}
        self._first: dict[bytes, str] = {}
        self.kind = "nothing"  # of the model's own output
        self._calls: Counter[str] = Counter()
        self._running: dict[int, list[str]] = defaultdict(list)  # by thread

    def before(self, path: str) -> Any:
        def hook(module: nn.Module, positional: Any, keyword: Any) -> None:
            self._calls[path] += 1
            count = self._calls[path]
            label = (path or ROOT) + (f"@{count}" if count > 1 else "")
            self._running[threading.get_ident()].append(label)
            self._record(f"{label}:in", named_arguments(module, positional, keyword))

        return hook

    def after(self, path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not path:
                self.kind = type(output).__name__
            self._record(f"{self._running[threading.get_ident()].pop()}:out", output)

        return hook

    def _record(self, key: str, value: Any) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for place, tensor in flatten(key, value):
            name = place
            while name in tensors:  # of keys that print alike
                name += "'"
            tensors[name] = tensor
        if tensors:
            with as_checkpoint(tensors, "outputs") as live:
                found = fingerprint(
                    live,
                    keep_values=_is_kept,
                    residues=self._tolerance,  # outputs agree to rounding only
                    workers=Workers(jobs=1),
                ).tensors
                if self._see is not None:
                    self._see(found, live.tensors)
            for name, made in found.items():
                # Most inputs are what another module has just put out: keep each only once.
                first = self._first.setdefault(made.digest or b"", name)
                if is_final(name) and first in self.prints and made.values is not None:
                    # Of the model's own outputs the values are kept, also where another's are not.
                    self.prints[first] = dataclasses.replace(made, key=first)
                kept = self.prints.get(first, made)
                alias_of = None if first == name else first
                self.prints[name] = dataclasses.replace(kept, key=name, alias_of=alias_of)


def _is_kept(tensor: Tensor) -> bool:
    """Whether the values are kept, or a sketch and residues."""
    if is_final(tensor.key):
        return tensor.nbytes <= _MAX_FINAL_NBYTES
    return tensor.numel <= _MAX_KEPT_NUMEL


def flatten(key: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name the tensors in nested outputs: fields, keys and indices joined by dots.

    Of what the model itself puts out, arrays and numbers are tensors as well, and objects are
    their attributes.
    """
    if isinstance(value, torch.Tensor):
        yield from _strided(key, value)
    elif isinstance(value, Mapping):
        for name, child in value.items():
            yield from flatten(f"{key}.{_spelled(name)}", child)
    elif hasattr(value, "_fields"):
        for name in value._fields:
            yield from flatten(f"{key}.{name}", getattr(value, name))
    elif isinstance(value, (tuple, list)):
        for index, child in enumerate(value):
            yield from flatten(f"{key}.{index}", child)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from flatten(f"{key}.{field.name}", getattr(value, field.name))
    elif is_final(key):
        if isinstance(value, (bool, int, float, complex, np.ndarray, np.generic)):
            with suppress(TypeError):  # of strings and objects
                yield key, torch.as_tensor(np.asarray(value))
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
            for name, child in vars(value).items():
                yield from flatten(f"{key}.{_spelled(name)}", child)


def _spelled(name: object) -> str:
    """A key of a mapping, so that no two are alike: `a`, `"a.b"`, `[0]`."""
    if not isinstance(name, str):
        return f"[{name}]"
    return json.dumps(name) if set(name) & set('."[]') or not name else name


def _strided(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of other layouts by those that they are made of."""
    if tensor.is_nested:
        yield from flatten(key, tensor.unbind())
    elif tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        yield from ((f"{key}.indices", tensor.indices()), (f"{key}.values", tensor.values()))
    elif tensor.layout == torch.sparse_csr:
        yield from (
            (f"{key}.rows", tensor.crow_indices()),
            (f"{key}.columns", tensor.col_indices()),
        )
        yield f"{key}.values", tensor.values()
    else:
        yield key, tensor.int_repr() if tensor.is_quantized else tensor


@contextmanager
def _quiet_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode and deterministic algorithms, put back afterwards, module by module.

    What is compiled runs uncompiled: fused, submodules have no outputs of their own.
    """
    modes = [(child, child.training) for child in module.modules()]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        module.eval()
        torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for child, training in modes:
            child.training = training
