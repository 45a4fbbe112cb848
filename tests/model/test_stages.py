"""The live stages: what code does to a checkpoint, caught and named by stage and module."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from harness import api
from harness.api import KeptValues
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy
from harness.errors import ModelError, UsageError
from harness.golden.file import read_golden
from harness.golden.golden import Golden
from harness.model.activations import first_divergence
from harness.model.inputs import inputs_of
from harness.model.loading import Loader
from harness.model.options import LiveOptions, remembered
from harness.model.outputs import outputs_of
from tests.conftest import Run
from tests.model import variants

HERE = "tests.model.variants"


def kinds(comparison: Comparison) -> list[tuple[str, str]]:
    return [(finding.kind, finding.key) for finding in comparison.findings]


def by_stage(comparisons: Iterable[Comparison]) -> dict[str, Comparison]:
    return {comparison.stage: comparison for comparison in comparisons}


@pytest.fixture(scope="module")
def nest_golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """The golden of NEST as it is loaded."""
    data = Path(__file__).parents[1] / "data"
    path = tmp_path_factory.mktemp("golden") / "nest.safetensors"
    api.record(data / "nest_tiny.nemo", path, stage="load")
    return read_golden(path)


def verify_nest(
    golden: Golden, checkpoint: Path, model: str, stage: Any = "outputs"
) -> dict[str, Comparison]:
    live = LiveOptions(target=f"{HERE}:{model}")
    return by_stage(api.verify_stages(checkpoint, golden, stage=stage, live=live))


def test_the_same_weights_in_a_lightning_checkpoint_pass_as_well(
    nest_golden: Golden, data: Path
) -> None:
    found = by_stage(api.verify_stages(data / "nest_tiny_step0.ckpt", nest_golden, stage="load"))
    assert {c.verdict for c in found.values()} == {"identical"}


def test_a_key_that_a_loose_load_left_random_is_named(nest_golden: Golden, data: Path) -> None:
    found = verify_nest(nest_golden, data / "nest_tiny_renamed_key.nemo", "Loose", "load")
    assert kinds(found["file"])[0][0] == "renamed"
    key = "encoder.layers.0.self_attn.linear_q.weight"
    assert kinds(found["load"]) == [("unwritten", key)]


def test_a_lost_codebook_is_named(nest_golden: Golden, data: Path) -> None:
    found = verify_nest(nest_golden, data / "nest_tiny_missing_key.nemo", "Loose", "load")
    assert kinds(found["file"]) == [("missing", "quantizer.codebooks")]
    assert kinds(found["load"]) == [("unwritten", "quantizer.codebooks")]


def test_a_parameter_that_was_thawed_is_named(nest_golden: Golden, data: Path) -> None:
    found = verify_nest(nest_golden, data / "nest_tiny.nemo", "Thawed", "load")
    (finding,) = found["load"].findings
    assert (finding.kind, finding.key) == ("requires_grad", "mask_processor.mask_embedding")
    assert (finding.expected, finding.actual) == ("frozen", "trainable")


def test_a_save_that_loses_bits_is_found_by_the_reload(nest_golden: Golden, data: Path) -> None:
    found = verify_nest(nest_golden, data / "nest_tiny.nemo", "SavesHalf", "reload")
    assert found["load"].verdict == "identical"
    assert kinds(found["reload"]) == [("different", "decoder.decoder_layers.0.weight")]


# Other people's models


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(variants.Plain().state_dict(), tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def record(path: Path, model: str) -> Golden:
    golden = path.parent / "golden" / f"{path.stem}.safetensors"
    live = LiveOptions(target=f"{HERE}:{model}")
    api.record(path, golden, stage="outputs", live=live, overwrite=True)
    return read_golden(golden)


def verify_with(golden: Golden, path: Path, model: str) -> dict[str, Comparison]:
    live = LiveOptions(target=f"{HERE}:{model}")
    return by_stage(api.verify_stages(path, golden, live=live))


def test_a_plain_module_passes_every_stage(plain: Path) -> None:
    golden = record(plain, "Plain")
    found = by_stage(api.verify_stages(plain, golden))
    assert [c.verdict for c in found.values()] == ["identical"] * 4


def test_a_weight_drawn_anew_after_loading_is_named(plain: Path) -> None:
    found = verify_with(record(plain, "Plain"), plain, "Reinitialised")
    assert kinds(found["load"]) == [("unwritten", "layers.1.weight")]


def test_a_bfloat16_file_that_loads_into_a_float32_model_is_named(plain: Path) -> None:
    golden = record(plain, "Plain")
    state = {key: value.bfloat16() for key, value in torch.load(plain).items()}
    torch.save(state, plain)
    found = by_stage(api.verify_stages(plain, golden, stage="load"))
    assert found["file"].count("dtype") == len(state)
    assert found["load"].verdict == "different"
    # Recorded from the bf16 file itself, the load is what casts.
    found = by_stage(api.verify_stages(plain, record(plain, "Plain"), stage="load"))
    assert found["file"].verdict == "identical"
    assert [(f.kind, f.expected, f.actual) for f in found["load"].findings] == (
        [("dtype", "bfloat16", "float32")] * len(state)
    )


def test_a_model_loads_the_keys_that_are_there_whatever_the_policy_calls_them(plain: Path) -> None:
    golden = record(plain, "Plain")
    state = {f"module.{key}": value for key, value in torch.load(plain).items()}
    torch.save(state, plain)
    stages = api.verify_stages(plain, golden, policy=Policy(strip_prefix="module."))
    assert next(stages).verdict == "identical"
    load = next(stages)
    assert kinds(load) == [("prefix", "module.")]
    assert load.exit_code == 1
    assert list(stages) == []


@pytest.mark.parametrize(
    "policy",
    [
        Policy(strip_prefix="module."),
        Policy(key_map=(("embed.", "module.embed."), ("layers.", "module.layers."))),
    ],
)
def test_what_the_model_renames_itself_needs_no_option_at_its_stages(
    plain: Path, policy: Policy
) -> None:
    golden = record(plain, "Plain")
    state = {f"module.{key}": value for key, value in torch.load(plain).items()}
    if policy.key_map:
        state |= {key: state.pop(f"module.{key}") for key in ("norm.weight", "norm.bias")}
    torch.save(state, plain)
    live = LiveOptions(target=f"{HERE}:Strips")
    stages = api.verify_stages(plain, golden, policy=policy, live=live, stage="load")
    assert [stage.verdict for stage in stages] == ["identical", "identical"]


def test_errors_of_the_users_code_name_its_line(plain: Path) -> None:
    live = LiveOptions(target=f"{HERE}:Breaks")
    with pytest.raises(ModelError, match=r"JSONDecodeError.*variants\.py:\d+, in forward\)"):
        list(api.roundtrip(plain, live=live))


def test_a_changed_transient_buffer_is_named(plain: Path) -> None:
    found = verify_with(record(plain, "Plain"), plain, "OtherScale")
    assert found["file"].verdict == "identical"
    assert kinds(found["load"]) == [("different", "scale")]
    assert found["outputs"].divergence is not None
    assert found["outputs"].divergence.diverging_module == "(model)"


def test_a_buffer_that_no_file_holds_may_be_left_out_at_all_stages(plain: Path) -> None:
    golden = record(plain, "Plain")
    live = LiveOptions(target=f"{HERE}:OtherScale")
    policy = Policy(ignore=("scale",), tolerances=(("scale", 1.0, 0.0),))
    found = by_stage(api.verify_stages(plain, golden, policy=policy, live=live, stage="reload"))
    assert [stage.verdict for stage in found.values()] == ["identical"] * 3
    assert [stage.num_ignored for stage in found.values()] == [0, 1, 1]


def test_an_output_may_be_left_out_and_no_stage_knows_a_tolerance_of_one(plain: Path) -> None:
    golden = record(plain, "Plain")
    found = by_stage(api.verify_stages(plain, golden, policy=Policy(ignore=("norm:out",))))
    assert {stage: one.num_ignored for stage, one in found.items()} == {
        **dict.fromkeys(("file", "load", "reload"), 0),
        "outputs": 1,
    }
    policy = Policy(tolerances=(("norm:*", 1.0, 0.0),))
    with pytest.raises(UsageError, match=r"matches no key of .*, at no stage"):
        list(api.verify_stages(plain, golden, policy=policy))


@pytest.mark.parametrize("values", ["small", "none"])
def test_of_a_large_transient_buffer_is_kept_as_much_as_of_the_weights(
    plain: Path, values: KeptValues
) -> None:
    golden = plain.parent / "golden.safetensors"
    live = LiveOptions(target=f"{HERE}:LargeBuffer")
    api.record(plain, golden, stage="load", live=live, values=values)
    other = LiveOptions(target=f"{HERE}:OtherLargeBuffer")
    found = by_stage(api.verify_stages(plain, read_golden(golden), live=other))
    assert kinds(found["load"]) == [("different", "table")]
    difference = found["load"].findings[0].difference
    assert difference is not None
    assert [element.index for element in difference.elements] == [(5,)]


def test_a_changed_epsilon_is_named_in_somebody_elses_model(plain: Path) -> None:
    found = verify_with(record(plain, "Plain"), plain, "OtherNorm")
    assert found["outputs"].divergence is not None
    assert found["outputs"].divergence.diverging_module == "norm"
    assert found["outputs"].divergence.agreeing == ("input",)


@pytest.mark.parametrize("model", ["DrawnInputs", "BuiltWithInputs"])
def test_inputs_that_a_model_draws_are_the_same_in_all_runs(plain: Path, model: str) -> None:
    golden = record(plain, model)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    found = [*api.verify_stages(plain, golden), *api.roundtrip(plain, live=remembered(golden))]
    assert {stage.verdict for stage in found} == {"identical"}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_that_no_file_holds_is_found_by_its_outputs_and_no_update_accepts_it(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = record(plain, "Drawn")
    found = by_stage(api.verify_stages(plain, golden))
    assert [found[stage].verdict for stage in ("file", "load", "reload")] == ["identical"] * 3
    assert found["outputs"].actual.name == "the reloaded Drawn"
    divergence = found["outputs"].divergence
    assert divergence is not None
    assert divergence.finding.key == "(model):out.last"
    run = harness("verify", plain, "-g", golden.path, "--outputs")
    assert run.code == 1
    assert "note: the reloaded model was built under another seed" in run.out
    assert "fix the code" in run.out
    assert harness("verify", plain, "-g", golden.path, "--outputs", "--update-golden").code == 1


def test_what_is_drawn_is_not_accepted_where_it_departs_from_the_golden_too(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = record(plain, "Plain")
    verify = ("verify", plain, "-g", golden.path, "--outputs", "--model", f"{HERE}:Drawn")
    for run in (harness(*verify), harness(*verify, "--update-golden")):
        assert run.code == 1
        assert "note: the reloaded model was built under another seed" in run.out


def test_a_parameter_that_is_now_a_buffer_is_named(plain: Path) -> None:
    found = verify_with(record(plain, "Plain"), plain, "Unlearning")
    (finding,) = found["load"].findings
    assert (finding.kind, finding.key) == ("requires_grad", "norm.weight")
    assert (finding.expected, finding.actual) == ("trainable", "a buffer")
    assert {found[stage].verdict for stage in ("reload", "outputs")} == {"identical"}


def test_a_compiled_model_computes_what_it_computes_as_it_is_written(plain: Path) -> None:
    found = verify_with(record(plain, "Plain"), plain, "Compiled")
    assert {stage.verdict for stage in found.values()} == {"identical"}


def test_extra_state_that_is_plain_data_is_given_to_the_model_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "extra.pt"
    state = variants.ExtraState().state_dict()
    torch.save(state, path)
    live = LiveOptions(target=f"{HERE}:ExtraState")
    assert all(c.ok for c in api.roundtrip(path, live=live))
    lost = api.roundtrip(path, live=LiveOptions(target=f"{HERE}:LosesExtraState"))
    assert [(f.kind, f.key) for f in next(lost).findings] == [("value", "_extra_state")]
    torch.save({**state, "_extra_state": ValueError}, path)
    with pytest.raises(ModelError, match=r"_extra_state of ExtraState is a dict, which is made by"):
        list(api.roundtrip(path, live=live))


def test_sharded_safetensors_load_into_a_factorys_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = variants.Plain().state_dict()
    names = sorted(state)
    table = {}
    for number, part in enumerate((names[:3], names[3:])):
        shard = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / shard)
        table |= dict.fromkeys(part, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    found = by_stage(api.roundtrip(index, live=LiveOptions(target=f"{HERE}:Plain")))
    assert [c.verdict for c in found.values()] == ["identical"] * 3


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A full Lightning checkpoint of a real training: optimizer, scheduler, DictConfig."""
    return train(variants.Tied, tmp_path)


