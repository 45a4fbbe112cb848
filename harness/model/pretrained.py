"""Classes that load and save folders of their own: `from_pretrained` and `save_pretrained`.

In: a class (of transformers, diffusers, peft, sentence-transformers, or one like them) and a local
folder. Out: the model, from the files in the folder alone. Refused (ModelError): the hub, code that
lies in the folder, and modules that an adapter's configuration names.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from harness.errors import ModelError

_CONFIGS = ("config.json", "adapter_config.json", "modules.json")
_MAX_CONFIG_NBYTES = 16 << 20
# Settings that say where a model is from, what wrote it, and what an adapter was made for.
_OF_ELSEWHERE = {
    *("_name_or_path", "name_or_path", "transformers_version", "_diffusers_version"),
    *("base_model_name_or_path", "auto_mapping", "revision", "peft_version"),
}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def folder_of(path: Path) -> Path | None:
    """The folder that `from_pretrained` would be given for a checkpoint; None if it is of none."""
    folder = path if path.is_dir() else path.parent
    return folder if any((folder / name).is_file() for name in _CONFIGS) else None


def is_pretrained(make: object) -> bool:
    """Whether a class loads folders and saves them, or makes one that does (`AutoModel`)."""
    if not isinstance(make, type):
        return False
    loads = hasattr(make, "from_pretrained") or _is_sentence_transformer(make)
    return loads and (hasattr(make, "save_pretrained") or not issubclass(make, nn.Module))


def _is_sentence_transformer(make: type) -> bool:
    return any(base.__name__ == "SentenceTransformer" for base in make.__mro__)


def load_pretrained(make: Any, folder: Path, *, base: Path | None = None) -> Any:
    """Load the model in a folder by its class: no hub, no code of the folder, nothing but files.

    `base` is the folder of the model that an adapter is for. Raises ModelError where one is needed.
    """
    with offline():
        if not hasattr(make, "from_pretrained"):
            return make(str(folder), local_files_only=True, trust_remote_code=False)
        if _takes_a_model(make):
            _check_adapter(folder)
            if base is None:
                raise ModelError(
                    f"{folder}: an adapter, which {make.__name__} needs a base model for",
                    hint="give that model: --base FOLDER",
                )
            return make.from_pretrained(_model_in(base), str(folder), local_files_only=True)
        options = {"local_files_only": True, "trust_remote_code": False}
        if _is_of(make, "diffusers"):  # which keeps what it does not know
            del options["trust_remote_code"]
        return make.from_pretrained(str(folder), **options)


def settings_of(module: nn.Module) -> dict[str, Any] | None:
    """The settings that a loaded model has, as its class reads them; None where it keeps none.

    A file of another version has them under other names.
    """
    found = getattr(module, "peft_config", None) or getattr(module, "config", None)
    if not isinstance(found, Mapping) and not hasattr(found, "to_dict"):
        return None
    settings: dict[str, Any] = _plain(found)
    return settings


def _plain(value: Any) -> Any:
    if callable(to_dict := getattr(value, "to_dict", None)):
        value = to_dict()
    if not isinstance(value, Mapping):
        return value
    return {k: _plain(v) for k, v in value.items() if k not in _OF_ELSEWHERE}


def _is_of(make: type, library: str) -> bool:
    return any(base.__module__.partition(".")[0] == library for base in make.__mro__)


def _takes_a_model(make: type) -> bool:
    """Whether a class puts an adapter onto a model; one of the user's may hide it by `*args`."""
    loads = (vars(base).get("from_pretrained") for base in make.__mro__)
    functions = (getattr(load, "__func__", load) for load in loads if load is not None)
    return any([*inspect.signature(one).parameters][1:2] == ["model"] for one in functions)


def _model_in(folder: Path) -> nn.Module:
    """The base model in a folder, of the class of transformers that its config names."""
    config = _json(folder / "config.json")
    transformers = sys.modules.get("transformers")
    names = config.get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if names and transformers else None
    if not is_pretrained(kind):
        raise ModelError(
            f"{folder}: not a transformers model (its config.json says {names})",
            hint="give --model a function that returns the model with its adapter",
        )
    model: nn.Module = load_pretrained(kind, folder)
    return model


def _check_adapter(folder: Path) -> None:
    """peft imports the module that `megatron_core` names: a checkpoint must not choose it."""
    config = _json(folder / "adapter_config.json")
    if config.get("megatron_config") is not None:
        raise ModelError(
            f"{folder}: loading its adapter would import {config.get('megatron_core')}",
            hint="set megatron_config to null in adapter_config.json",
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_NBYTES:
            raise ValueError(f"more than {_MAX_CONFIG_NBYTES} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not a configuration: {error}", hint="give a folder that save_pretrained wrote"
        ) from error
    return found


@contextmanager
def offline() -> Iterator[None]:
    """Keep huggingface_hub from asking the hub for what a folder lacks, or names elsewhere."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    constants: Any = sys.modules.get("huggingface_hub.constants")
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    try:
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
        if constants is not None:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if constants is not None:
            constants.HF_HUB_OFFLINE = was
