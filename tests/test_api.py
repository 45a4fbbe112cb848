"""The verbs on paths, open checkpoints, modules and state dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import harness
from harness import api
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.golden.file import read_golden
from harness.model.options import LiveOptions


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 70)
        self.head = nn.Linear(70, 90, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(70)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project as the current folder."""
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file(here: Path, net: Net) -> Path:
    torch.save(net.state_dict(), "net.pt")
    return Path("net.pt")


def test_a_module_its_state_dict_an_open_checkpoint_and_its_file_are_one_thing(
    file: Path, net: Net
) -> None:
    root = api.fingerprint(file).root
    with api.open_checkpoint(file) as opened:
        subjects: list[api.Subject] = [net, net.state_dict(), opened, str(file)]
        for number, subject in enumerate(subjects):
            golden = api.record(subject, f"golden/{number}.safetensors")
            assert api.fingerprint(subject).root == golden.fingerprint.root == root
            for other in subjects:
                compared = api.verify(other, golden.path)
                assert compared.verdict == "identical"
                assert compared.num_identical == 7


def test_a_changed_live_weight_is_named(file: Path, net: Net) -> None:
    golden = api.record(net, "golden/net.safetensors")
    with torch.no_grad():
        net.embed.weight[3, 2] += 1.0
    found, tied = harness.verify(net, golden).findings
    assert (found.kind, found.key, tied.key) == ("different", "embed.weight", "head.weight")
    assert found.difference is not None
    assert found.difference.elements[0].index == (3, 2)
    with torch.no_grad():
        net.embed.weight[3, 2] -= 1.0
    assert api.verify(net, golden).ok


def test_a_live_tie_that_came_apart_is_found(net: Net, here: Path) -> None:
    golden = api.record(net, "golden/net.safetensors")
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    assert [f.kind for f in api.verify(net, golden).findings] == ["alias"]


def test_an_open_checkpoint_stays_open(file: Path) -> None:
    with api.open_checkpoint(file) as opened:
        golden = api.record(opened, "golden/net.safetensors")
        api.verify(opened, golden)
        api.update(opened, golden)
        api.fingerprint(opened)
        assert opened.tensors["norm.weight"].array().shape == (70,)


def test_every_verb_takes_a_golden_by_its_path_or_finds_it_by_the_checkpoints_name(
    file: Path, net: Net
) -> None:
    golden = api.record(file)
    for given in ((), ("golden/net.safetensors",), (golden,)):
        assert api.verify(file, *given).ok
        assert [stage.ok for stage in api.verify_stages(file, *given)] == [True]
        assert api.update(file, *given).history == ()


def test_what_is_in_memory_in_the_place_of_a_path_is_an_error(file: Path, net: Net) -> None:
    for run in (
        partial(api.diff, file, net),
        partial(api.verify, file, net),
        partial(api.open_checkpoint, net),
    ):
        message, hint = refused(UsageError, run)  # type: ignore[arg-type]
        assert message == "a Net is not a path or URL"
        assert str(hint).startswith("give the path of a file")


def test_stages_and_values_that_there_are_not_are_told(file: Path) -> None:
    golden = api.record(file)
    for run in (
        partial(api.record, file, "other.safetensors", stage="loaded"),
        partial(api.update, file, golden, stage="loaded"),
        lambda: list(api.verify_stages(file, golden, stage="loaded")),  # type: ignore[arg-type]
    ):
        message, hint = refused(UsageError, run)  # type: ignore[arg-type]
        assert message == "stage='loaded': no such stage"
        assert hint == "one of file, load, reload, outputs"
    message, hint = refused(
        UsageError,
        lambda: api.record(file, "other.safetensors", values="few"),  # type: ignore[arg-type]
    )
    assert (message, hint) == ("values='few': no such choice", "one of small, all, none")
    assert not Path("other.safetensors").exists()


def test_a_golden_of_something_live_names_no_checkpoint(net: Net, here: Path) -> None:
    api.record(net, "golden/net.safetensors")
    golden = read_golden("golden/net.safetensors")
    assert golden.source == ""
    assert golden.checkpoint is None
    with pytest.raises(CheckpointError, match="recorded from a live model") as caught:
        api.verify(golden=golden)
    assert caught.value.hint == "harness verify CKPT -g golden/net.safetensors"


