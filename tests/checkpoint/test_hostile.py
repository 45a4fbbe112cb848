"""Files made to exhaust, mislead or run their reader: a clear error, in little memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.bombs import BOMBS
from tests.checkpoint.builders import (
    call,
    mapping,
    named,
    reference,
    string,
    tensor,
    write_torch_zip,
)

MEASURE = Path(__file__).with_name("measure.py")
# Strange, but no harm in it: these open.
HARMLESS = {
    "tuples_that_hold_each_other_twice_as_a_key",
    "tuples_that_hold_each_other_twice_as_hyper_parameters",
    "lists_that_hold_each_other_twice",
    "lists_that_hold_each_other_twice_as_hyper_parameters",
    "tuples_that_hold_each_other_twice_as_a_module_key",
    "keys_that_hash_alike",
    "keys_that_hash_alike_as_pairs",
    "safetensors_with_the_largest_metadata_that_is_read",
    "safetensors_with_a_wide_header",
    "script_of_many_empty_lines",
}


def measure(mebibytes: int, *paths: Path) -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, MEASURE, str(mebibytes), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_harmless(result: dict[str, Any], *, opens: bool, most_nbytes: int = 200 << 20) -> None:
    assert "escaped" not in result, result
    assert ("error" not in result) == opens, result
    if not opens:
        assert result["name"] in result["error"] or "missing" in result["error"]
        assert 0 < len(result["hint"]) < 1000
    assert result["peak_nbytes"] < most_nbytes, result
    assert result["seconds"] < 10, result


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every bomb, opened and read in a process of its own, with a sixteenth of the usual limits."""
    paths = [tmp_path_factory.mktemp("bombs") / name for name in BOMBS]
    for path in paths:
        BOMBS[path.name](path)
    return {result["name"]: result for result in measure(8, *paths)}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory_and_time(
    outcomes: dict[str, dict[str, Any]], name: str
) -> None:
    assert_harmless(outcomes[name], opens=name in HARMLESS)


def test_the_limit_for_a_pickle_is_within_the_memory_that_is_promised(tmp_path: Path) -> None:
    path = tmp_path / "strings"
    write_torch_zip(path, b"(" + b"X\x02\x00\x00\x00ab" * 1_000_000 + b"l")
    (result,) = measure(32, path)
    assert_harmless(result, opens=False, most_nbytes=50 << 20)
    assert result["peak_nbytes"] > 15 << 20  # else this would measure nothing


# Nothing is executed


def _touch(marker: Path) -> tuple[bytes, bytes]:
    return reference("os", "system"), string(f"touch {marker}")


def _attacks(marker: Path) -> dict[str, bytes]:
    system, command = _touch(marker)
    instance = b"(" + command + b"ios\nsystem\n"
    evil_state = mapping((string("x"), string("y")))
    return {
        "reduce": call(system, command),
        "newobj": system + b"(" + command + b"t\x81",
        "newobj_ex": system + b"(" + command + b"t}\x92",
        "inst": instance,
        "obj": b"(" + system + command + b"o",
        "build": reference("evil_module", "Evil") + b")R" + evil_state + b"b",
        "stack_global": string("os") + string("system") + b"\x93" + b"(" + command + b"tR",
        "getattr": call(
            call(reference("builtins", "getattr"), reference("os", "path"), string("join")), command
        ),
        "eval": call(reference("builtins", "eval"), string(f"open({str(marker)!r}, 'w')")),
        "hooks_of_a_tensor": tensor()[:-1]
        + call(call(reference("collections", "OrderedDict"), call(system, command))),
    }


@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "callbacks"])
@pytest.mark.parametrize("attack", [*_attacks(Path("unused"))][:-1])
def test_what_a_pickle_calls_is_never_called(tmp_path: Path, attack: str, place: str) -> None:
    """In a process of its own, so that an import would be one for the first time."""
    folder = tmp_path / "modules"
    folder.mkdir()
    marker = tmp_path / "marker"
    (folder / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    evil = _attacks(marker)[attack]
    weights = {"w": tensor(), "evil": evil} if place == "state_dict" else {"w": tensor()}
    parts = {"state_dict": named(**weights)} | ({} if place == "state_dict" else {place: evil})
    path = write_torch_zip(tmp_path / "evil.ckpt", named(**parts))
    from harness.checkpoint import open_checkpoint

    sys.path.insert(0, str(folder))
    try:
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.tensors["w"].array().tolist() == [[1, 2], [3, 4]]
            _ = checkpoint.config
    finally:
        sys.path.remove(str(folder))
    assert not marker.exists()
    assert "evil_module" not in sys.modules


def test_the_attacks_of_these_tests_are_real(tmp_path: Path) -> None:
    import pickle

    from tests.checkpoint.builders import pickled

    marker = tmp_path / "marker"
    pickle.loads(pickled(_attacks(marker)["reduce"]))
    assert marker.exists()


def test_reading_imports_neither_torch_nor_what_the_file_names(tmp_path: Path, data: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    body = named(w=tensor(), x=call(reference("evil_module", "Evil")))
    path = write_torch_zip(tmp_path / "evil.pt", body)
    script = (
        "import sys\n"
        "from harness.checkpoint import open_checkpoint\n"
        "for name in sys.argv[1:]:\n"
        "    with open_checkpoint(name) as checkpoint:\n"
        "        checkpoint.config\n"
        "        [tensor.array() for tensor in checkpoint.tensors.values()]\n"
        "heavy = {'torch', 'pytorch_lightning', 'omegaconf', 'evil_module'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    files = [str(path), str(data / "nest_tiny.nemo"), str(data / "nest_tiny.ckpt")]
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "-c", script, *files], check=True, env=env)
