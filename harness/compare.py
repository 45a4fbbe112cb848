"""Compare two fingerprints under a policy: every finding, and one verdict.

In: the expected and the actual `Fingerprint`, a `Policy`, and a function that measures pairs of
tensors whose digests differ. Out: a frozen `Comparison`. No I/O: what must be read to measure is
behind that function. Refused: options of the policy that fit no tensor (UsageError), and a side
that changed while it was read (CheckpointError).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, get_args

from harness.errors import CheckpointError, GoldenMismatch, UsageError
from harness.fingerprint import Fingerprint, TensorPrint

if TYPE_CHECKING:
    from harness.allclose import Tolerance
    from harness.difference import Difference, Measure, Verdict
    from harness.integrity import Damage

# Worst first: what explains all else, what stops a load, what computes something else, what is
# only noted.
FindingKind = Literal[
    "damaged",
    "missing",
    "unexpected",
    "prefix",
    "renamed",
    "shape",
    "dtype",
    "unwritten",
    "different",
    "alias",
    "requires_grad",
    "optimizer",
    "hyperparameter",
    "undecided",
    "close",
]
FINDING_KINDS: tuple[FindingKind, ...] = get_args(FindingKind)

# Inserted into keys by torch.compile, data parallelism and activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_MAX_TO_CHECK = 20
_STRANGERS = "no key in common: is it a checkpoint of another model?"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What counts as the same.

    `ignore` and `tolerances` take globs over the golden's keys (the checkpoint's, for unexpected
    ones); of several tolerances that fit, the last wins. `key_map` renames the golden's keys, or
    prefixes that end in a dot; `strip_prefix` is taken off the checkpoint's keys.
    """

    atol: float = 1e-5
    rtol: float = 1e-5
    exact: bool = False
    ignore: tuple[str, ...] = ()
    tolerances: tuple[tuple[str, float, float], ...] = ()
    key_map: tuple[tuple[str, str], ...] = ()
    strip_prefix: str = ""
    check_dtype: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.ignore, str):  # whose letters would be globs, "*" among them
            raise UsageError(
                f"ignore takes a tuple of globs, not {self.ignore!r}", hint=f"({self.ignore!r},)"
            )
        for atol, rtol in [(self.atol, self.rtol), *(t[1:] for t in self.tolerances)]:
            if not (0 <= atol < float("inf") and 0 <= rtol < float("inf")):
                raise UsageError(
                    f"a tolerance must be a finite number from 0 up, not atol {atol}, rtol {rtol}",
                    hint="leave it out for 1e-5, or give exact to allow no difference",
                )

    def tolerance(self, key: str) -> Tolerance:
        """The tolerance for a golden's key."""
        from harness.allclose import Tolerance  # not before something differs

        atol, rtol = self.atol, self.rtol
        for glob, its_atol, its_rtol in self.tolerances:
            if fnmatchcase(key, glob):
                atol, rtol = its_atol, its_rtol
        return Tolerance(atol=atol, rtol=rtol, exact=self.exact)

    def ignores(self, key: str) -> bool:
        return any(fnmatchcase(key, glob) for glob in self.ignore)

    def renamed(self, key: str) -> str:
        """The name under which the checkpoint should have a golden's key."""
        for old, new in self.key_map:
            if key == old:
                return new
            if old.endswith(".") and key.startswith(old):
                return new + key[len(old) :]
        return key

    def at_stage(self, keys: Collection[str], elsewhere: Collection[str]) -> Policy:
        """Leave out the globs that fit none of a stage's `keys`, but some of another one's."""

        def is_here(glob: str) -> bool:
            return _fits(glob, keys) or not _fits(glob, elsewhere)

        return replace(
            self,
            ignore=tuple(glob for glob in self.ignore if is_here(glob)),
            tolerances=tuple(one for one in self.tolerances if is_here(one[0])),
        )