def train(kind: type[variants.Tied], folder: Path) -> Path:
    torch.manual_seed(0)
    model = kind(OmegaConf.create({"vocabulary": 11, "width": 6, "margin": float("nan")}))
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches.*",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*",
)


def test_a_trained_lightning_module_passes_every_stage(trained: Path) -> None:
    golden = record(trained, "Tied")
    found = by_stage(api.verify_stages(trained, golden))
    assert [(c.verdict, kinds(c)) for c in found.values()] == [("identical", [])] * 4


def test_tied_weights_that_came_apart_are_named(trained: Path) -> None:
    found = verify_with(record(trained, "Tied"), trained, "CameApart")
    assert ("alias", "head.weight") in kinds(found["load"])
    # The optimizer has one parameter more now, and refuses its old state.
    (lost,) = [finding for finding in found["reload"].findings if finding.kind == "optimizer"]
    assert "refused by the optimizer" in (lost.actual or "")


def test_optimizer_state_that_would_go_to_other_parameters_is_named(trained: Path) -> None:
    golden = record(trained, "Tied")
    live = LiveOptions(target=f"{HERE}:Reordered")
    found = by_stage(api.verify_stages(trained, golden, stage="load", live=live))
    assert found["load"].verdict == "identical"
    found = by_stage(api.verify_stages(trained, golden, stage="reload", live=live))
    moved = [finding for finding in found["reload"].findings if finding.kind == "optimizer"]
    assert [finding.key for finding in moved] == ["embed.weight", "body.weight", "body.bias"]
    assert moved[0].expected == "parameter 0 of the optimizer"
    assert moved[0].actual == "parameter 2, and takes another one's state"


