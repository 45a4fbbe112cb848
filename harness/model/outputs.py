"""What a model computes on fixed inputs: every submodule's inputs and outputs, in order.

In: a module and inputs. Out: a `Fingerprint` whose keys are places in the computation, in the
order in which they happened: `encoder.layers.0.norm_out:in.0`, `encoder.layers.0.norm_out:out`;
a second call of the same module is `norm_out@2`. Memory: the tensors of one call at a time, plus
what the fingerprint keeps. The model is in eval mode and without gradients, under a fixed seed and
deterministic algorithms; all of that is put back afterwards.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from harness.checkpoint.tensors import Tensor
from harness.errors import ModelError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.fingerprints.residues import Bits, Grid
from harness.fingerprints.scan import fingerprint, residues_of
from harness.golden.columns import nbytes_of
from harness.model.activations import ROOT, is_final, is_output
from harness.model.inputs import SEED, Arguments, named_arguments
from harness.model.loading import seeded
from harness.model.nested import leaves
from harness.model.state import keyed
from harness.model.targets import user_code
from harness.model.values import with_keyed_values
from harness.streaming.workers import Workers

_MAX_KEPT_NUMEL = 256
_MAX_FINAL_NBYTES = 4 << 20  # of an output of the model itself
_ROW_NBYTES = 128  # in the table of a golden, but for names
# Called with the inputs, or the outputs, of one call, and with their values.
See: TypeAlias = "Callable[[Mapping[str, TensorFingerprint], Mapping[str, Tensor]], None]"


@dataclass(frozen=True, kw_only=True)
class OutputTolerance:
    """How far outputs may move: atol + rel * rms + rtol * |y|, the rms that of each activation.

    Activations differ in scale by orders of magnitude, for which there is `rel`.
    """

    atol: float = 1e-4
    rtol: float = 1e-4
    rel: float = 0.0

    def grid(self, tensor: TensorFingerprint, bits: Bits) -> Grid | None:
        """The grid of one activation's residues."""
        return Grid.of(tensor.dtype, self.atol + self.rel * tensor.rms, self.rtol, bits)


def outputs_of(
    module: nn.Module,
    arguments: Arguments,
    *,
    tolerance: OutputTolerance | None = None,
    room: float = 0.0,
    see: See | None = None,
) -> Fingerprint:
    """Run the model once and fingerprint what every submodule got and gave.

    `tolerance` is what residues are kept for: of 8 bits where that takes at most `room` bytes, and
    the values of 16-bit types, which torch rounds too much for residues; else of 4 bits. `see` is
    called with the inputs, or the outputs, of each call and their values, which are gone
    afterwards.
    """
    tolerance = tolerance or OutputTolerance()
    recorder = _Recorder(tolerance, room, see)
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
        hint = "add --traceback to see where, or run the same forward in a Python shell"
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
            f"running {type(module).__name__} on its inputs: its output "
            f"({recorder.kind}) holds no tensor to compare",
            hint="let its forward return tensors, or stop before outputs: --reload",
        )
    return Fingerprint(
        name="outputs",
        container="live outputs",
        section="",
        tensors=recorder.found(),
        unread=tuple(recorder.unread),
        keeps_aliases=False,
        tolerance=(tolerance.atol, tolerance.rtol),
        rel=tolerance.rel,
        bits=4 if recorder.fine is None else 8,
    )


class _Recorder:
    """`prints` are of 4 bits; `fine`, of 8, those that are others then, while there is room."""

    def __init__(self, tolerance: OutputTolerance, room: float, see: See | None) -> None:
        self._tolerance = tolerance
        self._room = room
        self._see = see
        self.prints: dict[str, TensorFingerprint] = {}
        self.fine: dict[str, TensorFingerprint] | None = {} if room > 0 else None
        self._first: dict[bytes, str] = {}
        self.unread: list[str] = []
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
        rest: dict[str, object] = {}
        for name, leaf in leaves(key, value, whole=is_final(key)):
            if isinstance(leaf, torch.Tensor):
                tensors[name] = leaf
            elif isinstance(leaf, Set) and any(isinstance(item, torch.Tensor) for item in leaf):
                self.unread.append(f"{name} (tensors of a {type(leaf).__name__}, in no order)")
            elif leaf is not None or name != key:  # a model may put out nothing
                rest[name] = leaf
        if tensors or rest:
            with with_keyed_values(keyed(tensors, "outputs"), rest) as live:
                self.unread += live.unread
                made_of = fingerprint(live, keep_values=_is_kept, workers=Workers(jobs=1)).tensors
                if self._see is not None and made_of:
                    self._see(made_of, live.tensors)
                for name, made in made_of.items():
                    self._keep(name, made, live.tensors[name])

    def _keep(self, name: str, made: TensorFingerprint, tensor: Tensor) -> None:
        # Most inputs are what another module has just put out: keep each only once.
        first = self._first.setdefault(made.digest or b"", name)
        if first == name:
            self.prints[name] = made = self._with_residues(made, tensor, 4)
            if self.fine is not None and made.sketch is not None:
                if made.dtype.itemsize == 2:
                    values = bytearray(made.nbytes)
                    tensor.read_into(0, memoryview(values))
                    made = replace(made, sketch=None, residues=None, values=bytes(values))
                else:
                    made = self._with_residues(made, tensor, 8)
                self.fine[name] = made
            self._room -= nbytes_of(made)
        else:
            self.prints[name] = replace(made, alias_of=first)
            if is_final(name) and made.values is not None:
                # Of the model's own outputs the values are kept, also where another's are not.
                before = (self.fine or {}).pop(first, self.prints[first])
                self._room -= nbytes_of(made) - nbytes_of(before)
                self.prints[first] = replace(made, key=first)
        self._room -= _ROW_NBYTES + 2 * len(name)
        if self._room < 0:
            self.fine = None

    def _with_residues(
        self, made: TensorFingerprint, tensor: Tensor, bits: Bits
    ) -> TensorFingerprint:
        grid = None if made.sketch is None else self._tolerance.grid(made, bits)
        return made if grid is None else replace(made, residues=residues_of(tensor, grid))

    def found(self) -> dict[str, TensorFingerprint]:
        """What is kept, by key in execution order."""
        kept = self.prints | (self.fine or {})
        return {
            name: one
            if one.alias_of is None
            else replace(kept[one.alias_of], key=name, alias_of=one.alias_of)
            for name, one in kept.items()
        }


def _is_kept(tensor: Tensor) -> bool:
    """Whether the values are kept, or a sketch and residues."""
    if is_final(tensor.key):
        return tensor.nbytes <= _MAX_FINAL_NBYTES
    return tensor.numel <= _MAX_KEPT_NUMEL


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
