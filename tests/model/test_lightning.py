"""Lightning's checkpoints: what they choose is never imported, and honest ones load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from harness import api
from harness.errors import ModelError
from harness.model.lightning import data_of, lightning_of, trainer_of
from harness.model.options import LiveOptions
from tests.conftest import Run

HERE = "tests.model.test_lightning"
# Which nothing else imports: seen in sys.modules, the checkpoint has chosen what runs.
CHOSEN = "this"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*",
)


class Net(pl.LightningModule):
    """Has an argument without a default, and an optimizer."""

    def __init__(self, width: int, rate: float = 1e-3, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.head = nn.Linear(4, width)
        self.example_input_array = torch.ones(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(x)
        return made

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])


class Old(Net):
    """Loads as Lightning below 2.6: without `weights_only`, and by unpickling all that is there."""

    @classmethod
    def load_from_checkpoint(cls, path: Any, map_location: Any = None, **options: Any) -> Self:  # type: ignore[override]
        found = torch.load(path, map_location=map_location, weights_only=False)
        model = cls(**{**found["hyper_parameters"], **options})
        model.on_load_checkpoint(found)
        model.load_state_dict(found["state_dict"])
        return model


class Restores(Net):
    """Leaves its backbone out of the file, and puts it back itself."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(width)
        self.backbone = nn.Linear(2, 2).requires_grad_(False)
        nn.init.ones_(self.backbone.weight)
        nn.init.zeros_(self.backbone.bias)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in [k for k in checkpoint["state_dict"] if k.startswith("backbone")]:
            del checkpoint["state_dict"][key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.backbone.state_dict()
        checkpoint["state_dict"].update({f"backbone.{key}": value for key, value in own.items()})


class Loose(Net):
    """Has a layer that is in no file, and does not mind."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(2)
        self.strict_loading = False


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(x)
        return made

    def golden_inputs(self) -> Tensor:
        return torch.ones(2, 4)


def make() -> Net:
    return Net(3)


class Calls:
    """Pickled, a call of what imports a module."""

    def __reduce__(self) -> Any:
        return __import__, (CHOSEN,)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(Net(3), tmp_path / "net.ckpt")


def save(model: pl.LightningModule, path: Path) -> Path:
    trainer_of(model).save_checkpoint(path)
    return path


def altered(path: Path, alter: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(path, weights_only=False)
    alter(content)
    torch.save(content, path)
    return path


def verdicts(path: Path, model: str, **options: Any) -> list[str]:
    live = LiveOptions(target=f"{HERE}:{model}", **options)
    return [stage.verdict for stage in api.roundtrip(path, live=live)]


@pytest.mark.parametrize("model", ["Net", "Old", "make", "Plain"])
def test_a_checkpoint_loads_by_what_the_target_offers(saved: Path, model: str) -> None:
    assert verdicts(saved, model) == ["identical"] * 3


@pytest.mark.parametrize("model", ["Net", "Old"])
@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"_instantiator": f"{CHOSEN}.anything"},
        {"_class_path": f"{CHOSEN}.Net"},
        {"_instantiator": f"{CHOSEN}.anything", "_class_path": f"{CHOSEN}.Net"},
        {
            "_instantiator": "pytorch_lightning.cli.instantiate_module",
            "extra": {"class_path": f"{CHOSEN}.Backbone"},
        },
        {
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "extra": [{"init_args": {"deep": {"class_path": f"{CHOSEN}.Backbone"}}}],
        },
    ],
)
def test_what_hyperparameters_would_import_is_named_and_refused(
    saved: Path, model: str, hyperparameters: dict[str, Any]
) -> None:
    altered(saved, lambda content: content["hyper_parameters"].update(hyperparameters))
    with pytest.raises(ModelError, match=f"would import .*{CHOSEN}") as error:
        verdicts(saved, model)
    assert "--trust-checkpoint" in (error.value.hint or "")
    assert CHOSEN not in sys.modules


@pytest.mark.parametrize("model", ["Net", "Old"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda content: content.update(hparams={"_instantiator": f"{CHOSEN}.anything"}),
        lambda content: content["hyper_parameters"].update(extra=Calls()),
        lambda content: content.update(hyper_parameters=Calls()),
    ],
)
def test_what_a_pickle_would_call_among_hyperparameters_is_refused(
    saved: Path, model: str, alter: Callable[[dict[str, Any]], object]
) -> None:
    altered(saved, alter)
    with pytest.raises(ModelError, match="would import"):
        verdicts(saved, model)
    assert CHOSEN not in sys.modules


@pytest.mark.parametrize("model", ["Net", "Old", "make"])
@pytest.mark.parametrize("place", ["callbacks", "hparams_type", "loops", "lr_schedulers"])
def test_what_a_pickle_would_call_elsewhere_never_is(saved: Path, model: str, place: str) -> None:
    altered(saved, lambda content: content.update({place: Calls()}))
    assert verdicts(saved, model) == ["identical"] * 3
    assert CHOSEN not in sys.modules


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("module", [HERE, "tests.of.before", "__main__"])
def test_an_honest_checkpoint_of_lightning_cli_loads_into_the_class_that_the_user_names(
    saved: Path, package: str, module: str
) -> None:
    added = {"_instantiator": f"{package}.cli.instantiate_module", "_class_path": f"{module}.Net"}
    altered(saved, lambda content: content["hyper_parameters"].update(added))
    assert verdicts(saved, "Net") == ["identical"] * 3


def test_data_among_hyperparameters_reaches_the_class_as_what_it_was(tmp_path: Path) -> None:
    extra = {
        "dtype": torch.bfloat16,
        "folder": Path("data/train"),
        "betas": (0.9, 0.99),
        "config": OmegaConf.create({"layers": [1, {"name": "${model}"}], "model": "tiny"}),
        "arguments": argparse.Namespace(rate=0.5),
        "table": torch.arange(3),
        3: None,
    }
    path = save(Net(3, extra=extra), tmp_path / "net.ckpt")
    found = data_of(path, Net)["hyper_parameters"]["extra"]
    assert torch.equal(found.pop("table"), extra.pop("table"))
    assert found == extra
    assert found["config"].layers[1].name == "tiny"


def test_what_a_module_puts_back_itself_is_a_note_and_no_finding(
    tmp_path: Path, harness: Callable[..., Run]
) -> None:
    path = save(Restores(), tmp_path / "net.ckpt")
    for model in ("Restores", "Net"):
        run = harness("roundtrip", path, "--model", f"{HERE}:{model}")
        assert run.code == 0
        assert ("put there by the module when it loads: 2 (" in run.out) == (model == "Restores")


def test_what_a_loose_load_left_as_it_was_built_is_a_finding(saved: Path) -> None:
    live = LiveOptions(target=f"{HERE}:Loose")
    load = next(iter(api.roundtrip(saved, live=live)))
    assert [f.key for f in load.findings if f.kind == "unexpected"] == ["norm.weight", "norm.bias"]


def test_a_plain_module_has_no_hyperparameters_to_lose(
    saved: Path, harness: Callable[..., Run]
) -> None:
    run = harness("roundtrip", saved, "--model", f"{HERE}:Plain")
    assert run.code == 0
    assert "note: a Plain keeps no hyperparameters or optimizers: not compared" in run.out


def test_a_trusted_checkpoint_is_lightnings_own_to_unpickle(saved: Path) -> None:
    altered(saved, lambda content: content["hyper_parameters"].update(extra=nn.MSELoss()))
    with pytest.raises(ModelError, match="MSELoss"):
        verdicts(saved, "Net")
    assert verdicts(saved, "Net", trust=True)[0] == "identical"


def test_the_package_of_a_class_is_found_by_its_bases() -> None:
    assert lightning_of(Net) is pl
    assert lightning_of(Net(3)) is pl
    assert lightning_of(Plain) is None
    assert lightning_of(make) is None
