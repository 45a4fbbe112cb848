"""GoldenCheckpoint in real trainings: good saves pass, a bad one stops the run and is explained."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getmodule
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.strategies import FSDPStrategy
from torch.utils.data import DataLoader

import harness
from harness import GoldenCheckpoint, GoldenMismatch, Policy
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.nest.model import AudioBatch, EncDecDenoiseMaskedTokenPredModel
from tests.model import training
from tests.model.distributed.ranks import run_ranks
from tests.model.training import Alters, Hook, Truncates, Tuned, Waits, saving, trainer

# What Lightning remarks on every training of this kind.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches.*",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Found .* in eval mode at the start",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)
SAVED = "ok identical  Tuned in memory at step {}  save: 11 identical"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """These models are too small for several threads, which only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(callback: GoldenCheckpoint) -> list[str]:
    return [Path(save.path).name for save in callback.saves]


# What passes


def test_a_healthy_run_passes_and_says_what_it_verified(tmp_path: Path) -> None:
    callback = GoldenCheckpoint()
    run = trainer(tmp_path, callback, saving(tmp_path))
    run.fit(Tuned())
    run.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert names(callback) == ["step=1.ckpt", "step=2.ckpt", "by_hand.ckpt"]
    assert [save.headlines for save in callback.saves] == [
        (SAVED.format(step),) for step in (1, 2, 2)
    ]
    assert all(save.error is None for save in callback.saves)


