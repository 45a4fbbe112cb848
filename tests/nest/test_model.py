"""The LightningModule: arguments, training, schedule, and Lightning's checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harness import api
from harness.errors import ModelError
from harness.model.lightning import trainer_of
from harness.nest.model import AudioBatch, EncDecDenoiseMaskedTokenPredModel

MakeModel = Callable[..., EncDecDenoiseMaskedTokenPredModel]

# Lightning recommends worker processes and a validation loader to every training run, remarks on
# the frozen modules' evaluation mode, and asks for a class of torch that is going to go
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found 3 module.s. in eval mode at the start:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
]


def loader(batch: AudioBatch, steps: int) -> DataLoader[Any]:
    return DataLoader([batch] * steps, batch_size=None)


def trainer(tmp_path: Path, steps: int, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**(settings | options))


# forward


def test_golden_inputs_are_fixed_and_not_silent(model: EncDecDenoiseMaskedTokenPredModel) -> None:
    before = torch.get_rng_state()
    inputs = model.golden_inputs()
    again = model.golden_inputs()
    assert torch.equal(torch.get_rng_state(), before)
    assert inputs.pop("apply_mask") is False
    assert all(torch.equal(value, again[key]) for key, value in inputs.items())
    signals = [inputs["input_signal"], inputs["noisy_input_signal"]]
    both = [inputs["input_signal_length"], inputs["noisy_input_signal_length"]]
    assert [lengths.tolist() for lengths in both] == [[25440, 25440], [25440, 15900]]
    for signal, lengths in zip(signals, both, strict=True):
        assert signal.shape == (2, 25440)
        assert signal.dtype == torch.float32
        # whole numbers over a power of two: no rounding, so no platform
        assert torch.equal(signal * 32768, (signal * 32768).round())
        for item, length in zip(signal, lengths.tolist(), strict=True):
            assert float(item[:length].unfold(0, 160, 160).std(1).min()) > 1e-3
            assert not item[length:].any()
    assert not torch.equal(*signals)
    clean, _ = model.preprocessor(signals[0], both[0])
    steps = model.config.quantizer.combine_time_steps
    assert clean.abs().unfold(2, steps, steps).amax(dim=(1, 3)).min() > 0  # no token of padding


@torch.no_grad()
def test_processed_signals_replace_raw_ones(model: EncDecDenoiseMaskedTokenPredModel) -> None:
    inputs = model.golden_inputs()
    expected = model(**inputs)
    clean = model.preprocessor(inputs["input_signal"], inputs["input_signal_length"])
    noisy = model.preprocessor(inputs["noisy_input_signal"], inputs["noisy_input_signal_length"])
    outputs = model(
        processed_signal=clean[0],
        processed_signal_length=clean[1],
        processed_noisy_input_signal=noisy[0],
        processed_noisy_input_signal_length=noisy[1],
    )
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("drop", "add"),
    [
        (("input_signal", "input_signal_length"), ()),
        (("noisy_input_signal", "noisy_input_signal_length"), ()),
        (("input_signal_length",), ()),
        (("noisy_input_signal",), ()),
        ((), ("processed_signal", "processed_signal_length")),
        ((), ("processed_noisy_input_signal", "processed_noisy_input_signal_length")),
        ((), ("processed_signal",)),
    ],
)
def test_exactly_one_form_of_each_signal(
    model: EncDecDenoiseMaskedTokenPredModel, drop: tuple[str, ...], add: tuple[str, ...]
) -> None:
    inputs = model.golden_inputs()
    for name in drop:
        del inputs[name]
    for name in add:
        inputs[name] = torch.zeros(2)
    with pytest.raises(ValueError, match="exactly one of"):
        model(**inputs)


def test_forward_takes_keywords_only(model: EncDecDenoiseMaskedTokenPredModel) -> None:
    with pytest.raises(TypeError):
        model(torch.zeros(1, 16000), torch.tensor([16000]))


def test_masks_replace_noisy_frames_only(make_model: MakeModel) -> None:
    model = make_model(masking__mask_prob=0.05)
    inputs = model.golden_inputs() | {"apply_mask": True}
    with torch.no_grad():
        plain = model(**model.golden_inputs())
        masked = model(**inputs)
    assert 0 < float(masked.masks.mean()) < 1
    assert torch.equal(masked.tokens, plain.tokens)
    assert not torch.equal(masked.log_probs, plain.log_probs)


def test_two_books_read_channels_class_slow(make_model: MakeModel) -> None:
    model = make_model(quantizer__num_books=2, decoder__num_decoders=2, loss__num_decoders=2)
    assert model.state_dict()["decoder.decoder_layers.0.weight"].shape == (256, 64, 1)
    encoded = torch.randn(1, 64, 3)
    conv = model.decoder.decoder_layers[0]
    with torch.no_grad():
        found = model.decoder(encoded)
        for book in range(2):
            weight = torch.stack([conv.weight[2 * c + book, :, 0] for c in range(128)])
            bias = torch.stack([conv.bias[2 * c + book] for c in range(128)])
            expected = (encoded[0].T @ weight.T + bias).log_softmax(1)
            torch.testing.assert_close(found[0, :, :, book], expected)


@torch.no_grad()
def test_half_precision_keeps_the_targets(model: EncDecDenoiseMaskedTokenPredModel) -> None:
    before = model.quantizer.codebooks.clone()
    outputs = model.bfloat16()(**model.golden_inputs())
    assert outputs.log_probs.dtype == torch.bfloat16
    assert outputs.log_probs.isfinite().all()
    assert torch.equal(model.quantizer.codebooks, before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(
    model: EncDecDenoiseMaskedTokenPredModel, dtype: torch.dtype
) -> None:
    inputs = model.golden_inputs()
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=dtype):
        cast = model(**inputs)
    assert float((cast.log_probs.float() - exact.log_probs).abs().max()) < 0.2


# training


@pytest.fixture
def trainable(nemo_config: dict[str, Any]) -> dict[str, Any]:
    """A config that learns in a few steps: one layer, many masks, a plain learning rate."""
    config = copy.deepcopy(nemo_config)
    config["encoder"]["n_layers"] = 1
    config["masking"]["mask_prob"] = 0.05
    config["optim"] = {"name": "adamw", "lr": 2e-3, "weight_decay": 1e-3}
    return config


def masked_loss(model: EncDecDenoiseMaskedTokenPredModel, batch: AudioBatch) -> float:
    """Loss in evaluation mode under fixed masks."""
    model.eval()
    with torch.no_grad():
        torch.manual_seed(11)
        value = float(model.validation_step(batch, 0)["val_loss"])
    model._epoch_losses["val_loss"].clear()
    return value


def test_training_lowers_the_loss_and_moves_only_what_is_trainable(
    trainable: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    pl.seed_everything(0, verbose=False)
    model = EncDecDenoiseMaskedTokenPredModel(trainable)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    before = masked_loss(model, batch)
    model.train()
    run = trainer(tmp_path, 12)
    run.fit(model, loader(batch, 12))
    after = masked_loss(model, batch)
    assert before > 4.0
    assert after < before - 0.5
    same = {key for key, value in model.state_dict().items() if torch.equal(value, start[key])}
    assert same == {
        "preprocessor.featurizer.window",
        "preprocessor.featurizer.fb",
        "quantizer.codebooks",
        "quantizer.proj.weight",
        "mask_processor.mask_embedding",
    }
    assert int(model.encoder.layers[0].conv.batch_norm.num_batches_tracked) == 12
    assert run.callback_metrics["train_loss"].isfinite()
    assert float(run.callback_metrics["learning_rate"]) == pytest.approx(2e-3)
    assert float(run.callback_metrics["global_step"]) == 11


def test_a_fixed_seed_gives_the_same_weights_twice(
    trainable: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        pl.seed_everything(seed, verbose=False)
        model = EncDecDenoiseMaskedTokenPredModel(trainable)
        trainer(tmp_path, 3).fit(model, loader(batch, 3))
        return model.state_dict()

    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    key = "encoder.layers.0.feed_forward1.linear1.weight"
    assert not torch.equal(first[key], other[key])


def test_a_batch_without_counted_frames_does_no_harm(
    trainable: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    trainable["masking"]["mask_prob"] = 0.0
    trainable["optim"]["weight_decay"] = 0.0
    model = EncDecDenoiseMaskedTokenPredModel(trainable)
    before = {key: value.clone() for key, value in model.named_parameters()}
    run = trainer(tmp_path, 2)
    run.fit(model, loader(batch, 2))
    assert float(run.callback_metrics["train_loss"]) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


def test_validation_and_test_log_the_mean_of_the_batches(
    trainable: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    class Losses(pl.Callback):
        """The batches' own losses, as the steps returned them."""

        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_validation_batch_end(self, *args: Any, **_options: Any) -> None:
            self.seen.append(float(args[2]["val_loss"]))

        def on_test_batch_end(self, *args: Any, **_options: Any) -> None:
            self.seen.append(float(args[2]["test_loss"]))

    model = EncDecDenoiseMaskedTokenPredModel(trainable)
    for name in ("val_loss", "test_loss"):
        losses = Losses()
        run = trainer(tmp_path, 1, callbacks=[losses])
        start = run.validate if name == "val_loss" else run.test
        torch.manual_seed(2)
        logged = start(model, loader(batch, 3), verbose=False)
        assert len(set(losses.seen)) == 3  # masks are drawn anew
        assert logged[0][name] == pytest.approx(sum(losses.seen) / 3)


