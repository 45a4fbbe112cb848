"""Code that was refactored: other names, hooks for old keys, wrappers, new buffers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import Policy
from tests.conftest import Harness

HERE = __name__


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.fc2(self.fc1(x).relu())
        return made


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.mlp(self.norm(x))
        return made


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.head(x)
        return made

    def golden_inputs(self) -> dict[str, Tensor]:
        return {"tokens": torch.arange(10).view(2, 5)}


class Renamed(nn.Module):
    """`blocks.N.mlp` is `layers.N.ff` here; a buffer is new, and one more is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8)}) for _ in range(2))
        for layer in self.layers:
            layer["ff"] = Mlp()  # type: ignore[index]
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self._register_load_state_dict_pre_hook(self._old_keys)

    def _old_keys(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.setdefault(f"{prefix}scale", torch.ones(1))
        for key in [*state]:
            now = key.replace("blocks.", "layers.").replace(".mlp.", ".ff.")
            state[now] = state.pop(key)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["ff"](layer["norm"](x))  # type: ignore[index]
        made: Tensor = self.head(x) * self.scale
        return made


class Unhooked(Renamed):
    def _old_keys(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        pass


class Wrapped(nn.Module):
    inner: type[nn.Module] = Renamed

    def __init__(self) -> None:
        super().__init__()
        self.module = self.inner()
        self._register_load_state_dict_pre_hook(self._old_keys)

    def _old_keys(self, state: dict[str, Any], *_: Any) -> None:
        for key in [*state]:
            if not key.startswith("module."):
                state[f"module.{key}"] = state.pop(key)

    def forward(self, tokens: Tensor) -> Tensor:
        made: Tensor = self.module(tokens)
        return made

    def golden_inputs(self) -> dict[str, Tensor]:
        return {"tokens": torch.arange(10).view(2, 5)}


class Loses(Renamed):
    def _old_keys(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        super()._old_keys(state, prefix)
        state[f"{prefix}layers.1.ff.fc1.weight"] = torch.ones(16, 8)


class WrappedAndLost(Wrapped):
    inner = Loses


class OtherEpsilon(Renamed):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1]["norm"].eps = 1e-1  # type: ignore[index,union-attr,assignment]


class WrappedAndOther(Wrapped):
    inner = OtherEpsilon


@pytest.fixture
def recorded(harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Old().state_dict(), "old.pt")
    run = harness("record", "old.pt", "-g", "g.safetensors", "--outputs", "--model", f"{HERE}:Old")
    assert run.code == 0
    return tmp_path


def command(model: str, *options: str) -> tuple[str, ...]:
    target = ("--model", f"{HERE}:{model}")
    return ("verify", "old.pt", "-g", "g.safetensors", "--outputs", *target, *options)


MAPS = (
    *("--map", "blocks.*.mlp.=layers.*.ff.", "--map", "blocks.=layers."),
    *("--strip-prefix", "module."),
)


def test_the_maps_that_the_report_prints_let_the_old_golden_pass_at_all_stages(
    harness: Harness, recorded: Path
) -> None:
    run = harness(*command("Wrapped"))
    assert run.code == 1
    [line] = [line for line in run.out.splitlines() if "to accept the new names:" in line]
    asked = shlex.split(line.partition(":  ")[2])
    assert tuple(asked[1:]) == command("Wrapped", *MAPS)
    passed = harness(*asked[1:])
    assert passed.code == 0
    assert [line for line in passed.out.splitlines() if not line.startswith("  note")] == [
        "ok identical  g.safetensors  file: 15 identical",
        "ok identical  g.safetensors  load: 15 identical",
        "ok identical  g.safetensors  reload: 15 identical",
        "ok identical  g.safetensors  outputs: 22 identical",
    ]
    assert "note: no effect at this stage: --map blocks.*.mlp.=layers.*.ff., --map" in passed.out


def test_what_does_not_load_verifies_once_it_is_converted(harness: Harness, recorded: Path) -> None:
    run = harness(*command("Unhooked"))
    assert run.code == 1
    assert "it does not load" in run.out
    assert "renamed: as shapes and names tell (" in run.out
    [line] = [line for line in run.out.splitlines() if "--map" in line]
    words = shlex.split(line.partition("harness ")[2])
    policy = Policy(key_map=tuple(w.split("=") for w in words if "=" in w))
    state = {policy.renamed(key): value for key, value in torch.load("old.pt").items()}
    torch.save(state, "new.pt")
    assert harness(*[w.replace("CONVERTED_CKPT", "new.pt") for w in words]).code == 0


def test_one_wrong_weight_in_a_refactored_model_fails(harness: Harness, recorded: Path) -> None:
    run = harness(*command("WrappedAndLost", *MAPS))
    assert run.code == 1
    assert "FAIL different  g.safetensors  load: 14 identical, 1 different" in run.out
    assert "blocks.1.mlp.fc1.weight  float32 [16, 8]" in run.out


def test_a_module_of_a_refactored_model_that_computes_something_else_is_named(
    harness: Harness, recorded: Path
) -> None:
    run = harness(*command("WrappedAndOther", *MAPS))
    assert run.code == 1
    assert "first diverges: module.layers.1.norm" in run.out


def test_equal_weights_under_new_names_may_pass_everywhere(
    harness: Harness, recorded: Path
) -> None:
    run = harness(*command("Wrapped", "--accept", "renamed"))
    assert run.code == 0
    assert "ok close  g.safetensors  load: 3 identical, 15 accepted" in run.out
    state = {k.replace("blocks", "layers"): v for k, v in torch.load("old.pt").items()}
    torch.save(state, "new.pt")
    assert harness("verify", "new.pt", "-g", "g.safetensors", "--file").code == 1
    accepted = ("-g", "g.safetensors", "--file", "--accept", "renamed")
    assert harness("verify", "new.pt", *accepted).code == 0
    state["layers.0.norm.weight"] += 1
    torch.save(state, "new.pt")
    assert harness("verify", "new.pt", *accepted).code == 1
    assert harness(*command("WrappedAndLost", "--accept", "renamed")).code == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--map", "block.=layers."), "has no key block."),
        (("--map", "blocks.=layer."), "the checkpoint has no key layer., at no stage"),
        (("--ignore", "blocks.7.*"), "matches no key of g.safetensors, at no stage"),
        (("--tolerance", "blocks.7.*=1"), "matches no key of"),
        (("--strip-prefix", "model."), "no key of the"),
    ],
)
def test_what_fits_no_stage_is_an_error(
    harness: Harness, recorded: Path, option: tuple[str, str], said: str
) -> None:
    run = harness(*command("Old", *option))
    assert run.code == 2
    assert said in run.err


