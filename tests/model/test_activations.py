"""What two implementations compute: what must agree, what is structure, and who parts first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.comparison.comparison import Comparison, render
from harness.comparison.policy import Policy
from harness.errors import UsageError
from harness.model.activations import WhileRunning, compare_activations, renamed
from harness.model.options import LiveOptions, output_policy, selection_of
from harness.model.outputs import outputs_of
from tests.conftest import Harness


class Block(nn.Module):
    """Normalises, then applies a layer and a module for the activation."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=eps)
        self.layer = nn.Linear(8, 8)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.act(self.layer(self.norm(x)))
        return made


class Inlined(Block):
    """The same, with its activation as a function, and its inputs under other names."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        made: Tensor = hidden + nn.functional.gelu(self.layer(self.norm(hidden)))
        return made


class Swapped(Block):
    """Adds what came in behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        made: Tensor = y + self.act(self.layer(y))
        return made


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, module in named.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"last": x, "first": x[:1]}


class Tuples(Model):
    """Gives its outputs without names, and calls its blocks by keyword."""

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x=x)
        return x, x[:1]


class Wide(nn.Module):
    """Too wide for its values to be kept; its second module adds `offset`."""

    offset = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 800), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x) + self.offset).sum()
        return made

    def golden_inputs(self) -> Tensor:
        return torch.linspace(-1, 1, 32).reshape(4, 8)


class Wider(Wide):
    offset = 1e-3


def model(kind: type[Model], *blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    made = kind(*blocks)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


INPUTS: Any = ((torch.linspace(-1, 1, 32).reshape(4, 8),), {})


def compared(
    one: nn.Module, other: nn.Module, policy: Policy | None = None, **options: Any
) -> Comparison:
    live, policy = LiveOptions(**options), policy or Policy()
    modules = {name for name, _ in other.named_modules()}
    expected, former, _ = renamed(outputs_of(one, INPUTS), policy, modules)
    tolerances = output_policy(live, expected, policy)
    measure = WhileRunning(expected=expected, policy=tolerances, former=former)
    actual = outputs_of(other, INPUTS, see=measure.see)
    return compare_activations(measure, actual, selection_of(live))


def test_an_inlined_activation_is_structure_in_one_line_and_no_failure() -> None:
    found = compared(model(Model, Block(), Block()), model(Model, Inlined(), Inlined()))
    assert found.verdict == "identical"
    (note,) = found.notes
    assert note == "structure, not compared: only in the golden: 2 (blocks.{0,1}.act)"
    strict = compared(
        model(Model, Block(), Block()), model(Model, Inlined(), Inlined()), activations="all"
    )
    assert strict.verdict == "different"


def test_inputs_and_outputs_of_other_names_are_matched_by_position() -> None:
    found = compared(model(Model, Block()), model(Tuples, Block()))
    assert (found.verdict, found.notes) == ("identical", ())
    found = compared(model(Model, Block()), model(Tuples, Swapped()))
    assert [f.key for f in found.findings if f.key.startswith("(model)")] == [
        "(model):out.0",
        "(model):out.1",
    ]


@pytest.mark.parametrize(
    ("changed", "module"),
    [
        ([Block(eps=1e-1), Block()], "blocks.0.norm"),
        ([Block(), Inlined(eps=1e-1)], "blocks.1.norm"),
        ([Block(), Swapped()], "blocks.1"),
        ([Swapped(), Inlined()], "blocks.0"),
    ],
)
def test_the_first_module_that_got_the_same_and_gave_another_is_named(
    changed: list[nn.Module], module: str
) -> None:
    found = compared(model(Model, Block(), Block()), model(Model, *changed))
    assert found.verdict == "different"
    assert found.divergence is not None
    assert found.divergence.diverging_module == module
    assert not found.divergence.diverging


def test_an_output_of_the_model_itself_that_is_gone_always_fails() -> None:
    class Less(Model):
        def forward(self, x: Tensor) -> Any:
            return {"last": super().forward(x)["last"]}

    for activations in ("common", "all", "final"):
        found = compared(model(Model, Block()), model(Less, Block()), activations=activations)
        assert [(f.kind, f.key) for f in found.findings] == [("missing", "(model):out.first")]


def test_the_models_own_outputs_may_be_all_that_counts() -> None:
    class Detour(Block):
        """Its norm computes something else, and nothing comes of it."""

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x * 2)
            made: Tensor = x + self.act(
                self.layer(
                    torch.nn.functional.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
                )
            )
            return made

    models = model(Model, Block()), model(Model, Detour())
    assert compared(*models).verdict == "different"
    found = compared(*models, activations="final")
    assert (found.verdict, found.num_identical) == ("identical", 2)


@pytest.mark.parametrize("asked", [{"activations": "final"}, {"only": ("(model):out*",)}])
def test_where_little_must_agree_the_module_is_named_all_the_same(asked: Any) -> None:
    found = compared(model(Model, Block(), Block()), model(Model, Block(), Inlined(1e-1)), **asked)
    assert [finding.key for finding in found.findings] == ["(model):out.last", "(model):out.first"]
    assert (found.num_identical, found.num_ignored) == (0, 15)
    assert found.divergence is not None
    assert found.divergence.diverging_module == "blocks.1.norm"