def test_optimizer_state_that_is_lost_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = record(trained, "Tied")
    monkeypatch.setattr(
        variants.Tied, "on_save_checkpoint", lambda self, c: c.pop("optimizer_states")
    )
    found = by_stage(api.verify_stages(trained, golden, stage="reload"))
    assert kinds(found["reload"]) == [("optimizer", "optimizer_states")]


def test_hyperparameters_that_do_not_survive_are_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.load(trained, weights_only=False)
    original["hyper_parameters"]["cfg"]["seed"] = 5
    torch.save(original, trained)
    golden = record_again(trained)

    def drop(self: Any, checkpoint: dict[str, Any]) -> None:
        del checkpoint["hyper_parameters"]["cfg"]["seed"]

    monkeypatch.setattr(variants.Tied, "on_save_checkpoint", drop)
    found = by_stage(api.verify_stages(trained, golden, stage="reload"))
    assert [(f.kind, f.key, f.expected, f.actual) for f in found["reload"].findings] == [
        ("hyperparameter", "cfg.seed", "5", "nothing")
    ]


def record_again(path: Path) -> Golden:
    golden = path.parent / "golden" / f"{path.stem}.safetensors"
    api.record(path, golden, stage="load", live=LiveOptions(target=f"{HERE}:Tied"), overwrite=True)
    return read_golden(golden)


