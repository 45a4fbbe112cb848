"""A model's YAML config, resolved and parsed."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harness.errors import ModelError


def load_config(path: str | Path) -> dict[str, Any]:
    """Load a YAML file and return its resolved `model` section, or all of it without one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or "").lower() if isinstance(error, OSError) else "not UTF-8"
        raise ModelError(f"{path}: unreadable config: {why}", hint="check the path") from error
    config = parse(text, str(path))
    model = config.get("model", config)
    if not isinstance(model, dict):
        raise ModelError(
            f"{path}: model = {model!r} is not valid (expected: a section (mapping))",
            hint=f"set {path}: model to a section (mapping)",
        )
    return model


def resolve(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Copy a model config into plain dicts and lists, interpolations resolved, order kept."""
    try:
        node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ModelError(
            f"config: {str(error).splitlines()[0]}", hint="correct the interpolation or the value"
        ) from error
    return typing.cast("dict[str, Any]", plain)


def parse(text: str, where: str) -> dict[str, Any]:
    """Parse YAML (omegaconf's dialect: `1e-5` is a number) into a resolved plain config."""
    try:
        node = OmegaConf.create(text)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ModelError(f"{where}: not a YAML config: {error}", hint="correct the file") from error
    if not isinstance(node, DictConfig):
        raise ModelError(f"{where}: the config is not a mapping", hint="correct the file")
    return resolve(node)
