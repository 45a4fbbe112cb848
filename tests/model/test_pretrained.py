"""Classes that load and save folders of their own, as those of transformers and peft do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import api
from harness.errors import ModelError
from harness.model.options import LiveOptions
from tests.conftest import Harness

HERE = "tests.model.test_pretrained"


class Tied(nn.Module):
    """Leaves out of its file what is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.emb.weight
        self.dummy_inputs = {"ids": torch.arange(3)}

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.out(self.emb(ids))
        return made

    def written(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k != "out.weight"}

    def read(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict({**state, "out.weight": state["emb.weight"]})

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"architectures": [type(self).__name__]}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(self.written(), Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        assert options == {"local_files_only": True, "trust_remote_code": False}
        model = cls()
        model.read(load_file(Path(folder) / "model.safetensors"))
        return model


class Stacked(Tied):
    """Holds stacked what it writes one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.emb(ids)
        for expert in self.experts:
            hidden = hidden @ expert
        made: Tensor = self.out(hidden)
        return made

    def written(self) -> dict[str, Tensor]:
        state = super().written()
        stacked = state.pop("experts")
        return {**state, **{f"experts.{i}.weight": stacked[i].clone() for i in range(2)}}

    def read(self, state: dict[str, Tensor]) -> None:
        stacked = [state.pop(f"experts.{i}.weight") for i in range(2)]
        super().read({**state, "experts": torch.stack(stacked)})


class Swapped(Stacked):
    """Stacks what it reads in another order."""

    def read(self, state: dict[str, Tensor]) -> None:
        super().read(
            {**state, **{f"experts.{i}.weight": state[f"experts.{1 - i}.weight"] for i in range(2)}}
        )


class Forgets(Stacked):
    """Leaves a weight of its file unread."""

    def read(self, state: dict[str, Tensor]) -> None:
        super().read({**state, "emb.weight": self.emb.weight.detach()})


class Adapted(nn.Module):
    """A model with an adapter, of which it saves the latter alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = model
        self.lora = nn.Linear(6, 6, bias=False)
        self.dummy_inputs = {"ids": torch.arange(3)}

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.lora(self.base(ids))
        return made

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "adapter_config.json").write_text("{}")
        save_file({"lora.A.weight": self.lora.weight}, Path(folder) / "adapter_model.safetensors")

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str, *, local_files_only: bool) -> Self:
        made = cls(model)
        state = load_file(Path(folder) / "adapter_model.safetensors")
        made.lora.load_state_dict({"weight": state["lora.A.weight"]})
        return made


def verdicts(folder: Path, model: str, **options: Any) -> list[str]:
    live = LiveOptions(target=f"{HERE}:{model}", **options)
    return [f"{stage.stage} {stage.verdict}" for stage in api.roundtrip(folder, live=live)]


@pytest.mark.parametrize("model", [Tied, Stacked])
def test_a_folder_goes_through_its_own_class(model: type[Tied], tmp_path: Path) -> None:
    model().save_pretrained(str(tmp_path / "folder"))
    assert verdicts(tmp_path / "folder", model.__name__) == [
        f"{stage} identical" for stage in ("load", "reload", "outputs")
    ]


class Auto:
    """Makes the model that a folder names, and is none."""

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> nn.Module:
        return Tied.from_pretrained(folder, **options)


class Named(Tied):
    """Is written under a name of its own."""


class Renames(Tied):
    def save_pretrained(self, folder: str) -> None:
        super().save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"architectures": ["Other"]}))


@pytest.mark.parametrize(
    ("model", "reload"), [("Auto", "identical"), ("Named", "identical"), ("Renames", "different")]
)
def test_a_subclass_may_go_by_its_own_name_and_a_class_may_make_another(
    model: str, reload: str, tmp_path: Path
) -> None:
    Tied().save_pretrained(str(tmp_path / "folder"))
    assert verdicts(tmp_path / "folder", model)[1] == f"reload {reload}"
    # The file alone has no settings to lose.
    file = tmp_path / "folder" / "model.safetensors"
    assert verdicts(file, "Named") == [f"{s} identical" for s in ("load", "reload", "outputs")]