def _fits(glob: str, keys: Iterable[str]) -> bool:
    return any(fnmatchcase(key, glob) for key in keys)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as the golden says.

    `key` is the golden's key (the checkpoint's, for `unexpected`); `expected` and `actual` are the
    two sides in words; `actual_key` differs from `key` where it was renamed or mapped; `count` is
    the number of tensors that a `prefix` finding covers.
    """

    kind: FindingKind
    key: str
    expected: str | None = None
    actual: str | None = None
    actual_key: str | None = None
    count: int = 1
    difference: Difference | None = None

    @property
    def fails(self) -> bool:
        return self.kind not in ("close", "undecided")


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The first place in a computation that is not as recorded, in execution order.

    `culprit` is the submodule whose own code computed it; `agreeing` and `departing` are that
    submodule's inputs, by name.
    """

    finding: Finding
    culprit: str
    agreeing: tuple[str, ...]
    departing: tuple[str, ...]
    num_before: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of one stage: what was compared, and every finding, worst first."""

    expected: Fingerprint
    actual: Fingerprint
    policy: Policy
    findings: tuple[Finding, ...]
    num_identical: int
    num_ignored: int = 0
    num_nan: int = 0
    stage: str = "file"
    departure: Departure | None = None
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst of all tensors: different, undecided, close or identical."""
        kinds = {finding.kind for finding in self.findings}
        if any(finding.fails for finding in self.findings):
            return "different"
        if "undecided" in kinds:
            return "undecided"
        return "close" if "close" in kinds else "identical"

    @property
    def exit_code(self) -> int:
        """0 all identical or close, 1 something differs, 3 something is undecided."""
        return {"identical": 0, "close": 0, "different": 1, "undecided": 3}[self.verdict]

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def count(self, kind: FindingKind) -> int:
        """The number of tensors with findings of a kind."""
        return sum(finding.count for finding in self.findings if finding.kind == kind)

    def raise_for_mismatch(self) -> Comparison:
        """Raise GoldenMismatch, with the report as its message, unless the verdict passes."""
        if not self.ok:
            from harness.report.text import render

            raise GoldenMismatch(render(self), hint="update the golden if the change is meant")
        return self


@dataclass(frozen=True)
class _Pair:
    expected: TensorPrint
    actual: TensorPrint


def compare(
    expected: Fingerprint,
    actual: Fingerprint,
    policy: Policy,
    measure: Measure,
    *,
    stage: str = "file",
) -> Comparison:
    """Compare `actual` with `expected` (a golden, as a rule); all findings are collected."""
    _check_globs(policy, expected, actual)
    theirs = _stripped(policy, actual)
    named = {policy.renamed(key): tensor for key, tensor in expected.tensors.items()}
    kept = {k: t for k, t in named.items() if not policy.ignores(t.key) and not policy.ignores(k)}
    ignored = named.keys() - kept
    found = {k: t for k, t in theirs.items() if not policy.ignores(k) and k not in ignored}
    num_ignored = len(ignored | (theirs.keys() - found.keys()))

    pairs = [_Pair(tensor, found[key]) for key, tensor in kept.items() if key in found]
    missing = {key: tensor for key, tensor in kept.items() if key not in found}
    unexpected = {key: tensor for key, tensor in found.items() if key not in kept}

    findings: list[Finding] = []
    prefixed, finding = _find_prefix(missing, unexpected)
    if finding is not None:
        findings.append(finding)
        pairs += [_Pair(missing.pop(a), unexpected.pop(b)) for a, b in prefixed]
    renamed = _find_renamed(missing, unexpected)
    for expected_key, actual_key in renamed:
        ours, other = missing.pop(expected_key), unexpected.pop(actual_key)
        findings.append(
            Finding(
                kind="renamed",
                key=ours.key,
                actual_key=other.key,
                expected=ours.key,
                actual=other.key,
            )
        )
    findings += [Finding(kind="missing", key=t.key, expected=describe(t)) for t in missing.values()]
    findings += [
        Finding(kind="unexpected", key=t.key, actual=describe(t)) for t in unexpected.values()
    ]
    strangers = missing and unexpected and not pairs and not renamed
    aliases = _alias_changes(expected, actual, pairs)
    to_measure: list[_Pair] = []
    num_identical = 0
    for pair in pairs:
        structural = _structure(pair, policy)
        if structural is not None:
            findings.append(structural)
            continue
        if pair.expected.key in aliases:
            findings.append(aliases[pair.expected.key])
        if pair.expected.digest is not None and pair.expected.digest == pair.actual.digest:
            num_identical += pair.expected.key not in aliases
        else:
            to_measure.append(pair)
    triples = [(p.expected, p.actual, policy.tolerance(p.expected.key)) for p in to_measure]
    differences = measure(triples) if triples else []
    for pair, difference in zip(to_measure, differences, strict=True):
        if difference.verdict == "identical":
            _refuse_contradiction(pair, actual)
            num_identical += pair.expected.key not in aliases
        elif difference.verdict == "different" or pair.expected.key not in aliases:
            findings.append(
                Finding(
                    kind=difference.verdict,
                    key=pair.expected.key,
                    actual_key=_other_key(pair),
                    expected=describe(pair.expected),
                    actual=describe(pair.actual),
                    difference=difference,
                )
            )
    return Comparison(
        expected=expected,
        actual=actual,
        policy=policy,
        findings=tuple(sorted(findings, key=_severity)),
        num_identical=num_identical,
        num_ignored=num_ignored,
        num_nan=sum(1 for t in kept.values() if t.stats is not None and t.stats.num_nan),
        stage=stage,
        notes=tuple(_notes(actual, strangers=bool(strangers))),
    )


