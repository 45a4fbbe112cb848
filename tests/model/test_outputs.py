"""What a model computes is measured while its values are there."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness import api
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison, render
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy
from harness.errors import ModelError
from harness.fingerprints.fingerprint import Fingerprint
from harness.golden.file import read_golden, write_golden
from harness.golden.golden import Golden
from harness.model.activations import (
    OutputPolicy,
    Selection,
    WhileRunning,
    compare_activations,
    first_divergence,
)
from harness.model.options import LiveOptions, output_policy
from harness.model.outputs import OutputTolerance, outputs_of
from tests.model.variants import Plain


class Bumped(nn.Module):
    """Is off by up to `size` where |x| is below 0.3."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.size * torch.exp(-((x / 0.3) ** 2))


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 10


def bumped(size: float) -> nn.Module:
    return nn.Sequential(nn.Identity(), Bumped(size), Scaled())


INPUTS = ((torch.randn(64, 64, generator=torch.Generator().manual_seed(0)),), {})


def compared(size: float, atol: float = 1e-4, *, by_sketches: bool = False) -> Comparison:
    recorded = outputs_of(bumped(0.0), INPUTS)
    policy = Policy(atol=atol, rtol=0.0 if by_sketches else 1e-4)
    measure = WhileRunning(expected=recorded, policy=OutputPolicy(atol=atol, rtol=1e-4))
    found = outputs_of(bumped(size), INPUTS, see=measure.see)
    how = BySketches(recorded.block_nbytes) if by_sketches else measure
    comparison = compare(recorded, found, policy, how, stage="outputs")
    return replace(comparison, divergence=first_divergence(comparison))


def test_the_module_that_is_off_by_little_more_than_the_tolerance_diverges_first() -> None:
    found = compared(5e-4)
    assert found.divergence is not None
    assert found.divergence.diverging_module == "1"
    assert found.divergence.agreeing == ("x",)
    assert found.count("undecided") == found.divergence.num_undecided == 0
    assert "an element is beyond the tolerance" in render(found)


def test_what_is_within_the_tolerance_is_close_and_its_size_is_said() -> None:
    found = compared(3e-6)
    assert Counter(f.kind for f in found.findings) == {"close": 4}
    difference = next(f.difference for f in found.findings if f.key == "1:out")
    assert difference is not None
    assert difference.max_abs[0] <= 3e-6 <= difference.max_abs[1]


def test_a_looser_tolerance_than_the_recorded_one_says_how_to_record_it() -> None:
    found = compared(5e-4, atol=2e-3)
    [finding] = [f for f in found.findings if f.key == "1:out"]
    assert finding.difference is not None
    assert finding.difference.verdict == "undecided"
    assert "recorded for atol 0.0001, rtol 0.0001: larger differences" in finding.difference.why
    assert "record with --output-atol 0.002" in finding.difference.why


def test_what_is_undecided_is_not_said_to_agree() -> None:
    found = compared(5e-4, by_sketches=True)
    assert found.divergence is not None
    assert found.divergence.diverging_module == "2"
    assert (found.divergence.agreeing, found.divergence.undecided) == ((), ("x",))
    assert (found.divergence.num_before, found.divergence.num_undecided) == (6, 2)
    assert "first diverges: 2, or 1 before it, which is undecided\n" in render(found)
    assert "of its 1 inputs x is undecided; 2 of the 6 activations computed before it are " in (
        render(found)
    )


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    path = tmp_path / "plain.pt"
    torch.save(Plain().state_dict(), path)
    live = LiveOptions(target="tests.model.variants:Plain", output_atol=1.0)
    return api.record(path, tmp_path / "golden.safetensors", stage="outputs", live=live)


def test_the_recorded_tolerance_is_that_of_a_later_verify(golden: Golden) -> None:
    def verdict(**options: float) -> str:
        live = LiveOptions(target="tests.model.variants:OtherNorm", **options)
        return [*api.verify_stages(None, golden.path, live=live)][-1].verdict

    assert golden.live is not None
    assert golden.live.outputs is not None
    assert golden.live.outputs.tolerance == (1.0, 1e-4)
    assert verdict() == "close"
    assert verdict(output_atol=1e-6, output_rtol=1e-6) == "different"


