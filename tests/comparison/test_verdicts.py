"""Verdicts against torch.allclose: `close` and `different` are never wrong, from the golden alone
or with all values, over thousands of perturbed tensors of every kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

from harness import api
from harness.api import KeptValues
from harness.comparison.comparison import Comparison
from harness.comparison.policy import Policy
from harness.golden.golden import Golden

# harness.fingerprint widens signalling NaN of bfloat16 under a warning; see test_fingerprint.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast"),
    pytest.mark.usefixtures("without_causes"),
]

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
]
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
INTS = [
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
TOLERANCES = [(1e-5, 1e-5), (1e-3, 0.0), (0.0, 1e-2), (1e-9, 1e-6), (2.0, 0.3), (0.0, 0.0)]
# One element; less than a block; blocks of which the last is partial (float32: 8192 a block).
SIZES = [1, 5, 64, 300, 8192, 9001, 20000]

BYTES = torch.uint8
Change = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def components(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor


def like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """float64 values as a tensor of another's dtype and shape."""
    if tensor.is_complex():
        return torch.view_as_complex(values.reshape(-1, 2)).to(tensor.dtype)
    return values.to(tensor.dtype)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return components(tensor).to(torch.float64).clone()


def chosen(tensor: torch.Tensor, count: int, g: torch.Generator) -> torch.Tensor:
    return torch.randperm(tensor.numel(), generator=g)[:count]


def scaled_by(factor: float) -> Change:
    return lambda t, g: like(wide(t) * factor, t)


