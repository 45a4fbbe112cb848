"""The mistakes of a person's first ten minutes: each is told with the next step, which works."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from harness import api
from tests.conftest import Harness


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """What lies about in a project: checkpoints, a golden, a text, broken files and modules."""
    folder = tmp_path_factory.mktemp("project")
    models = folder / "models"
    models.mkdir()
    (folder / "pyproject.toml").touch()
    shutil.copy(data / "nest_tiny.nemo", models / "nest.nemo")
    shutil.copy(data / "nest_tiny.nemo", models / "new.nemo")
    shutil.copy(data / "nest_tiny_perturbed_all_1e-6.nemo", models / "noisy.nemo")
    (models / "cut.nemo").write_bytes((models / "nest.nemo").read_bytes()[:50000])
    (folder / "notes.txt").write_text("to do\n")
    save_file({"other.weight": np.zeros(2, "f4")}, folder / "other.safetensors")
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    two = {name: torch.nn.Linear(2, 2).state_dict() for name in ("the generator", "critic")}
    torch.save(two, folder / "two.pt")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "needs.py").write_text("import a_library_that_is_not_there\n")
    api.record(models / "nest.nemo", folder / "golden" / "nest.safetensors")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, with it as the current folder, to do with as one likes."""
    folder = tmp_path / "project"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


NEST = "verify models/nest.nemo --load --model"
MISTAKES = [
    # A wrong path.
    ("verify models/nets.nemo", "no such file", "did you mean models/nest.nemo?"),
    ("verify modles/nest.nemo", "no such file", "did you mean models/nest.nemo?"),
    ("record nothing_alike", "no such file", "see what is there: ls ."),
    ("diff models/nest.nemo models/zzz", "no such file", "see what is there: ls models"),
    ("show models/nets.nemo", "no such file", "did you mean models/nest.nemo?"),
    ("roundtrip models/nets.nemo", "no such file", "did you mean models/nest.nemo?"),
    # A golden that is not there.
    ("verify models/new.nemo", "no golden is recorded", "harness record models/new.nemo"),
    (
        "verify models/new.nemo -g golden/a/b.safetensors",
        "no golden is recorded for models/new.nemo",
        "harness record models/new.nemo -g golden/a/b.safetensors",
    ),
    (
        "verify models/nest.nemo -g golden/nets.safetensors",
        "no golden there",
        "did you mean -g golden/nest.safetensors?",
    ),
    ("verify -g golden/nets.safetensors", "no golden there", "did you mean -g golden/nest.safeten"),
    # One thing in the place of another.
    ("verify golden/nest.safetensors", "is a golden", "harness verify -g golden/nest.safetensors"),
    ("record golden/nest.safetensors", "is a golden", "harness verify -g golden/nest.safetensors"),
    ("verify golden/nets.safetensors", "no such", "harness verify -g golden/nest.safetensors"),
    ("verify -g models/nest.nemo", "not a golden", "give the golden with -g"),
    ("verify -g models", "no goldens in models/", "harness record CHECKPOINT"),
    ("verify linear.pt -g golden", "no golden is recorded", "harness record linear.pt"),
    ("verify models", "a folder of several files (cut.nemo", "give one of them: models/cut.nemo"),
    ("record models", "a folder of several files", "or all: models/*"),
    ("verify golden", "is a folder of goldens, not a checkpoint", "harness verify -g golden"),
    (
        "verify golden/nest.safetensors -g models/nest.nemo",
        "they are swapped",
        "harness verify models/nest.nemo -g golden/nest.safetensors",
    ),
    ("verify models/nest.nemo --root gone", "--root gone: no such folder", "check the path"),
    ("verify models/nest.nemo --adapter lora.pt", "lora.pt: no such file", "see what is there"),
    ("verify notes.txt", "text, not a checkpoint", "give a .pt, .ckpt, .nemo"),
    ("record notes.txt", "text, not a checkpoint", "give a .pt, .ckpt, .nemo"),
    ("record models/cut.nemo", "ends inside", "the file is truncated: copy or download it again"),
    ("verify models/cut.nemo -g golden/nest.safetensors", "ends inside", "the file is truncated"),
    ("record models/nest.nemo", "recorded there already", "--update-golden --reason WHY"),
    # A part of a file.
    (
        "diff linear.pt two.pt",
        "no state dict found in it",
        "give one of its sections the generator (2 tensors), critic (2 tensors), or "
        "--all-sections: harness record two.pt --section 'the generator'",
    ),
    # A reference that is none.
    (
        "verify models/noisy.nemo -g golden/nest.safetensors --reference other.safetensors",
        "not the checkpoint that was recorded",
        "give the reference that the golden was recorded from",
    ),
    (
        "verify models/noisy.nemo -g golden/nest.safetensors --reference golden/nest.safetensors",
        "is a golden, not the checkpoint that was recorded",
        "--reference models/nest.nemo",
    ),
    (
        "verify models/nest.nemo --reference golden/nest.safetensors",
        "is a golden, not the checkpoint that was recorded",
        "give the checkpoint that was recorded, or leave it out",
    ),
    # A model that cannot be built.
    (f"{NEST} nope:Thing", "No module named 'nope'", "install it, run from the folder"),
    (f"{NEST} nope.deeper:Thing", "No module named 'nope'", "install it, run from the folder"),
    (f"{NEST} needs:Thing", "No module named 'a_library", "python -c 'import needs'"),
    (f"{NEST} raises:Thing", "ZeroDivisionError", "see its traceback: python -c 'import raises'"),
    (f"{NEST} harness.nest:Nope", "has no Nope", "see what it has: python -m pydoc harness.nest"),
    (
        f"{NEST} harness.nest:EncDecDenoiseMaskedTokenPred",
        "has no EncDec",
        "did you mean --model harness.nest:EncDecDenoiseMaskedTokenPredModel?",
    ),
    (f"{NEST} no_colon", "not of the form package.module:Class", "for instance --model my_pack"),
    (f"{NEST} torch.nn.Linear", "not of the form", "--model torch.nn:Linear"),
    (f"{NEST} .relative:Class", "not of the form", "for instance --model my_package"),
    (f"{NEST} math:pi", "is a float", "name a class, or a function without arguments"),
    (f"{NEST} json:JSONDecoder", "made a JSONDecoder", "name a class, or a function without"),
    (f"{NEST} torch.nn:Linear", "missing a required argument: 'in_features'", "name a function"),
    ("roundtrip linear.pt", "its model is unknown", "give --model package"),
    ("record models/new.nemo --load --config no.yaml", "no such file or directory", "check the pa"),
    # Options.
    ("verify models/nest.nemo --reason x", "--reason needs --update-golden", "add --update-golden"),
]


