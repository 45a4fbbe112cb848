"""The goldens of a folder: found below it, in natural order, under names that tell them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.checkpoint.sources.paths import to_path
from harness.golden.folder import goldens_below, names_of


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_goldens_are_found_below_a_folder_in_natural_order_those_of_tests_apart() -> None:
    names = ("step-1000", "step-200", "a/b", "tests/test_net/test_it", "test_root/it", ".hid/x")
    for name in names:
        path = Path(f"golden/{name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths, num_of_tests = goldens_below(Path("golden"))
    found = [path.relative_to("golden").with_suffix("").as_posix() for path in paths]
    assert found == ["a/b", "step-200", "step-1000"]
    assert num_of_tests == 2


@pytest.mark.parametrize(
    ("checkpoint", "names"),
    [
        ("nest.nemo", ["nest"]),
        ("models/nest.nemo", ["nest", "models-nest"]),
        ("model.safetensors", ["model"]),
        ("./model.safetensors.index.json", ["model"]),
        ("bert/model.safetensors", ["bert-model"]),
        ("lora/adapter_model.safetensors", ["lora-adapter_model"]),
        ("run/checkpoint-500", ["run-checkpoint-500"]),
        ("a/run/step-1000.ckpt", ["run-step-1000", "a-run-step-1000"]),
        (
            "v0/checkpoints/epoch=1-step=20.ckpt",
            ["v0-checkpoints-epoch=1-step=20"],
        ),
        ("s3://bucket/run/last.ckpt", ["run-last", "bucket-run-last"]),
        ("../far/x.pt", ["x", "far-x"]),
    ],
)
def test_a_name_that_says_nothing_begins_with_that_of_its_folder(
    checkpoint: str, names: list[str]
) -> None:
    found = [name.removesuffix(".safetensors") for name in names_of(to_path(checkpoint))]
    assert found[: len(names)] == names
    assert ".." not in "".join(found)
