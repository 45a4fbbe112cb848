"""What nested outputs hold, by the place at which it is."""

from __future__ import annotations

import pytest
import torch

from harness.model.nested import leaves


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated)")
def test_tensors_of_other_layouts_are_recorded_by_their_parts() -> None:
    x = torch.eye(2)
    made = {
        "coo": x.to_sparse(),
        "csr": x.to_sparse_csr(),
        "nested": torch.nested.nested_tensor([x[0], x[1, :1]]),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "text": "no tensor",
    }
    found = dict(leaves("out", made, whole=False))
    assert {key: (*part.shape, part.dtype) for key, part in found.items()} == {
        "out.coo.indices": (2, 2, torch.int64),
        "out.coo.values": (2, torch.float32),
        "out.coo.size": (2, torch.int64),
        "out.csr.rows": (3, torch.int64),
        "out.csr.columns": (2, torch.int64),
        "out.csr.values": (2, torch.float32),
        "out.csr.size": (2, torch.int64),
        "out.nested.0": (2, torch.float32),
        "out.nested.1": (1, torch.float32),
        "out.quantized.int_repr": (2, 2, torch.uint8),
        "out.quantized.scale": (torch.float32,),
        "out.quantized.zero_point": (torch.int64,),
    }
