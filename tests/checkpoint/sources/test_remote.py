"""Files behind URLs: the same checkpoints, in few requests, and clear errors when the web fails."""

from __future__ import annotations

import io
import json
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources import remote, transport
from harness.checkpoint.sources.paths import to_path
from harness.checkpoint.sources.remote import RemotePath
from harness.checkpoint.sources.urls import redacted, without_secrets
from harness.errors import CheckpointError, GoldenError, UsageError
from harness.golden.file import read_golden
from tests.checkpoint.conftest import root, torch_file
from tests.checkpoint.web import Answer, Fault, Web
from tests.conftest import Run

Harness = Callable[..., Run]
SECRET = "X-Amz-Signature=5ec2e7"


def weights() -> dict[str, torch.Tensor]:
    big = torch.arange(40_000.0).reshape(200, 200)
    return {"a": big, "b": big.t(), "c": torch.ones(3, dtype=torch.bfloat16), "d": big[1:9, ::3]}


def deflated(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    return buffer.getvalue()


def containers() -> dict[str, dict[str, bytes]]:
    """Files by name; the first is the one to open. All hold the same weights."""
    state = weights()
    plain = {key: value.contiguous() for key, value in state.items()}
    parts = [dict(list(plain.items())[:2]), dict(list(plain.items())[2:])]
    index = {"weight_map": {k: f"{n}.safetensors" for n, p in enumerate(parts) for k in p}}
    return {
        "zip": {"w.pt": torch_file(state)},
        "deflated": {"w.pt": deflated(torch_file(state))},
        "legacy": {"w.pt": torch_file(state, zipped=False)},
        "safetensors": {"w.safetensors": save(plain)},
        "sharded": {
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{f"{n}.safetensors": save(part) for n, part in enumerate(parts)},
        },
    }


CONTAINERS = containers()


@pytest.mark.parametrize("block_nbytes", [1 << 20, 10_000])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_weights_have_the_same_root_wherever_they_are(
    tmp_path: Path,
    web: Web,
    memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
    block_nbytes: int,
) -> None:
    monkeypatch.setattr(transport, "BLOCK_NBYTES", block_nbytes)
    for name, data in CONTAINERS[container].items():
        (tmp_path / name).write_bytes(data)
        web.files[f"/m/{name}"] = data
        memory.pipe_file(f"/bucket/m/{name}", data)
    first = next(iter(CONTAINERS[container]))
    expected = root(tmp_path / first)
    assert root(f"{web.url}/m/{first}?{SECRET}") == expected
    assert root(f"memory://bucket/m/{first}") == expected
    assert root(f"file://{tmp_path}/{first}") == expected
    if container == "sharded":
        assert root(f"{web.url}/m/?{SECRET}") == expected
        assert root("memory://bucket/m") == expected


@pytest.mark.parametrize("name", ["nest_tiny.nemo", "nest_tiny_gz.nemo", "nest_tiny.ckpt"])
def test_nemo_and_lightning_files_read_by_url(data: Path, web: Web, memory: Any, name: str) -> None:
    web.files["/" + name] = (data / name).read_bytes()
    memory.pipe_file("/b/" + name, web.files["/" + name])
    assert root(f"{web.url}/{name}") == root(f"memory://b/{name}") == root(data / name)


# What it costs


def at_first(count: int, change: Callable[[Answer], Answer]) -> Fault:
    """Spoil the first answers that bring more than a byte."""
    spoilt: list[int] = []

    def fault(number: int, answer: Answer) -> Answer:
        if len(answer.body or b"") <= 1 or len(spoilt) >= count:
            return answer
        spoilt.append(number)
        return change(answer)

    return fault


def cut(answer: Answer) -> Answer:
    body = answer.body or b""
    length = str(len(body))
    return Answer(
        answer.status, answer.headers | {"Content-Length": length}, body[: len(body) // 2]
    )


def status(code: int) -> Callable[[Answer], Answer]:
    return lambda answer: Answer(code, {}, b"no")


TRANSIENT = {"cut": cut, "500": status(500), "503": status(503), "429": status(429)}
FILE = CONTAINERS["zip"]["w.pt"]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_failure_that_passes_is_not_noticed(web: Web, tmp_path: Path, fault: str) -> None:
    web.files["/w.pt"] = FILE
    (tmp_path / "w.pt").write_bytes(FILE)
    web.fault = at_first(3, TRANSIENT[fault])
    assert root(f"{web.url}/w.pt") == root(tmp_path / "w.pt")


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_failure_that_stays_is_one_clear_error(web: Web, fault: str) -> None:
    web.files["/w.pt"] = FILE
    web.fault = at_first(10**9, TRANSIENT[fault])
    with pytest.raises(CheckpointError, match=r"reading bytes 0 to \d+ failed 4 times") as caught:
        open_checkpoint(f"{web.url}/w.pt?{SECRET}")
    assert str(caught.value).startswith(f"{web.url}/w.pt: ")
    assert "connection" in str(caught.value.hint)


def test_a_server_that_is_not_there_is_one_clear_error(web: Web) -> None:
    with pytest.raises(CheckpointError, match=r"failed 4 times: .*connect"):
        open_checkpoint("http://127.0.0.1:9/w.pt")
    with pytest.raises(
        CheckpointError, match=r"^http://\[::1\]:9/w.pt: .*failed 4 times: .*connect"
    ):
        open_checkpoint("http://[::1]:9/w.pt")


def test_a_silent_server_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.checkpoint.sources.transport.SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.01,))
    web.files["/w.pt"] = FILE
    web.delay = 0.4
    with pytest.raises(CheckpointError, match=r"failed 2 times: .*[Tt]imeout"):
        open_checkpoint(f"{web.url}/w.pt")


