"""What of a configuration a golden holds: no secret, and no place of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import api
from harness.golden.file import read_golden
from harness.text.disclosure import disclosed


@pytest.mark.parametrize(
    ("config", "secret"),
    [
        ({"wandb_api_key": "S3CR3T"}, "S3CR3T"),
        ({"apiKey": "S3CR3T"}, "S3CR3T"),
        ({"AWS_SECRET_ACCESS_KEY": "S3CR3T"}, "S3CR3T"),
        ({"hf_token": ["S3CR3T"]}, "S3CR3T"),
        ({"token": {"value": "S3CR3T"}}, "S3CR3T"),
        ({"db": {"password": 74923}}, "74923"),
        ({"credentials": {"user": "me", "data": {"x": ["S3CR3T"]}}}, "S3CR3T"),
        ({"url": "postgresql://me:S3CR3T@host/db"}, "S3CR3T"),
        ({"remote": "https://S3CR3T@host/repository.git"}, "S3CR3T"),
        ({"data": "https://host/x?X-Amz-Signature=S3CR3T&a=b"}, "S3CR3T"),
        ({"overrides": ["trainer.max_steps=5", "logger.api_key=S3CR3T"]}, "S3CR3T"),
        ({"argv": ["train.py", "--api-key", "S3CR3T"]}, "S3CR3T"),
        ({"https://me:S3CR3T@host/": 1}, "S3CR3T"),
    ],
)
def test_secrets_are_digests_which_tell_that_they_changed(config: Any, secret: str) -> None:
    kept = disclosed(config)
    assert secret not in str(kept)
    assert "<secret, BLAKE3 " in str(kept)
    assert kept == disclosed(config)
    other = disclosed(eval(repr(config).replace(secret, f"{secret[::-1]}")))
    assert other != kept


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 8, "pad_token_id": 0, "tokenizer": "bpe", "keyboard": "qwerty"},
        {"password": None, "token": "", "keys": [1, 2]},
        {"url": "https://host/x?version=3", "lr": 1e-3, "attention": {"key": {"bias": True}}},
        {"_target_": "package.Model", "email": "me@host", "sum": "a = b"},
    ],
)
def test_what_is_no_secret_stands_as_it_is(config: Any) -> None:
    assert disclosed(config) == config


_plain = st.recursive(
    st.none() | st.integers() | st.sampled_from(["", "/a/b", "~x", "a=b", "x://u:p@h", "key=5"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["key", "password", "a", "--token", "/p"]), inner)
    ),
    max_leaves=8,
)


@given(_plain)
def test_what_was_disclosed_once_stays_as_it_is(value: Any) -> None:
    assert disclosed(disclosed(value)) == disclosed(value)


def test_a_golden_holds_no_secret_of_the_hyperparameters(tmp_path: Path) -> None:
    hyperparameters = {"wandb_api_key": "S3CR3T", "db": "postgres://u:S3CR3T@host/x", "lr": 1e-3}
    torch.save(
        {"state_dict": {"w": torch.ones(3)}, "hyper_parameters": hyperparameters},
        tmp_path / "model.ckpt",
    )
    golden = api.record(tmp_path / "model.ckpt", tmp_path / "g.safetensors")
    assert b"S3CR3T" not in tmp_path.joinpath("g.safetensors").read_bytes()
    config = read_golden(golden.path).fingerprint.config
    assert config is not None
    assert config["lr"] == 1e-3
    assert config["db"].startswith("<secret, BLAKE3 ")
