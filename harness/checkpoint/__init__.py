"""Files and URLs -> `Checkpoint`; executes nothing, imports no torch."""

from harness.checkpoint.dtypes import DType
from harness.checkpoint.opening import open_checkpoint
from harness.checkpoint.tensors import Checkpoint, Tensor

__all__ = ["Checkpoint", "DType", "Tensor", "open_checkpoint"]
