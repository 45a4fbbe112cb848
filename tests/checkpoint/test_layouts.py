"""Folders as libraries write them: which files are the weights, and what is left aside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.layouts import inner_folder, layout_of
from harness.comparison.policy import Policy
from harness.errors import CheckpointError, NoSection


def weights(path: Path, number: float = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"w": np.full(3, number, "f4")}, path)
    else:
        torch.save({"w": torch.full((3,), number)}, path)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("files", "parts", "others"),
    [
        # transformers: safetensors before .bin, one file before an index, an old name last.
        (
            ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
            {"": "model.safetensors"},
            ("model.safetensors.index.json", "pytorch_model.bin"),
        ),
        (
            ["pytorch_model.bin.index.json", "model.safetensors", "tf_model.h5", "rust_model.ot"],
            {"": "model.safetensors"},
            ("pytorch_model.bin.index.json", "rust_model.ot", "tf_model.h5"),
        ),
        (
            ["pytorch_model.bin", "optimizer.pt", "rng_state.pth"],
            {"": "pytorch_model.bin"},
            ("optimizer.pt", "rng_state.pth"),
        ),
        (
            ["consolidated.safetensors", "model.safetensors.index.json"],
            {"": "model.safetensors.index.json"},
            ("consolidated.safetensors",),
        ),
        # PEFT, and a variant of diffusers.
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            {"": "adapter_model.safetensors"},
            (),
        ),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"],
            {"": "diffusion_pytorch_model.bin"},
            ("diffusion_pytorch_model.fp16.safetensors",),
        ),
        # accelerate: several models.
        (
            ["model.safetensors", "model_1.safetensors", "optimizer.bin", "scheduler.bin"],
            {"model": "model.safetensors", "model_1": "model_1.safetensors"},
            ("optimizer.bin", "scheduler.bin"),
        ),
        # sentence-transformers without its list of modules.
        (
            ["model.safetensors", "2_Dense/model.safetensors"],
            {"": "model.safetensors", "2_Dense": "2_Dense/model.safetensors"},
            (),
        ),
        # A pipeline of diffusers: a part per component.
        (
            [
                *("model_index.json", "unet/diffusion_pytorch_model.safetensors"),
                *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
                *("text_encoder/flax_model.msgpack", "tokenizer/vocab.json"),
            ],
            {
                "text_encoder": "text_encoder/model.safetensors",
                "unet": "unet/diffusion_pytorch_model.safetensors",
                "vae": "vae/diffusion_pytorch_model.safetensors",
            },
            ("text_encoder/flax_model.msgpack",),
        ),
        # sentence-transformers: the folder's own, and modules of it.
        (
            [
                "modules.json",
                "model.safetensors",
                "1_Pooling/config.json",
                "2_Dense/model.safetensors",
            ],
            {"": "model.safetensors", "2_Dense": "2_Dense/model.safetensors"},
            (),
        ),
        # A trainer's folder of checkpoints is no checkpoint.
        (["checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors"], {}, ()),
        (
            ["model.safetensors", "checkpoint-1/model.safetensors"],
            {"": "model.safetensors"},
            ("checkpoint-1/",),
        ),
        (["notes.txt"], {}, ()),
    ],
)
def test_the_weights_are_those_that_the_library_would_read(
    tmp_path: Path, files: list[str], parts: dict[str, str], others: tuple[str, ...]
) -> None:
    touch(tmp_path, *files)
    found = layout_of(tmp_path)
    assert found.parts == {part: tmp_path / path for part, path in parts.items()}
    assert found.others == others


def test_one_model_in_a_folder_has_the_root_of_its_file(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors")
    file = api.fingerprint(tmp_path / "model.safetensors")
    assert api.fingerprint(tmp_path).root == file.root
    weights(tmp_path / "pytorch_model.bin", 2)
    with open_checkpoint(tmp_path) as found:
        assert found.others == (("pytorch_model.bin", None),)


def test_several_models_are_parts_of_one_checkpoint(tmp_path: Path) -> None:
    touch(tmp_path, "model_index.json")
    weights(tmp_path / "unet/diffusion_pytorch_model.safetensors", 1)
    weights(tmp_path / "text_encoder/pytorch_model.bin", 2)
    with open_checkpoint(tmp_path) as found:
        assert list(found.tensors) == ["text_encoder.w", "unet.w"]
    unet = api.fingerprint(tmp_path, section="unet")
    assert unet.root == api.fingerprint(tmp_path / "unet").root
    with pytest.raises(NoSection, match="no part 'vae'") as caught:
        open_checkpoint(tmp_path, section="vae")
    assert caught.value.hint == "one of: text_encoder, unet"
    # A change in any part is seen.
    golden = api.record(tmp_path, tmp_path / "g.safetensors")
    weights(tmp_path / "text_encoder/pytorch_model.bin", 3)
    comparison = api.verify(tmp_path, golden.path)
    assert [finding.key for finding in comparison.findings] == ["text_encoder.w"]


@pytest.mark.parametrize(
    ("name", "text"), [("latest", "global_step8\n"), ("latest_checkpointed_iteration.txt", "8")]
)
def test_a_folder_that_names_the_latest_save_is_that_save(
    tmp_path: Path, name: str, text: str
) -> None:
    inner = tmp_path / ("iter_0000008" if text == "8" else "global_step8")
    inner.mkdir()
    (tmp_path / name).write_text(text)
    assert inner_folder(tmp_path) == inner
    for hostile in ("..", "/", "a/b", "x" * 300, "", "nothing"):
        (tmp_path / name).write_text(hostile)
        assert inner_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("inner", ["weights", "model/weights", "model_weights"])
def test_the_weights_of_a_larger_save_are_found(tmp_path: Path, inner: str) -> None:
    touch(tmp_path, f"{inner}/.metadata", f"{inner}/common.pt", "context/model.yaml")
    assert inner_folder(tmp_path) == tmp_path / inner


def test_a_folder_of_checkpoints_names_the_last(tmp_path: Path) -> None:
    for step in (9, 10):
        weights(tmp_path / f"checkpoint-{step}/model.safetensors")
    with pytest.raises(CheckpointError, match="a folder of several checkpoints") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == (
        f"give one of them: {tmp_path / 'checkpoint-10'}, or all: {tmp_path / '*'}"
    )


def test_a_file_of_empty_tensors_alone_is_refused(tmp_path: Path) -> None:
    state = {"module": {"w": torch.empty(0), "b": torch.empty(0, 4)}, "step": 3}
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="2 of 2 tensors are empty: the weights are in"):
        open_checkpoint(path)
    torch.save({**state, "module": {**state["module"], "c": torch.ones(1)}}, path)  # type: ignore[dict-item]
    open_checkpoint(path).close()


def described(folder: Path, **changes: object) -> Path:
    """A folder of transformers, or of diffusers, of which some files are others."""
    weights(folder / "model.safetensors")
    files = {
        "config.json": {"rope_theta": 1.0, "transformers_version": "5.0"},
        "generation_config.json": {"max": 1},
        "tokenizer.json": {"vocab": 1},
        "tokenizer_config.json": {"chat": 1},
        "trainer_state.json": {"step": 1},
        "model.safetensors.index.json": {},
    }
    for name, content in {**files, **changes}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("config.json", {"rope_theta": 2.0}, ("rope_theta", "1.0", "2.0")),
        ("generation_config.json", {"max": 2}, ("generation_config.max", "1", "2")),
        ("tokenizer.json", {"vocab": 2}, ("tokenizer.json", "digest", "digest")),
        ("tokenizer_config.json", {"chat": 2}, ("tokenizer_config.json", "digest", "digest")),
        ("config.json", "no JSON", ("rope_theta", "1.0", "nothing")),
        ("config.json", "[" * 100_000, ("rope_theta", "1.0", "nothing")),
        ("merges.txt", "a b", ("merges.txt", "nothing", "digest")),
        ("config.json", {"rope_theta": 1.0, "transformers_version": "5.1"}, None),
        ("trainer_state.json", {"step": 2}, None),
    ],
)
def test_what_describes_the_model_in_a_folder_is_compared(
    tmp_path: Path, name: str, content: object, finding: tuple[str, str, str] | None
) -> None:
    one, other = described(tmp_path / "one"), described(tmp_path / "other", **{name: content})
    golden = api.record(one, tmp_path / "golden.safetensors")
    assert api.verify(one, golden).findings == ()
    for compared in (api.diff(one, other), api.verify(other, golden)):
        found = {f.key: (f.expected or "", f.actual or "") for f in compared.findings}
        if finding is None:
            assert not found
        else:
            key, *sides = finding
            assert all(map(str.__contains__, found[key], sides))
        assert compared.ok
    strict = api.diff(one, other, policy=Policy(check_config=True))
    assert strict.ok is (finding is None)
    # A file by itself carries nothing.
    assert api.diff(one, other / "model.safetensors").findings == ()


def test_each_part_of_a_pipeline_is_described(tmp_path: Path) -> None:
    for beta in (1, 2):
        weights(tmp_path / f"{beta}/unet/diffusion_pytorch_model.safetensors")
        weights(tmp_path / f"{beta}/vae/diffusion_pytorch_model.safetensors")
        touch(tmp_path / f"{beta}", "model_index.json", "tokenizer/vocab.json")
        for part in ("unet/config.json", "scheduler/scheduler_config.json"):
            (tmp_path / f"{beta}" / part).parent.mkdir(exist_ok=True)
            (tmp_path / f"{beta}" / part).write_text(json.dumps({"beta": beta}))
    found = api.diff(tmp_path / "1", tmp_path / "2").findings
    assert [f.key for f in found] == ["scheduler/scheduler_config.beta", "unet/config.beta"]
    with open_checkpoint(tmp_path / "1") as checkpoint:
        assert sorted(checkpoint.members) == ["model_index.json", "tokenizer/vocab.json"]
