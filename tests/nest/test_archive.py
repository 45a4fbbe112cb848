"""`.nemo` files: NeMo's are read strictly, ours are like NeMo's, bad ones are refused."""

from __future__ import annotations

import gzip
import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.errors import CheckpointError, ModelError
from harness.nest.archive import read_nemo, write_nemo
from harness.nest.model import EncDecDenoiseMaskedTokenPredModel

Members = list[tuple[str, bytes]]


def members_of(path: Path) -> Members:
    with tarfile.open(path) as archive:
        files = [(m, archive.extractfile(m)) for m in archive.getmembers() if m.isfile()]
        return [(m.name, f.read()) for m, f in files if f is not None]


def pack(path: Path, members: Members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=tar_format) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def saved(state: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream, **options)
    return stream.getvalue()


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key


def gzipped(path: Path, members: Members) -> None:
    path.write_bytes(gzip.compress(pack(path, members).read_bytes()))


VARIANTS: dict[str, Callable[[Path, Members], object]] = {
    "reversed": lambda path, m: pack(path, m[::-1]),
    "without ./": lambda path, m: pack(path, [(n.removeprefix("./"), c) for n, c in m]),
    "GNU": lambda path, m: pack(path, m, tarfile.GNU_FORMAT),
    "gzip": gzipped,
    "other members": lambda path, m: pack(path, [("./tokenizer.model", b"x"), *m]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dialect_is_read(
    nemo_path: Path, nemo_state: dict[str, Tensor], tmp_path: Path, variant: str
) -> None:
    VARIANTS[variant](tmp_path / "model.nemo", members_of(nemo_path))
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "model.nemo")
    assert_equal_states(model.state_dict(), nemo_state)


@pytest.mark.parametrize("compress", [False, True])
def test_legacy_weights_are_read(
    nemo_path: Path, nemo_state: dict[str, Tensor], tmp_path: Path, compress: bool
) -> None:
    config = members_of(nemo_path)[0]
    legacy = saved(dict(nemo_state), _use_new_zipfile_serialization=False)
    path = pack(tmp_path / "model.nemo", [config, ("./model_weights.ckpt", legacy)])
    if compress:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert_equal_states(read_nemo(path)[1], nemo_state)


def test_a_restored_model_is_in_training_mode_except_the_frozen_parts(nemo_path: Path) -> None:
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(nemo_path)
    assert model.training
    assert model.encoder.training
    assert model.preprocessor.training
    assert not model.quantizer.training
    assert not model.mask_processor.training


def test_a_saved_file_is_like_nemo_s(
    model: EncDecDenoiseMaskedTokenPredModel, nemo_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.nemo"
    model.save_to(path)
    assert path.read_bytes()[:2] != b"\x1f\x8b"
    with tarfile.open(path) as ours, tarfile.open(nemo_path) as theirs:
        assert ours.getnames() == theirs.getnames()
        assert [m.type for m in ours] == [m.type for m in theirs]
    (_, our_config), (_, our_weights) = members_of(path)
    (_, config), (_, weights) = members_of(nemo_path)
    assert our_config == config
    ours_zip = zipfile.ZipFile(io.BytesIO(our_weights))
    theirs_zip = zipfile.ZipFile(io.BytesIO(weights))
    # the tensors' bytes, in the same entries under the same prefix
    names = [name for name in theirs_zip.namelist() if "/data/" in name and "serial" not in name]
    assert len(names) == 99
    assert names == [n for n in ours_zip.namelist() if "/data/" in n and "serial" not in n]
    assert all(ours_zip.read(name) == theirs_zip.read(name) for name in names)
    assert all(entry.compress_type == zipfile.ZIP_STORED for entry in ours_zip.infolist())
    state = torch.load(io.BytesIO(our_weights), weights_only=True)
    assert type(state).__name__ == "OrderedDict"
    assert not any(value.requires_grad for value in state.values())
    expected = torch.load(io.BytesIO(weights), weights_only=True)
    assert state._metadata["encoder.layers.0.conv.batch_norm"]["version"] == 2
    assert expected._metadata["encoder.layers.0.conv.batch_norm"]["version"] == 2


def test_the_same_model_gives_the_same_bytes(
    model: EncDecDenoiseMaskedTokenPredModel, tmp_path: Path
) -> None:
    model.save_to(tmp_path / "a.nemo")
    model.save_to(tmp_path / "b.nemo")
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()
    again = EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "a.nemo")
    again.save_to(tmp_path / "c.nemo")
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "c.nemo").read_bytes()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    model: EncDecDenoiseMaskedTokenPredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"old")

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_to(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.nemo"]


def test_a_save_replaces_the_file_and_does_not_write_into_it(
    model: EncDecDenoiseMaskedTokenPredModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        model.save_to(path)
        assert reader.read() == b"old"
    assert len(members_of(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["model.nemo"]


def test_non_contiguous_and_shared_tensors_are_written(
    nemo_config: dict[str, Any], tmp_path: Path
) -> None:
    shared = torch.arange(6.0)
    state = {"a": torch.arange(6.0).view(2, 3).T, "b": shared, "c": shared}
    write_nemo(tmp_path / "x.nemo", nemo_config, state)
    loaded = read_nemo(tmp_path / "x.nemo")[1]
    assert_equal_states(loaded, state)
    assert loaded["a"].is_contiguous()
    assert loaded["b"].data_ptr() == loaded["c"].data_ptr()


def test_strict_loading_names_the_keys(
    nemo_config: dict[str, Any], nemo_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(nemo_state)
    state["encoder.layers.0.self_attn.query_proj.weight"] = state.pop(
        "encoder.layers.0.self_attn.linear_q.weight"
    )
    write_nemo(tmp_path / "x.nemo", nemo_config, state)
    with pytest.raises(ModelError, match=r"linear_q\.weight[\s\S]*query_proj\.weight"):
        EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "x.nemo")


def test_loading_without_strict_warns_of_every_key(
    nemo_config: dict[str, Any], nemo_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(nemo_state)
    del state["quantizer.codebooks"]
    state["extra.weight"] = torch.zeros(1)
    write_nemo(tmp_path / "x.nemo", nemo_config, state)
    with pytest.warns(UserWarning, match=r"missing .*quantizer\.codebooks.*extra\.weight"):
        EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "x.nemo", strict=False)


def test_a_missing_batch_counter_is_missed(
    nemo_config: dict[str, Any], model: EncDecDenoiseMaskedTokenPredModel, tmp_path: Path
) -> None:
    state = model.state_dict()
    del state["encoder.layers.0.conv.batch_norm.num_batches_tracked"]
    write_nemo(tmp_path / "x.nemo", nemo_config, state)
    with pytest.raises(ModelError, match="num_batches_tracked"):
        EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "x.nemo")


def test_loading_without_strict_is_quiet_when_all_fits(nemo_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EncDecDenoiseMaskedTokenPredModel.restore_from(nemo_path, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_must_fit_in_either_mode(
    nemo_config: dict[str, Any], nemo_state: dict[str, Tensor], tmp_path: Path, strict: bool
) -> None:
    state = nemo_state | {"mask_processor.mask_embedding": torch.zeros(81)}
    write_nemo(tmp_path / "x.nemo", nemo_config, state)
    with pytest.raises(ModelError, match="mask_embedding"):
        EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "x.nemo", strict=strict)


def test_dtypes_are_cast_to_the_model_s(
    nemo_config: dict[str, Any], nemo_state: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in nemo_state.items()}
    write_nemo(tmp_path / "x.nemo", nemo_config, half)
    assert read_nemo(tmp_path / "x.nemo")[1]["quantizer.codebooks"].dtype == torch.bfloat16
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(tmp_path / "x.nemo")
    state = model.state_dict()
    assert [v.dtype for v in state.values()] == [v.dtype for v in nemo_state.values()]
    rounded = nemo_state["quantizer.codebooks"].bfloat16().double()
    assert torch.equal(state["quantizer.codebooks"], rounded)


def test_another_config_can_be_given(
    nemo_path: Path, nemo_config: dict[str, Any], tmp_path: Path
) -> None:
    nemo_config["encoder"]["dropout"] = 0.25
    restore = EncDecDenoiseMaskedTokenPredModel.restore_from
    model = restore(nemo_path, override_config=nemo_config)
    assert model.cfg["encoder"]["dropout"] == 0.25
    nemo_config["encoder"]["n_layers"] = 3
    with pytest.raises(ModelError, match=r"encoder\.layers\.2"):
        restore(nemo_path, override_config=nemo_config)


def test_the_smallest_config_is_completed_on_saving(
    nemo_config: dict[str, Any], tmp_path: Path
) -> None:
    kept = ("preprocessor", "masking", "quantizer", "encoder", "decoder", "loss")
    bare = {key: dict(nemo_config[key]) for key in kept}
    for section in bare.values():
        del section["_target_"]
    EncDecDenoiseMaskedTokenPredModel(bare).save_to(tmp_path / "x.nemo")
    written = read_nemo(tmp_path / "x.nemo")[0]
    added = {"spec_augment", "num_books", "squeeze_single", "target", "nemo_version"}
    assert set(written) == {*kept, *added}
    assert all(written[key] == nemo_config[key] for key in written)


def _link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/passwd"
    return entry


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["../model_config.yaml"], "points outside of it"),
        (["/model_config.yaml"], "points outside of it"),
        (["a/../../x"], "points outside of it"),
        (["model_config.yaml", "./model_config.yaml"], "two members named"),
        (["model_config.yaml"], "without model_weights.ckpt"),
        ([], "without its directory|unknown format|without model_weights.ckpt|not a checkpoint"),
    ],
)
def test_dangerous_and_incomplete_archives_are_refused(
    tmp_path: Path, names: list[str], match: str
) -> None:
    path = pack(tmp_path / "x.nemo", [(name, b"a: 1") for name in names])
    with pytest.raises(CheckpointError, match=match):
        read_nemo(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.nemo", "w:") as archive:
        archive.addfile(_link("./model_weights.ckpt", kind))
    with pytest.raises(CheckpointError, match="a link, a device"):
        read_nemo(tmp_path / "x.nemo")


class _Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (saved({"a": _Planted()}), "no state dict"),
        (saved({"a": 3}), "no state dict"),
        (saved({"a": torch.zeros(100)})[:-200], "model_weights.ckpt"),
        (b"", "model_weights.ckpt"),
        (b"not weights", "model_weights.ckpt"),
    ],
    ids=["code", "number", "cut", "empty", "text"],
)
def test_weights_that_are_no_state_dict_are_refused_and_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: bytes, match: str
) -> None:
    members = [("model_config.yaml", b"a: 1"), ("model_weights.ckpt", weights)]
    with pytest.raises(CheckpointError, match=match):
        read_nemo(pack(tmp_path / "x.nemo", members))
    assert "executed" not in capsys.readouterr().out


