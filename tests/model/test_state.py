"""Live tensors whose class makes them of others are read as those of their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import api
from harness.model.state import put_together


class Scaled(torch.Tensor):
    """Holds values and a scale, and has no storage of its own, as those of torchao."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.values, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, settings: None, size: Any, stride: Any) -> Scaled:
        return Scaled(**parts)

    def __reduce_ex__(self, protocol: object) -> Any:
        return Scaled, (self.values, self.scale)

    def detach(self) -> Scaled:
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3))
        self.factor = factor

    def state_dict(self, *args: Any, **options: Any) -> Any:
        weight = Scaled(torch.arange(6).to(torch.int8), torch.tensor([self.factor]))
        return {**super().state_dict(*args, **options), "weight": weight}


def test_a_tensor_made_of_others_is_compared_by_them(tmp_path: Path) -> None:
    torch.save(Net(2.0).state_dict(), tmp_path / "net.pt")
    golden = api.record(tmp_path / "net.pt", tmp_path / "golden.safetensors")
    assert len(golden.fingerprint.tensors) == 3
    assert api.verify(Net(2.0), golden).verdict == "identical"
    (finding,) = api.verify(Net(3.0), golden).findings
    assert (finding.kind, finding.key.startswith("weight")) == ("different", True)


def test_what_a_file_keeps_in_parts_is_put_together_for_the_module_that_has_it_whole() -> None:
    values, scale = torch.arange(6).to(torch.int8), torch.tensor([2.0])
    tensors = {"bias": torch.ones(3), "weight[values]": values, "weight[scale]": scale}
    state = put_together(Net(3.0), tensors)
    assert [*state] == ["bias", "weight"]
    assert isinstance(state["weight"], Scaled)
    assert state["weight"].scale is scale
    assert put_together(nn.Linear(1, 3), tensors) == tensors
    del tensors["weight[scale]"]
    assert put_together(Net(3.0), tensors) == tensors
