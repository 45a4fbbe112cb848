"""The files that `scripts/bench` measures with: bench_files.py KIND [ARGUMENTS]

    number FOLDER                            number.pt: one number, for what starting up costs
    state FOLDER DTYPE GIGABYTES NAME...     once.pt, same.pt (a copy), noisy.pt (every element
                                             differs, by less than the tolerance in float32)
    nest FILE                                NEST at its real size, 113 million parameters
    dcp FILE FOLDER                          a torch.distributed.checkpoint of a file, written by
                                             the ranks of torchrun, each tensor in shards

The state dict has the keys and shapes of NEST-L, 17 layers, as wide as the size asks for. The same
arguments make the same values.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

NUM_LAYERS = 17
PARAMETERS_PER_SQUARE = 25 * NUM_LAYERS  # of the width


def shapes(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(NUM_LAYERS):
        prefix = f"encoder.layers.{layer}"
        weights = {
            f"norm_{name}": (width,)
            for name in ("feed_forward1", "conv", "self_att", "feed_forward2", "out")
        }
        for block in ("feed_forward1", "feed_forward2"):
            weights[f"{block}.linear1"] = (4 * width, width)
            weights[f"{block}.linear2"] = (width, 4 * width)
        weights["conv.pointwise_conv1"] = (2 * width, width, 1)
        weights["conv.depthwise_conv"] = (width, 1, 9)
        weights["conv.batch_norm"] = (width,)
        weights["conv.pointwise_conv2"] = (width, width, 1)
        for name in ("q", "k", "v", "out", "pos"):
            weights[f"self_attn.linear_{name}"] = (width, width)
        for name, shape in weights.items():
            yield f"{prefix}.{name}.weight", shape
            yield f"{prefix}.{name}.bias", shape[:1]


def state_of(dtype: torch.dtype, nbytes: float, *, noisy: bool = False) -> dict[str, torch.Tensor]:
    """A state dict of about `nbytes`; the noisy one differs from it in every element."""
    width = round((nbytes / dtype.itemsize / PARAMETERS_PER_SQUARE) ** 0.5 / 8) * 8
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes(width):
        values = torch.randn(shape, generator=generator).mul_(0.02)
        stored = values.to(dtype)
        if noisy:
            change = 1e-6 * (values.abs() + 0.1) if dtype == torch.float32 else 0.01 * values
            stored, before = (values + change).to(dtype), stored
            assert dtype != torch.float32 or bool((stored != before).all())
        state[key] = stored
    return state


def write_states(folder: Path, dtype: str, gigabytes: str, names: list[str]) -> None:
    for name in names:
        if name == "same":
            shutil.copyfile(folder / "once.pt", folder / "same.pt")
        else:
            nbytes = float(gigabytes) * 1e9
            state = state_of(getattr(torch, dtype), nbytes, noisy=name == "noisy")
            torch.save(state, folder / f"{name}.pt")


def write_nest(path: str) -> None:
    from harness.model.config import load_config
    from harness.nest import RECIPE
    from harness.nest.model import EncDecDenoiseMaskedTokenPredModel

    torch.manual_seed(0)
    EncDecDenoiseMaskedTokenPredModel(load_config(RECIPE)).save_to(path)


def write_dcp(path: str, folder: str) -> None:
    """On every rank of torchrun: shard the first axis of each tensor, and save together."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = torch.load(path, mmap=True)
    dcp.save(
        {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in state.items()},
        checkpoint_id=folder,
    )
    dist.destroy_process_group()


def main(kind: str, *arguments: str) -> None:
    if kind == "number":
        torch.save({"w": torch.ones(1)}, Path(arguments[0]) / "number.pt")
    elif kind == "state":
        folder, dtype, gigabytes, *names = arguments
        write_states(Path(folder), dtype, gigabytes, names)
    elif kind == "nest":
        write_nest(*arguments)
    elif kind == "dcp":
        write_dcp(*arguments)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
