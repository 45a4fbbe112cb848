"""What is fetched of files behind URLs: in few requests, at once, and each byte once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.sources import blocks, files, transport
from harness.checkpoint.sources.remote import RemotePath
from harness.errors import CheckpointError
from tests.checkpoint.conftest import root, torch_file
from tests.checkpoint.dcp_writer import halves, write_dcp
from tests.checkpoint.web import Answer, Web


def ranges(web: Web) -> list[tuple[int, int]]:
    """What was asked for, in order of the bytes."""
    spans = (wanted.removeprefix("bytes=").partition("-") for _, wanted in web.asked)
    return sorted((int(first), int(last) + 1) for first, _, last in spans)


def test_opening_takes_few_requests_and_verifying_fetches_every_byte_once(
    data: Path, web: Web, shipped_golden: Path
) -> None:
    content = (data / "nest_tiny.nemo").read_bytes()
    web.files["/n.nemo"] = content
    with open_checkpoint(f"{web.url}/n.nemo"):
        assert len(web.asked) <= 3
        web.asked.clear()
    comparison = api.verify(f"{web.url}/n.nemo", shipped_golden)
    assert comparison.ok
    fetched = [(first, last) for first, last in ranges(web) if last - first > 1]
    assert len(web.asked) <= 5
    # One block to see that it is no golden, then the whole file in ranges that do not overlap.
    fetched.remove((0, transport.BLOCK_NBYTES))
    assert fetched == [(0, transport.BLOCK_NBYTES), (transport.BLOCK_NBYTES, len(content))]


def test_opening_leaves_the_values_where_they_are(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the headers of a zip's entries nor the counts of a legacy file's are asked for."""
    monkeypatch.setattr(transport, "BLOCK_NBYTES", 4096)
    state = {f"layer.{n}": torch.full((64, 64), float(n)) for n in range(60)}
    monkeypatch.setattr("harness.checkpoint.formats.torchfile._WINDOW_NBYTES", 4096)
    for zipped in (True, False):
        data = web.files["/w.pt"] = torch_file(state, zipped=zipped)
        web.sent = 0
        with open_checkpoint(f"{web.url}/w.pt") as checkpoint:
            assert len(checkpoint.tensors) == 60
            # For the end of a zip archive, 64 KiB are searched.
            assert web.sent < 110_000 < len(data) / 8
            assert checkpoint.tensors["layer.7"].array().tolist() == [[7.0] * 64] * 64


def test_a_folder_of_many_chunks_is_opened_by_their_ends_at_once_and_each_file_once(
    tmp_path: Path, web: Web, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 2)
    values = torch.randn(12, 128, 1024).unbind()
    folder = write_dcp(tmp_path, {f"w{i}": halves(w, count=4) for i, w in enumerate(values)})
    for file in folder.iterdir():
        web.files[f"/m/{file.name}"] = file.read_bytes()
        memory.pipe_file(f"/b/m/{file.name}", file.read_bytes())
    web.delay = 0.01
    on, filesystem = [], RemotePath._filesystem

    def found_on(path: RemotePath) -> Any:
        on.append(threading.current_thread())
        return filesystem(path)

    monkeypatch.setattr(RemotePath, "_filesystem", found_on)
    with open_checkpoint(f"{web.url}/m/") as checkpoint:
        assert set(on) == {threading.main_thread()}  # one session, not one for each thread
        assert web.sent < sum(map(len, web.files.values())) / 4
        assert web.most_at_once >= 8
        found = api.fingerprint(checkpoint).root.hex()
    looks = [path for path, wanted in web.asked if wanted == "bytes=0-0" and "distcp" in path]
    assert sorted(looks) == sorted(2 * [path for path in web.files if "distcp" in path])
    assert found == root(folder) == root("memory://b/m")
    with pytest.raises(CheckpointError, match="one file of a torch") as caught:
        open_checkpoint(f"{web.url}/m/__2_0.distcp")
    assert caught.value.hint == f"give the whole folder: {web.url}/m/"
    with pytest.raises(CheckpointError, match="no such file") as caught:
        open_checkpoint(f"{web.url}/m")
    assert caught.value.hint == "check the URL: that of a folder ends with a slash"
    del web.files["/m/__2_0.distcp"]
    with pytest.raises(
        CheckpointError, match=r"/m/__2_0.distcp: missing, but \.metadata places 12"
    ):
        open_checkpoint(f"{web.url}/m/")


