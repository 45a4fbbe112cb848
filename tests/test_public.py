"""The package as people import it: what its signatures name is there, and nothing loads early."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harness
from harness import Policy, UsageError

# What is Python's own, of Lightning, or of what the annotations are made.
PLAIN = {
    *("str", "int", "float", "bool", "bytes", "memoryview", "object", "None", "tuple", "list"),
    *("dict", "Any", "Mapping", "Sequence", "Collection", "Iterator", "Callable", "Path", "os"),
    *("PathLike", "Self", "BaseException", "Result", "complex", "Array", "Literal"),
    *("pl", "Trainer", "LightningModule"),
}
# What values hold, and nobody else makes or looks into.
WITHIN = {"Checksum", "DType", "Hashes", "Residues", "Sketch", "Source"}


# Of transformers, which is not installed where the tests run.
ELSEWHERE = {"GoldenTrainerCallback"}


def test_dir_lists_the_public_names_and_each_is_there() -> None:
    assert {*dir(harness)} >= {*harness.__all__} >= ELSEWHERE
    for name in {*harness.__all__} - ELSEWHERE:
        assert getattr(harness, name) is not None


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_what_takes_a_library_that_is_not_installed_says_so() -> None:
    with pytest.raises(harness.HarnessError, match="transformers") as caught:
        _ = harness.GoldenTrainerCallback
    assert caught.value.hint == "pip install transformers"


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that are ours, and the constructor with all fields."""
    for home in kind.__mro__:
        if home.__module__.startswith("harness."):
            for name, member in vars(home).items():
                if name == "__init__" or not name.startswith("_"):
                    found = getattr(member, "fget", getattr(member, "func", member))
                    yield name, getattr(found, "__func__", found)


def signatures() -> dict[str, inspect.Signature]:
    """The verbs, and the public classes with what they hold, take and give."""
    found = {}
    for name in {*harness.__all__} - ELSEWHERE - WITHIN:
        public = getattr(harness, name)
        owned = members(public) if isinstance(public, type) else [("", public)]
        for member, function in owned:
            # What a Protocol or a field with a default makes of itself is annotated with nothing.
            if inspect.isfunction(function) and function.__annotations__:
                found[f"{name}.{member}".rstrip(".")] = inspect.signature(function)
    return found


def test_the_types_in_public_signatures_can_be_imported() -> None:
    found = signatures()
    asked = {"verify", "open_checkpoint", "Comparison.rows", "Golden.parts", "LiveOptions.__init__"}
    asked |= {"Comparison.ok", "GoldenCheckpoint.__init__", "Fingerprint.root", "Checkpoint.config"}
    assert asked <= {*found}
    for name, signature in found.items():
        given = [p.annotation for p in signature.parameters.values()] + [
            signature.return_annotation
        ]
        texts = (text for text in given if isinstance(text, str))
        named = set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))
        assert named - PLAIN <= {*harness.__all__}, name


def test_paths_of_other_libraries_are_paths(tmp_path: Path) -> None:
    class Place:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __fspath__(self) -> str:
            return str(self.path)

    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    place: os.PathLike[str] = Place(tmp_path / "m.pt")
    golden: os.PathLike[str] = Place(tmp_path / "g.safetensors")
    harness.record(place, golden)
    assert harness.verify(place, golden)
    assert harness.diff(place, place)
    assert len(harness.open_checkpoint(place).tensors) == 1
    assert harness.read_golden(golden).source


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: harness.fingerprint(None), "None is not a checkpoint"),
        (lambda: harness.record(None, "g.safetensors"), "None is not a checkpoint"),
        (lambda: harness.fingerprint(5), "cannot fingerprint an int"),
        (lambda: harness.fingerprint(b"x.pt"), "cannot fingerprint a bytes"),
        (lambda: harness.diff(None, "x.pt"), "a NoneType is not a path"),
        (lambda: harness.verify("x.pt", 5), "a int is not a path"),
        (lambda: harness.verify("x.pt", policy={"atol": 1}), "policy takes a Policy, not"),
        (lambda: harness.verify("x.pt", jobs="2"), "jobs takes a number of threads, not '2'"),
        (lambda: harness.record("x.pt", section=5), "section takes a text, not 5"),
        (lambda: harness.record("x.pt", overwrite="no"), "overwrite takes True or False"),
        (lambda: harness.record("x.pt", stage=5), "stage takes one of file, load"),
        (lambda: harness.update("x.pt", reason=5), "reason takes a text, not 5"),
        (lambda: harness.diff("x.pt", "y.pt", policy="exact"), "policy takes a Policy"),
        (lambda: harness.roundtrip("x.pt", policy="exact"), "policy takes a Policy"),
        (lambda: harness.verify_stages("x.pt", policy=1), "policy takes a Policy"),
        (lambda: Policy(atol="1e-5"), "atol takes a number"),
        (lambda: harness.fingerprint(np.ones(3)), "cannot fingerprint a"),
    ],
)
def test_what_is_of_another_type_is_named_at_once(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