def test_an_update_keeps_the_recorded_tolerance(golden: Golden) -> None:
    assert golden.checkpoint is not None
    state = torch.load(golden.checkpoint)
    for live in (None, LiveOptions(target="tests.model.variants:Plain")):
        state = {key: value + 1 for key, value in state.items()}
        torch.save(state, golden.checkpoint)
        updated = api.update(None, golden.path, live=live)
        assert updated.live is not None
        assert updated.live.outputs is not None
        assert updated.live.outputs.tolerance == (1.0, 1e-4)


class Small(nn.Module):
    """Activations of any scale, one of which may be off by a share of itself."""

    def __init__(self, scale: float = 1e-4, share: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.act = nn.Identity() if share == 0 else Shifted(share)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.act(self.first(x) * self.scale)
        return found

    def golden_inputs(self) -> torch.Tensor:
        return INPUTS[0][0]


class Shifted(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.share * x.square().mean().sqrt()


def tiny() -> nn.Module:
    return Small()


def tiny_and_off() -> nn.Module:
    return Small(share=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("share", "verdict"), [(1e-3, "different"), (2e-5, "close")])
def test_what_an_activation_may_move_can_be_a_share_of_its_own_scale(
    scale: float, share: float, verdict: str
) -> None:
    torch.manual_seed(0)
    expected, actual = Small(scale), Small(scale, share)
    actual.load_state_dict(expected.state_dict())
    recorded = outputs_of(expected, INPUTS, tolerance=OutputTolerance(atol=0.0, rel=1e-4))
    measure = WhileRunning(
        expected=recorded, policy=output_policy(LiveOptions(), recorded, Policy())
    )
    found = compare_activations(measure, outputs_of(actual, INPUTS, see=measure.see), Selection())
    assert found.verdict == verdict
    if verdict == "different":
        assert found.divergence is not None
        assert found.divergence.diverging_module == "act"
    else:
        assert found.notes == ("the first that is not bit-identical: act:out",)


def test_a_recorded_share_is_kept_and_is_that_of_a_later_verify(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    torch.save(tiny().state_dict(), path)

    def verdict(rel: float | None, **options: float) -> str:
        target = f"{__name__}:tiny"
        live = LiveOptions(target=target, output_rel=rel)
        golden = api.record(
            path, tmp_path / "golden.safetensors", stage="outputs", live=live, overwrite=True
        )
        live = LiveOptions(target=f"{__name__}:tiny_and_off", **options)
        return [*api.verify_stages(None, golden.path, live=live)][-1].verdict

    assert verdict(None) == "close"  # all of it is far below 1e-4
    assert verdict(1e-4) == "different"
    assert verdict(1e-2) == "close"
    assert verdict(1e-2, output_atol=0.0) == "different"
    assert verdict(1e-2, output_rel=1e-6) == "different"
    assert verdict(1e-2, output_rtol=0.0) == "close"


class Puts(nn.Module):
    """Puts out whatever is made of its input plus `by`."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], object], by: float = 0) -> None:
        super().__init__()
        self.make, self.by = make, by

    def forward(self, x: torch.Tensor) -> object:
        return self.make(x + self.by, x)


class Named(dict[str, object]):
    """A dict with attributes of its own."""

    def __init__(self, items: dict[str, object], **attributes: object) -> None:
        super().__init__(items)
        vars(self).update(attributes)


def quantized(x: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(x / x.abs().max(), float(x.abs().max()) / 64, 0, torch.qint8)


def of_itself(x: torch.Tensor) -> list[object]:
    found: list[object] = [x]
    found.append(found)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda changed, same: SimpleNamespace(logits=changed),
        lambda changed, same: {"a.b": changed, "a": {"b": same}},
        lambda changed, same: {"a": {"b": same}, "a.b": changed},
        lambda changed, same: {0: changed, "0": same},
        lambda changed, same: {"[0]": same, 0: changed, "": same},
        lambda changed, same: {Fraction(1, 2): same, "[1/2]": same, PurePath("1/2"): changed},
        lambda changed, same: {(0, "a"): changed, None: same, True: same, b"[": same, 1.5: same},
        lambda changed, same: {"\ud800": changed, "\n": same},
        lambda changed, same: float(changed.sum()),
        lambda changed, same: [same.numpy(), {"x": changed.numpy()}],
        lambda changed, same: changed.numpy()[::-1].astype(">f4"),
        lambda changed, same: Named({"x": same}, aux=changed),
        lambda changed, same: deque([same, {"x": changed}.values()]),
        lambda changed, same: [same, str(changed.sum()), None],
        lambda changed, same: [same, {"b", "a", repr(changed.sum())}],
        lambda changed, same: [same, Fraction(int(changed.sum()), 7)],
        lambda changed, same: [same, [10**30 + int(changed.sum())]],
        lambda changed, same: [same, [()] if changed.sum() > same.sum() else [{}]],
        lambda changed, same: [same, np.array([str(changed.sum())])],
        lambda changed, same: of_itself(changed),
        lambda changed, same: quantized(changed),
        lambda changed, same: changed.to_sparse_csr(),
        lambda changed, same: changed.to_sparse_csc(),
        lambda changed, same: torch.nested.as_nested_tensor([same, changed], layout=torch.jagged),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated)")
def test_no_change_of_what_a_model_puts_out_passes_unseen(
    make: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    def run(by: float, seen: Fingerprint | None = None) -> Fingerprint:
        measure = None if seen is None else WhileRunning(expected=seen, policy=OutputPolicy())
        found = outputs_of(Puts(make, by), INPUTS, see=None if measure is None else measure.see)
        if measure is not None:
            compared = compare_activations(measure, found, Selection(activations="final"))
            assert compared.ok == (by == 0)
        return found

    recorded = run(0)
    assert recorded.tensors.keys() == run(0, recorded).tensors.keys()
    assert recorded.root != run(100, recorded).root
    assert not recorded.unread


def test_what_of_an_output_cannot_be_compared_is_named() -> None:
    found = outputs_of(Puts(lambda x, _: [x, {x}, (y for y in [x])]), INPUTS)
    assert found.unread == (
        "(model):out.1 (tensors of a set, in no order)",
        "(model):out.2 (cannot be pickled: TypeError)",
    )


@pytest.mark.parametrize("make", [lambda *_: None, lambda x, _: {x}])
def test_a_model_that_puts_out_nothing_to_compare_is_refused(
    make: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    with pytest.raises(ModelError, match="holds no tensor to compare"):
        outputs_of(Puts(make), INPUTS)


def test_outputs_keep_as_much_as_there_is_room_for(tmp_path: Path) -> None:
    layers = nn.Linear(64, 64), nn.Tanh(), Puts(lambda x, _: x.bfloat16()), nn.ReLU()
    model = nn.Sequential(nn.Sequential(*layers), nn.Identity())

    def recorded(room: float) -> Golden:
        found = outputs_of(model, INPUTS, room=room)
        written = Golden(path=tmp_path / f"{room}.safetensors", fingerprint=found, source="")
        write_golden(written)
        return read_golden(written.path)

    fine, coarse = (recorded(room).fingerprint.tensors for room in (math.inf, 0))
    assert list(fine) == list(coarse)
    nbytes = [Path(str(recorded(room).path)).stat().st_size for room in (math.inf, 0)]
    for room in (nbytes[0] - nbytes[1], nbytes[0] - 3000, nbytes[0]):
        golden = recorded(room)
        assert golden.fingerprint.bits == (8 if room == nbytes[0] else 4)
    for tensors, bits in ((fine, 8), (coarse, 4)):
        residues = tensors["0.1:out"].residues
        assert residues is not None
        assert (residues.grid.bits, residues.packed.size) == (bits, 4096 * bits // 8)
        assert tensors["0.1:out"].sketch is not None
        # Of 16 bits, which torch rounds much, the values themselves; also those of aliases.
        for key in ("0.2:out", "0.3:in.input"):
            assert (tensors[key].values is None) is (bits == 4)
            assert (tensors[key].residues is None) is (bits == 8)


@pytest.mark.parametrize("max_size", [None, 10_000])
def test_an_update_keeps_as_many_bits_of_outputs(golden: Golden, max_size: int | None) -> None:
    path = Path(str(golden.path)).parent / "plain.pt"
    live = LiveOptions(target="tests.model.variants:Plain")
    options: dict[str, Any] = {"stage": "outputs", "live": live, "overwrite": True}
    api.record(path, golden.path, max_size=max_size, **options)
    torch.save({key: value + 1 for key, value in torch.load(path).items()}, path)
    updated = api.update(path, golden.path).live
    assert updated is not None
    assert updated.outputs is not None
    assert updated.outputs.bits == (8 if max_size is None else 4)