def with_damages(
    comparison: Comparison, find: Callable[[list[str]], Mapping[str, Damage]]
) -> Comparison:
    """Add a finding for each tensor, of the worst that differ in value, whose bytes are damaged.

    `find` tells which of the checkpoint's keys are. Of very many, some tell as much as all.
    """
    differing = [f for f in comparison.findings if f.difference is not None][:_MAX_TO_CHECK]
    if not differing:
        return comparison
    damaged = find([finding.actual_key or finding.key for finding in differing])
    found = [
        Finding(
            kind="damaged",
            key=finding.key,
            actual_key=finding.actual_key,
            expected=f"CRC-32 {damage.expected:08x}, says {damage.where}",
            actual=f"CRC-32 {damage.actual:08x}",
        )
        for finding in differing
        if (damage := damaged.get(finding.actual_key or finding.key)) is not None
    ]
    return replace(comparison, findings=(*found, *comparison.findings))


def _notes(actual: Fingerprint, *, strangers: bool) -> Iterator[str]:
    if strangers:
        yield _STRANGERS
    if actual.num_cached:
        count = sum(1 for tensor in actual.tensors.values() if tensor.alias_of is None)
        yield (
            f"{actual.num_cached:,} of {count:,} tensors were not read: the cache knows their files"
        )


def _refuse_contradiction(pair: _Pair, actual: Fingerprint) -> None:
    """Equal bytes have equal digests, unless they were read at two times."""
    ours, theirs = pair.expected, pair.actual
    if ours.dtype == theirs.dtype and None not in (ours.digest, theirs.digest):
        raise CheckpointError(
            f"{actual.name}: the values of {theirs.key!r} are as expected, but their digest not",
            hint="something writes to it while it is read: try again when that is done",
        )


def describe(tensor: TensorPrint) -> str:
    """A tensor in words: dtype and shape."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def _other_key(pair: _Pair) -> str | None:
    return pair.actual.key if pair.actual.key != pair.expected.key else None


def _severity(finding: Finding) -> tuple[int, float]:
    """Worst kind first, within it the largest difference; ties keep the golden's order."""
    size = 0.0
    if finding.difference is not None:
        size = finding.difference.max_abs[0]
    return FINDING_KINDS.index(finding.kind), -size


def _structure(pair: _Pair, policy: Policy) -> Finding | None:
    """The most structural thing in which two tensors of one key differ, if any."""
    ours, theirs = pair.expected, pair.actual
    if ours.shape != theirs.shape:
        return Finding(
            kind="shape",
            key=ours.key,
            actual_key=_other_key(pair),
            expected=str(list(ours.shape)),
            actual=str(list(theirs.shape)),
        )
    if ours.dtype != theirs.dtype and policy.check_dtype:
        return Finding(
            kind="dtype",
            key=ours.key,
            actual_key=_other_key(pair),
            expected=str(ours.dtype),
            actual=str(theirs.dtype),
        )
    return None


def _alias_changes(
    expected: Fingerprint, actual: Fingerprint, pairs: Sequence[_Pair]
) -> dict[str, Finding]:
    """Tied tensors that came apart, and separate ones that were tied.

    Only between containers that can say so: safetensors cannot.
    """
    if not (expected.keeps_aliases and actual.keeps_aliases):
        return {}
    # Which of a tied group comes first depends on the order of the file: compare the groups.
    renamed = {pair.actual.key: pair.expected.key for pair in pairs}
    ours = _groups(pair.expected for pair in pairs)
    theirs = _groups(pair.actual for pair in pairs)
    theirs_by_our_key = {
        renamed[key]: frozenset(renamed[k] for k in group) for key, group in theirs.items()
    }
    findings = {}
    for pair in pairs:
        key = pair.expected.key
        before, after = ours[key], theirs_by_our_key[key]
        # One finding a group: the first key speaks for a tie that stays whole otherwise.
        if before != after and key != min(before | after):
            findings[key] = Finding(
                kind="alias", key=key, expected=_tied(before, key), actual=_tied(after, key)
            )
    return findings


