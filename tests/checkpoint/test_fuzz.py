"""Damaged files of every container: they read, or say why not; nothing else ever happens."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from harness.checkpoint import open_checkpoint
from harness.errors import HarnessError
from tests.checkpoint.formats.test_torchfile import Model

HOT = [b"\0", b"\xff", b"\x80", b"(", b".", b"R", b"t", b"Q", b"b", b"0", b"u", b"]", b"}", b"h"]
HOT += [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"PK\x01\x02", b"", b"\x85", b"2"]


def _samples() -> dict[str, bytes]:
    def written(value: object, *, zipped: bool = True) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        return buffer.getvalue()

    big = torch.arange(24.0).reshape(4, 6)
    state = {"w": big, "t": big.t(), "s": big[1:3, ::2], "e": torch.zeros(1).expand(5)}
    state["c"] = torch.view_as_complex(torch.ones(3, 2)).conj()
    samples = {"zip": written(state), "legacy": written(state, zipped=False)}
    hyper = {"lr": 0.1, "sizes": (1, 2)}
    samples["lightning"] = written({"state_dict": state, "hyper_parameters": hyper})
    samples["safetensors"] = save({"a": big, "b": torch.ones(2, dtype=torch.int8)})
    samples["index"] = json.dumps({"weight_map": {"a": "x", "b": "y"}}).encode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        samples["module"] = written(Model())
        samples["old_module"] = written(Model(), zipped=False)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(Model()), buffer)
        samples["script"] = buffer.getvalue()
    for name, mode, form in [("pax", "w:", 2), ("gnu", "w:", 1), ("gzip", "w:gz", 1)]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]
            parts = {
                "./model_config.yaml": b"a: [1, {b: c}]\n",
                "./model_weights.ckpt": samples["zip"],
            }
            for member, data in parts.items():
                info = tarfile.TarInfo(member)
                info.size, info.mtime = len(data), 1.5
                archive.addfile(info, io.BytesIO(data))
        samples[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(samples["zip"])) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    samples["deflated"] = buffer.getvalue()
    return samples


SAMPLES = _samples()


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut, mostly where the structure is."""
    mutable = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        size = len(mutable)
        if size < 2:
            break
        regions = [(0, min(size, 700)), (max(0, size - 900), size), (0, size)]
        first, last = draw(st.sampled_from(regions))
        at = draw(st.integers(first, last - 1))
        match draw(st.sampled_from(["flip", "overwrite", "insert", "delete", "splice", "cut"])):
            case "flip":
                mutable[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                new = draw(st.sampled_from(HOT))
                mutable[at : at + len(new)] = new
            case "insert":
                mutable[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del mutable[at : at + draw(st.integers(1, 64))]
            case "splice":
                start = draw(st.integers(0, size - 1))
                mutable[at : at + 32] = mutable[start : start + 32]
            case "cut":
                del mutable[at:]
    return bytes(mutable)


def pickle_damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Damage the pickle (or the code) only, in an archive that is sound."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            if entry.endswith(("data.pkl", ".py")):
                content = draw(damage(content))
            new.writestr(entry, content)
    return buffer.getvalue()


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    name = draw(st.sampled_from([*SAMPLES, "pickle", "pickle", "pickle"]))
    if name != "pickle":
        return draw(damage(SAMPLES[name]))
    inside = draw(st.sampled_from(["zip", "lightning", "module", "script"]))
    return pickle_damaged(draw, SAMPLES[inside])


def read_all(path: Path, section: str | None) -> None:
    with open_checkpoint(path, section=section) as checkpoint:
        _ = checkpoint.config
        for key, tensor in checkpoint.tensors.items():
            key.encode()
            tensor.array()


@settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=damaged_files(), section=st.sampled_from([None, "."]))
def test_a_damaged_file_reads_or_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, section: str | None
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "file"
    path.write_bytes(data)
    try:
        read_all(path, section)
    except HarnessError as error:
        message, hint = str(error), error.hint
    else:
        message, hint = "read", "nothing"
    assert message
    assert hint
    assert [child.name for child in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["nest_tiny.nemo", "nest_tiny.ckpt", "nest_tiny_step0.ckpt"])
def test_a_real_file_cut_anywhere_is_refused(tmp_path: Path, data: Path, name: str) -> None:
    whole = (data / name).read_bytes()
    path = tmp_path / "cut"
    for step in range(1, 40):
        path.write_bytes(whole[: len(whole) * step // 40])
        with pytest.raises(HarnessError) as caught:
            read_all(path, None)
        assert caught.value.hint
