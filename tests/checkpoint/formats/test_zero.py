"""DeepSpeed's ZeRO folders: the weights that `zero_to_fp32.py` would give, and what is refused."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError

State = dict[str, torch.Tensor]


def pieces(flat: torch.Tensor, num: int) -> list[torch.Tensor]:
    """Equal parts of a vector, the last padded as DeepSpeed pads it, with values of no meaning."""
    share = -(-flat.numel() // num)
    padded = torch.cat([flat, torch.full((share * num - flat.numel(),), 77.0)])
    return [part.clone() for part in padded.split(share)] if share else [padded] * num


def save_zero(folder: Path, groups: list[State], num_ranks: int, stage: int, **more: Any) -> None:
    """Write a folder as DeepSpeed's engine does."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [OrderedDict((k, t.shape) for k, t in group.items()) for group in groups]
    if stage == 3:
        ranks = [
            [torch.cat([pieces(t.flatten(), num_ranks)[rank] for t in group.values()])]
            for group in groups
            for rank in range(num_ranks)
        ]
        vectors = [
            [ranks[number * num_ranks + rank][0] for number in range(len(groups))]
            for rank in range(num_ranks)
        ]
    else:
        whole = [torch.cat([t.flatten() for t in group.values()]) for group in groups]
        vectors = [[pieces(flat, num_ranks)[rank] for flat in whole] for rank in range(num_ranks)]
    for rank in range(num_ranks):
        optimizer = {
            "zero_stage": stage,
            "partition_count": num_ranks if stage == 3 else [num_ranks] * len(groups),
            "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": vectors[rank],
        }
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_version": "0.17.0"},
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        if rank == 0 or stage == 3:
            rank_of = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            model = {"module": {}, "param_shapes": shapes, "buffer_names": [], **more}
            fragments = model.get("frozen_param_fragments")
            if stage == 3 and fragments:
                model["frozen_param_fragments"] = {
                    k: pieces(t.flatten(), num_ranks)[rank] for k, t in fragments.items()
                }
            torch.save(model, folder / f"{rank_of}mp_rank_00_model_states.pt")


def assert_holds(folder: Path, expected: State) -> None:
    with open_checkpoint(folder) as found:
        assert set(found.tensors) == set(expected)
        for key, tensor in expected.items():
            there = found.tensors[key]
            assert there.shape == tuple(tensor.shape)
            data = bytearray(there.nbytes)
            there.read_into(0, memoryview(data))
            assert bytes(data) == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("stage", [1, 2, 3])
@settings(max_examples=15)
@given(data=st.data())
def test_the_weights_are_whole_whatever_the_ranks_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, stage: int, data: st.DataObject
) -> None:
    shape = st.lists(st.integers(1, 5), max_size=3)
    shapes = data.draw(st.lists(st.lists(shape, min_size=1, max_size=4), min_size=1, max_size=2))
    numbers = iter(range(1_000_000))
    groups = [
        {
            f"g{number}.p{index}.weight": torch.tensor(
                [float(next(numbers)) for _ in range(math.prod(size))]
            ).reshape(size)
            for index, size in enumerate(group)
        }
        for number, group in enumerate(shapes)
    ]
    folder = tmp_path_factory.mktemp("zero")
    save_zero(folder, groups, data.draw(st.integers(1, 4)), stage)
    assert_holds(folder, {key: tensor for group in groups for key, tensor in group.items()})


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_frozen_and_shared_parameters_are_there_too(tmp_path: Path, stage: int) -> None:
    weights = {"a": torch.arange(7.0), "b": torch.arange(6.0).reshape(2, 3)}
    frozen = {"f": torch.arange(5.0) + 9}
    save_zero(
        tmp_path / "global_step4",
        [weights],
        2,
        stage,
        module={"mean": torch.ones(3)},
        buffer_names=["mean"],
        shared_params={"tied": "a"},
        frozen_param_shapes={"f": frozen["f"].shape},
        frozen_param_fragments=frozen,
    )
    (tmp_path / "latest").write_text("global_step4")
    assert_holds(tmp_path, {**weights, **frozen, "mean": torch.ones(3), "tied": weights["a"]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("rank", "has the files of 1 ranks, of 2"),
        ("short", r"has \d+ of the 6 elements of 'b'"),
        ("stage", "is of ZeRO stage 7"),
        ("shapes", "has no param_shapes"),
        ("tensor parallel", "split by tensor parallelism over 2 ranks"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, damage: str, message: str) -> None:
    weights = {"a": torch.arange(7.0), "b": torch.arange(6.0).reshape(2, 3)}
    save_zero(tmp_path, [weights], 2, 2)
    last = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    first = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    model = tmp_path / "mp_rank_00_model_states.pt"
    if damage == "rank":
        last.unlink()
    elif damage == "tensor parallel":
        last.rename(tmp_path / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    elif damage == "shapes":
        torch.save({"module": {}}, model)
    else:
        file = first if damage == "stage" else last
        state = torch.load(file)
        inside = state["optimizer_state_dict"]
        if damage == "stage":
            inside["zero_stage"] = 7
        else:
            vectors = inside["single_partition_of_fp32_groups"]
            vectors[0] = vectors[0][:-2].clone()
        torch.save(state, file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
