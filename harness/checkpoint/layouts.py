"""How libraries lay out a folder of weights: transformers, PEFT, diffusers, accelerate, DeepSpeed.

In: a folder. Out: the files that hold weights, by the name of their part, in the order of
precedence of the library that reads them, and the names of the files that were left aside. No file
is opened but those of one line that name another folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from harness.checkpoint.sources.access import open_source
from harness.checkpoint.sources.paths import METADATA, AnyPath, is_file
from harness.checkpoint.sources.source import read

_MAX_FILES = 100_000
_MAX_NAME_NBYTES = 255
# Of one model the first of these is read, as transformers and diffusers do.
_FORMS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|adapter_model|diffusion_pytorch_model|consolidated)"
    r"(?P<number>_\d+)?(?P<variant>\.(?!safetensors|bin)\w+)?"
    rf"(?P<form>{'|'.join(re.escape(form) for form in _FORMS)})"
)
# The same model under the name of an older format, or of another program.
_SAME = {"pytorch_model": "model", "consolidated": "model"}
_STEMS = ("model", "pytorch_model", "consolidated")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# What other programs make of the weights, and what training keeps beside them.
_OTHER_FORMS = (
    *(".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"),
    *(".tflite", ".pb", ".mlmodel", ".keras"),
)
# Configurations and tokenizers, but not what a training says of itself.
_BESIDE = re.compile(
    r"(?!trainer_state|.*_results|.*\.index\.)(.*config\.json|model_index\.json|modules\.json"
    r"|.*\.jinja|(tokenizer|vocab|added_tokens|special_tokens_map|processor)\b.*|merges\.txt"
    r"|.*\.spm|sentencepiece.*\.model|spiece\.model)"
)
_MAX_BESIDE = 200
# A module of sentence-transformers, behind the model in the folder itself: 2_Dense.
_MODULE = re.compile(r"\d+_[A-Z]\w*")
# A folder with one of these has parts in the folders below it.
_OF_PARTS = ("model_index.json", "modules.json")
# Folders that are known to hold the weights of a larger save: NeMo 2, Megatron.
_INNER = ("weights", "model/weights", "model_weights", "model")
_LATEST = ("latest", "latest_checkpointed_iteration.txt")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The weights in a folder: files by the name of their part, "" where there is but one.

    `others` hold weights, too, and were left aside; those `beside` describe the model.
    """

    parts: Mapping[str, AnyPath] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def layout_of(folder: AnyPath) -> Layout:
    """Find the files with the weights of a folder; no parts where none has a known name."""
    names = names_in(folder)
    top = _weights_among(folder, names)
    parts, others, beside = dict(top.parts), list(top.others), _describing(names)
    is_of_parts = any(name in names for name in _OF_PARTS)
    for name in (n for n in names if not n.startswith(".") and (folder / n).is_dir()):
        inside = names_in(folder / name)
        below = _weights_among(folder / name, inside)
        if is_of_parts:
            beside += (f"{name}/{other}" for other in _describing(inside))
        if is_of_parts or not top.parts or _MODULE.fullmatch(name):
            for part, path in below.parts.items():
                parts[f"{name}/{part}" if part else name] = path
            others += (f"{name}/{other}" for other in below.others)
        elif below.parts:
            others.append(f"{name}/")
    if not (is_of_parts or top.parts):
        # Several models side by side are no one checkpoint: nobody said that they are.
        return Layout() if len(parts) != 1 else Layout(parts={"": next(iter(parts.values()))})
    return Layout(parts=parts, others=tuple(others), beside=tuple(beside[:_MAX_BESIDE]))


def _describing(names: Iterable[str]) -> list[str]:
    """The files that say what a model is, and how it is used."""
    return [name for name in names if _BESIDE.fullmatch(name)]


def inner_folder(folder: AnyPath) -> AnyPath:
    """The folder that holds the checkpoint: itself, or one that it names or is known to have."""
    names = names_in(folder)
    for name in _LATEST:
        if name in names and (folder / name).is_file():
            said = _line_of(folder / name)
            for inner in (said, f"iter_{int(said):07}" if said.isdecimal() else ""):
                if inner in names and (folder / inner).is_dir():
                    return folder / inner
    if METADATA not in names and not _weights_among(folder, names).parts:
        for inner in _INNER:
            if is_file(folder / inner / METADATA):
                return folder / inner
    return folder


def names_in(folder: AnyPath) -> list[str]:
    """The names in a folder, sorted; none behind a URL that cannot list them."""
    if not isinstance(folder, Path) and folder.is_web:
        stems = ("model", "pytorch_model", "adapter_model")
        asked = [f"{stem}{form}" for stem in stems for form in _FORMS]
        return [name for name in asked if (folder / name).is_file()]
    children: Iterator[AnyPath] = folder.iterdir()
    return sorted(child.name for child in islice(children, _MAX_FILES))


def _weights_among(folder: AnyPath, names: Iterable[str]) -> Layout:
    """The first form of each model among these files; named where there are several."""
    found: dict[str, list[tuple[tuple[bool, int, int], str]]] = {}
    others = []
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match is not None:
            stem, number = match["stem"], match["number"] or ""
            order = (match["variant"] is not None, _STEMS.index(stem) if stem in _STEMS else 0)
            rank = (*order, _FORMS.index(match["form"]))
            found.setdefault(_SAME.get(stem, stem) + number, []).append((rank, name))
        elif name.endswith(_OTHER_FORMS) and not _SHARD.search(name):
            others.append(name)
    first = {}
    for part, ranked in sorted(found.items()):
        (_, chosen), *rest = sorted(ranked)
        first[part] = folder / chosen
        others += (name for _, name in rest)
    if len(first) == 1:
        first = {"": next(iter(first.values()))}
    return Layout(parts=first, others=tuple(sorted(others)))


def _line_of(path: AnyPath) -> str:
    """The one line of a file that names a folder; "" for anything else."""
    with closing(open_source(path)) as source:
        is_short = source.nbytes <= _MAX_NAME_NBYTES
        return read(source, 0, source.nbytes).decode("utf-8", "replace").strip() if is_short else ""