def test_something_live_needs_a_golden_to_be_named(net: Net, here: Path) -> None:
    for verb in (api.record, api.verify):
        with pytest.raises(UsageError, match="no default golden") as caught:
            verb(net)
        assert "golden='golden/NAME.safetensors'" in str(caught.value.hint)
    assert not Path("golden").exists()


def test_something_live_has_neither_sections_nor_live_stages(
    net: Net, file: Path, data: Path
) -> None:
    with pytest.raises(UsageError, match="only a file has sections"):
        api.record(net, "golden/net.safetensors", section="model")
    with pytest.raises(UsageError, match="only a file has sections"):
        api.fingerprint(net, section="model")
    with pytest.raises(UsageError, match="'load' loads a file"):
        api.record(net, "golden/net.safetensors", stage="load")
    golden = api.record(
        data / "nest_tiny.nemo", "golden/nest.safetensors", stage="load", live=LiveOptions()
    )
    with api.open_checkpoint(data / "nest_tiny.nemo") as opened:
        assert api.verify(opened, golden).ok
        with pytest.raises(UsageError, match="'load' loads a file"):
            api.update(opened, golden)
    assert read_golden(golden.path).history == ()


def test_an_update_from_something_live_forgets_the_file(net: Net, file: Path) -> None:
    golden = api.record(file)
    assert golden.source == "../net.pt"
    same = api.update(None, golden)
    assert (same.source, same.history) == ("../net.pt", ())
    with torch.no_grad():
        net.norm.bias += 1
    updated = api.update(net, golden, reason="trained on")
    assert updated.source == ""
    assert [entry.reason for entry in updated.history] == ["trained on"]
    assert api.verify(net, read_golden(golden.path)).verdict == "identical"


def test_a_state_dict_whose_parts_would_be_left_out_is_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(UsageError, match="holds tensors below 'model', which would") as caught:
        api.fingerprint({"step": one, "model": {"w": one}})
    assert "give one part of it" in str(caught.value.hint)
    with pytest.raises(UsageError, match="holds tensors below 'state'"):
        api.fingerprint({"state": {0: {"exp_avg": one}}, "param_groups": [{"lr": 0.1}]})
    extra = {"w": one, "layer._extra_state": {"amax": one}, "epoch": 3, "hyper": {"lr": 0.1}}
    assert list(api.fingerprint(extra).tensors) == [
        *("w", 'layer._extra_state["amax"]', "epoch", "hyper"),
    ]


