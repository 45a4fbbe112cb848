"""Digests, roots, statistics and sketches: what they depend on, and what they never do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import DTYPES, numpy_dtype
from harness.errors import CheckpointError
from harness.fingerprints.arithmetic import as_floats
from harness.fingerprints.fingerprint import Fingerprint, structure
from harness.fingerprints.scan import fingerprint
from harness.fingerprints.stats import Stats
from harness.streaming.chunks import CHUNK_NBYTES
from harness.streaming.workers import Workers

State = dict[str, torch.Tensor]


def fingerprint_of(path: Path, **options: object) -> Fingerprint:
    with open_checkpoint(path) as checkpoint:
        return fingerprint(checkpoint, **options)  # type: ignore[arg-type]


def saved(folder: Path, state: State, name: str = "x.pt") -> Path:
    path = folder / name
    if name.endswith(".safetensors"):
        safetensors.torch.save_file({k: t.contiguous() for k, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def state_of(seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        "large.weight": torch.randn(1200, 1000, generator=g),  # more than a chunk
        "double": torch.randn(70_001, generator=g, dtype=torch.float64),
        "half": torch.randn(50_000, generator=g).bfloat16(),
        "complex": torch.randn(9_001, generator=g, dtype=torch.complex64),
        "bias": torch.randn(10, generator=g),
        "steps": torch.tensor(7),
        "mask": torch.rand(100, generator=g) > 0.5,
        "empty": torch.empty(0, 4),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("state"), state_of())


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_nothing_depends_on_the_number_of_threads(path: Path, jobs: int) -> None:
    one, other = (
        fingerprint_of(path, workers=Workers(jobs=1)),
        fingerprint_of(path, workers=Workers(jobs=jobs)),
    )
    assert one.root == other.root
    for key, tensor in one.tensors.items():
        again = other.tensors[key]
        assert (tensor.digest, tensor.stats, tensor.values) == (
            again.digest,
            again.stats,
            again.values,
        )
        if tensor.sketch is not None:
            assert again.sketch is not None
            assert np.array_equal(tensor.sketch.projections, again.sketch.projections)
            assert np.array_equal(tensor.sketch.norms, again.sketch.norms)


@pytest.mark.parametrize("name", ["x.safetensors", "legacy.pt", "reversed.pt", "strided.pt"])
def test_the_root_does_not_depend_on_container_order_or_strides(
    tmp_path: Path, path: Path, name: str
) -> None:
    state = state_of()
    if name == "reversed.pt":
        state = dict(reversed(state.items()))
    if name == "strided.pt":
        state["large.weight"] = state["large.weight"].T.contiguous().T
    if name == "legacy.pt":
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
        other = tmp_path / name
    else:
        other = saved(tmp_path, state, name)
    expected, found = fingerprint_of(path), fingerprint_of(other)
    assert found.root == expected.root
    assert {k: t.digest for k, t in found.tensors.items()} == {
        k: t.digest for k, t in expected.tensors.items()
    }
    for key, tensor in expected.tensors.items():
        assert found.tensors[key].stats == tensor.stats


def test_the_root_names_keys_dtypes_and_shapes_too(tmp_path: Path) -> None:
    x = torch.zeros(4, 6)
    states: list[State] = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(6, 4)},
        {"x": x.to(torch.int32)},
        {"x": x, "y": torch.zeros(0)},
    ]
    roots = {fingerprint_of(saved(tmp_path, s, f"{n}.pt")).root for n, s in enumerate(states)}
    assert len(roots) == len(states)


def test_the_digest_of_a_known_tensor_never_changes(tmp_path: Path) -> None:
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    found = fingerprint_of(saved(tmp_path, {"weight": x}))
    digest = found.tensors["weight"].digest
    assert digest is not None
    assert digest.hex() == "7580b8b21ec455c92726b168091162d7ca268850908491829e3b2796c59c5371"
    assert found.root.hex() == "8947f460faef6ba4e6bf2d123676035b4b1ffaf3e85f487dd1fdd4436f1f2db9"


@pytest.fixture(scope="module")
def digests(path: Path) -> dict[str, bytes | None]:
    return {key: tensor.digest for key, tensor in fingerprint_of(path).tensors.items()}


@settings(max_examples=40)
@given(
    which=st.sampled_from([k for k, t in state_of().items() if t.numel()]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_one_flipped_bit_changes_the_digest(
    path: Path, digests: dict[str, bytes | None], which: str, place: float, bit: int
) -> None:
    state = state_of()
    if which == "mask":
        bit = 0
    data = state[which].reshape(-1).view(torch.uint8)
    data[int(place * data.numel())] ^= 1 << bit
    changed = saved(path.parent, {which: state[which]}, "flipped.pt")
    found = fingerprint_of(changed, details=lambda tensor: False)
    assert found.tensors[which].digest not in {digests[which], None}


def test_flipped_bits_change_the_root(tmp_path: Path, path: Path) -> None:
    roots = {fingerprint_of(path).root}
    for number, key in enumerate(state_of()):
        state = state_of()
        if state[key].numel():
            state[key].reshape(-1).view(torch.uint8)[-1] ^= 1
            roots.add(fingerprint_of(saved(tmp_path, state, f"{number}.pt")).root)
    assert len(roots) == len(state_of())  # all but the empty one, and the original


@pytest.mark.parametrize("extra", [-4, 0, 4, 4 * 8192, 4 * 8192 + 4])
def test_chunks_of_all_sizes_are_joined(tmp_path: Path, extra: int) -> None:
    numel = (CHUNK_NBYTES + extra) // 4
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    found = fingerprint_of(saved(tmp_path, {"x": x})).tensors["x"]
    assert found.stats is not None
    assert found.sketch is not None
    values = x.double().numpy()
    assert found.stats.l2 == pytest.approx(np.linalg.norm(values), rel=1e-12)
    assert len(found.sketch.norms) == -(-numel // 8192)
    assert found.sketch.norms[-1] == pytest.approx(
        np.linalg.norm(values[numel - (numel % 8192 or 8192) :]), rel=1e-12
    )
    # A change on either side of the boundary is seen, and only in its own block.
    for place in (CHUNK_NBYTES // 4 - 2, numel - 1):
        y = x.clone()
        y[place] += 1
        other = fingerprint_of(saved(tmp_path, {"x": y})).tensors["x"]
        assert other.sketch is not None
        changed = np.any(other.sketch.projections != found.sketch.projections, axis=1)
        assert np.flatnonzero(changed).tolist() == [place // 8192]
        assert other.digest != found.digest


def numpy_stats(x: torch.Tensor) -> Stats:
    if x.is_complex():
        x = torch.view_as_real(x)
    values = x.double().flatten().numpy() if x.dtype != torch.bool else x.numpy().astype("f8")
    finite = values[np.isfinite(values)]
    return Stats(
        min=finite.min(initial=math.inf) if finite.size else 0.0,
        max=finite.max(initial=-math.inf) if finite.size else 0.0,
        mean=finite.mean() if finite.size else 0.0,
        std=finite.std() if finite.size else 0.0,
        l2=float(np.linalg.norm(finite)),
        num_zero=int((finite == 0).sum()),
        num_nan=int(np.isnan(values).sum()),
        num_posinf=int(np.isposinf(values).sum()),
        num_neginf=int(np.isneginf(values).sum()),
    )


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64),
    ],
)
@pytest.mark.parametrize("numel", [1, 5000, 300_000])
@pytest.mark.parametrize("special", [False, True])
def test_stats_are_those_of_numpy_in_float64(
    tmp_path: Path, dtype: torch.dtype, numel: int, special: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=g, dtype=torch.float64) * 3
    if dtype.is_floating_point or dtype.is_complex:
        if special:
            x[::7], x[1::11], x[2::13], x[3::17] = 0.0, math.nan, math.inf, -math.inf
        x = torch.complex(x, x.flip(0)).to(dtype) if dtype.is_complex else x.to(dtype)
    else:
        x = (x.abs() * 10).to(torch.int64).to(dtype)
    stats = fingerprint_of(saved(tmp_path, {"x": x})).tensors["x"].stats
    truth = numpy_stats(x)
    assert stats is not None
    for name in ("min", "max", "num_zero", "num_nan", "num_posinf", "num_neginf"):
        assert getattr(stats, name) == getattr(truth, name), name
    scale = max(abs(truth.min), abs(truth.max), 1e-300)
    assert stats.mean == pytest.approx(truth.mean, rel=1e-12, abs=1e-14 * scale)
    assert stats.std == pytest.approx(truth.std, rel=1e-11)
    assert stats.l2 == pytest.approx(truth.l2, rel=1e-12)
    assert stats.num_nonfinite == truth.num_nan + truth.num_posinf + truth.num_neginf


def test_stats_do_not_depend_on_what_else_is_kept(path: Path) -> None:
    expected = {key: tensor.stats for key, tensor in fingerprint_of(path).tensors.items()}
    for options in (
        {"keep_values": lambda tensor: True},
        {"keep_values": lambda tensor: False},
        {"block_nbytes": 1024},
        {"block_nbytes": 1 << 20},
    ):
        found = fingerprint_of(path, **options).tensors
        assert {key: tensor.stats for key, tensor in found.items()} == expected


def test_a_tensor_of_nothing_finite_has_stats_of_zero(tmp_path: Path) -> None:
    x = torch.full((5000,), math.nan)
    found = fingerprint_of(saved(tmp_path, {"x": x})).tensors["x"]
    assert found.stats == Stats(
        min=0, max=0, mean=0, std=0, l2=0, num_zero=0, num_nan=5000, num_posinf=0, num_neginf=0
    )
    assert found.sketch is not None
    assert not found.sketch.projections.any()


def test_a_signalling_nan_of_bfloat16_is_widened_without_a_warning(tmp_path: Path) -> None:
    x = torch.full((5000,), 0x7F81, dtype=torch.int16).view(torch.bfloat16)
    stats = fingerprint_of(saved(tmp_path, {"x": x})).tensors["x"].stats
    assert stats is not None
    assert stats.num_nan == 5000


def test_small_tensors_keep_values_large_floating_ones_a_sketch_and_others_neither(
    path: Path,
) -> None:
    found = fingerprint_of(path).tensors
    kept = {k for k, t in found.items() if t.values is not None}
    sketched = {k for k, t in found.items() if t.sketch is not None}
    assert kept == {"bias", "steps", "mask", "empty"}
    assert sketched == {"large.weight", "double", "half", "complex"}
    assert found["bias"].values == state_of()["bias"].numpy().tobytes()


def test_a_large_integer_tensor_has_a_digest_and_stats(tmp_path: Path) -> None:
    found = fingerprint_of(saved(tmp_path, {"x": torch.arange(10_000)})).tensors["x"]
    assert (found.values, found.sketch) == (None, None)
    assert found.stats is not None
    assert found.stats.max == 9999


def test_digests_alone_read_no_stats(path: Path) -> None:
    found = fingerprint_of(path, details=lambda tensor: False)
    assert found.root == fingerprint_of(path).root
    assert all((t.stats, t.values, t.sketch) == (None, None, None) for t in found.tensors.values())


def test_the_structure_has_keys_dtypes_and_shapes_but_no_root(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        found = structure(checkpoint)
    assert {k: t.shape for k, t in found.tensors.items()} == {
        k: tuple(t.shape) for k, t in state_of().items()
    }
    with pytest.raises(ValueError, match="no root"):
        _ = found.root


def test_a_meta_tensor_is_an_error_that_names_it(tmp_path: Path) -> None:
    state = {"a": torch.zeros(3), "b.weight": torch.empty(3, 4, device="meta")}
    with pytest.raises(CheckpointError, match=r"b\.weight.*meta"):
        fingerprint_of(saved(tmp_path, state))


def test_tied_tensors_are_recorded_once_and_named(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    state = {"embed.weight": weight, "head.weight": weight, "other": weight.clone()}
    found = fingerprint_of(saved(tmp_path, state)).tensors
    assert {k: t.alias_of for k, t in found.items()} == {
        "embed.weight": None,
        "head.weight": "embed.weight",
        "other": None,
    }
    assert found["head.weight"].key == "head.weight"
    assert found["head.weight"].digest == found["embed.weight"].digest == found["other"].digest
    separate = {key: tensor.clone() for key, tensor in state.items()}
    again = fingerprint_of(saved(tmp_path, separate, "separate.pt"))
    assert again.root == fingerprint_of(tmp_path / "x.pt").root


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
@pytest.mark.parametrize(
    ("values", "least", "greatest", "num_zero"),
    [
        ([-3.0, -0.5, -2.0], -3.0, -0.5, 0),
        ([3.0, 0.5, 2.0], 0.5, 3.0, 0),
        ([-0.0, -1.0], -1.0, 0.0, 1),
        ([0.0, -0.0, 1.0], 0.0, 1.0, 2),
        ([0.0, 1.0], 0.0, 1.0, 1),
        ([-0.0], 0.0, 0.0, 1),
        ([-math.nan, -1.0, -2.0], -2.0, -1.0, 0),
        ([math.nan, 1.0, 2.0], 1.0, 2.0, 0),
        ([-math.inf, 1.0, 2.0, -0.0], 0.0, 2.0, 1),
        ([math.inf, -1.0, -2.0], -2.0, -1.0, 0),
    ],
)
def test_extremes_and_zeros_whatever_the_signs(
    tmp_path: Path,
    dtype: torch.dtype,
    values: list[float],
    least: float,
    greatest: float,
    num_zero: int,
) -> None:
    x = torch.tensor(values).to(dtype)
    if math.isnan(values[0]):  # a sign that torch does not promise to keep
        bits = x.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.itemsize])
        sign = torch.iinfo(bits.dtype).min
        bits[0] = bits[0] & ~sign if math.copysign(1, values[0]) > 0 else bits[0] | sign
    stats = fingerprint_of(saved(tmp_path, {"x": x})).tensors["x"].stats
    assert stats is not None
    assert (stats.min, stats.max, stats.num_zero) == (least, greatest, num_zero)
    assert "-0.0" not in repr(stats)


@pytest.mark.parametrize(
    "name", sorted(name for name, dtype in DTYPES.items() if dtype.is_floating)
)
def test_floats_are_the_numbers_that_are_stored(name: str) -> None:
    """All there are of one or two bytes, a sample of others."""
    dtype = DTYPES[name]
    stored = numpy_dtype(dtype)
    if stored.itemsize <= 2:
        data = np.arange(1 << 8 * stored.itemsize, dtype=f"<u{stored.itemsize}").view("|u1")
    else:
        data = np.random.default_rng(0).integers(0, 256, 4096, dtype="|u1")
    found = as_floats(data, dtype)
    with np.errstate(invalid="ignore"):
        expected = data.view(stored).astype("<f8")
        assert np.array_equal(found.astype("<f8"), expected, equal_nan=True)
    assert found.dtype == np.dtype("<f8" if stored.itemsize == 8 else "<f4")


def test_a_small_std_beside_a_large_mean_keeps_its_digits(tmp_path: Path) -> None:
    one = torch.tensor(1000.0)
    other = torch.nextafter(one, torch.tensor(2000.0))
    path = saved(tmp_path, {"x": torch.stack([one, other]).repeat(5000)})
    stats = fingerprint_of(path).tensors["x"].stats
    assert stats is not None
    assert stats.std == pytest.approx(float(other - one) / 2, rel=1e-3)