def test_batches_without_counted_frames_do_not_enter_the_validation_mean(
    trainable: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    trainable["masking"]["mask_prob"] = 0.0
    model = EncDecDenoiseMaskedTokenPredModel(trainable)
    logged = trainer(tmp_path, 1).validate(model, loader(batch, 2), verbose=False)
    assert math.isnan(logged[0]["val_loss"])


# schedule


def test_the_trainer_steps_the_schedule_every_batch(
    nemo_config: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    nemo_config["encoder"]["n_layers"] = 1
    nemo_config["optim"]["sched"] |= {"warmup_steps": None, "warmup_ratio": 0.5}
    model = EncDecDenoiseMaskedTokenPredModel(nemo_config)
    run = trainer(tmp_path, 4)
    run.fit(model, loader(batch, 4))
    schedule = run.lr_scheduler_configs[0].scheduler
    assert schedule.last_epoch == 4
    assert schedule.warmup_steps == 2
    group = run.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(5.0 / 8 * 4**-0.5)
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.98), 1e-3, 1e-8)
    assert len(run.optimizers[0].param_groups) == 1
    assert len(group["params"]) == len(list(model.parameters()))


# Lightning's checkpoints


def test_nemo_s_own_ckpt_loads_by_itself(ckpt_path: Path, nemo_keys: list[dict[str, Any]]) -> None:
    allowed = torch.serialization.get_safe_globals()
    model = EncDecDenoiseMaskedTokenPredModel.load_from_checkpoint(ckpt_path)
    # the allow-list was for this file only
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    assert list(model.state_dict()) == [row["key"] for row in nemo_keys]
    assert int(model.encoder.layers[0].conv.batch_norm.num_batches_tracked) == 3
    assert model.cfg["nemo_version"] == "3.0.0"
    assert type(model.cfg["encoder"]) is dict
    model.eval()
    with torch.no_grad():
        assert model(**model.golden_inputs()).log_probs.isfinite().all()


