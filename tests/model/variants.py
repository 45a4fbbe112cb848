"""Models under test: the local NEST as someone could break it, and models of other people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness.nest.model import EncDecDenoiseMaskedTokenPredModel


class Loose(EncDecDenoiseMaskedTokenPredModel):
    """Loads what fits and leaves the rest as it is, without a word."""

    @classmethod
    def restore_from(cls, path: str | Path, **options: Any) -> Self:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().restore_from(path, strict=False, **options)


class Thawed(EncDecDenoiseMaskedTokenPredModel):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.mask_processor.mask_embedding.requires_grad_(True)


class SavesHalf(EncDecDenoiseMaskedTokenPredModel):
    """Saves one weight with half of its bits."""

    def save_to(self, path: str | Path) -> None:
        weight = self.decoder.decoder_layers[0].weight
        original = weight.data
        weight.data = original.half().float()
        super().save_to(path)
        weight.data = original


class Plain(nn.Module):
    """Somebody's model, saved as a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.norm = nn.LayerNorm(16)
        self.register_buffer("scale", torch.full((16,), 2.0), persistent=False)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        x = self.embed(tokens) * self.scale
        hidden = []
        for layer in self.layers:
            x = x + torch.relu(layer(x))
            hidden.append(x)
        return {"last": self.norm(x), "hidden": hidden}

    def golden_inputs(self) -> tuple[Tensor]:
        return (torch.arange(12).reshape(2, 6) % 50,)


class LargeBuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        table = torch.linspace(1, 2, 8192)
        self.register_buffer("table", table, persistent=False)


class OtherLargeBuffer(LargeBuffer):
    def __init__(self) -> None:
        super().__init__()
        self.table[5] += 1


class Strips(Plain):
    """Takes checkpoints of DataParallel, and saves none."""

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        plain = {key.removeprefix("module."): value for key, value in state.items()}
        return super().load_state_dict(plain, *args, **kwargs)


class Breaks(Plain):
    def forward(self, tokens: Tensor) -> dict[str, Any]:
        return dict(json.loads("no JSON"))


class DrawnInputs(Plain):
    """Draws its inputs, anew at each call."""

    def golden_inputs(self) -> tuple[Tensor]:
        return (torch.randint(50, (2, 6)),)


class BuiltWithInputs(Plain):
    """Draws its inputs once, when it is built, and writes into them."""

    golden_inputs = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randint(25, (2, 6))

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        return super().forward(tokens.mul_(2))


class Drawn(Plain):
    """Has a weight that is no parameter and no buffer, so that no file ever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.randn(16)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        made = super().forward(tokens)
        return {**made, "last": made["last"] + self.shift}


class Unlearning(Plain):
    """A parameter that was is a buffer of the same name."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.norm.weight.data
        del self.norm.weight
        self.norm.register_buffer("weight", weight)


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].compile(backend="eager")
        self.forward = torch.compile(super().forward, backend="eager")  # type: ignore[method-assign]


class Prints(Plain):
    def forward(self, tokens: Tensor) -> dict[str, Any]:
        print("a model speaks")  # noqa: T201
        return super().forward(tokens)


class ExtraState(Plain):
    factor = 3

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.factor, "of": [1.5, None]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.factor = state["scale"]


class LosesExtraState(ExtraState):
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.factor = 4


class OtherScale(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale.mul_(1.5)


class Reinitialised(Plain):
    """Draws one weight anew after it was loaded."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        nn.init.normal_(self.layers[1].weight)
        return result


class OtherNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm.eps = 1e-2


class Tied(pl.LightningModule):
    """A Lightning module with a DictConfig, Adam and tied weights."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(cfg.vocabulary, cfg.width)
        self.body = nn.Linear(cfg.width, cfg.width)
        self.head = nn.Linear(cfg.width, cfg.vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.example_input_array = torch.arange(8).reshape(2, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embed(tokens))))
        return logits

    def training_step(self, batch: tuple[Tensor], index: int) -> Tensor:
        (tokens,) = batch
        logits = self(tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.hparams["cfg"].vocabulary, (8, 4), generator=generator)
        return DataLoader(TensorDataset(tokens), batch_size=4)


class Logs(Tied):
    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        if self._trainer is not None:
            self.log("mean", logits.mean())
        return logits


class NeedsItsData(Tied):
    """Plans its rates for as many steps as its data has."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)]


class Thaws(Tied):
    """Freezes what the checkpoint says, which its save forgets to say."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.body.requires_grad_(checkpoint.get("unfrozen", False))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["unfrozen"] = True


class CameApart(Tied):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


class Reordered(Tied):
    """The same keys, registered in another order: the optimizer's indices mean others."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        body = self.body
        del self.body
        modules = dict(self._modules)
        self._modules.clear()
        self._modules["body"] = body
        self._modules.update(modules)