class Config:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return {**self.settings, "transformers_version": "5.0"}


class Configured(Tied):
    """Writes its settings under other names than older versions did."""

    loses = False

    def save_pretrained(self, folder: str) -> None:
        super().save_pretrained(folder)
        kept = {} if self.loses else self.config.to_dict()
        (Path(folder) / "config.json").write_text(json.dumps(kept))

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        model = super().from_pretrained(folder, **options)
        read = json.loads((Path(folder) / "config.json").read_text())
        model.config = Config(
            theta=read.get("theta", read.get("old_theta", 1)), _name_or_path=folder
        )
        return model


class LosesSettings(Configured):
    loses = True


@pytest.mark.parametrize(("model", "lost"), [("Configured", []), ("LosesSettings", ["theta"])])
def test_settings_are_compared_as_the_class_reads_them(
    model: str, lost: list[str], tmp_path: Path
) -> None:
    """A file of another version names them otherwise, and says where the model was from."""
    Tied().save_pretrained(str(tmp_path / "folder"))
    old = {"old_theta": 7, "transformers_version": "4.1", "_name_or_path": "there"}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(old))
    live = LiveOptions(target=f"{HERE}:{model}")
    _, reload, *_ = api.roundtrip(tmp_path / "folder", live=live)
    assert [finding.key for finding in reload.findings] == lost


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("Swapped", [("different", f"experts.{i}.weight") for i in range(2)]),
        ("Forgets", [("unwritten", "emb.weight")]),
    ],
)
def test_what_a_class_reads_otherwise_is_named_by_the_keys_of_the_file(
    model: str, found: list[tuple[str, str]], tmp_path: Path
) -> None:
    Stacked().save_pretrained(str(tmp_path / "folder"))
    live = LiveOptions(target=f"{HERE}:{model}")
    load = next(iter(api.roundtrip(tmp_path / "folder", live=live)))
    assert load.stage == "load"
    assert sorted((f.kind, f.key) for f in load.findings) == found


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = ModuleType("transformers")
    library.Tied = Tied  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", library)
    base = Tied()
    base.save_pretrained(str(tmp_path / "base"))
    Adapted(base).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_is_put_onto_the_base_that_is_named(
    adapter: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdicts(adapter, "Adapted", base=adapter.parent / "base") == [
        f"{stage} identical" for stage in ("load", "reload", "outputs")
    ]
    with pytest.raises(ModelError, match="which Adapted needs a base model for") as refused:
        verdicts(adapter, "Adapted")
    assert "--base FOLDER" in (refused.value.hint or "")
    # A golden remembers the base, which is part of what computes.
    monkeypatch.chdir(adapter.parent)
    target = f"{HERE}:Adapted"
    assert harness("record", "adapter", "--outputs", "--model", target, "--base", "base").code == 0
    assert harness("verify").code == 0
    other = Tied()
    other.save_pretrained("base")
    run = harness("verify")
    assert (run.code, "outputs" in run.out, "diverges" in run.out) == (1, True, True)
    other.save_pretrained("other")
    run = harness("roundtrip", "adapter", "--model", f"{HERE}:AdaptedByAny", "--base", "other")
    assert run.code == 0, run


class AdaptedByAny(Adapted):
    """Passes on whatever it is given, as a class of the user's may."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Self:
        return super().from_pretrained(*args, **options)


class Untied(Tied):
    """Leaves what was tied without values, as transformers does under another configuration."""

    def read(self, state: dict[str, Tensor]) -> None:
        super().read(state)
        self.out.weight = nn.Parameter(self.out.weight.to("meta"))


def test_what_a_load_leaves_without_values_is_a_finding(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Tied().save_pretrained("tied")
    assert harness("record", "tied", "--outputs", "--model", f"{HERE}:Tied").code == 0
    run = harness("verify", "--model", f"{HERE}:Untied")
    assert run.code == 1, run
    assert "load: 1 identical, 1 unwritten" in run.out
    assert "out.weight" in run.out
    assert "reload" not in run.out


class Bare(nn.Module):
    """Has no example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


def fails() -> nn.Module:
    return broken_below()


def broken_below() -> nn.Module:
    raise ZeroDivisionError("on purpose")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    torch.save(Bare().state_dict(), tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


def test_a_model_without_inputs_ends_after_reload_unless_outputs_are_asked_for(
    bare: Path, harness: Harness
) -> None:
    run = harness("roundtrip", bare, "--model", f"{HERE}:Bare")
    assert run.code == 0
    assert "note: outputs were not compared: Bare: no example inputs" in run.out
    assert harness("roundtrip", bare, "--model", f"{HERE}:Bare", "--outputs").code == 2
    for stage, count in (("load", 1), ("reload", 2)):
        run = harness("roundtrip", bare, "--model", f"{HERE}:Bare", f"--{stage}")
        assert (run.code, run.out.count("ok identical")) == (0, count)
        assert "outputs" not in run.out
    run = harness("roundtrip", bare, "--model", f"{HERE}:Bare", "--load", "--keep")
    assert (run.code, "--keep has no effect with --load" in run.err) == (2, True)


def test_a_section_goes_into_the_model(tmp_path: Path, harness: Harness) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "own": Bare().state_dict()}, tmp_path / "two.pt")
    run = harness(
        "roundtrip", tmp_path / "two.pt", "--section", "own", "--model", f"{HERE}:Bare", "--load"
    )
    assert run.code == 0, run.out


