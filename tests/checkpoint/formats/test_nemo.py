"""`.nemo` archives in every form that tar has; members that are no models are refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError
from tests.checkpoint.builders import write_tar
from tests.checkpoint.conftest import Assert

STATE = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "encoder.bias": torch.ones(2)}
CONFIG = b"model:\n  layers: 2\n  rate: 1e-3\n"


def weights(*, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FORMS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gzip", [False, True])
@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_form_of_archive_reads(
    tmp_path: Path, assert_reads: Assert, form: str, gzip: bool, prefix: str, zipped: bool
) -> None:
    members = [
        (f"{prefix}model_weights.ckpt", weights(zipped=zipped)),
        (f"{prefix}{'long' * 60}.txt" if form != "ustar" else "x.txt", b"other"),
        (f"{prefix}model_config.yaml", CONFIG),
    ]
    for order in (members, members[::-1]):
        path = write_tar(tmp_path / "m.nemo", order, form=FORMS[form], gzip=gzip)
        checkpoint = assert_reads(path, STATE)
        assert checkpoint.container == "nemo"
        assert checkpoint.config == {"model": {"layers": 2, "rate": 0.001}}
    assert [child.name for child in tmp_path.iterdir()] == ["m.nemo"]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (member("../model_config.yaml"), "points outside"),
        (member("/etc/passwd"), "points outside"),
        (member("a/../../b"), "points outside"),
        (member("a\\..\\b"), "points outside"),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "link"),
        (member("link", tarfile.LNKTYPE, "model_weights.ckpt"), "link"),
        (member("device", tarfile.CHRTYPE), "device"),
        (member("device", tarfile.BLKTYPE), "device"),
        (member("pipe", tarfile.FIFOTYPE), "device"),
        (member("sparse", tarfile.GNUTYPE_SPARSE), "sparse"),
        (member("./model_weights.ckpt"), "two members"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
@pytest.mark.parametrize("first", [True, False])
def test_members_that_no_model_has_are_refused(
    tmp_path: Path, bad: tarfile.TarInfo, match: str, first: bool
) -> None:
    good: list[tuple[str | tarfile.TarInfo, bytes]] = [("model_weights.ckpt", weights())]
    path = write_tar(tmp_path / "m.nemo", [(bad, b""), *good] if first else [*good, (bad, b"")])
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert [child.name for child in tmp_path.iterdir()] == ["m.nemo"]


def test_a_pax_header_may_not_change_the_size_of_a_member_at_will(tmp_path: Path) -> None:
    for size in ("99999999999", "-1", "²", "1e3", ""):
        info = member("model_weights.ckpt")
        info.pax_headers = {"size": size}
        path = write_tar(tmp_path / "m.nemo", [(info, weights())])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 2000, -1024, -5000])
def test_a_truncated_archive_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "m.nemo", [("model_weights.ckpt", weights())])
    data = path.read_bytes().rstrip(b"\0") + bytes(600)
    path.write_bytes(data[:cut])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.hint


def test_a_flipped_bit_in_a_header_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.nemo", [("model_weights.ckpt", weights())])
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        open_checkpoint(path)


def test_an_archive_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.nemo", [("a.txt", b"x"), ("b.txt", b"y")])
    with pytest.raises(CheckpointError, match=r"a\.txt, b\.txt"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "config",
    [b"!!python/object:os.system {}", b"!!bool x", b"!!timestamp x", b"!!int ''", b"a: [", b"\x00"],
)
def test_a_configuration_that_is_no_plain_yaml_is_an_error_when_asked_for(
    tmp_path: Path, assert_reads: Assert, config: bytes
) -> None:
    members = [("model_config.yaml", config), ("model_weights.ckpt", weights())]
    checkpoint = assert_reads(write_tar(tmp_path / "m.nemo", members), STATE)
    with pytest.raises(CheckpointError, match="YAML"):
        _ = checkpoint.config


def test_the_files_that_nemo_wrote_read_as_torch_loads_them(
    data: Path, assert_reads: Assert
) -> None:
    with tarfile.open(data / "nest_tiny.nemo") as archive:
        name = next(n for n in archive.getnames() if n.endswith("model_weights.ckpt"))
        inner = archive.extractfile(name)
        assert inner is not None
        expected = torch.load(io.BytesIO(inner.read()), weights_only=False)
    checkpoint = assert_reads(data / "nest_tiny.nemo", expected)
    assert checkpoint.config
