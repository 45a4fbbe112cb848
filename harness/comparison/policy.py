"""What counts as the same: tolerances, and keys that are left out or have another name.

In: what a user asks for. Out: a frozen `Policy`, and the names of the stages that it holds for, in
their order. Refused (UsageError): tolerances that are none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from harness.comparison.cause import ACCEPTABLE, CASTS
from harness.comparison.mapping import check_pair, makes_any, mapped, names_any
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.fingerprints.fingerprint import TensorFingerprint

    Prints: TypeAlias = Mapping[str, TensorFingerprint]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What allclose allows; `exact` allows nothing: not even -0.0 for 0.0, but the same NaN."""

    atol: float = 1e-5
    rtol: float = 1e-5
    exact: bool = False


_Kind: TypeAlias = type | tuple[type, ...]
Stage = Literal["file", "load", "reload", "outputs"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# In float32 more is infinite, of which allclose makes NaN where a 0 is expected.
_GREATEST = 3.4028234663852886e38
_MAX_NAMED = 3  # options in a note


def check_stage(name: str) -> None:
    """Raise UsageError for what is no stage."""
    if name not in STAGES:
        raise UsageError(f"stage={name!r}: no such stage", hint=f"one of {', '.join(STAGES)}")


def check_type(name: str, value: object, kind: _Kind, what: str) -> None:
    """Raise UsageError for an argument that is no `what`; True is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name} takes {what}, not {value!r:.200}")


def _texts(name: str, given: object, what: str) -> tuple[str, ...]:
    """A collection of texts as a tuple; a text alone, whose letters would be globs, is an error."""
    if isinstance(given, str):
        raise UsageError(f"{name} takes a tuple of {what}, not {given!r}", hint=f"({given!r},)")
    check_type(name, given, (tuple, list, set, frozenset), f"a tuple of {what}")
    assert isinstance(given, Collection)
    for one in given:
        check_type(name, one, str, f"a tuple of {what}")
    return tuple(given if isinstance(given, (tuple, list)) else sorted(given))


def _flat(entries: object) -> object:
    """The items of a mapping: what stands on the right beside what stands on the left."""
    if not isinstance(entries, Mapping):
        return entries
    return [
        (left, *right) if isinstance(right, (tuple, list)) else (left, right)
        for left, right in entries.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What counts as the same.

    `ignore` and `tolerances` take globs over the golden's keys (the checkpoint's, for unexpected
    ones); of several tolerances that fit, the last wins. `key_map` renames the golden's keys, or
    prefixes that end in a dot; a `*` stands for the same text on both sides, `{1..3}` for the
    numbers in its place on the other (`harness.comparison.mapping`). `strip_prefix` is taken off
    the checkpoint's keys. Where `atol` or `rtol` is None, it is what the golden recorded. `accept`
    names proved causes that pass: renamed, moved, reshaped, transposed, joined, order, rows,
    rounded; `cast` is a dtype to which values may be rounded. Tensors that fit a glob of
    `must_change` have to differ, and may.

    Lists, and the mappings {OLD: NEW} and {GLOB: (ATOL, RTOL)}, become tuples. Raises UsageError.
    """

    atol: float | None = None
    rtol: float | None = None
    exact: bool = False
    ignore: tuple[str, ...] = ()
    tolerances: tuple[tuple[str, float, float | None], ...] = ()
    key_map: tuple[tuple[str, str], ...] = ()
    strip_prefix: str = ""
    check_dtype: bool = True
    accept: tuple[str, ...] = ()
    check_config: bool = False
    cast: str | None = None
    must_change: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds: tuple[tuple[str, _Kind, str], ...] = (
            ("atol", (Real, NoneType), "a number"),
            ("rtol", (Real, NoneType), "a number"),
            ("exact", bool, "True or False"),
            ("check_dtype", bool, "True or False"),
            ("check_config", bool, "True or False"),
            ("strip_prefix", str, "a text"),
            ("cast", (str, NoneType), "the name of a dtype"),
        )
        for name, kind, what in kinds:
            check_type(name, getattr(self, name), kind, what)
        for name, what in (("ignore", "globs"), ("must_change", "globs"), ("accept", "causes")):
            object.__setattr__(self, name, _texts(name, getattr(self, name), what))
        if self.cast is not None and self.cast not in CASTS:
            raise UsageError(
                f"cast {self.cast!r}: not a dtype to round to",
                hint=f"one of {', '.join(CASTS)}",
            )
        for word in self.accept:
            if word not in ACCEPTABLE:
                raise UsageError(
                    f"accept {word!r}: no such cause",
                    hint=f"one of {', '.join(ACCEPTABLE)}",
                )
        tuples: tuple[tuple[str, tuple[_Kind, ...], str, object], ...] = (
            ("key_map", (str, str), "(OLD, NEW)", (("encoder.", "model.encoder."),)),
            (
                "tolerances",
                (str, Real, (Real, NoneType)),
                "(GLOB, ATOL, RTOL)",
                (("encoder.*", 1e-4, 1e-5),),
            ),
        )
        for name, parts, entry, example in tuples:
            given = _flat(getattr(self, name))
            # The letters of a text could pass for pairs.
            if not isinstance(given, (tuple, list)) or not all(
                isinstance(one, (tuple, list))
                and len(one) == len(parts)
                and all(isinstance(*pair) for pair in zip(one, parts, strict=True))
                for one in given
            ):
                raise UsageError(
                    f"{name} takes a tuple of {entry}, not {getattr(self, name)!r:.200}",
                    hint=f"{name}={example!r}",
                )
            object.__setattr__(self, name, tuple(map(tuple, given)))
        for old, new in self.key_map:
            check_pair(old, new)
        for glob, atol, rtol in [("", self.atol, self.rtol), *self.tolerances]:
            for name, number in (("atol", atol), ("rtol", rtol)):
                if number is None or 0 <= number <= _GREATEST:
                    continue
                where = f" of {glob}" if glob else ""
                raise UsageError(
                    f"{name}{where} is {number}: a tolerance is 0 or more, and finite in float32",
                    hint="leave it out for 1e-5, or allow no difference at all: --exact",
                )

    def with_recorded(self, recorded: tuple[float, float]) -> Policy:
        """Take what is not said from a golden's tolerance (atol, rtol)."""
        atol, rtol = recorded
        return replace(
            self,
            atol=atol if self.atol is None else self.atol,
            rtol=rtol if self.rtol is None else self.rtol,
        )

    @property
    def general(self) -> Tolerance:
        """The tolerance for what no glob fits."""
        unsaid = Tolerance()
        atol = unsaid.atol if self.atol is None else self.atol
        rtol = unsaid.rtol if self.rtol is None else self.rtol
        return Tolerance(atol=atol, rtol=rtol, exact=self.exact)

    def tolerance(self, key: str) -> Tolerance:
        """The tolerance for a golden's key."""
        found = self.general
        for glob, atol, rtol in self.tolerances:
            if _fits(key, glob):
                found = replace(found, atol=atol, rtol=self.general.rtol if rtol is None else rtol)
        return found

    def demands_change(self, key: str) -> bool:
        return any(_fits(key, glob) for glob in self.must_change)

    def ignores(self, key: str) -> bool:
        return any(_fits(key, glob) for glob in self.ignore)

    def renamed(self, key: str) -> str:
        """The name under which the checkpoint should have a golden's key."""
        found = self.new_name(key)
        return key if found is None else found

    def new_name(self, key: str) -> str | None:
        """The name that the first of `key_map` that fits gives to a golden's key, if any does."""
        names = (mapped(pair, key) for pair in self.key_map)
        return next((name for name in names if name is not None), None)

    def map_of(self, key: str) -> tuple[str, str] | None:
        """The one of `key_map` that renames a golden's key: the first that fits."""
        return next((pair for pair in self.key_map if mapped(pair, key) is not None), None)

    def at_stage(self, keys: Collection[str], elsewhere: Collection[str]) -> Policy:
        """Leave out the globs that fit none of a stage's `keys`, but some of another one's."""

        def is_here(glob: str) -> bool:
            return fits(glob, keys) or not fits(glob, elsewhere)

        return replace(
            self,
            ignore=tuple(glob for glob in self.ignore if is_here(glob)),
            tolerances=tuple(one for one in self.tolerances if is_here(one[0])),
            must_change=tuple(glob for glob in self.must_change if is_here(glob)),
        )

    def fitting(
        self, expected: Mapping[str, TensorFingerprint], actual: Mapping[str, TensorFingerprint]
    ) -> Policy:
        """Leave out the maps, the prefix and the globs that fit nothing of a stage's two sides."""
        prefix = self.strip_prefix
        strips = any(key.startswith(prefix) for key in actual)
        there = {k.removeprefix(prefix): t for k, t in actual.items()} if strips else actual
        either = {*expected, *there}
        return replace(
            self,
            ignore=tuple(glob for glob in self.ignore if fits(glob, either)),
            tolerances=tuple(one for one in self.tolerances if fits(one[0], expected)),
            must_change=tuple(glob for glob in self.must_change if fits(glob, expected)),
            strip_prefix=prefix if strips else "",
            key_map=tuple(
                pair
                for pair in self.key_map
                if names_any(pair[0], expected) and makes_any(pair, there)
            )
            if self._is_renamed(expected, there)
            else (),
        )

    def _is_renamed(self, expected: Prints, actual: Prints) -> bool:
        """Whether a stage has the new names, which may be old ones: indices that are shifted."""

        def num_equal(name: Callable[[str], str]) -> int:
            pairs = ((tensor, actual.get(name(key))) for key, tensor in expected.items())
            return sum(1 for a, b in pairs if b and a.digest and a.digest == b.digest)

        now, before = num_equal(self.renamed), num_equal(str)
        return now > before or (now == before and not actual.keys() >= expected.keys())

    @property
    def parts(self) -> tuple[str, ...]:
        """What fits a checkpoint or does not, as options of the command line."""
        return (
            *(f"--ignore {glob}" for glob in self.ignore),
            *(f"--tolerance {glob}" for glob, *_ in self.tolerances),
            *(f"--must-change {glob}" for glob in self.must_change),
            *(f"--map {old}={new}" for old, new in self.key_map),
            *([f"--strip-prefix {self.strip_prefix}"] if self.strip_prefix else []),
        )


class PolicyOfStages:
    """One policy for several stages: each takes what fits it, and what fits none is an error."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._used: set[str] = set()
        self._shifted: tuple[tuple[str, str], ...] = ()

    def at(self, expected: Prints, actual: Prints) -> Policy:
        """What fits a stage's two sides."""
        here = self.policy.fitting(expected, actual)
        self.use(here)
        left = (pair for pair in self.policy.key_map if pair not in here.key_map)
        self._shifted = tuple(m for m in left if names_any(m[0], expected))
        return here

    @property
    def of_modules(self) -> Policy:
        """For the names of modules: without what renames weights, but not those of the last stage.

        Names that are there under both may be layers that were shifted, or not.
        """
        maps = tuple(pair for pair in self.policy.key_map if pair not in self._shifted)
        return replace(self.policy, key_map=maps)

    def use(self, policy: Policy) -> None:
        """Count what a stage made use of."""
        self._used |= set(policy.parts)

    def note(self, here: Policy) -> tuple[str, ...]:
        """Say what a stage left out."""
        out = [part for part in self.policy.parts if part not in here.parts]
        more = f" and {len(out) - _MAX_NAMED:,} more" if len(out) > _MAX_NAMED else ""
        return (f"no effect at this stage: {', '.join(out[:_MAX_NAMED])}{more}",) if out else ()

    @property
    def unused(self) -> Policy:
        """What no stage made use of."""
        policy, used = self.policy, self._used
        prefix = policy.strip_prefix
        return replace(
            policy,
            ignore=tuple(g for g in policy.ignore if f"--ignore {g}" not in used),
            tolerances=tuple(t for t in policy.tolerances if f"--tolerance {t[0]}" not in used),
            must_change=tuple(g for g in policy.must_change if f"--must-change {g}" not in used),
            key_map=tuple(m for m in policy.key_map if f"--map {m[0]}={m[1]}" not in used),
            strip_prefix="" if f"--strip-prefix {prefix}" in used else prefix,
        )


def fits(glob: str, keys: Iterable[str]) -> bool:
    return any(_fits(key, glob) for key in keys)


def _fits(key: str, glob: str) -> bool:
    """Whether a glob fits a key; every key fits itself, also one with brackets."""
    return key == glob or fnmatchcase(key, glob)