# What is refused


def test_a_checkpoint_cannot_name_the_class_to_import(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save(
        {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {"w": torch.ones(2)},
            "hyper_parameters": {"cfg": {"target": "antigravity.Evil"}},
        },
        path,
    )
    with pytest.raises(
        ModelError, match=r"antigravity\.Evil, which is not in the registry"
    ) as error:
        list(api.roundtrip(path))
    assert "--model" in (error.value.hint or "")
    assert "antigravity" not in sys.modules


def test_a_project_extends_the_registry(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.harness.models]\nEncDecDenoiseMaskedTokenPredModel = "{HERE}:Thawed"\n'
    )
    monkeypatch.chdir(tmp_path)
    with api.open_checkpoint(data / "nest_tiny.nemo") as checkpoint:
        assert Loader(checkpoint, target=None).target == f"{HERE}:Thawed"


def test_pickled_classes_are_refused_by_name_unless_trusted(trained: Path) -> None:
    original = torch.load(trained, weights_only=False)
    original["hyper_parameters"]["loss"] = torch.nn.MSELoss()
    torch.save(original, trained)
    live = {"target": f"{HERE}:Tied"}
    with pytest.raises(
        ModelError, match=r"would import torch\.nn\.modules\.loss\.MSELoss"
    ) as error:
        list(api.roundtrip(trained, live=LiveOptions(**live)))
    assert "--trust-checkpoint" in (error.value.hint or "")
    found = by_stage(api.roundtrip(trained, live=LiveOptions(**live, trust=True)))
    assert found["load"].verdict == "identical"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "not of the form"),
        ("no_such_module:Model", "cannot be imported"),
        (f"{HERE}:Nothing", "has no Nothing"),
        (f"{HERE}:Path", "not a torch.nn.Module"),
        ("math:pi", "not a class or function"),
    ],
)
def test_targets_that_make_no_model_are_clear_errors(
    plain: Path, target: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        list(api.roundtrip(plain, live=LiveOptions(target=target)))
    assert error.value.hint or "not a class" in message


def test_without_a_model_the_error_asks_for_one(plain: Path) -> None:
    with pytest.raises(ModelError, match="its model is unknown") as error:
        list(api.roundtrip(plain))
    assert "--model" in (error.value.hint or "")


def test_a_module_that_logs_in_its_forward_runs_after_a_save(trained: Path) -> None:
    found = by_stage(api.roundtrip(trained, live=LiveOptions(target=f"{HERE}:Logs")))
    assert found["outputs"].verdict == "identical"


def test_optimizers_that_only_a_training_can_build_are_said_to_be_left_out(tmp_path: Path) -> None:
    trained = train(variants.NeedsItsData, tmp_path)
    live = LiveOptions(target=f"{HERE}:NeedsItsData")
    found = by_stage(api.roundtrip(trained, live=live))
    assert {stage.verdict for stage in found.values()} == {"identical"}
    (note,) = found["reload"].notes
    assert note.startswith("the optimizers' state was not compared: configure_optimizers() failed")
    assert "variants.py:" in note


def test_a_scheduler_that_a_callback_brought_is_no_fault_of_the_model(trained: Path) -> None:
    saved = torch.load(trained, weights_only=False)
    saved["lr_schedulers"].append({"swa_lrs": [0.1]})
    torch.save(saved, trained)
    live = LiveOptions(target=f"{HERE}:Tied")
    assert {stage.verdict for stage in api.roundtrip(trained, live=live)} == {"identical"}


def test_what_a_save_forgets_of_frozen_parameters_is_found_by_the_reload(
    trained: Path, harness: Callable[..., Run]
) -> None:
    golden = record(trained, "Thaws")
    found = by_stage(api.verify_stages(trained, golden))
    assert found["load"].verdict == "identical"
    assert [(f.kind, f.key, f.expected, f.actual) for f in found["reload"].findings] == [
        ("requires_grad", name, "frozen", "trainable") for name in ("body.weight", "body.bias")
    ]
    run = harness("verify", trained, "-g", golden.path, "--reload")
    assert "fix the code" in run.out


def test_the_scheduler_of_a_cluster_has_no_say_in_a_save(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": "4", "JOB_NAME": "train", "PROCID": "3", "LOCALID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    live = LiveOptions(target=f"{HERE}:Tied")
    assert {stage.verdict for stage in api.roundtrip(trained, live=live)} == {"identical"}


# How the model is run


def test_running_leaves_the_model_and_the_random_state_as_they_were(plain: Path) -> None:
    model = variants.Plain()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    outputs_of(model, inputs_of(model, None))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.are_deterministic_algorithms_enabled()


def test_outputs_are_named_in_execution_order_with_nested_containers_flat() -> None:
    model = variants.Plain()
    found = outputs_of(model, inputs_of(model, None)).tensors
    keys = list(found)
    assert keys[:4] == ["(model):in.tokens", "embed:in.input", "embed:out", "layers.0:in.input"]
    assert keys[-4:] == [
        "(model):out.last",
        "(model):out.hidden.0",
        "(model):out.hidden.1",
        "(model):out.hidden.2",
    ]
    assert found["embed:in.input"].alias_of == "(model):in.tokens"


class Fragile(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")


class Forgiving(torch.nn.Module):
    """Catches what a submodule raises, and goes on without it."""

    def __init__(self) -> None:
        super().__init__()
        self.fragile, self.after = Fragile(), torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        try:
            return self.fragile(x)
        except ValueError:
            self.after(x + 1)
            return None


def test_a_call_that_raises_and_is_caught_does_not_shift_the_names() -> None:
    found = outputs_of(Forgiving(), ((torch.ones(2),), {})).tensors
    assert list(found) == ["(model):in.x", "fragile:in.x", "after:in.input", "after:out"]


class Waits(torch.nn.Module):
    """Gives what it got times a factor, when something has happened."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.begun, self.may_end = factor, threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.begun.set()
        assert self.may_end.wait(30)
        return x * self.factor


class Parallel(torch.nn.Module):
    """Runs two submodules in threads: the one that begins first ends first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Waits(2.0), Waits(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(self.one, x)
            assert self.one.begun.wait(30)
            other = pool.submit(self.other, x)
            assert self.other.begun.wait(30)
            self.one.may_end.set()
            made = one.result()
            self.other.may_end.set()
            return made + other.result()


def test_modules_that_run_at_once_keep_their_names() -> None:
    found = outputs_of(Parallel(), ((torch.ones(1),), {})).tensors
    made = {key: tensor.values for key, tensor in found.items() if key.endswith("out")}
    factors = {"one:out": 2.0, "other:out": 3.0, "(model):out": 5.0}
    assert made == {key: np.float32(factor).tobytes() for key, factor in factors.items()}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_scripted_modules_are_run_but_not_looked_into() -> None:
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()))
    x = torch.linspace(-1, 1, 5)
    assert list(outputs_of(scripted, ((x,), {})).tensors) == ["(model):in.input", "(model):out"]
    around = torch.nn.Sequential(scripted, torch.nn.ReLU())
    found = outputs_of(around, ((x,), {})).tensors
    assert list(found) == ["(model):in.input", "1:in.input", "1:out", "(model):out"]


class Twice(torch.nn.Module):
    """Its first call gives its submodule what it got, its second call something else."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor, self.calls = torch.nn.ReLU(), factor, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y: torch.Tensor = self.inner(x if self.calls == 1 else x * self.factor)
        return y


class Siamese(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.tower = Twice(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tower(x) + self.tower(x + 1)
        return y


def test_of_several_calls_the_one_that_departs_is_named() -> None:
    x = torch.linspace(1, 2, 5)
    before, after = (outputs_of(Siamese(factor), ((x,), {})) for factor in (2.0, 3.0))
    compared = compare(before, after, Policy(), BySketches(before.block_nbytes), stage="outputs")
    divergence = first_divergence(compared)
    assert divergence is not None
    assert (divergence.finding.key, divergence.diverging_module) == (
        "tower.inner@2:in.input",
        "tower@2",
    )
    assert divergence.agreeing == ("x",)


def test_inputs_come_from_the_model_or_from_a_file(tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(1, 2, dtype=torch.int64)}, tmp_path / "inputs.safetensors")
    model = variants.Plain()
    positional, keyword = inputs_of(model, tmp_path / "inputs.safetensors")
    assert positional == ()
    assert torch.equal(keyword["tokens"], torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ModelError, match="no example inputs") as error:
        inputs_of(torch.nn.Linear(2, 2), None)
    assert "--inputs" in (error.value.hint or "")


# The command line


def test_what_a_model_prints_is_no_part_of_the_report(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = record(plain, "Prints")
    run = harness("verify", plain, "-g", golden.path, "--outputs", "--format", "json")
    assert run.json["exit_code"] == 0
    assert "a model speaks" in run.err


def test_the_command_line_reports_a_line_per_stage(
    plain: Path, harness: Callable[..., Run], tmp_path: Path
) -> None:
    golden = tmp_path / "golden" / "n.safetensors"
    run = harness("record", plain, "-g", golden, "--outputs", "--model", f"{HERE}:Plain")
    assert run.code == 0, run.err
    run = harness("verify", plain, "-g", golden, "--outputs")
    assert run.code == 0, run.err
    assert [line.partition("  ")[0] for line in run.out.splitlines()] == ["ok identical"] * 4
    broken = ["--model", f"{HERE}:OtherNorm", "--outputs"]
    run = harness("verify", plain, "-g", golden, *broken)
    assert run.code == 1
    assert "first diverges: norm" in run.out
    assert "its input is unchanged, and so are the " in run.out


def test_roundtrip_needs_no_golden_and_keeps_the_saved_file_where_asked(
    data: Path, harness: Callable[..., Run], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "nest.nemo"
    checkpoint.write_bytes((data / "nest_tiny.nemo").read_bytes())
    run = harness("roundtrip", checkpoint, "--keep", "--format", "json")
    assert run.code == 0, run.err
    stages = run.json["goldens"][0]["stages"]
    assert [stage["stage"] for stage in stages] == ["load", "reload", "outputs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nest.nemo", "nest.test.nemo"]
    assert checkpoint.read_bytes() == (data / "nest_tiny.nemo").read_bytes()


def test_updating_the_weights_records_the_outputs_anew(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = record(plain, "Plain")
    torch.save({k: v + 1 for k, v in torch.load(plain).items()}, plain)
    # Only the file was looked at, but the golden would remember outputs of the old weights.
    assert harness("verify", plain, "-g", golden.path, "--update-golden").code == 0
    assert harness("verify", "-g", golden.path).code == 0


def test_updating_records_the_stages_anew(plain: Path, harness: Callable[..., Run]) -> None:
    golden = plain.parent / "golden" / "plain.safetensors"
    record(plain, "Plain")
    arguments = ["verify", plain, "-g", golden, "--outputs", "--model", f"{HERE}:OtherNorm"]
    assert harness(*arguments).code == 1
    assert harness(*arguments, "--update-golden", "--reason", "new epsilon").code == 0
    assert harness(*arguments).code == 0
    assert read_golden(golden).history[-1].reason == "new epsilon"


def test_outputs_that_a_golden_lacks_are_recorded_by_an_update(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = plain.parent / "golden" / "plain.safetensors"
    api.record(plain, golden, stage="load", live=LiveOptions(target=f"{HERE}:Plain"))
    arguments = ["verify", plain, "-g", golden, "--outputs"]
    run = harness(*arguments)
    assert run.code == 2
    assert run.err == (
        f"error: {golden}: was recorded without outputs\n"
        "  next: the same command with --update-golden records them\n"
    )
    assert harness(*arguments, "--update-golden").code == 0
    assert harness(*arguments).code == 0


def test_without_any_record_of_a_model_outputs_are_said_to_be_compared_with_a_reload(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = plain.parent / "golden" / "plain.safetensors"
    api.record(plain, golden)
    run = harness("verify", plain, "-g", golden, "--outputs", "--model", f"{HERE}:Plain")
    assert run.code == 0
    assert "note: no golden of outputs: the model is compared with itself" in run.out


@pytest.mark.parametrize("fault", ["sys.exit(0)", "1 / 0"])
def test_code_under_test_that_ends_the_process_is_an_error_and_no_verdict(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harness: Callable[..., Any],
    data: Path,
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"faulty_{abs(hash(fault))}"
    (tmp_path / f"{name}.py").write_text(f"import sys\n{fault}\n")
    run = harness("roundtrip", data / "nest_tiny.nemo", "--model", f"{name}:Model")
    assert run.code == 2
    assert f"{name} cannot be imported: " in run.err
    assert "next: see its traceback: python -c" in run.err


def test_an_update_accepts_the_file_but_no_fault_of_the_code(
    plain: Path, harness: Callable[..., Run]
) -> None:
    golden = plain.parent / "golden.safetensors"
    api.record(plain, golden)
    torch.save({key: value + 1 for key, value in torch.load(plain).items()}, plain)
    broken = ["--load", "--model", f"{HERE}:Reinitialised"]
    assert harness("verify", plain, "-g", golden, "--update-golden", *broken).code == 1
    assert harness("verify", plain, "-g", golden).code == 0
    assert harness("verify", plain, "-g", golden, *broken).code == 1