def test_a_typing_error_is_said_before_a_model_is_loaded(harness: Harness, recorded: Path) -> None:
    for words in (command("Old"), ("roundtrip", "old.pt", "--model", f"{HERE}:Old")):
        run = harness(*words, "--map", "block.=layers.")
        assert (run.code, run.out) == (2, "")
        assert "did you mean blocks.?" in run.err
    run = harness(*command("Old", "--output-rel", "-1"))
    assert run.code == 2
    assert "atol is -1.0: a tolerance is 0 or more" in run.err


def test_an_option_that_fits_one_stage_is_enough(harness: Harness, recorded: Path) -> None:
    run = harness(*command("Old", "--ignore", "blocks.0.mlp:out", "--ignore", "embed.weight"))
    assert run.code == 0
    assert "file: 14 identical, 1 ignored" in run.out
    assert "outputs: 25 identical, 1 ignored" in run.out


def test_many_maps_may_be_in_a_file(harness: Harness, recorded: Path) -> None:
    Path("map.txt").write_text("blocks.*.mlp.  layers.*.ff.\nblocks.  layers.\n")
    options = ("--map-file", "map.txt", "--strip-prefix", "module.")
    assert harness(*command("Wrapped", *options)).code == 0
    run = harness(*command("Wrapped", *options, "--update-golden"))
    assert run.code == 2
    assert "cannot be combined with --update-golden" in run.err