@pytest.mark.parametrize(("names", "said"), [("ab", "model: a does not"), ("ba", "model")])
def test_where_no_section_has_a_known_name_the_model_decides(
    tmp_path: Path, harness: Harness, names: str, said: str
) -> None:
    other, own = names
    states = {other: nn.Conv1d(2, 2, 1).state_dict(), own: Bare().state_dict()}
    torch.save({name: states[name] for name in "ab"}, tmp_path / "two.pt")
    run = harness("roundtrip", tmp_path / "two.pt", "--model", f"{HERE}:Bare", "--reload")
    assert run.code == 0
    assert f"note: section {own} is taken, which fits the {said}\n" in run.out


def test_the_section_that_fits_the_model_is_taken_and_named(
    tmp_path: Path, harness: Harness
) -> None:
    path, target = tmp_path / "two.pt", f"{HERE}:Bare"
    torch.save({"net": nn.Conv1d(2, 2, 1).state_dict(), "net2": Bare().state_dict()}, path)
    run = harness("roundtrip", path, "--model", target, "--reload")
    assert (run.code, run.out.count("ok identical")) == (0, 2)
    assert "note: section net2 is taken, which fits the model: net does not" in run.out
    # A golden says which section it is of: another one is no answer.
    run = harness("record", path, "--model", target, "--load", "-g", tmp_path / "g.safetensors")
    assert (run.code, "--section net2" in run.err) == (2, True)
    assert harness("record", path, "-g", tmp_path / "g.safetensors").code == 0
    asked = ["verify", path, "-g", tmp_path / "g.safetensors", "--model", target, "--load"]
    assert harness(*asked).code == 1


@pytest.mark.parametrize("command", ["record", "verify", "roundtrip"])
def test_a_traceback_of_the_models_code_is_shown_where_it_is_asked_for(
    command: str, bare: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bare.parent)
    harness("record", bare.name)
    asked = [command, bare.name, "--model", f"{HERE}:fails", "--load"]
    asked += ["--overwrite"] if command == "record" else []
    run = harness(*asked)
    assert (run.code, "Traceback" in run.err) == (2, False)
    assert "next: see where with --traceback" in run.err
    run = harness(*asked, "--traceback")
    assert (run.code, run.err.count("in broken_below")) == (2, 2)  # and in the error itself
    assert run.err.index("Traceback") < run.err.index("error: ")