def noise(size: float) -> Change:
    """Uniform noise of up to `size` times what atol = rtol = 1e-5 allows."""

    def change(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        x = wide(t)
        uniform = torch.rand(x.shape, generator=g, dtype=torch.float64) * 2 - 1
        return like(x + uniform * size * (1e-5 + 1e-5 * x.abs()), t)

    return change


def sparse(count: int, size: float) -> Change:
    def change(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        x = wide(t)
        where = chosen(x, count, g)
        x[where] += torch.randn(len(where), generator=g, dtype=torch.float64) * size
        return like(x, t)

    return change


def bit_flip(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    data = t.view(torch.uint8).clone()
    index = int(torch.randint(data.numel(), (), generator=g))
    data[index] ^= 1 << int(torch.randint(8, (), generator=g))
    return data.view(t.dtype)


def ulps(count: int) -> Change:
    """One in ten elements goes to a neighbouring number."""

    def change(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        bits = components(t).view(BITS[components(t).element_size()]).clone()
        bits[chosen(bits, max(1, bits.numel() // 10), g)] += count
        if t.is_complex():
            return torch.view_as_complex(bits.view(components(t).dtype).reshape(-1, 2))
        return bits.view(t.dtype)

    return change


BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def at_limit(offset: int) -> Change:
    """One element exactly at the limit of (1e-5, 1e-5) as float64 sees it, or ulps from it."""

    def change(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        x, before = wide(t), wide(t)
        where = chosen(x, 1, g)
        x[where] += 1e-5 + 1e-5 * before[where].abs()
        changed = like(x, t)
        if not t.is_complex():
            bits = changed.view(BITS[t.element_size()])
            bits[where] += offset
        return changed

    return change


def put(value: float, count: int) -> Change:
    def change(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        x = wide(t)
        x[chosen(x, count, g)] = value
        return like(x, t)

    return change


def swapped(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    half = t.numel() // 2
    return torch.cat([t[half : 2 * half], t[:half], t[2 * half :]])


def negated_one(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    x = wide(t)
    x[chosen(x, 1, g)] *= -1
    return like(x, t)


def through(dtype: torch.dtype) -> Change:
    return lambda t, g: like(wide(t).to(dtype).to(torch.float64), t)


CHANGES: dict[str, Change] = {
    "same": lambda t, g: t.clone(),
    "1 ulp": ulps(1),
    "3 ulps": ulps(3),
    **{f"noise {size:g}": noise(size) for size in (1e-5, 1e-3, 0.3, 1.0, 1.05, 3, 30, 1e4)},
    **{f"{n} changed by {s:g}": sparse(n, s) for n in (1, 2, 3, 10) for s in (1e-5, 1e-2, 5)},
    "bit flip": bit_flip,
    **{f"limit {offset:+}": at_limit(offset) for offset in (-1, 0, 1)},
    "NaN put": put(float("nan"), 1),
    "inf put": put(float("inf"), 2),
    "-inf put": put(float("-inf"), 1),
    "zero put": put(0.0, 3),
    "swapped": swapped,
    "one negated": negated_one,
    "negated": scaled_by(-1.0),
    "scaled 1 + 1e-5": scaled_by(1 + 1e-5),
    "scaled 1.2": scaled_by(1.2),
    "zeroed": scaled_by(0.0),
    "through bfloat16": through(torch.bfloat16),
    "through float32": through(torch.float32),
}


def with_specials(x: torch.Tensor, values: list[float]) -> torch.Tensor:
    for place, value in enumerate(values):
        x[place * 7 % x.numel()] = value
    return x


BASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "small": lambda x: x * 1e-4,
    "tiny": lambda x: x * 1e-40,
    "below": lambda x: x * 1e-200,
    "large": lambda x: x * 1e4,
    "huge": lambda x: x * 1e37,
    "beyond": lambda x: x * 1e200,
    "offset": lambda x: 3 + x * 1e-3,
    "zero": lambda x: x * 0,
    "with inf": lambda x: with_specials(x, [float("inf"), float("-inf")]),
    "with NaN": lambda x: with_specials(x, [float("nan")]),
}


def cases(seed: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(key, expected, actual): every dtype of every base, under the next three of the changes."""
    g = torch.Generator().manual_seed(seed)
    changes, sizes = cycle(CHANGES.items()), cycle(SIZES)
    for dtype in [*FLOATS, *FLOAT8]:
        for base, make in BASES.items():
            for (change, apply), size in zip(islice(changes, 3), sizes, strict=False):
                count = size * 2 if dtype.is_complex else size
                x = make(torch.randn(count, generator=g, dtype=torch.float64))
                expected = like(x, torch.empty(0, dtype=dtype))
                yield f"{dtype}.{base}.{size}.{change}", expected, apply(expected, g)


def integer_cases(seed: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    for dtype in INTS:
        for size in SIZES:
            data = torch.randint(0, 2, (size,), generator=g).to(dtype).clone()
            yield f"{dtype}.{size}.same", data, data.clone()
            changed = data.view(torch.uint8).clone()
            changed[int(torch.randint(size, (), generator=g)) * data.element_size()] ^= 1
            yield f"{dtype}.{size}.one changed", data.clone(), changed.view(dtype)


def allclose(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> bool:
    if actual.dtype in FLOAT8:
        actual, expected = actual.float(), expected.float()
    if not (actual.is_floating_point() or actual.is_complex()):
        return torch.equal(actual, expected)
    return torch.allclose(actual, expected, atol=atol, rtol=rtol)


def verdicts(comparison: Comparison, keys: list[str]) -> dict[str, str]:
    found: dict[str, str] = dict.fromkeys(keys, "identical")
    found |= {finding.key: finding.kind for finding in comparison.findings}
    assert set(found) == set(keys)
    return found


class Pairs:
    """Two checkpoints of many tensors, and the goldens of the first."""

    def __init__(self, folder: Path, found: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        self.expected = {key: expected for key, expected, _ in found}
        self.actual = {key: actual for key, _, actual in found}
        self.reference, self.path = folder / "expected.pt", folder / "actual.pt"
        torch.save(self.expected, self.reference)
        torch.save(self.actual, self.path)
        self.goldens: dict[KeptValues, Golden] = {
            values: api.record(self.reference, folder / values, values=values)
            for values in ("none", "all")
        }

        self.same = {key for key, a, b in found if torch.equal(a.view(BYTES), b.view(BYTES))}

    @cache  # noqa: B019
    def verified(self, values: KeptValues, policy: Policy) -> Comparison:
        return api.verify(self.path, self.goldens[values], policy=policy)

    @cache  # noqa: B019
    def close(self, atol: float, rtol: float) -> set[str]:
        """The keys of the tensors that torch calls close."""
        sides = self.expected.items()
        return {key for key, e in sides if allclose(self.actual[key], e, atol, rtol)}


@pytest.fixture(scope="module", params=[0])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    found = [*cases(request.param), *integer_cases(request.param)]
    return Pairs(tmp_path_factory.mktemp("pairs"), found)


@pytest.mark.parametrize(("atol", "rtol"), TOLERANCES)
def test_no_verdict_from_the_golden_alone_is_wrong(pairs: Pairs, atol: float, rtol: float) -> None:
    found = pairs.verified("none", Policy(atol=atol, rtol=rtol))
    wrong, counts = [], Counter[str]()
    for key, verdict in verdicts(found, list(pairs.expected)).items():
        truth = key in pairs.close(atol, rtol)
        counts[verdict] += 1
        if verdict == "identical":
            assert key in pairs.same, key
        elif (verdict == "close" and not truth) or (verdict == "different" and truth):
            wrong.append((key, verdict))
    assert wrong == []
    assert counts["different"] > 90
    assert counts["close"] > 9 or atol + rtol == 0


@pytest.mark.parametrize(
    ("atol", "rtol", "how"),
    [(1e-5, 1e-5, "reference"), (1e-5, 1e-5, "diff"), *((*pair, "values") for pair in TOLERANCES)],
)
def test_verdicts_with_all_values_are_those_of_torch(
    pairs: Pairs, atol: float, rtol: float, how: str
) -> None:
    policy = Policy(atol=atol, rtol=rtol)
    if how == "values":
        found = pairs.verified("all", policy)
    elif how == "reference":
        golden = pairs.goldens["none"]
        found = api.verify(pairs.path, golden, policy=policy, reference=pairs.reference)
    else:
        found = api.diff(pairs.reference, pairs.path, policy=policy)
    wrong = []
    for key, verdict in verdicts(found, list(pairs.expected)).items():
        close = "close" if key in pairs.close(atol, rtol) else "different"
        truth = "identical" if key in pairs.same else close
        if verdict != truth:
            wrong.append((key, verdict, truth))
    assert wrong == []


@pytest.mark.parametrize("values", ["none", "all"])
def test_exact_allows_the_same_bytes_alone(pairs: Pairs, values: KeptValues) -> None:
    found = pairs.verified(values, Policy(exact=True))
    for key, verdict in verdicts(found, list(pairs.expected)).items():
        assert verdict == ("identical" if key in pairs.same else "different"), key


def test_intervals_from_the_golden_alone_hold_what_all_values_say(pairs: Pairs) -> None:
    policy = Policy(atol=TOLERANCES[0][0], rtol=TOLERANCES[0][1])
    sketched, full = (pairs.verified(values, policy) for values in ("none", "all"))
    exact = {f.key: f.difference for f in full.findings}
    checked = 0
    for finding in sketched.findings:
        bounded, truth = finding.difference, exact[finding.key]
        assert bounded is not None
        assert truth is not None
        if not truth.tolerance.exact and "int" not in finding.key and "bool" not in finding.key:
            for name in ("max_abs", "min_atol"):
                low, high = getattr(bounded, name)
                value = getattr(truth, name)[0]
                # The exact figures are in the arithmetic of the dtype.
                slack = 1e-6 * value if value < float("inf") else 0.0
                assert low <= value + slack + 1e-45, (finding.key, name, low, value)
                assert value <= high * (1 + 1e-6) + 1e-45, (finding.key, name, high, value)
            checked += 1
    assert checked > 140