class Conv(nn.Module):
    """A convolution in the plain form, and in either form of weight norm."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        if form == "old":
            nn.utils.weight_norm(self.conv)
        elif form == "new":
            nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        return made


def plain_conv() -> nn.Module:
    return Conv("plain")


def old_conv() -> nn.Module:
    return Conv("old")


def new_conv() -> nn.Module:
    return Conv("new")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("form", "model", "said"),
    [
        ("old", "plain", "folded (g is weight_g, v is weight_v)"),
        ("new", "plain", "folded (g is original0, v is original1)"),
        ("plain", "old", "unfolded (g is weight_g, v is weight_v)"),
        ("plain", "new", "unfolded (g is original0, v is original1)"),
    ],
)
def test_a_load_that_fails_for_weight_norm_says_what_became_of_it(
    tmp_path: Path, harness: Harness, form: str, model: str, said: str
) -> None:
    torch.save(Conv(form).state_dict(), tmp_path / "conv.pt")
    run = harness("roundtrip", tmp_path / "conv.pt", "--model", f"{HERE}:{model}_conv", "--load")
    assert run.code == 1
    assert run.out.count(f"weight = g·v/‖v‖: weight_norm was {said}") == 2
    assert "renamed" not in run.out


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_load_that_fails_for_the_other_form_of_weight_norm_says_so(
    tmp_path: Path, harness: Harness
) -> None:
    torch.save(Conv("new").state_dict(), tmp_path / "conv.pt")
    run = harness("roundtrip", tmp_path / "conv.pt", "--model", f"{HERE}:old_conv", "--load")
    assert run.code == 1
    assert "weight_norm in its other form: parametrizations.weight.original0 is weight_g" in run.out


class Shifted(Old):
    """What was block N is block N + 1 here, behind a new first one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), *self.blocks])
        self._register_load_state_dict_pre_hook(self._shift)  # type: ignore[no-untyped-call]

    def _shift(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        if f"{prefix}blocks.2.norm.weight" not in state:
            for number in (1, 0):
                for key in [key for key in state if key.startswith(f"{prefix}blocks.{number}.")]:
                    name = key.replace(f"blocks.{number}.", f"blocks.{number + 1}.")
                    state[name] = state.pop(key)


class Exchanged(Old):
    """The keys are what they were, and each block is the other one."""

    def __init__(self) -> None:
        super().__init__()
        self._register_load_state_dict_pre_hook(self._exchange)  # type: ignore[no-untyped-call]
        self.register_buffer("is_new", torch.ones(1))

    def _exchange(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        if f"{prefix}is_new" not in state:
            state[f"{prefix}is_new"] = torch.ones(1)
            for key in [key for key in state if key.startswith(f"{prefix}blocks.0.")]:
                other = key.replace("blocks.0.", "blocks.1.")
                state[key], state[other] = state[other], state[key]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in reversed(self.blocks):
            x = block(x)
        made: Tensor = self.head(x)
        return made


class ExchangedAndLost(Exchanged):
    def _exchange(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        super()._exchange(state, prefix)
        state["blocks.0.mlp.fc1.weight"] = torch.ones(16, 8)


@pytest.mark.parametrize(
    ("model", "maps"),
    [
        ("Shifted", ("--map", "blocks.{0,1}.=blocks.{1,2}.")),
        ("Exchanged", ("--map", "blocks.{0,1}.=blocks.{1,0}.")),
    ],
)
def test_indices_that_are_shifted_pass_with_the_map_that_is_printed_where_it_is_true(
    harness: Harness, recorded: Path, model: str, maps: tuple[str, ...]
) -> None:
    run = harness(*command(model))
    assert run.code == 1
    [line] = [line for line in run.out.splitlines() if "to accept the new names:" in line]
    asked = shlex.split(line.partition(":  harness ")[2])
    assert tuple(asked) == command(model, *maps)
    run = harness(*asked)
    assert (run.code, run.out.count("ok identical")) == (0, 4)
    assert "note: no effect at this stage: --map blocks" in run.out


def test_a_wrong_weight_behind_indices_that_are_shifted_is_named(
    harness: Harness, recorded: Path
) -> None:
    run = harness(*command("ExchangedAndLost"))
    [line] = [line for line in run.out.splitlines() if "to accept the new names:" in line]
    run = harness(*shlex.split(line.partition(":  harness ")[2]))
    assert run.code == 1
    assert "load: 14 identical, 1 different" in run.out
    assert "blocks.1.mlp.fc1.weight  float32 [16, 8]" in run.out


def parallel() -> nn.Module:
    return nn.DataParallel(Old())


def compiled() -> Any:
    return torch.compile(Old())


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(Old())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("model", "prefix"),
    [("parallel", "module."), ("compiled", "_orig_mod."), ("averaged", "module.")],
)
def test_what_torch_wraps_loads_and_passes_with_the_prefix_that_is_printed(
    harness: Harness, recorded: Path, model: str, prefix: str
) -> None:
    run = harness(*command(model))
    assert run.code == 1
    assert f"--strip-prefix {prefix}" in run.out
    run = harness(*command(model, "--strip-prefix", prefix))
    assert run.code == 0, run
    assert run.out.count("ok identical") == 4


class Experts(nn.Module):
    """Experts that are modules of their own, behind a q, a k and a v."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict(
            {name: nn.Linear(6, 6) for name in ("q_proj", "k_proj", "v_proj")}
        )
        names = ("gate_proj", "up_proj", "down_proj")
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(6, 6, bias=False) for name in names}) for _ in range(3)
        )


class FusedExperts(nn.Module):
    """The same with as few tensors as it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(6, 18)})
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 12, 6))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 6, 6))


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def of(name: str) -> list[Tensor]:
        return [state[f"experts.{n}.{name}_proj.weight"] for n in range(3)]

    made = {
        f"attn.qkv.{leaf}": torch.cat([state[f"attn.{x}_proj.{leaf}"] for x in "qkv"])
        for leaf in ("weight", "bias")
    }
    made["experts.gate_up_proj"] = torch.cat([torch.stack(of(n)) for n in ("gate", "up")], dim=1)
    return {**made, "experts.down_proj": torch.stack(of("down"))}