@pytest.mark.parametrize(("command", "message", "hint"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_with_the_next_step(
    template: Path,
    harness: Harness,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(template)
    monkeypatch.syspath_prepend(template)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(template.rglob("*"))
    run = harness(*shlex.split(command))
    assert run.code == 2
    said, *then = run.err.splitlines()
    assert said.startswith("error: ")
    assert message in said
    assert len(then) == bool(hint)
    assert all(line.startswith("  next: ") and hint in line for line in then)
    assert sorted(template.rglob("*")) == before


STEPS = [
    ("verify models/new.nemo", ["record models/new.nemo", "verify models/new.nemo"]),
    ("verify golden/nest.safetensors", ["verify -g golden/nest.safetensors"]),
    ("verify golden/nets.safetensors", ["verify -g golden/nest.safetensors"]),
    (
        "verify models/new.nemo -g golden/a/b.safetensors",
        ["record models/new.nemo -g golden/a/b.safetensors"],
    ),
    (
        "verify other.safetensors -g golden/nest.safetensors",
        ["record other.safetensors", "verify other.safetensors"],
    ),
    (
        "verify two.pt -g golden/nest.safetensors",
        ["record two.pt --section 'the generator'", "verify two.pt"],
    ),
]


@pytest.mark.parametrize(("command", "steps"), STEPS, ids=[step[0] for step in STEPS])
def test_the_next_step_works_as_it_is_typed(
    project: Path, harness: Harness, command: str, steps: list[str]
) -> None:
    run = harness(*shlex.split(command))
    assert run.code in (1, 2)
    for step in steps:
        assert f"harness {step}\n" in run.out + run.err
        run = harness(*shlex.split(step))
        assert run.code == 0


def test_of_a_folder_of_goldens_that_of_the_checkpoint_is_meant(
    project: Path, harness: Harness
) -> None:
    assert harness("record", "linear.pt").code == 0
    for name in ("linear.pt", "models/nest.nemo"):
        run = harness("verify", name, "-g", "golden")
        assert run.code == 0
        assert f"golden/{Path(name).stem}.safetensors" in run.out


@pytest.mark.parametrize("held", ["", "<<<<<<< HEAD\n"], ids=["nothing", "a conflict"])
def test_what_is_named_as_a_golden_and_holds_none_is_to_be_restored(
    project: Path, harness: Harness, held: str
) -> None:
    Path("golden/broken.safetensors").write_text(held)
    run = harness("verify")
    assert run.code == 2
    assert "not a golden (" in run.err
    assert run.err.endswith("restore it from version control, or remove it and record it again\n")


def test_a_golden_of_a_section_that_is_not_there_says_that_it_is_of_one(
    project: Path, harness: Harness
) -> None:
    assert harness("record", "two.pt", "--section", "critic").code == 0
    torch.save({"actor": {"w": torch.ones(1)}, "opt": {"m": torch.ones(1)}}, project / "one.pt")
    for command in (
        ["verify", "one.pt", "-g", "golden/two.safetensors"],
        ["verify", "two.pt", "--reference", "one.pt"],
        ["diff", "one.pt", "golden/two.safetensors"],
    ):
        run = harness(*command)
        assert run.code == 2
        assert run.err.endswith(
            "; the golden holds that section\n  next: give a checkpoint that has it, or say which "
            "one holds the same weights: --section NAME\n"
        )
        assert "'critic'" in run.err
    # What has no sections may be what was exported of one: its weights decide.
    assert harness("verify", "linear.pt", "-g", "golden/two.safetensors").code == 1


def test_a_checkpoint_of_another_model_is_not_offered_as_an_update(
    project: Path, harness: Harness
) -> None:
    run = harness("verify", "other.safetensors", "-g", "golden/nest.safetensors")
    assert run.code == 1
    assert "no key in common: is it a checkpoint of another model?" in run.out
    assert run.out.splitlines()[-1] == (
        "  if it is another model, give it a golden of its own:  harness record other.safetensors"
    )
    # Of the golden's name, but of another file: said first, and given a golden of its own.
    shutil.copy("other.safetensors", "models/nest.safetensors")
    run = harness("verify", "models/nest.safetensors")
    first, *_, last = run.out.splitlines()
    assert first == "note: golden/nest.safetensors was recorded from another file: models/nest.nemo"
    assert last == "  to give it a golden of its own:  harness record models/nest.safetensors"
    assert harness("record", "models/nest.safetensors").code == 0
    assert "golden/models-nest.safetensors" in harness("verify", "models/nest.safetensors").out
    # One that has a golden already is not offered another.
    torch.save({"w": torch.ones(3), "b": torch.ones(1), "steps": torch.tensor(0)}, "own.pt")
    assert harness("record", "own.pt").code == 0
    run = harness("verify", "own.pt", "-g", "golden/nest.safetensors")
    assert run.out.splitlines()[-1] == (
        "  if it is another model, it has a golden of its own:  harness verify own.pt"
    )
    # And it is not another model if something of it is the same.
    save_file({"other.weight": np.zeros(2, "f4"), "bias": np.ones(1, "f4")}, "both.safetensors")
    save_file({"other.weight": np.zeros(2, "f4"), "gain": np.zeros(3, "f4")}, "near.safetensors")
    assert harness("record", "both.safetensors").code == 0
    run = harness("verify", "near.safetensors", "-g", "golden/both.safetensors")
    assert run.out.splitlines()[-1].endswith('--update-golden --reason "why"')


def test_from_a_folder_below_the_way_to_the_goldens_is_told(
    project: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("models")
    run = harness("verify")
    assert run.code == 2
    assert run.err.endswith("  next: go to where they are: cd ..\n")
    monkeypatch.chdir("..")
    assert harness("verify").code == 0


def test_every_reason_is_kept_in_order_and_printed_by_update_and_show(
    project: Path, harness: Harness
) -> None:
    arguments = ["-g", "golden/nest.safetensors", "--update-golden", "--reason"]
    first, second = "8fa8681d0705c440  rounding", "is now"
    assert harness("verify", "models/noisy.nemo", *arguments, "rounding").code == 0
    run = harness("verify", "other.safetensors", *arguments, "another model")
    assert run.code == 0
    *_, updated, one, other = run.out.splitlines()
    assert second in updated
    assert one == f"  replaced {first}"
    assert other.endswith("  another model")
    shown = harness("show", "golden/nest.safetensors").out
    assert f"replaced   {first}\nreplaced " in shown
    history = harness("show", "golden/nest.safetensors", "--json").json["history"]
    assert [entry["reason"] for entry in history] == ["rounding", "another model"]