def test_nemo_s_optimizer_and_schedule_go_on(
    ckpt_path: Path, batch: AudioBatch, tmp_path: Path
) -> None:
    from harness.nest.model import _CONFIG_CLASSES

    model = EncDecDenoiseMaskedTokenPredModel.load_from_checkpoint(ckpt_path)
    with torch.serialization.safe_globals(_CONFIG_CLASSES):
        stored = torch.load(ckpt_path, weights_only=True)
    model.trainer = trainer(tmp_path, 3)
    (optimizer,), (entry,) = model.configure_optimizers()
    state = stored["optimizer_states"][0]
    parameters = list(model.parameters())
    assert state["param_groups"][0]["params"] == list(range(len(parameters)))
    frozen = {i for i, p in enumerate(parameters) if not p.requires_grad}
    assert set(state["state"]) == set(range(len(parameters))) - frozen
    for index, moments in state["state"].items():
        assert moments["exp_avg"].shape == parameters[index].shape
    optimizer.load_state_dict(state)
    schedule = entry["scheduler"]
    theirs = stored["lr_schedulers"][0]
    missing = set(theirs) - set(schedule.state_dict())
    assert missing == set()
    schedule.load_state_dict(theirs)
    assert schedule.get_lr() == pytest.approx(theirs["_last_lr"])