@pytest.mark.parametrize(
    ("code", "match", "hint"),
    [
        (404, "no such file", "check the URL"),
        (410, "no such file", "check the URL"),
        (403, "access denied", "credentials"),
        (401, "access denied", "credentials"),
        (400, "failed: ", "check the URL"),
    ],
)
def test_a_refusal_is_taken_at_its_word(web: Web, code: int, match: str, hint: str) -> None:
    web.fault = lambda number, answer: Answer(code, {}, b"no")
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(f"{web.url}/w.pt?{SECRET}")
    assert len(web.asked) == 1
    assert hint in str(caught.value.hint)
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)


class NoCredentialsError(Exception):
    """As botocore has it."""


class Throttled(Exception):  # noqa: N818
    """As the clients of clouds have them: the status somewhere inside."""

    def __init__(self, code: int) -> None:
        self.response = type("Response", (), {"status_code": code})


@pytest.mark.parametrize(
    ("error", "attempts", "match"),
    [
        (NoCredentialsError("none"), 1, "access denied"),
        (PermissionError("no"), 1, "access denied"),
        (Throttled(403), 1, "access denied"),
        (Throttled(400), 1, "looking at it failed: Throttled"),
        (Throttled(429), 3, "failed 3 times"),
        (ValueError("odd"), 1, "failed: ValueError: odd"),
        (OSError("reset"), 3, "failed 3 times: OSError: reset"),
        (RuntimeError("see s3://b/k?sig=1"), 3, r"see s3://b/k\n"),
    ],
)
def test_errors_of_any_library_are_told_apart(
    memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int, match: str
) -> None:
    asked = []

    def info(url: str) -> None:
        asked.append(url)
        raise error

    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0, 0.0))
    monkeypatch.setattr(memory, "info", info)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint("memory://w.pt")
    assert len(asked) == attempts