def _groups(tensors: Iterator[TensorPrint]) -> dict[str, frozenset[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for tensor in tensors:
        groups[tensor.alias_of or tensor.key].add(tensor.key)
    return {key: frozenset(group) for group in groups.values() for key in group}


def _tied(group: frozenset[str], key: str) -> str:
    others = sorted(group - {key})
    return f"tied to {', '.join(others)}" if others else "separate"


def _find_prefix(
    missing: Mapping[str, TensorPrint], unexpected: Mapping[str, TensorPrint]
) -> tuple[list[tuple[str, str]], Finding | None]:
    """Find one change of prefix that explains most of the missing and unexpected keys."""
    votes: Counter[tuple[str, str]] = Counter()  # (expected prefix, actual prefix)
    for key in unexpected:
        votes.update(("", prefix) for prefix in _prefixes(key) if key[len(prefix) :] in missing)
    for key in missing:
        votes.update((prefix, "") for prefix in _prefixes(key) if key[len(prefix) :] in unexpected)
    plain = {_unwrapped(key): key for key in missing}
    wrapped = {plain.get(_unwrapped(key), ""): key for key in unexpected}
    wrapped.pop("", None)
    if votes:
        (ours, theirs), count = votes.most_common(1)[0]
        if count >= max(2, len(wrapped)):
            pairs = [
                (key, theirs + key[len(ours) :])
                for key in missing
                if key.startswith(ours) and theirs + key[len(ours) :] in unexpected
            ]
            return pairs, Finding(
                kind="prefix",
                key=ours or theirs,
                expected=f"prefix {ours!r}" if ours else "no prefix",
                actual=f"prefix {theirs!r}" if theirs else "no prefix",
                count=len(pairs),
            )
    if len(wrapped) >= 2:
        ours, theirs = _wrappers(wrapped.keys()), _wrappers(wrapped.values())
        return [*wrapped.items()], Finding(
            kind="prefix",
            key=theirs or ours,
            expected=f"wrapped as {ours!r}" if ours else "no wrapper",
            actual=f"wrapped as {theirs!r}" if theirs else "no wrapper",
            count=len(wrapped),
        )
    return [], None


def _prefixes(key: str) -> Iterator[str]:
    position = key.find(".")
    while 0 <= position < len(key) - 1:
        yield key[: position + 1]
        position = key.find(".", position + 1)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _wrappers(keys: Iterable[str]) -> str:
    parts = {part for key in keys for part in key.split(".")}
    return " ".join(f"{name}." for name in _WRAPPERS if name in parts)


def _find_renamed(
    missing: Mapping[str, TensorPrint], unexpected: Mapping[str, TensorPrint]
) -> list[tuple[str, str]]:
    """Pair missing and unexpected keys of equal digest; among equals, the most alike names."""
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for key, tensor in unexpected.items():
        if tensor.digest is not None:
            by_digest[tensor.digest].append(key)
    pairs = []
    for key, tensor in missing.items():
        candidates = by_digest.get(tensor.digest or b"", [])
        if candidates:
            best = max(candidates, key=lambda other: _likeness(key, other))
            candidates.remove(best)
            pairs.append((key, best))
    return pairs


def _likeness(one: str, other: str) -> int:
    """How many parts of two keys agree, from the front and from the back."""
    a, b = one.split("."), other.split(".")
    front = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return front + next(
        (i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y),
        min(len(a), len(b)),
    )


def _most_alike(name: str, keys: Sequence[str]) -> str:
    best = max(keys, key=lambda key: _likeness(key, name), default=None)
    return "there are no keys" if best is None else f"the most alike key is {best}"


def _stripped(policy: Policy, actual: Fingerprint) -> dict[str, TensorPrint]:
    prefix = policy.strip_prefix
    if not prefix:
        return dict(actual.tensors)
    if not any(key.startswith(prefix) for key in actual.tensors):
        raise UsageError(
            f"--strip-prefix {prefix}: no key of {actual.name} starts with it",
            hint=f"its first key is {next(iter(actual.tensors))}",
        )
    stripped: dict[str, TensorPrint] = {}
    for key, tensor in actual.tensors.items():
        short = key.removeprefix(prefix)
        if short in stripped:
            raise UsageError(
                f"--strip-prefix {prefix}: two keys of {actual.name} become {short}",
                hint="leave it out: the checkpoint has keys with this prefix and without it",
            )
        stripped[short] = tensor
    return stripped


def _check_globs(policy: Policy, expected: Fingerprint, actual: Fingerprint) -> None:
    """An option that fits nothing is a typing error, and would silently weaken or do nothing."""
    keys = list(expected.tensors)
    both = [*keys, *actual.tensors]
    options = [("--ignore", glob, both) for glob in policy.ignore]
    options += [("--tolerance", glob, keys) for glob, _, _ in policy.tolerances]
    for option, glob, candidates in options:
        if not _fits(glob, candidates):
            raise UsageError(
                f"{option} {glob}: fits no key of {expected.name}",
                hint=f"a glob fits whole keys: '*{glob}*' would fit"
                if _fits(f"*{glob}*", candidates)
                else _most_alike(glob, candidates),
            )
    for old, new in policy.key_map:
        if not any(key == old or (old.endswith(".") and key.startswith(old)) for key in keys):
            raise UsageError(
                f"--map {old}={new}: {expected.name} has no key {old}",
                hint=_most_alike(old, keys),
            )
    targets = Counter(policy.renamed(key) for key in keys)
    for key, count in targets.items():
        if count > 1:
            raise UsageError(
                f"--map: {count} keys of {expected.name} would become {key}",
                hint="give the map of each key, in place of that of a prefix",
            )
