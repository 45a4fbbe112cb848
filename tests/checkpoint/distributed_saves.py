"""What torch and Lightning really write when several processes save: run once for all tests.

Two of the four ranks stay for what needs only two. Consolidated files are made by torch's and
Lightning's own converters.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
)

NUM_RANKS = 4


class Net(nn.Module):
    """Uneven over two ranks, a dimension of one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 5)
        self.gate = nn.Linear(5, 1)
        self.register_buffer("scale", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(self.linear(self.embed(x))).sum()


def two_dimensional(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(1)
    values = torch.randn(5, 7, 3)

    def spread(value: torch.Tensor, *placements: Any) -> DTensor:
        return distribute_tensor(value, mesh, placements)

    state = {
        "rows and columns": spread(values, Shard(0), Shard(1)),
        "columns and depth": spread(values, Shard(1), Shard(2)),
        "rows twice": spread(values, Shard(0), Shard(0)),
        "columns": spread(values, Replicate(), Shard(1)),
        "everywhere": spread(values, Replicate(), Replicate()),
        "two of four": spread(torch.ones(2, 2), Shard(0), Shard(0)),
        "plain": values,
    }
    dcp.save(state, checkpoint_id=folder / "mesh")


def one_dimensional(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(2)

    def spread(value: torch.Tensor, placement: Any) -> DTensor:
        return distribute_tensor(value, mesh, [placement])

    local = torch.randn(4, 3).t()  # not contiguous
    state = {
        "rows": spread(torch.randn(5, 4), Shard(0)),
        "columns": spread(torch.randn(4, 5), Shard(1)),
        "depth": spread(torch.randn(2, 3, 9), Shard(2)),
        "one row": spread(torch.randn(1, 4), Shard(0)),
        "no rows": spread(torch.zeros(0, 4), Shard(0)),
        "half": spread(torch.randn(6, 6).bfloat16(), Shard(1)),
        "counts": spread(torch.arange(7), Shard(0)),
        "flags": spread(torch.arange(7) % 2 == 0, Shard(0)),
        "waves": spread(torch.randn(3, 4, dtype=torch.complex64), Shard(1)),
        "replicated": spread(torch.randn(3, 3), Replicate()),
        "transposed": DTensor.from_local(local, mesh, [Shard(1)], run_check=False),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0),
    }
    dcp.save(state, checkpoint_id=folder / "sharded")
    writer = dcp.FileSystemWriter(folder / "one file an item", single_file_per_rank=False)
    dcp.save(state, storage_writer=writer)


def trained(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    net = Net()
    for part in (net.linear, net.gate):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net(torch.arange(8).remainder(11)).backward()
    optimizer.step()
    model, optim = get_state_dict(net, optimizer)
    flat = get_optimizer_state_dict(
        net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    state = {
        "model": model,
        "optim": optim,
        "flat": flat,
        "step": 3,
        "epochs": [1, 2],
        "history": [{"loss": torch.tensor(0.5)}, {"loss": torch.tensor(0.25)}],
        "pair": (torch.ones(2), "text"),
        "empty": {},
    }
    dcp.save(state, checkpoint_id=folder / "fsdp")
    dcp.async_save(state, checkpoint_id=folder / "async").result()
    names = {key: 1 + index % 2 for index, key in enumerate(model)}
    for name, options in {
        "rank safetensors": {},
        "rank safetensors in two": {"fqn_to_index_mapping": names},
        "safetensors": {"enable_consolidation": True},
    }.items():
        writer = HuggingFaceStorageWriter(str(folder / name), save_distributed=True, **options)
        dcp.save(model, storage_writer=writer)


class Module(pl.LightningModule):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 5)

    def configure_model(self) -> None:
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def lightning(folder: Path) -> None:
    from pytorch_lightning.strategies import ModelParallelStrategy

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(4, verbose=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(4, 6), batch_size=2))
    trainer.save_checkpoint(folder / "lightning.ckpt")


def consolidate(folder: Path) -> None:
    for name in ("mesh", "sharded", "fsdp", "async"):
        dcp_to_torch_save(folder / name, folder / f"{name}.pt")
    from lightning_fabric.utilities.load import _load_distributed_checkpoint

    whole = _load_distributed_checkpoint(folder / "lightning.ckpt")
    torch.save(whole, folder / "lightning.pt")


def save_all(folder: Path) -> None:
    """What each of four ranks does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = f"file://{folder.resolve()}/.store"
    dist.init_process_group("gloo", init_method=f"{store}4", rank=rank, world_size=NUM_RANKS)
    two_dimensional(folder)
    dist.destroy_process_group()
    if rank >= 2:
        return
    dist.init_process_group("gloo", init_method=f"{store}2", rank=rank, world_size=2)
    one_dimensional(folder)
    trained(folder)
    dist.destroy_process_group()
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    lightning(folder)
    if rank == 0:
        consolidate(folder)
