"""What is carried beside the weights: settings, hyperparameters, the other files of an archive."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import harness
from harness import Policy, api
from harness.comparison.comparison import Comparison, render

_CONFIG: dict[str, Any] = {
    "encoder": {"xscaling": True, "d_model": 512, "layers": [1, 2]},
    "optim": [{"name": "adamw", "lr": 1e-3}],
    "train_ds": {"manifest_filepath": "/data/a.json", "batch_size": 4},
    "nemo_version": "2.0.0",
    "tokenizer": {"model_path": "nemo:0123456789abcdef0123456789abcdef_tokenizer.model"},
}


def _nemo(path: Path, config: dict[str, Any], **members: bytes) -> Path:
    weights = io.BytesIO()
    torch.save({"w": torch.ones(3)}, weights)
    files = {"model_config.yaml": yaml.safe_dump(config).encode(), **members}
    with tarfile.open(path, "w") as archive:
        for name, data in {**files, "model_weights.ckpt": weights.getvalue()}.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _changed(config: Any, path: str, value: Any) -> Any:
    first, _, rest = path.partition(".")
    key: Any = int(first) if isinstance(config, list) else first
    copy = list(config) if isinstance(config, list) else dict(config)
    copy[key] = _changed(config[key], rest, value) if rest else value
    return copy


def _told(found: Comparison) -> list[tuple[str, str, str | None, str | None]]:
    return [(f.kind, f.key, f.expected, f.actual) for f in found.findings]


@pytest.mark.parametrize(
    ("path", "value", "before", "after"),
    [
        ("encoder.xscaling", False, "true", "false"),
        ("encoder.d_model", 256, "512", "256"),
        ("encoder.layers", [1, 3], "[1, 2]", "[1, 3]"),
        ("encoder.layers", None, "[1, 2]", "null"),
        ("optim.0.lr", 0.01, "0.001", "0.01"),
    ],
)
def test_a_setting_that_changed_is_a_note_with_both_values(
    tmp_path: Path, path: str, value: Any, before: str, after: str
) -> None:
    golden = tmp_path / "golden.safetensors"
    one = _nemo(tmp_path / "one.nemo", _CONFIG)
    other = _nemo(tmp_path / "other.nemo", _changed(_CONFIG, path, value))
    harness.record(one, golden)
    for found in (harness.verify(other, golden), harness.diff(one, other)):
        assert (found.verdict, found.exit_code) == ("identical", 0)
        assert _told(found) == [("config", path, before, after)]
        assert f"{path}  {before} → {after}" in render(found)
    strict = harness.verify(other, golden, policy=Policy(check_config=True))
    assert (strict.verdict, strict.exit_code) == ("different", 1)


def test_where_and_when_are_one_line_and_never_fail(tmp_path: Path) -> None:
    other = _changed(_CONFIG, "nemo_version", "2.1.0")
    other = _changed(other, "train_ds", {"manifest_filepath": "/elsewhere/b.json", "workers": 3})
    one = _nemo(tmp_path / "one.nemo", _CONFIG)
    found = harness.diff(
        one, _nemo(tmp_path / "other.nemo", other), policy=Policy(check_config=True)
    )
    assert found.findings == ()
    assert found.notes == (
        "4 settings that only say where or when also differ: train_ds (3), nemo_version",
    )


def test_other_files_of_an_archive_are_compared_under_their_names(tmp_path: Path) -> None:
    golden = tmp_path / "golden.safetensors"
    name, again = ("0123456789abcdef" * 2 + "_tokenizer.model", "f" * 32 + "_tokenizer.model")
    one = _nemo(tmp_path / "one.nemo", _CONFIG, **{name: b"a b c", "vocab.txt": b"a"})
    harness.record(one, golden)
    saved = _changed(_CONFIG, "tokenizer.model_path", f"nemo:{again}")
    same = _nemo(tmp_path / "same.nemo", saved, **{again: b"a b c", "vocab.txt": b"a"})
    assert harness.verify(same, golden).findings == ()
    other = _nemo(tmp_path / "other.nemo", saved, **{again: b"a b d"})
    changed, missing = harness.verify(other, golden).findings
    assert changed.key == "tokenizer.model"
    assert changed.expected != changed.actual
    assert (missing.key, missing.actual) == ("vocab.txt", "nothing")
    assert harness.verify(one, golden).findings == ()


def test_hyperparameters_of_lightning_are_compared_without_secrets(tmp_path: Path) -> None:
    def saved(name: str, **settings: Any) -> Path:
        state = {"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.4.0"}
        torch.save({**state, "hyper_parameters": settings}, tmp_path / name)
        return tmp_path / name

    golden = tmp_path / "golden.safetensors"
    harness.record(saved("one.ckpt", lr=0.1, api_key="abc", nested={"dim": 3}), golden)
    other = saved("other.ckpt", lr=0.2, api_key="xyz", nested={"dim": 3})
    found = harness.verify(other, golden)
    assert {finding.key for finding in found.findings} == {"lr", "api_key"}
    assert "xyz" not in render(found)
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    assert harness.verify(tmp_path / "plain.pt", golden).findings == ()


def test_an_update_takes_the_settings_over(tmp_path: Path) -> None:
    golden = tmp_path / "golden.safetensors"
    harness.record(_nemo(tmp_path / "one.nemo", _CONFIG), golden)
    other = _nemo(tmp_path / "other.nemo", _changed(_CONFIG, "encoder.xscaling", False))
    api.update(other, golden)
    assert harness.verify(other, golden).findings == ()


def test_nemo_keeps_in_a_ckpt_what_its_archive_has(data: Path) -> None:
    compared = api.diff(data / "nest_tiny.nemo", data / "nest_tiny.ckpt")
    assert compared.count("config") == 0