@pytest.mark.parametrize("subject", [{}, {"step": 1}, [1], 7])
def test_what_holds_no_tensors_is_refused(subject: object, here: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tensors|cannot fingerprint") as caught:
        api.fingerprint(subject)  # type: ignore[arg-type]
    assert caught.value.hint


def refused(kind: type[Exception], run: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(kind) as caught:
        run()
    assert isinstance(caught.value, harness.HarnessError)
    return str(caught.value), caught.value.hint


def test_a_golden_in_the_place_of_a_checkpoint_is_told(file: Path) -> None:
    golden = api.record(file).path
    before = golden.read_bytes()
    told = f"{golden}: is a golden, not a checkpoint", f"harness verify -g {golden}"
    for run in (
        partial(api.verify, golden),
        partial(api.verify, golden, golden),
        partial(api.record, golden),
        partial(api.record, golden, "golden/other.safetensors", overwrite=True),
        partial(api.fingerprint, golden),
        partial(api.update, golden, read_golden(golden)),
    ):
        assert refused(UsageError, run) == told
    assert golden.read_bytes() == before


def test_a_checkpoint_is_never_replaced_by_its_golden(here: Path, net: Net) -> None:
    Path("golden").mkdir()
    path = Path("golden/net.safetensors")
    save_model(net, str(path))
    before = path.read_bytes()
    for overwrite in (False, True):
        message, hint = refused(GoldenError, partial(api.record, path, overwrite=overwrite))
        assert "is the checkpoint itself" in message
        assert hint == f"harness record {path} -g golden/net.golden.safetensors"
    api.record(path, "golden/net.golden.safetensors")
    assert path.read_bytes() == before


def test_overwriting_another_checkpoint_is_refused_before_anything_is_read(
    file: Path, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(net, "other.safetensors")
    before = Path("other.safetensors").read_bytes()
    monkeypatch.setattr("harness.api.recording.opened", None)
    message, hint = refused(
        GoldenError, partial(api.record, file, "other.safetensors", overwrite=True)
    )
    assert message == "other.safetensors: exists, and is not a golden"
    assert hint == "give another file with -g, or remove it"
    assert Path("other.safetensors").read_bytes() == before


def test_a_golden_of_another_checkpoint_of_that_name_is_told(file: Path, net: Net) -> None:
    api.record(file)
    message, hint = refused(GoldenError, partial(api.record, file))
    assert message == "golden/net.safetensors: a golden is recorded there already"
    assert hint == "to replace it: harness verify net.pt --update-golden --reason WHY"
    message, hint = refused(GoldenError, partial(api.record, file, "golden/net.safetensors"))
    assert "net.pt -g golden/net.safetensors --update-golden" in str(hint)
    Path("other").mkdir()
    torch.save(net.state_dict(), "other/net.pt")
    assert api.record("other/net.pt").path == Path("golden/other-net.safetensors")
    assert api.choose_golden("other/net.pt", None) == Path("golden/other-net.safetensors")
    assert api.choose_golden("net.pt", None) == Path("golden/net.safetensors")


def test_what_replaces_a_golden_goes_as_far_and_takes_the_same_part(file: Path, net: Net) -> None:
    api.record(file)
    live = LiveOptions(target="nets:Net", config=Path("a file.yaml"))
    _, hint = refused(GoldenError, partial(api.record, file, stage="load", live=live))
    assert hint == (
        "to replace it: harness verify net.pt --load --model nets:Net --config 'a file.yaml' "
        "--update-golden --reason WHY"
    )
    torch.save({"model": net.state_dict(), "ema": net.state_dict()}, file)
    for golden in (None, "golden/net.safetensors"):
        message, hint = refused(GoldenError, partial(api.record, file, golden, section="ema"))
        assert message == (
            "golden/net.safetensors: a golden is recorded there already, of the state dict"
        )
        assert hint == (
            "give yours another name: harness record net.pt -g golden/OTHER.safetensors "
            "--section ema"
        )


def test_a_folder_in_the_place_of_a_golden_is_that_of_the_goldens(file: Path) -> None:
    Path("elsewhere").mkdir()
    there = Path("elsewhere/net.safetensors")
    assert api.record(file, "elsewhere").path == there
    assert api.verify(file, "elsewhere").expected.name == str(there)
    message, hint = refused(GoldenError, partial(api.verify, None, "elsewhere"))
    assert (message, hint) == ("elsewhere: a folder, not a golden", f"-g {there}")


def test_paths_that_cannot_be_looked_at_are_clear_errors(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = f"{'x' * 300}.pt"
    kinds = (CheckpointError, GoldenError)
    for run in (
        partial(api.record, long),
        partial(api.record, file, f"golden/{long}"),
        partial(api.verify, long),
        partial(api.verify, file, f"golden/{long}"),
        partial(api.choose_golden, long, None),
    ):
        message, hint = refused(kinds, run)  # type: ignore[arg-type]
        assert "file name too long" in message.lower()
        assert hint
    golden = api.record(file)
    missing = replace(golden, source=long)
    assert "does not exist" in refused(CheckpointError, partial(api.verify, None, missing))[0]

    def forbidden(path: Path, **_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", forbidden)
    for run in (partial(api.record, file), partial(api.verify, file)):
        message, hint = refused(kinds, run)  # type: ignore[arg-type]
        assert message == "golden: permission denied"
        assert hint


def test_a_tolerance_past_its_policy_says_where_it_goes(file: Path) -> None:
    with pytest.raises(TypeError, match=r"^verify\(\) got an .* policy=Policy\(atol=…\)$"):
        api.verify(file, atol=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^diff\(\) missing a required argument: 'actual'$"):
        api.diff(file)  # type: ignore[call-arg]


def test_fingerprint_is_the_verb_whatever_was_imported_before(data: Path) -> None:
    import_module("harness.fingerprints.scan")
    for _ in range(2):
        assert harness.fingerprint(data / "nest_tiny.nemo").root.hex()[:16] == "8fa8681d0705c440"
