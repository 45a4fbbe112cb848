"""The local NEST FastConformer: NVIDIA NeMo's EncDecDenoiseMaskedTokenPredModel without NeMo.

In: a model config, a `.nemo` archive or a Lightning `.ckpt`. Out: a `LightningModule` with NeMo's
state-dict keys, order, shapes, dtypes and numbers, that trains and saves again. Configs that it
cannot reproduce are refused by name. `RECIPE` is the public NEST Large recipe.
"""

from __future__ import annotations

from pathlib import Path

from harness.model import not_installed

if error := not_installed("torch", "pytorch_lightning", "omegaconf"):
    raise error

from harness.model.config import load_config
from harness.nest.model import AudioBatch, EncDecDenoiseMaskedTokenPredModel

RECIPE = Path(__file__).with_name("nest_fast-conformer.yaml")

__all__ = ["RECIPE", "AudioBatch", "EncDecDenoiseMaskedTokenPredModel", "load_config"]