def test_an_input_that_one_side_alone_has_is_not_said_to_agree() -> None:
    class Masked(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    class Masks(Model):
        def forward(self, x: Tensor) -> Any:
            for block in self.blocks:
                x = block(x, mask=x > 0)
            return {"last": x, "first": x[:1]}

    found = compared(model(Model, Masked()), model(Masks, Masked()))
    assert found.divergence is not None
    assert (found.divergence.agreeing, found.divergence.alone) == (("x",), ("mask",))
    assert "of its 2 inputs mask is on one side only; unchanged: the 2 activations" in render(found)
    assert "only in this model: 1 (blocks.0:in.mask)" in render(found)


def test_activations_of_other_names_are_measured_by_their_values() -> None:
    one, other = model(Model, Block()), model(Tuples, Block(eps=1.1e-5))
    found = compared(one, other, output_atol=1e-4)
    assert found.verdict == "close"
    assert {f.key for f in found.findings} > {"(model):out.0", "(model):out.1"}
    assert all(f.difference is not None and f.difference.is_exact for f in found.findings)


def test_an_input_that_differs_where_the_output_agrees_is_noted_and_passes() -> None:
    class Ignored(Block):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return super().forward(x)

    class Scales(Model):
        scale = 1.0

        def forward(self, x: Tensor) -> Any:
            for block in self.blocks:
                x = block(x, torch.full((2,), self.scale))
            return {"last": x, "first": x[:1]}

    one, other = model(Scales, Ignored()), model(Scales, Ignored())
    other.scale = 2.0
    found = compared(one, other)
    assert found.verdict == "identical"
    assert found.notes == (
        "inputs that differ, of modules whose outputs agree: 1 (blocks.0:in.scale)",
    )


def test_other_inputs_of_the_model_are_said() -> None:
    one, other = outputs_of(model(Model, Block()), INPUTS), model(Model, Block())
    policy = output_policy(LiveOptions(), one, Policy())
    measure = WhileRunning(expected=one, policy=policy)
    actual = outputs_of(other, ((INPUTS[0][0] + 1,), {}), see=measure.see)
    found = compare_activations(measure, actual, selection_of(LiveOptions()))
    assert found.divergence is not None
    assert (found.divergence.diverging_module, found.divergence.diverging) == ("(model)", ("x",))


def test_globs_select_activations_and_those_that_fit_none_are_errors() -> None:
    models = model(Model, Block(), Block()), model(Model, Block(), Block(eps=1e-1))
    found = compared(*models, only=("blocks.0*",))
    assert found.verdict == "identical"
    assert found.num_ignored > 0
    with pytest.raises(UsageError, match=r"--only blocks\.7: matches no activation"):
        compared(*models, only=("blocks.7",))
    with pytest.raises(UsageError, match="leave no output to compare"):
        compared(*models, only=("blocks.0:in.*",))
    inputs = compared(*models, only=("blocks.0:in.*",), activations="all")
    assert (inputs.verdict, inputs.num_identical) == ("identical", 1)
    with pytest.raises(UsageError, match=r"--output-tolerance blocks\.7: matches no activation"):
        compared(*models, output_tolerances=(("blocks.7", 1.0, None),))


def test_tolerances_may_be_of_some_activations_or_a_share_of_each_ones_scale() -> None:
    models = model(Model, Block()), model(Model, Block(eps=1.1e-5))
    assert compared(*models, output_atol=0.0, output_rtol=0.0).verdict == "different"
    loose = (("*", 1.0, None),)
    assert compared(*models, output_atol=0.0, output_tolerances=loose).verdict == "close"
    assert compared(*models, output_atol=0.0, output_rtol=0.0, output_rel=1e-3).verdict == "close"
    assert compared(*models, output_rel=1e-9).verdict == "different"


@pytest.mark.parametrize(
    "policy",
    [
        Policy(key_map=(("blocks.", "layers."),)),
        Policy(key_map=(("blocks.0.", "layers.0."), ("blocks.1.", "layers.1."))),
    ],
)
def test_maps_of_keys_reach_activations(policy: Policy) -> None:
    class Renamed(Model):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__()
            del self.blocks
            self.layers = nn.ModuleList(blocks)

        def forward(self, x: Tensor) -> Any:
            for block in self.layers:
                x = block(x)
            return {"last": x, "first": x[:1]}

    models = model(Model, Block(), Block()), model(Renamed, Block(), Block(eps=1e-1))
    found = compared(*models, policy=policy)
    assert found.divergence is not None
    assert found.divergence.diverging_module == "layers.1.norm"
    assert found.notes == ()


def test_a_wrapped_model_is_matched_by_the_prefix_that_is_taken_off() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, x: Tensor) -> Any:
            return self.module(x)

    models = model(Model, Block()), Wrapper(model(Model, Block()))
    found = compared(*models, policy=Policy(strip_prefix="module."))
    assert found.verdict == "identical"
    assert found.num_identical > 6


def test_values_of_the_models_own_outputs_are_kept() -> None:
    class Repeats(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.repeat(40, 40), x.repeat(2000, 100)

    found = outputs_of(Repeats(), INPUTS).tensors
    assert [found[f"(model):out.{i}"].values is not None for i in (0, 1)] == [True, False]


def test_an_undecided_activation_of_a_module_without_weights_ends_in_a_report(
    harness: Harness, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    torch.save(Wide().state_dict(), tmp_path / "wide.pt")
    golden = tmp_path / "golden.safetensors"
    target = ("--model", f"{__name__}:Wide")
    harness("record", tmp_path / "wide.pt", "-g", golden, "--outputs", *target)
    other = ("--model", f"{__name__}:Wider", "--output-rel", "1e-1")
    run = harness("verify", tmp_path / "wide.pt", "-g", golden, "--outputs", *other)
    assert run.code == 3
    assert "record with --output-atol" in run.out