class Stateful(Tuned):
    """Its state dict has entries that are no dense tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(3).to_sparse())

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": torch.ones(3), "step": self.global_step}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_extra_state_and_sparse_buffers_are_verified_too(tmp_path: Path) -> None:
    callback = GoldenCheckpoint()
    trainer(tmp_path, callback, saving(tmp_path)).fit(Stateful())
    assert [save.error for save in callback.saves] == [None, None]

    def alter(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["_extra_state"]["scale"] += 1

    run = trainer(tmp_path, GoldenCheckpoint(), saving(tmp_path), plugins=[Alters(alter)])
    with pytest.raises(GoldenMismatch, match=r'_extra_state\["scale"\]'):
        run.fit(Stateful())


def test_it_goes_with_the_trainer_to_processes_that_are_spawned(tmp_path: Path) -> None:
    callback = pickle.loads(pickle.dumps(GoldenCheckpoint(every=2)))
    trainer(tmp_path, callback, saving(tmp_path), steps=3).fit(Tuned())
    assert names(callback) == ["step=1.ckpt", "step=3.ckpt"]


def test_several_fits_of_one_trainer_verify_each_save_once(tmp_path: Path) -> None:
    callback = GoldenCheckpoint()
    run = trainer(tmp_path, callback, saving(tmp_path))
    run.fit(Tuned())
    run.fit_loop.epoch_loop.max_steps = 3
    run.fit(Tuned())
    assert names(callback) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_checkpoint_is_verified_as_its_own_save_unless_it_is_a_link(
    tmp_path: Path, save_last: Any
) -> None:
    callback = GoldenCheckpoint()
    trainer(tmp_path, callback, saving(tmp_path, save_last=save_last)).fit(Tuned())
    last = ["last.ckpt"] if save_last is True else []
    assert names(callback) == ["step=1.ckpt", *last, "step=2.ckpt", *last]
    assert (tmp_path / "last.ckpt").exists()


def test_a_checkpoint_is_verified_before_it_is_deleted(tmp_path: Path) -> None:
    callback = GoldenCheckpoint()
    trainer(tmp_path, callback, saving(tmp_path, save_top_k=1)).fit(Tuned())
    assert names(callback) == ["step=1.ckpt", "step=2.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_every_counts_steps_so_that_each_kind_of_save_has_its_turn(tmp_path: Path) -> None:
    callback = GoldenCheckpoint(every=2)
    trainer(tmp_path, callback, saving(tmp_path, save_last=True), steps=4).fit(Tuned())
    assert names(callback) == ["step=1.ckpt", "last.ckpt", "step=3.ckpt", "last.ckpt"]


# What does not


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_tensor_zeroed_on_write_stops_the_run_and_is_named(
    tmp_path: Path, weights_only: bool
) -> None:
    callback = GoldenCheckpoint()
    checkpoints = saving(tmp_path, save_top_k=1, save_weights_only=weights_only)
    run = trainer(
        tmp_path, callback, checkpoints, plugins=[Alters(training.zero, start=2)], steps=4
    )
    with pytest.raises(GoldenMismatch, match=r"head\.bias") as stopped:
        run.fit(Tuned())
    assert "FAIL different  Tuned in memory at step 2  save: 10 identical, 1 different" in str(
        stopped.value
    )
    assert "4 of 4 elements differ" in str(stopped.value)
    assert "actual 0" in str(stopped.value)
    assert stopped.value.__notes__ == [f"next: {stopped.value.hint}"]
    assert run.global_step == 2
    # The evidence stays, and so does the good one before it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    assert [save.error for save in callback.saves] == [None, stopped.value]


@pytest.mark.parametrize(
    ("alter", "kind"),
    [
        (training.zero, "different: allclose is false (1)\n    head.bias"),
        (training.zero_in_place, "different: allclose is false (1)\n    head.bias"),
        (training.halve, "expected float32, actual float16:\n      head.bias"),
        (training.drop, "missing: only in expected (1)\n    head.bias"),
        (
            training.tear,
            "alias: tied weights are now separate, or the reverse (1)\n    head.weight",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_another_callback_does_to_the_weights_is_named(
    tmp_path: Path, alter: Callable[[dict[str, Any]], None], kind: str
) -> None:
    run = trainer(tmp_path, Hook(alter), GoldenCheckpoint(), saving(tmp_path))
    with pytest.raises(GoldenMismatch) as stopped:
        run.fit(Tuned())
    assert kind in str(stopped.value)
    assert "10 identical" in str(stopped.value)


def test_a_truncated_file_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, GoldenCheckpoint(), saving(tmp_path), plugins=[Truncates()])
    with pytest.raises(CheckpointError, match=r"step=1\.ckpt"):
        run.fit(Tuned())


def test_a_save_by_hand_after_the_training_is_verified_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, GoldenCheckpoint(), plugins=[Alters(training.zero)])
    run.fit(Tuned())
    with pytest.raises(GoldenMismatch, match=r"head\.bias"):
        run.save_checkpoint(tmp_path / "by_hand.ckpt")


def test_with_warn_the_run_goes_on(tmp_path: Path) -> None:
    callback = GoldenCheckpoint(on_mismatch="warn")
    run = trainer(tmp_path, callback, saving(tmp_path), plugins=[Alters(training.zero, start=2)])
    with pytest.warns(UserWarning, match=r"(?s)GoldenCheckpoint: FAIL.*head\.bias.*next: see"):
        run.fit(Tuned())
    assert run.global_step == 2
    assert [type(save.error) for save in callback.saves] == [type(None), GoldenMismatch]


def test_what_fails_unexpectedly_is_told_like_a_bad_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("harness.callbacks.lightning.open_checkpoint", fails)
    callback = GoldenCheckpoint(on_mismatch="warn")
    with pytest.warns(UserWarning, match="GoldenCheckpoint: a bug"):
        trainer(tmp_path, callback, saving(tmp_path)).fit(Tuned())
    assert names(callback) == ["step=1.ckpt", "step=2.ckpt"]


def test_after_an_exception_a_bad_save_is_a_warning_and_the_exception_is_raised(
    tmp_path: Path,
) -> None:
    callback = GoldenCheckpoint()
    checkpoints = saving(tmp_path, every_n_train_steps=9, save_on_exception=True)
    run = trainer(tmp_path, callback, checkpoints, plugins=[Alters(training.zero)], steps=4)
    with (
        pytest.raises(ZeroDivisionError, match="the batch is bad"),
        pytest.warns(UserWarning, match=r"head\.bias"),
    ):
        run.fit(training.Fails())
    assert names(callback) == ["step=2.ckpt"]


def test_what_is_saved_because_of_a_bad_save_tells_nothing_more(tmp_path: Path) -> None:
    callback = GoldenCheckpoint()
    checkpoints = saving(tmp_path, save_on_exception=True)
    run = trainer(tmp_path, callback, checkpoints, plugins=[Alters(training.zero)])
    with pytest.raises(GoldenMismatch, match=r"head\.bias") as stopped:  # and warns of nothing
        run.fit(Tuned())
    first, second = callback.saves
    assert first.error is stopped.value
    assert second.error is not None


# What is meant


def test_what_a_policy_ignores_may_be_left_out(tmp_path: Path) -> None:
    policy = Policy(exact=True, ignore=("head.bias",))
    callback = GoldenCheckpoint(policy=policy)
    trainer(tmp_path, Hook(training.drop), callback, saving(tmp_path)).fit(Tuned())
    assert all("10 identical, 1 ignored" in save.headlines[0] for save in callback.saves)


def test_a_policy_that_fits_no_tensor_stops_the_run(tmp_path: Path) -> None:
    callback = GoldenCheckpoint(policy=Policy(ignore=("haed.bias",)))
    with pytest.raises(UsageError, match=r"haed\.bias"):
        trainer(tmp_path, callback, saving(tmp_path)).fit(Tuned())


def test_with_averaged_weights_in_its_place_the_section_of_the_model_is_verified(
    tmp_path: Path,
) -> None:
    average = EMAWeightAveraging(decay=0.5)
    with pytest.raises(GoldenMismatch, match=r"body\.weight") as bad:
        trainer(tmp_path, average, GoldenCheckpoint(), saving(tmp_path)).fit(Tuned())
    assert 'GoldenCheckpoint(section="current_model_state")' in (bad.value.hint or "")
    callback = GoldenCheckpoint(section="current_model_state")
    trainer(tmp_path, EMAWeightAveraging(decay=0.5), callback, saving(tmp_path)).fit(Tuned())
    assert [save.headlines for save in callback.saves] == [(SAVED.format(s),) for s in (1, 2)]


# Asynchronous saves


def test_asynchronous_saves_are_verified_at_the_latest_when_the_fit_ends(tmp_path: Path) -> None:
    callback, plugin = GoldenCheckpoint(), AsyncCheckpointIO()
    run = trainer(tmp_path, callback, saving(tmp_path), plugins=[plugin])
    run.fit(Tuned())
    assert [save.headlines for save in callback.saves] == [(SAVED.format(s),) for s in (1, 2)]
    # Outside of a fit nobody would come back for it.
    run.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert names(callback)[2:] == ["by_hand.ckpt"]
    plugin.teardown()


def test_a_bad_asynchronous_save_stops_the_run_with_the_values_of_its_step(tmp_path: Path) -> None:
    callback = GoldenCheckpoint()
    run = trainer(
        tmp_path, callback, saving(tmp_path), plugins=[AsyncCheckpointIO(Alters(training.zero))]
    )
    with pytest.raises(GoldenMismatch, match=r"head\.bias") as stopped:
        run.fit(Tuned())
    assert "Tuned in memory at step 1  save: 10 identical, 1 different" in str(stopped.value)
    assert "actual 0" in str(stopped.value)


class Releases(pl.Callback):
    """Lets the plugin write before the second step ends, and notes what was verified until then."""

    def __init__(self, plugin: Waits, callback: GoldenCheckpoint) -> None:
        self.plugin, self.callback = plugin, callback
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(len(self.callback.saves))
        if trainer.global_step == 2:
            self.plugin.go.set()


def test_training_goes_on_while_an_asynchronous_save_is_written(tmp_path: Path) -> None:
    callback, plugin = GoldenCheckpoint(), Waits()
    releases = Releases(plugin, callback)
    run = trainer(
        tmp_path, callback, releases, saving(tmp_path), plugins=[AsyncCheckpointIO(plugin)]
    )
    run.fit(Tuned())
    assert releases.seen == [0, 0]
    # What was read back is the model of that step, not of a later one.
    assert [save.headlines for save in callback.saves] == [(SAVED.format(s),) for s in (1, 2)]


def test_a_bad_asynchronous_save_is_told_after_the_batch_in_which_it_was_verified(
    tmp_path: Path,
) -> None:
    class SavesOnce(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")
            else:
                plugin._executor.submit(int).result()

    plugin = AsyncCheckpointIO(Alters(training.zero))
    run = trainer(tmp_path, GoldenCheckpoint(), SavesOnce(), plugins=[plugin], steps=4)
    with pytest.raises(GoldenMismatch, match=r"head\.bias"):
        run.fit(Tuned())
    assert run.global_step in (1, 2)


def test_an_asynchronous_checkpoint_is_deleted_only_after_it_was_verified(tmp_path: Path) -> None:
    callback, plugin = GoldenCheckpoint(), Waits()
    run = trainer(
        tmp_path, callback, saving(tmp_path, save_top_k=1), plugins=[AsyncCheckpointIO(plugin)]
    )
    # The second save comes before the first is written, and Lightning then deletes the first.
    writes = threading.Timer(0.5, plugin.go.set)
    writes.start()
    run.fit(Tuned())
    writes.join()
    assert [save.headlines for save in callback.saves] == [(SAVED.format(s),) for s in (1, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_the_error_of_a_write_that_failed_in_its_thread_is_raised_as_it_is(tmp_path: Path) -> None:
    callback, plugin = GoldenCheckpoint(), Waits(error=OSError("no space left"))
    run = trainer(
        tmp_path,
        callback,
        Releases(plugin, callback),
        saving(tmp_path),
        plugins=[AsyncCheckpointIO(plugin)],
    )
    with pytest.raises(OSError, match="no space left"):
        run.fit(Tuned())
    assert callback.saves[0].error is plugin.error


# Golden and stages


def golden_of(folder: Path, module: pl.LightningModule) -> Path:
    harness.record(module, folder / "golden.safetensors")
    return folder / "golden.safetensors"


def test_a_golden_fixes_the_structure_and_what_is_frozen(tmp_path: Path) -> None:
    module = Tuned()
    callback = GoldenCheckpoint(golden_of(tmp_path, module))
    trainer(tmp_path, callback, saving(tmp_path)).fit(module)
    _, against_golden = callback.saves[-1].headlines
    assert against_golden.startswith("ok identical")
    assert "file: 2 identical (section state_dict; not compared: " in against_golden


def test_a_frozen_weight_that_is_not_the_golden_s_is_named(tmp_path: Path) -> None:
    module = Tuned()
    golden = golden_of(tmp_path, module)
    with torch.no_grad():
        module.frozen.bias[2] += 1
    with pytest.raises(GoldenMismatch, match=r"frozen\.bias") as stopped:
        trainer(tmp_path, GoldenCheckpoint(golden), saving(tmp_path)).fit(module)
    assert "1 of 4 elements" in str(stopped.value)
    assert "\n  note: the values of 9 tensors were not compared, since they are not frozen" in str(
        stopped.value
    )
    assert "head.weight" not in str(stopped.value)


def test_a_trained_weight_of_another_shape_or_dtype_than_the_golden_s_is_named(
    tmp_path: Path,
) -> None:
    golden = golden_of(tmp_path, Tuned())
    module = Tuned()
    module.norm = torch.nn.BatchNorm1d(4, dtype=torch.float64)
    module.body = torch.nn.Linear(4, 4, dtype=torch.float64)
    module.head = torch.nn.Linear(4, 5, dtype=torch.float64)
    module.frozen.double()
    with pytest.raises(GoldenMismatch) as stopped:
        trainer(tmp_path, GoldenCheckpoint(golden), saving(tmp_path), precision="64-true").fit(
            module
        )
    assert "\n    expected float32, actual float64:" in str(stopped.value)
    assert "\n    expected [4, 4], actual [5, 4]:\n      head.weight" in str(stopped.value)


def test_a_golden_that_is_not_there_is_an_error_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(GoldenError):
        GoldenCheckpoint(tmp_path / "golden.safetensors")


def test_stages_follow_each_file_through_load_and_reload(tmp_path: Path) -> None:
    callback = GoldenCheckpoint(stages="reload")
    run = trainer(tmp_path, callback, saving(tmp_path, save_weights_only=True))
    run.fit(Tuned())
    random = torch.get_rng_state()
    run.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert torch.equal(torch.get_rng_state(), random)
    assert len(callback.saves) == 3
    for save in callback.saves:
        assert [line.partition("  ")[2].rpartition(": ")[0] for line in save.headlines] == [
            f"Tuned in memory at step {save.global_step}  save",
            f"{save.path}  load",
            f"{save.path}  reload",
        ]


def test_a_model_whose_load_leaves_a_weight_random_is_stopped_at_its_first_save(
    tmp_path: Path,
) -> None:
    callback = GoldenCheckpoint(stages="load")
    with pytest.raises(GoldenMismatch, match=r"norm\.weight") as stopped:
        trainer(tmp_path, callback, saving(tmp_path)).fit(training.Forgetful())
    assert "unwritten" in str(stopped.value)
    assert [len(save.headlines) for save in callback.saves] == [2]


def test_nest_trains_under_the_shipped_golden_until_its_codebooks_change(
    tmp_path: Path, data: Path, shipped_golden: Path
) -> None:
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(data / "nest_tiny.nemo").train()
    inputs = model.golden_inputs()
    signal, length = inputs["input_signal"][:, :8000], torch.tensor([8000, 8000])
    batch = AudioBatch(["a", "b"], signal, length, None, None, signal, length)
    loader = DataLoader([batch], batch_size=None)
    callback = GoldenCheckpoint(shipped_golden, stages="reload")
    trainer(tmp_path, callback, saving(tmp_path), steps=1).fit(model, loader)
    (save,) = callback.saves
    assert save.error is None
    saved, against_golden, *followed = [line.rpartition("  ")[2] for line in save.headlines]
    assert saved == "save: 99 identical"
    assert against_golden.startswith("file: 3 identical (section state_dict; not compared: ")
    assert followed == ["load: 99 identical", "reload: 99 identical"]

    with torch.no_grad():
        model.quantizer.codebooks[0, 0, 0] += 1
    with pytest.raises(GoldenMismatch, match=r"quantizer\.codebooks") as stopped:
        trainer(tmp_path, GoldenCheckpoint(shipped_golden), saving(tmp_path), steps=1).fit(
            model, loader
        )
    assert "1 different" in str(stopped.value)


# Two processes


def test_both_processes_of_a_team_stop_at_a_bad_save_and_one_tells_why(tmp_path: Path) -> None:
    ranks = run_ranks(2, training.train_together, tmp_path, folder=tmp_path)
    assert [rank.code for rank in ranks] == [1, 1], ranks
    (out, err), (other_out, other_err) = [(rank.out, rank.err) for rank in ranks]

    good = out.splitlines()[:16]
    assert good[::4] == ["good"] * 4
    assert good[1::4] == [SAVED.format(step) for step in (1, 2, 3, 4)]
    assert all(line.startswith("ok identical") for line in good if line != "good")
    told = "stopped: FAIL different  Tuned in memory at step 4  save: 10 identical, 1 different"
    assert out.splitlines()[16:] == [f"rank 0 {told}"]
    file = tmp_path / "async" / "step=4.ckpt"
    assert other_out == f"rank 1 stopped: {file}: a bad save, see the report of rank 0\n"

    assert "GoldenMismatch: FAIL different  Tuned in memory at step 2" in err
    assert "expected float32, actual float16" in err
    assert (err + other_err).count("head.bias") == 1
    file = tmp_path / "bad" / "step=2.ckpt"
    assert f"GoldenMismatch: {file}: a bad save, see the report of rank 0" in other_err


# What is refused


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"stages": "roundtrip"}, {"on_mismatch": "ignore"}], ids=str
)
def test_options_that_mean_nothing_are_refused(options: Any) -> None:
    with pytest.raises(UsageError) as refused:
        GoldenCheckpoint(**options)
    assert refused.value.hint


def test_stages_that_build_a_model_are_refused_beside_asynchronous_saves(tmp_path: Path) -> None:
    callback = GoldenCheckpoint(stages="load")
    with pytest.raises(UsageError, match="AsyncCheckpointIO"):
        trainer(tmp_path, callback, plugins=[AsyncCheckpointIO()]).fit(Tuned())


def test_strategies_that_write_shards_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run._accelerator_connector.strategy = FSDPStrategy()  # needs a GPU to be asked for
    with pytest.raises(UsageError, match="FSDPStrategy writes shards"):
        GoldenCheckpoint().setup(run, Tuned(), "fit")


def test_a_class_that_cannot_be_built_anew_is_refused_before_the_training(tmp_path: Path) -> None:
    class Local(Tuned):
        pass

    callback = GoldenCheckpoint(stages="load")
    with pytest.raises(UsageError, match=r"<locals>\.Local is a class of a function") as refused:
        trainer(tmp_path, callback, saving(tmp_path)).fit(Local())
    assert "live=LiveOptions(target=" in (refused.value.hint or "")
    assert not list(tmp_path.glob("*.ckpt"))


# Both packages


def test_it_is_a_callback_of_every_lightning_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package, other = ModuleType("lightning"), ModuleType("lightning.pytorch")
    other.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", other)
    home = getmodule(GoldenCheckpoint)
    assert home is not None
    # A fresh one: the first import has decided which packages there are.
    spec = spec_from_file_location("a_fresh_callback", home.__file__ or "")
    assert spec is not None
    assert spec.loader is not None
    fresh = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_fresh_callback", fresh)
    spec.loader.exec_module(fresh)
    assert issubclass(fresh.GoldenCheckpoint, (other.Callback,))
    assert issubclass(fresh.GoldenCheckpoint, pl.Callback)