def test_a_library_that_was_patient_itself_is_not_asked_again(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(url: str) -> None:
        raise OSError("gave up")

    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(memory, "info", info)
    with pytest.raises(CheckpointError, match="looking at it failed: OSError: gave up"):
        open_checkpoint("memory://w.pt")


def test_a_server_that_ignores_ranges_is_refused_before_the_file_is_sent(web: Web) -> None:
    web.files["/w.st"] = save({"w": torch.zeros(1 << 20)})
    web.fault = lambda number, answer: Answer(
        200, {"Content-Length": str(len(web.files["/w.st"]))}, web.files["/w.st"][:1000]
    )
    with pytest.raises(CheckpointError, match="with the whole file") as caught:
        open_checkpoint(f"{web.url}/w.st?{SECRET}")
    assert len(web.asked) == 1
    assert caught.value.hint == f"download it first: curl -LO '{web.url}/w.st'"


def test_a_small_file_is_read_from_a_server_that_ignores_ranges(web: Web, tmp_path: Path) -> None:
    data = web.files["/w.st"] = CONTAINERS["safetensors"]["w.safetensors"]
    (tmp_path / "w.st").write_bytes(data)
    web.fault = lambda number, answer: Answer(200, {}, data)
    assert root(f"{web.url}/w.st") == root(tmp_path / "w.st")


def shifted(answer: Answer) -> Answer:
    return Answer(206, {"Content-Range": f"bytes 1-{len(FILE)}/{len(FILE) + 1}"}, answer.body)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (shifted, "in place of"),
        (lambda answer: Answer(206, {}, answer.body), "does not say"),
        (lambda a: Answer(206, a.headers | {"Content-Encoding": "gzip"}, a.body), "compresses"),
    ],
)
def test_what_is_no_answer_to_a_range_is_refused(web: Web, change: Any, match: str) -> None:
    web.files["/w.pt"] = FILE
    web.fault = at_first(10**9, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(f"{web.url}/w.pt")
    assert "curl" in str(caught.value.hint)


def test_a_file_that_changes_while_it_is_read_is_an_error(
    web: Web, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "BLOCK_NBYTES", 1000)
    old, new = save({"w": torch.zeros(9000)}), save({"w": torch.ones(9000)})
    for other, match in [(new, "ETag"), (new[:-4000], "size"), (None, "not there any more")]:
        web.files["/w.st"] = old
        with open_checkpoint(f"{web.url}/w.st") as checkpoint:
            web.files.pop("/w.st") if other is None else web.files.update({"/w.st": other})
            with pytest.raises(CheckpointError, match=f"{match}.*changed while") as caught:
                checkpoint.tensors["w"].array()
            assert caught.value.hint
    memory.pipe_file("/w.st", old)
    with open_checkpoint("memory://w.st") as checkpoint:
        memory.pipe_file("/w.st", old[:-4000])
        with pytest.raises(CheckpointError, match="bytes came in place of"):
            checkpoint.tensors["w"].array()


def test_the_header_of_a_zips_entry_is_checked_when_it_is_read(memory: Any) -> None:
    data = bytearray(FILE)
    at = data.index(b"PK\x03\x04", data.index(b"data/0"))
    assert data[at + 30 :].startswith(b"archive/data/1")
    data[at : at + 4] = b"XXXX"
    memory.pipe_file("/w.pt", bytes(data))
    with (
        open_checkpoint("memory://w.pt") as checkpoint,
        pytest.raises(CheckpointError, match="no header for 'archive/data/1'"),
    ):
        checkpoint.tensors["c"].array()


def test_the_count_of_a_legacy_storage_is_checked_when_it_is_read(memory: Any) -> None:
    data = bytearray(CONTAINERS["legacy"]["w.pt"])
    at = data.index((40_000).to_bytes(8, "little"))
    data[at] ^= 1
    memory.pipe_file("/w.pt", bytes(data))
    with (
        open_checkpoint("memory://w.pt") as checkpoint,
        pytest.raises(CheckpointError, match="has 40001 elements in storage"),
    ):
        checkpoint.tensors["a"].array()


@pytest.mark.parametrize(
    ("url", "match", "hint"),
    [
        ("s3://bucket/w.pt", "s3fs, which is not installed", "pip install s3fs"),
        ("gs://bucket/w.pt", "gcsfs, which is not installed", "pip install gcsfs"),
        ("nope://bucket/w.pt", "unknown protocol nope://", "https://"),
        ("zip://w.pt::memory://a.zip", "chain", "one protocol"),
        (
            f"simplecache::https://h/w.pt?{SECRET}",
            "^simplecache::https://h/w.pt: chains p",
            "one pr",
        ),
        ("file://elsewhere/w.pt", "elsewhere", "file:///elsewhere/w.pt"),
    ],
)
def test_a_url_that_nothing_here_can_read_names_what_to_do(
    monkeypatch: pytest.MonkeyPatch, url: str, match: str, hint: str
) -> None:
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=match) as caught:
        open_checkpoint(url)
    assert hint in str(caught.value.hint)


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        open_checkpoint("memory://w.pt")
    assert caught.value.hint == "pip install 'checkpoint-harness[remote]'"