def test_weights_whose_bytes_have_changed_are_refused(nemo_path: Path, tmp_path: Path) -> None:
    content = bytearray(nemo_path.read_bytes())
    content[len(content) // 2] ^= 1  # inside of a tensor, which torch would load
    (tmp_path / "x.nemo").write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC-32"):
        read_nemo(tmp_path / "x.nemo")


def test_the_config_is_read_as_omegaconf_reads_it(tmp_path: Path) -> None:
    config = b"a: 1e-5\nb: ${a}\nc: [1_0e3, -2E+2, 'e5', 1e5x]\n"
    weights = saved({"w": torch.zeros(2)})
    path = pack(
        tmp_path / "x.nemo", [("model_config.yaml", config), ("model_weights.ckpt", weights)]
    )
    assert read_nemo(path)[0] == {"a": 1e-5, "b": 1e-5, "c": [1e4, -200.0, "e5", "1e5x"]}


@pytest.mark.parametrize("cut", [100, 5000, 600_000])
@pytest.mark.parametrize("compress", [False, True])
def test_a_cut_file_is_refused(nemo_path: Path, tmp_path: Path, cut: int, compress: bool) -> None:
    content = nemo_path.read_bytes()
    if compress:
        content = gzip.compress(content)
    (tmp_path / "x.nemo").write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match=r"x\.nemo"):
        read_nemo(tmp_path / "x.nemo")


def test_a_file_that_is_not_there_or_no_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_nemo(tmp_path / "x.nemo")
    (tmp_path / "x.nemo").write_bytes(b"text" * 1000)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_nemo(tmp_path / "x.nemo")
