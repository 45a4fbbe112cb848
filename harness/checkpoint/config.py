"""A checkpoint's config as plain data: of a .nemo, of a .ckpt, or of a folder's JSON files.

Refused: aliases, deep nesting, long texts, and more values than a config has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from harness.checkpoint.sources.paths import AnyPath
from harness.checkpoint.sources.source import Source, read
from harness.checkpoint.unpickling.inert import Global, OpaqueKey, Record
from harness.errors import CheckpointError

_MAX_YAML_DEPTH = 64
_MAX_YAML_SCALAR = 1 << 16
# What yaml's constructors raise for values that do not fit their tags.
_UNFIT = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


def config_of_yaml(path: AnyPath, text: bytes) -> Mapping[str, Any] | None:
    import yaml

    loader = _loader()
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                # They would let a page of text expand without bound; NeMo never writes any.
                raise ValueError("it repeats parts of itself by aliases")
            if depth > _MAX_YAML_DEPTH:
                raise ValueError(f"it is nested deeper than {_MAX_YAML_DEPTH} levels")
            if len(getattr(event, "value", "")) > _MAX_YAML_SCALAR:
                raise ValueError(f"it holds a text of more than {_MAX_YAML_SCALAR} characters")
        plain = plain_config(yaml.load(text, Loader=loader))
    except (yaml.YAMLError, *_UNFIT) as error:
        raise CheckpointError(
            f"{path}: its model_config.yaml is no plain YAML: {str(error).partition(chr(10))[0]}",
            hint="get the archive again from where it came",
        ) from error
    return plain if isinstance(plain, dict) else None


@cache
def _loader() -> Any:
    """YAML as omegaconf reads it, and NeMo with it: `1e-5` is a number."""
    import yaml

    loader = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    number = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))  # type: ignore[attr-defined]
    return loader


def hyperparameters_of(root: Any) -> Mapping[str, Any] | None:
    value = root.get("hyper_parameters") if isinstance(root, dict) else None
    if not isinstance(value, (dict, Record)):
        return None
    try:
        plain = plain_config(value)
    except ValueError:
        return None
    return plain if isinstance(plain, dict) else None


# Of a folder: that of the model, of its parts, and of how it is used; others count by their bytes.
_SETTINGS = re.compile(
    r"(.*/)?((generation_|adapter_|scheduler_|preprocessor_)?config|model_index|modules)\.json"
)
_MAX_SETTINGS_NBYTES = 1 << 20


def settings_of(name: str, source: Source) -> Mapping[str, Any] | None:
    """The settings in a file beside the weights; None where its bytes have to do."""
    if not _SETTINGS.fullmatch(name) or source.nbytes > _MAX_SETTINGS_NBYTES:
        return None
    try:
        plain = plain_config(json.loads(read(source, 0, source.nbytes)))
    except (ValueError, RecursionError):
        return None
    if name == "config.json" and isinstance(plain, dict):
        return plain
    return {name.removesuffix(".json"): plain}


_MAX_CONFIG_VALUES = 100_000


def plain_config(value: Any) -> Any:
    """Turn a pickled configuration (dicts, omegaconf containers and nodes) into plain data.

    omegaconf containers keep their children in the state `_content`, its leaves in `_val`.
    Anything that is not data becomes its type's name. Raises ValueError if it is too large.
    """
    budget = [_MAX_CONFIG_VALUES]

    def named(key: Any, depth: int) -> str:
        if isinstance(key, OpaqueKey):
            return f"<{type(key.value).__name__}>"
        return str(convert(key, depth) if isinstance(key, str) else key)

    def convert(item: Any, depth: int) -> Any:
        budget[0] -= 1 + (len(item) // 64 if isinstance(item, str) else 0)
        if budget[0] < 0 or depth > 64:
            raise ValueError("the configuration is too large")
        if isinstance(item, int) and item.bit_length() > 64:
            return "<int>"
        if item is None or isinstance(item, (str, bool, int, float)):
            return item
        if isinstance(item, dict):
            return {named(key, depth): convert(child, depth + 1) for key, child in item.items()}
        if isinstance(item, (list, tuple)):
            return [convert(child, depth + 1) for child in item]
        if isinstance(item, Record):
            state = item.state if isinstance(item.state, dict) else {}
            for held in ("_content", "_val"):
                if held in state:
                    return convert(state[held], depth + 1)
            if item.pairs:
                return convert(item.pairs, depth + 1)
            return f"<{item.callee}>" if isinstance(item.callee, Global) else "<object>"
        return f"<{item}>" if isinstance(item, Global) else f"<{type(item).__name__}>"

    return convert(value, 0)