def test_the_shards_of_an_index_are_opened_at_once(tmp_path: Path, web: Web) -> None:
    table = {f"w{i}": f"model-{i}.safetensors" for i in range(20)}
    for key, name in table.items():
        web.files[f"/m/{name}"] = save({key: torch.randn(5)})
    index = json.dumps({"weight_map": table}).encode()
    web.files["/m/model.safetensors.index.json"] = index
    for name, data in web.files.items():
        (tmp_path / Path(name).name).write_bytes(data)
    web.delay = 0.02
    url = f"{web.url}/m/model.safetensors.index.json"
    with open_checkpoint(url) as checkpoint:
        assert len(checkpoint.tensors) == 20
        assert web.most_at_once >= 8
    assert root(url) == root(tmp_path / "model.safetensors.index.json")
    del web.files["/m/model-7.safetensors"]
    with pytest.raises(CheckpointError, match=r"/m/model-7.safetensors: missing, but"):
        open_checkpoint(url)


def test_the_shards_of_ranks_behind_a_url_have_the_root_of_those_here(
    tmp_path: Path, memory: Any
) -> None:
    for rank in range(20):
        offsets = json.dumps({"w": {"saved_offsets": [3 * rank, 0]}})
        data = save({"w": torch.randn(3, 5)}, metadata={"DCP_SHARDING_INFO": offsets})
        name = f"shard-{rank:05}-model-00001-of-00001.safetensors"
        (tmp_path / name).write_bytes(data)
        memory.pipe_file(f"/b/ranks/{name}", data)
    with open_checkpoint("memory://b/ranks") as checkpoint:
        assert checkpoint.tensors["w"].shape == (60, 5)
    assert root("memory://b/ranks") == root(tmp_path)


def test_what_is_found_damaged_at_first_stops_the_opening_of_the_rest(memory: Any) -> None:
    for rank in range(20):
        data = save({"w": torch.ones(1)}, metadata={"DCP_SHARDING_INFO": "no JSON"})
        memory.pipe_file(f"/b/ranks/shard-{rank:05}-model-00001-of-00001.safetensors", data)
    with pytest.raises(CheckpointError, match="not JSON") as caught:
        open_checkpoint("memory://b/ranks")
    assert caught.value.__traceback__ is not None  # which holds on to all that was there
    assert not [one for one in threading.enumerate() if one.name.startswith("harness-open")]


def test_tensors_that_lie_in_many_files_are_fetched_once(tmp_path: Path, web: Web) -> None:
    values = {}
    for number in range(6):
        values[f"{number}.weight"] = halves(torch.randn(40, 1 << 13), count=40)
        values[f"{number}.bias"] = halves(torch.randn(40), count=40)
    folder = write_dcp(tmp_path, values)
    for file in folder.iterdir():
        web.files[f"/m/{file.name}"] = file.read_bytes()
    with open_checkpoint(f"{web.url}/m/") as checkpoint:
        web.sent = 0
        assert api.fingerprint(checkpoint).root.hex() == root(folder)
    assert web.sent < 1.1 * sum(map(len, web.files.values()))


def test_a_small_file_is_read_from_a_server_that_ignores_ranges_in_any_blocks(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_KEPT_NBYTES", 1 << 14)
    monkeypatch.setattr(blocks, "_LEAST_BLOCK_NBYTES", 1 << 10)
    data = web.files["/w.st"] = save({"w": torch.randn(50, 1000)})
    (tmp_path / "w.st").write_bytes(data)
    web.fault = lambda number, answer: Answer(200, {}, data)
    assert root(f"{web.url}/w.st") == root(tmp_path / "w.st")


def test_ranges_are_fetched_in_parallel(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BLOCK_NBYTES", 1 << 16)
    web.files["/w.st"] = save({"w": torch.zeros(1 << 18)})
    web.delay = 0.1
    root(f"{web.url}/w.st")
    assert web.most_at_once >= 4


def test_threads_that_want_the_same_block_share_one_request(web: Web) -> None:
    web.files["/w"] = bytes(5000)
    source = blocks.RemoteSource(RemotePath(f"{web.url}/w"))
    web.delay = 0.05
    web.asked.clear()
    buffers = [bytearray(100) for _ in range(8)]
    threads = [threading.Thread(target=source.read_into, args=(9, memoryview(b))) for b in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert len(web.asked) == 1


def test_what_is_kept_of_all_files_together_is_bounded(memory: Any) -> None:
    memory.pipe_file("/big", bytes(40 * transport.BLOCK_NBYTES))
    sources = [blocks.RemoteSource(RemotePath("memory://big")) for _ in range(2)]
    for source in sources:
        source.read_into(0, memoryview(bytearray(source.nbytes)))
    assert sum(span.nbytes for span in blocks._blocks._found) <= blocks._KEPT_NBYTES
    for source in sources:
        source.close()
    assert not blocks._blocks._found


# What goes wrong
