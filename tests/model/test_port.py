"""A golden of NeMo 3.0.0's own class, recorded where NeMo is installed, verifies the local class.

It was made by hand, beside torch 2.13.0, as harness/model/PORTING.md says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from harness import api
from harness.comparison.comparison import Comparison
from harness.model.options import LiveOptions
from harness.nest import EncDecDenoiseMaskedTokenPredModel
from harness.nest.encoder import ConformerLayer

HERE = __name__


class Epsilon(EncDecDenoiseMaskedTokenPredModel):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.encoder.layers[1].norm_conv.eps = 1e-3


class LateResidual(ConformerLayer):
    """Adds the attention to what comes out of its norm, in place of what goes in."""

    def forward(self, x: Tensor, forbidden: Tensor, table: Tensor, padded: Tensor) -> Tensor:
        x = x + self.dropout(self.feed_forward1(self.norm_feed_forward1(x))) * 0.5
        x = self.norm_self_att(x)
        x = x + self.dropout(self.self_attn(x, forbidden, table))
        x = x + self.dropout(self.conv(self.norm_conv(x), padded))
        x = x + self.dropout(self.feed_forward2(self.norm_feed_forward2(x))) * 0.5
        normed: Tensor = self.norm_out(x)
        return normed


class Residual(EncDecDenoiseMaskedTokenPredModel):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.encoder.layers[1].__class__ = LateResidual


class Padding(EncDecDenoiseMaskedTokenPredModel):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        conv: Any = self.encoder.layers[1].conv
        conv.padding = (sum(conv.padding), 0)  # causal


@pytest.fixture(scope="session")
def inputs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("port") / "inputs.safetensors"
    api.write_inputs(data / "nest_tiny.nemo", file)
    return file


def verified(data: Path, inputs: Path, target: str) -> dict[str, Comparison]:
    live = LiveOptions(target=target, inputs=inputs)
    golden = data / "nest_tiny_nemo.safetensors"
    stages = api.verify_stages(data / "nest_tiny.nemo", golden, stage="outputs", live=live)
    return {found.stage: found for found in stages}


def test_the_local_class_computes_what_nemo_does(data: Path, inputs: Path) -> None:
    found = verified(data, inputs, "harness.nest:EncDecDenoiseMaskedTokenPredModel")
    assert {stage: one.ok for stage, one in found.items()} == dict.fromkeys(found, True)
    assert list(found) == ["file", "load", "reload", "outputs"]
    notes = [note for note in found["outputs"].notes if "bit-identical" not in note]
    structure, padded = notes  # which of them are equal to the bit depends on the processor
    assert structure.startswith("structure, not compared: only in the golden: 9 (preprocessor.feat")
    assert structure.endswith("; only in this model: 2 (encoder.pre_encode.conv.{4,7})")
    assert padded.endswith(": 2 (encoder.layers.{0,1}.conv.depthwise_conv:in.input)")
    assert found["load"].notes == (
        "structure, in no file: non-persistent buffers only in the golden: 1 (encoder.pos_enc.pe)",
    )
    names = [key for key in found["outputs"].actual.tensors if key.startswith("(model):out")]
    assert names == [
        f"(model):out.{name}" for name in ("log_probs", "encoded_length", "masks", "tokens")
    ]


@pytest.mark.parametrize(
    ("sabotage", "module", "shows_at"),
    [
        (Epsilon, "encoder.layers.1.norm_conv", "encoder.layers.1.norm_conv:out"),
        (Residual, "encoder.layers.1", "encoder.layers.1.norm_conv:in.input"),
        (Padding, "encoder.layers.1.conv", "encoder.layers.1.conv.depthwise_conv:out"),
    ],
)
def test_each_sabotage_is_named_by_its_module(
    data: Path, inputs: Path, sabotage: type[nn.Module], module: str, shows_at: str
) -> None:
    found = verified(data, inputs, f"{HERE}:{sabotage.__name__}")
    assert [stage for stage, one in found.items() if not one.ok] == ["outputs"]
    divergence = found["outputs"].divergence
    assert divergence is not None
    assert (divergence.diverging_module, divergence.finding.key) == (module, shows_at)
    assert not divergence.diverging