@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before:UserWarning"
)
def test_our_ckpt_reloads_by_itself_and_plainly(
    trainable: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    pl.seed_everything(0, verbose=False)
    model = EncDecDenoiseMaskedTokenPredModel(trainable)
    run = trainer(tmp_path, 2)
    run.fit(model, loader(batch, 2))
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    # no class of the config's library inside: no allow-list needed
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"] == {"cfg": trainable}
    pl.seed_everything(7, verbose=False)
    again = EncDecDenoiseMaskedTokenPredModel.load_from_checkpoint(path)
    assert again.cfg == model.cfg
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    # and training goes on from it
    more = trainer(tmp_path, 3)
    more.fit(again, loader(batch, 3), ckpt_path=path, weights_only=True)
    assert more.global_step == 3


def test_our_ckpt_says_its_class_though_the_recipe_does_not(
    trainable: dict[str, Any], tmp_path: Path
) -> None:
    del trainable["target"]
    path = tmp_path / "model.ckpt"
    trainer_of(EncDecDenoiseMaskedTokenPredModel(trainable)).save_checkpoint(path)
    assert {stage.verdict for stage in api.roundtrip(path)} == {"identical"}


def test_a_ckpt_that_does_not_fit_is_refused(trainable: dict[str, Any], ckpt_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"encoder\.layers\.1"):
        EncDecDenoiseMaskedTokenPredModel.load_from_checkpoint(ckpt_path, cfg=trainable)


class _Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_a_ckpt_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": _Planted()}, tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        EncDecDenoiseMaskedTokenPredModel.load_from_checkpoint(tmp_path / "x.ckpt")
    assert "executed" not in capsys.readouterr().out


def test_training_without_optim_says_what_is_missing(
    nemo_config: dict[str, Any], batch: AudioBatch, tmp_path: Path
) -> None:
    del nemo_config["optim"]
    model = EncDecDenoiseMaskedTokenPredModel(nemo_config)
    with pytest.raises(ModelError, match="optim"):
        trainer(tmp_path, 1).fit(model, loader(batch, 1))


def test_the_draws_of_a_training_forward_come_in_nemo_s_order(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(encoder__dropout_emb=0.1, encoder__stochastic_depth_drop_prob=0.1).train()
    draws: list[tuple[str, tuple[int, ...]]] = []

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = real(*args, **kwargs)
            if name != "dropout" or kwargs.get("training", args[2] if len(args) > 2 else True):
                draws.append((name, tuple(out.shape)))
            return out

        monkeypatch.setattr(owner, name, call)

    spy(torch, "randn_like")
    spy(torch, "rand")
    spy(torch.nn.functional, "dropout")
    with torch.no_grad():
        model(**(model.golden_inputs() | {"apply_mask": True}))
    wide, inner, scores = (2, 20, 64), (2, 20, 256), (2, 4, 20, 20)
    layer = [inner, wide, scores, wide, wide, inner, wide]
    assert draws == [
        ("randn_like", (2, 25440)),
        ("randn_like", (2, 25440)),
        ("rand", (2, 160)),
        ("dropout", (1, 39, 64)),
        ("dropout", wide),
        *[("dropout", shape) for shape in layer],
        *[("dropout", shape) for shape in layer],
        ("rand", (1,)),
    ]