class Fuses(FusedExperts):
    def __init__(self) -> None:
        super().__init__()
        self._register_load_state_dict_pre_hook(self._fuse)  # type: ignore[no-untyped-call]

    def _fuse(self, state: dict[str, Tensor], *_: Any) -> None:
        if "experts.gate_up_proj" not in state:
            made = fused(state)
            state.clear()
            state.update(made)


@pytest.mark.parametrize("model", ["FusedExperts", "Experts"])
def test_experts_that_are_stacked_in_the_model_or_the_file_alone_are_said_to_be(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """By shapes alone gate, up and down could be each other: the names tell."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    each = Experts().state_dict()
    files = [each, fused(each)] if model == "FusedExperts" else [fused(each), each]
    for name, state in zip(("old.pt", "new.pt"), files, strict=True):
        torch.save(state, name)
    assert harness("record", "old.pt", "-g", "g.safetensors").code == 0
    run = harness("verify", "old.pt", "-g", "g.safetensors", "--load", "--model", f"{HERE}:{model}")
    assert run.code == 1
    assert "it does not load" in run.out
    said = run.out.replace("experts.", "").replace("attn.", "")
    if model == "FusedExperts":
        assert "down_proj = {0..2}.down_proj.weight, stacked" in said
        assert "gate_up_proj = {0..2}.gate_proj.weight and {0..2}.up_proj.weight, stacked" in said
        assert "qkv.bias = q_proj.bias, k_proj.bias and v_proj.bias joined along 0" in said
    else:
        assert "down_proj is now {0..2}.down_proj.weight, unstacked" in said
        assert "is now {0..2}.gate_proj.weight and {0..2}.up_proj.weight, unstacked" in said
        assert "qkv.bias is now q_proj.bias, k_proj.bias and v_proj.bias, split along 0" in said
    [line] = [line for line in run.out.splitlines() if "CONVERTED_CKPT" in line]
    words = shlex.split(line.partition("harness ")[2].replace("CONVERTED_CKPT", "new.pt"))
    assert words[-2:] == ["--accept", "joined"]
    assert harness(*words).code == 0


def test_what_a_load_hook_stacks_passes_where_that_is_accepted(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Experts().state_dict(), "old.pt")
    asked = ("old.pt", "--model", f"{HERE}:Fuses", "--reload")
    run = harness("roundtrip", *asked)
    assert run.code == 1
    assert "experts.down_proj = experts.{0..2}.down_proj.weight, stacked" in run.out
    assert "to accept joined:  harness roundtrip" in run.out
    assert harness("roundtrip", *asked, "--accept", "joined").code == 0