# Names


def test_only_a_scheme_makes_a_url() -> None:
    for text in ("C:/w.pt", "a:b", "a:/b", "s3:/b/w.pt", "://x", "9p://x", "./s3://b"):
        assert to_path(text) == Path(text)
    assert to_path("file:///a/b%20c") == to_path("file://localhost/a/b%20c") == Path("/a/b c")
    assert to_path("S3://Bucket/Key") == RemotePath("s3://Bucket/Key")


def test_a_remote_path_walks_as_a_path_does() -> None:
    path = RemotePath("https://h/a/b/w.pt?sig=1")
    assert (path.name, path.parent.name, str(path)) == ("w.pt", "b", "https://h/a/b/w.pt")
    assert (path.parent / "x y?").url == "https://h/a/b/x%20y%3F?sig=1"
    assert (RemotePath("s3://b/a/") / "x y").url == "s3://b/a/x y"
    assert path.with_name("v") == RemotePath("https://h/a/b/v?sig=1")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:8/a.pt?X-Sig=1#f", "https://h:8/a.pt"),
        ("https://token@h/a.pt", "https://h/a.pt"),
        ("s3://b/a#1.pt", "s3://b/a#1.pt"),
        ("abfs://container@account.net/a.pt?sas=1", "abfs://container@account.net/a.pt"),
        ("abfs://container:key@account.net/a.pt", "abfs://container@account.net/a.pt"),
        ("https://h?sig=1", "https://h"),
        ("hf://datasets/o/r@main/a.pt", "hf://datasets/o/r@main/a.pt"),
    ],
)
def test_names_hold_no_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == str(RemotePath(url)) == shown
    assert redacted(f"could not get '{url}': no") == f"could not get '{shown}': no"
    assert repr(RemotePath(url)) == f"RemotePath({shown!r})"


# The commands


@pytest.fixture
def project(tmp_path: Path, web: Web, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("nest_tiny.nemo", "nest_tiny_perturbed_1e-3.nemo"):
        web.files[f"/{name}"] = (data / name).read_bytes()
    return tmp_path


def test_a_golden_is_recorded_from_a_url_and_verified_without_naming_it(
    project: Path, web: Web, harness: Harness
) -> None:
    url = f"{web.url}/nest_tiny.nemo"
    run = harness("record", f"{url}?{SECRET}")
    assert run.code == 0, run.err
    assert f"99 tensors of {url} (nemo)" in run.out
    assert read_golden("golden/nest_tiny.safetensors").source == url
    line = "ok identical  golden/nest_tiny.safetensors  file: 99 identical\n"
    assert harness("verify") == Run(0, line, "")
    assert harness("verify", f"{url}?{SECRET}") == Run(0, line, "")
    # The same checkpoint again: nothing to overwrite.
    again = harness("record", url)
    assert again.code == 2
    assert f"harness verify {url} --update-golden" in again.err
    assert SECRET not in (project / "golden" / "nest_tiny.safetensors").read_bytes().decode("latin")


def test_a_difference_is_reported_without_the_secrets(
    project: Path, web: Web, harness: Harness, shipped_golden: Path
) -> None:
    good, bad = f"{web.url}/nest_tiny.nemo", f"{web.url}/nest_tiny_perturbed_1e-3.nemo"
    private = bad.replace("//", "//user:pass@") + f"?{SECRET}"
    for arguments in (
        ["verify", private, "-g", shipped_golden],
        ["verify", private, "-g", shipped_golden, "--format=json"],
        ["verify", private, "-g", shipped_golden, "--reference", f"{good}?{SECRET}"],
        ["diff", f"{good}?{SECRET}", private],
        ["verify", private, "-g", shipped_golden, "--report", "r.json"],
    ):
        run = harness(*arguments)
        assert run.code == 1, run
        said = run.out + run.err + "".join(p.read_text() for p in project.glob("r.*"))
        assert bad in said
        assert SECRET not in said
        assert "pass" not in said.replace("would pass", "")
    assert harness("show", f"{good}?{SECRET}").code == 0
    failure = harness("show", f"{web.url}/none.pt?{SECRET}", "more", private)
    assert (failure.code, SECRET in failure.err) == (2, False)


def test_a_golden_may_be_at_a_url(project: Path, memory: Any, harness: Harness, data: Path) -> None:
    nemo, other = data / "nest_tiny.nemo", data / "nest_tiny_perturbed_1e-3.nemo"
    run = harness("record", nemo, "-g", "memory://b/g.safetensors")
    assert (run.code, run.err) == (0, "")
    assert read_golden("memory://b/g.safetensors").source == "nest_tiny.nemo"
    assert harness("verify", nemo, "-g", "memory://b/g.safetensors").code == 0
    assert harness("show", "memory://b/g.safetensors").code == 0
    before = memory.cat_file("/b/g.safetensors")
    assert harness("record", other, "-g", "memory://b/g.safetensors").code == 2
    assert memory.cat_file("/b/g.safetensors") == before
    update = ("--update-golden", "--reason", "new")
    assert harness("verify", other, "-g", "memory://b/g.safetensors", *update).code == 0
    assert harness("verify", other, "-g", "memory://b/g.safetensors").code == 0
    memory.pipe_file("/b/else", b"something else")
    run = harness("record", nemo, "-g", "memory://b/else", "--overwrite")
    assert (run.code, memory.cat_file("/b/else")) == (2, b"something else")
    assert harness("verify", nemo, "-g", "memory://b/none").code == 2


def test_a_golden_that_somebody_else_wrote_in_between_is_not_replaced(
    memory: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemotePath, "exists", lambda path: False)
    memory.pipe_file("/g.safetensors", b"theirs")
    with pytest.raises(GoldenError, match="recorded there already"):
        api.record(data / "nest_tiny.nemo", "memory://g.safetensors")
    assert memory.cat_file("/g.safetensors") == b"theirs"


def test_a_web_server_takes_no_golden(web: Web, data: Path) -> None:
    with pytest.raises(GoldenError, match="takes no files"):
        api.record(data / "nest_tiny.nemo", f"{web.url}/g.safetensors")


def test_live_stages_and_reports_need_files(project: Path, web: Web, harness: Harness) -> None:
    url = f"{web.url}/nest_tiny.nemo"
    harness("record", url)
    asked = len(web.asked)
    for arguments in (
        ["verify", url, "--load"],
        ["roundtrip", url],
        ["record", url, "-g", "other.safetensors", "--outputs"],
        ["verify", url, "--report", "memory://r.json"],
        ["verify", url, "--load", "--config", "memory://c.yaml"],
    ):
        run = harness(*arguments)
        assert (run.code, "must be on this machine" in run.err) == (2, True), run
        assert "download the file first" in run.err
    assert len(web.asked) <= asked + 12


def test_what_cannot_be_reached_is_tried_once_by_a_command(web: Web, harness: Harness) -> None:
    web.fault = lambda number, answer: Answer(500, {}, b"no")
    assert harness("verify", f"{web.url}/w.pt").code == 2
    assert len(web.asked) == 1 + len(remote.RETRY_DELAYS)
