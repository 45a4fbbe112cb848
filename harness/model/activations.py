"""Compare what two implementations compute: what must agree, what is structure, where they part.

In: the activations of both sides (`harness.model.outputs`), in execution order. Out: a
`Comparison`. Activations are matched by module path, call and name; names that differ altogether,
by position. What only one side has is structure. Refused (UsageError): globs that fit nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from harness.checkpoint.tensors import Tensor
from harness.comparison.bounds import difference_from_values
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.difference import Difference
from harness.comparison.findings import Divergence
from harness.comparison.mapping import mapped
from harness.comparison.matching import is_ignored
from harness.comparison.policy import Policy, Tolerance, fits
from harness.errors import UsageError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.model.mismatch import brief_keys

if TYPE_CHECKING:
    from harness.comparison.measuring import Triple

ROOT = "(model)"
_MAX_STRUCTURE = 12  # patterns of names
Activations = Literal["common", "all", "final"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which activations must agree.

    "common": the outputs of modules that both sides have, and the model's own; "all": every input
    and output, on both sides; "final": the model's own outputs alone. `only` and `ignore` are globs
    over activations (`encoder.*`, `*.norm:out`).
    """

    activations: Activations = "common"
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activations not in get_args(Activations):
            raise UsageError(
                f"activations={self.activations!r}: no such choice",
                hint=f"one of {', '.join(get_args(Activations))}",
            )

    def takes(self, key: str) -> bool:
        """Whether an activation must agree, unless it is ignored."""
        if self.only:
            return any(fits(glob, [key]) for glob in self.only)
        return self.activations != "final" or is_final(key)


@dataclass(frozen=True, kw_only=True)
class OutputPolicy(Policy):
    """A policy whose tolerances are in part of single activations."""

    by_key: Mapping[str, Tolerance] = field(default_factory=dict)

    def tolerance(self, key: str) -> Tolerance:
        found = self.by_key.get(key)
        return Policy.tolerance(self, key) if found is None else found


def is_final(key: str) -> bool:
    """Whether an activation is an output of the model itself."""
    return key == f"{ROOT}:out" or key.startswith(f"{ROOT}:out.")


def module_of(key: str) -> str:
    """The module, and its call, whose activation it is: `encoder.norm@2`."""
    return key.partition(":")[0]


def renamed(
    expected: Fingerprint, policy: Policy, modules: Collection[str]
) -> tuple[Fingerprint, Mapping[str, str], Policy]:
    """Give activations the names that the modules have now, as a policy's maps and prefix say.

    Returns also the former name of each, and what of the policy was of use. A map of a key is one
    of its module. A module whose name another one got is gone.
    """
    maps = {pair: _of_module(pair) for pair in policy.key_map}
    prefix = policy.strip_prefix
    used: set[tuple[str, str]] = set()
    paths = dict.fromkeys(module_of(key).partition("@")[0] for key in expected.tensors)
    now = {path: path for path in paths if path != ROOT}
    stays = dict(now)
    for path in now:
        fitting = ((pair, mapped(maps[pair], f"{path}.")) for pair in policy.key_map)
        pair, name = next(((p, n) for p, n in fitting if n is not None), (None, f"{path}."))
        name = name.removesuffix(".")
        name = next((n for n in (f"{prefix}{name}", name) if n in modules), path)
        now[path] = name or ROOT
        if pair is not None and name in modules:
            used.add(pair)
            del stays[path]
    taken = {now[path] for path in now.keys() - stays.keys()}
    now |= {path: f"former {path}" for path in stays if now[path] in taken}

    def key_now(key: str) -> str:
        label, _, rest = key.partition(":")
        path, at, call = label.partition("@")
        return f"{now.get(path, path)}{at}{call}:{rest}"

    here = Policy(
        key_map=tuple(pair for pair in policy.key_map if pair in used),
        strip_prefix=prefix if any(n.startswith(prefix) for n in now.values()) else "",
    )
    found = _rekeyed(expected, {key: key_now(key) for key in expected.tensors})
    return found, dict(zip(found.tensors, expected.tensors, strict=True)), here


def _of_module(pair: tuple[str, str]) -> tuple[str, str]:
    """What a map of a key, `norm.weight=ln.weight`, says of its module."""
    old, new = pair
    stem, _, leaf = old.rpartition(".")
    other, _, same = new.rpartition(".")
    return (f"{stem}.", f"{other}.") if leaf and leaf == same else pair


def _rekeyed(found: Fingerprint, names: Mapping[str, str]) -> Fingerprint:
    """The same tensors under other keys; one whose new key another one has keeps its own."""
    taken = Counter(names.values())
    names = {key: name if taken[name] == 1 else key for key, name in names.items()}
    return replace(
        found,
        tensors={
            names[key]: replace(
                tensor,
                key=names[key],
                alias_of=None if tensor.alias_of is None else names.get(tensor.alias_of),
            )
            for key, tensor in found.tensors.items()
        },
    )


def _place(key: str) -> str:
    """The inputs, or the outputs, of one call: `encoder.norm@2:in`."""
    module, _, name = key.partition(":")
    return f"{module}:{name.partition('.')[0]}"


@dataclass(frozen=True, kw_only=True)
class WhileRunning:
    """Measures what a model computes while it does: `see` takes each call with its values.

    `former` are the names that activations have in the golden; `names` are the expected keys of
    what was seen: inputs and outputs that are called otherwise on both sides go by their order.
    Memory: a `Difference` for each that differs.
    """

    expected: Fingerprint
    policy: OutputPolicy
    former: Mapping[str, str] = field(default_factory=dict)
    seen: dict[str, Difference] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _keys(self) -> dict[str, list[str]]:
        keys: dict[str, list[str]] = defaultdict(list)
        for key in self.expected.tensors:
            keys[_place(key)].append(key)
        return keys

    def see(self, found: Mapping[str, TensorFingerprint], values: Mapping[str, Tensor]) -> None:
        """Measure the inputs, or the outputs, of one call where their digests differ."""
        ours = self._keys.get(_place(next(iter(found))), [])
        names = {key: key for key in found if key in ours}
        mine, theirs = ([k for k in side if k not in names] for side in (ours, found))
        is_same_number = len(mine) == len(theirs)
        for key in theirs:
            shape = found[key].shape
            alike = [k for k in mine if is_same_number or self.expected.tensors[k].shape == shape]
            if alike:
                names[key] = alike[0]
                mine.remove(alike[0])
        self.names.update(names)
        for key, name in names.items():
            expected, actual = self.expected.tensors[name], found[key]
            is_value = expected.dtype.is_value or actual.dtype.is_value
            if expected.shape == actual.shape and expected.digest != actual.digest and not is_value:
                self.seen[key] = difference_from_values(
                    expected,
                    actual,
                    self.policy.tolerance(name),
                    self.expected.block_nbytes,
                    values[key],
                    option="--output-atol",
                )

    def __call__(self, triples: Sequence[Triple]) -> list[Difference]:
        return [self.seen[actual.key] for _, actual, _ in triples]


def compare_activations(
    measure: WhileRunning, actual: Fingerprint, selection: Selection
) -> Comparison:
    """Compare a run that `measure` has seen: findings are what must agree and does not.

    The rest is noted. Raises UsageError for globs that fit no activation.
    """
    now = {name: key for key, name in measure.names.items()}
    expected = _rekeyed(measure.expected, {k: now.get(k, k) for k in measure.expected.tensors})
    keys = list(dict.fromkeys([*expected.tensors, *actual.tensors]))
    ignored = _ignored(measure, selection.ignore, expected, actual)
    _check_selection(selection, keys, ignored)
    strict = selection.activations == "all"
    both = {
        key
        for key in keys
        if (strict or is_final(key) or (key in expected.tensors and key in actual.tensors))
        and key not in ignored
    }
    policy = measure.policy

    def kept(side: Fingerprint) -> Fingerprint:
        return replace(side, tensors={k: t for k, t in side.tensors.items() if k in both})

    compared = compare(kept(expected), kept(actual), policy, measure, stage="outputs")
    selected = {key for key in both if selection.takes(key)}
    findings = [f for f in compared.findings if f.key in selected]
    passed_over = [] if strict else [f for f in findings if _is_input(f.key) and f.fails]
    left = {f.key for f in passed_over}
    findings = [f for f in findings if f.key not in left or not f.fails]
    alone = [key for key in keys if key not in both and key not in ignored]
    notes = compared.notes
    if not strict and selection.activations != "final":
        notes = (*notes, *_structure(expected, actual, [k for k in alone if selection.takes(k)]))
    divergence = None
    if any(finding.fails for finding in findings):
        divergence = first_divergence(compared, alone)
    elif close := {finding.key for finding in findings if finding.kind == "close"}:
        first = next(key for key in keys if key in close)
        notes = (*notes, f"the first that is not bit-identical: {first}")
    if passed_over and divergence is None:
        inputs = brief_keys([finding.key for finding in passed_over])
        notes = (*notes, f"inputs that differ, of modules whose outputs agree: {inputs}")
    return replace(
        compared,
        findings=tuple(findings),
        notes=notes,
        divergence=divergence,
        num_identical=len(selected - {f.key for f in (*findings, *passed_over)}),
        num_ignored=len(keys) - len(alone) - len(selected),
        policy=Policy(atol=policy.atol, rtol=policy.rtol, exact=policy.exact),
    )


def _is_input(key: str) -> bool:
    return not is_output(key)


def is_output(key: str) -> bool:
    """Whether an activation is an output of some module."""
    return key.partition(":")[2].partition(".")[0] == "out"


def _ignored(
    measure: WhileRunning, globs: Sequence[str], expected: Fingerprint, actual: Fingerprint
) -> set[str]:
    """The activations that globs leave out, by their names now or in the golden."""
    policy, ours = Policy(ignore=tuple(globs)), set(measure.former.values())
    former = {key: measure.former.get(measure.names.get(key, key), key) for key in expected.tensors}
    return {
        key
        for key in (*expected.tensors, *actual.tensors)
        if is_ignored(policy, former.get(key, key), key, ours, actual.tensors)
    }


def _check_selection(selection: Selection, keys: Sequence[str], ignored: set[str]) -> None:
    for glob in selection.only:
        if not fits(glob, keys):
            longer = f"*{glob.strip('*')}*"
            raise UsageError(
                f"--only {glob}: matches no activation",
                hint=f"--only '{longer}'"
                if fits(longer, keys)
                else f"names look like {', '.join(keys[-2:]) or 'nothing: it computes none'}",
            )
    taken = [key for key in keys if selection.takes(key) and key not in ignored]
    if keys and not (taken if selection.activations == "all" else any(map(is_output, taken))):
        raise UsageError(
            "--only and --ignore leave no output to compare",
            hint="inputs alone are compared with --activations all"
            if taken
            else "leave one of them out",
        )


def _structure(expected: Fingerprint, actual: Fingerprint, alone: Sequence[str]) -> list[str]:
    """What only one of two implementations has, in one line; modules that are lacking as such."""
    said = []
    for side, other, where in ((expected, actual, "the golden"), (actual, expected, "this model")):
        keys = [key for key in alone if key in side.tensors]
        calls = {module_of(key) for key in other.tensors}
        modules = {call.partition("@")[0] for call in calls}

        def name(key: str, calls: set[str] = calls, modules: set[str] = modules) -> str:
            call = module_of(key)
            path = call.partition("@")[0]
            return key if call in calls else call if path in modules else path

        if keys:
            names = list(dict.fromkeys(map(name, keys)))
            # What stands for all that is inside of it.
            tops = [one for one in names if not any(one.startswith(f"{n}.") for n in names)]
            inside = f" and {len(names) - len(tops):,} inside" * (len(tops) < len(names))
            said.append(f"only in {where}: {brief_keys(tops, _MAX_STRUCTURE)}{inside}")
    return [f"structure, not compared: {'; '.join(said)}"] if said else []


def first_divergence(comparison: Comparison, alone: Collection[str] = ()) -> Divergence | None:
    """Find the first module, in the golden's execution order, that got the same and gave another.

    Inputs that changed are the doing of the module around the one that got them. `alone` are the
    activations that only one side has: of such inputs nothing is known.
    """
    findings = {f.key: f for f in comparison.findings if f.fails}
    if not findings:
        return None
    # Where the output agrees all the same, the input does not matter.
    without = {module_of(k) for k in comparison.expected.tensors if is_output(k)}.difference(
        module_of(key) for key in findings if is_output(key)
    )
    failing = {key: f for key, f in findings.items() if module_of(key) not in without} or findings
    undecided = {f.key for f in comparison.findings if f.kind == "undecided"}
    close = {f.key for f in comparison.findings if f.kind == "close"}
    order = list(comparison.expected.tensors)
    inputs: dict[str, list[str]] = defaultdict(list)
    for key in (*order, *alone):
        if _is_input(key):
            inputs[module_of(key)].append(key)
    first = next((key for key in order if key in failing), next(iter(failing)))
    outputs = [key for key in order if key in failing and not _is_input(key)]
    by_itself = [k for k in outputs if not any(i in failing for i in inputs[module_of(k)])]
    around = _around(module_of(first), order) if _is_input(first) else module_of(first)
    module = module_of(by_itself[0]) if by_itself else around
    if module == around or not by_itself:
        # Of another shape may be what is padded in another place; values say more.
        inside = (k for k in order if k in failing and failing[k].difference is not None)
        shown = next(inside, first) if _is_input(first) else first
    else:
        shown = by_itself[0]
    before = order[: order.index(first)] if first in order else []
    unknown = undecided.union(alone)
    open_ones = [key for key in before if key in undecided]
    # Inputs are what the module around them made.
    perhaps = [_around(module_of(k), order) if _is_input(k) else module_of(k) for k in open_ones]

    def names(keys: Iterable[str]) -> tuple[str, ...]:
        return tuple(key.partition(":in.")[2] for key in keys)

    return Divergence(
        finding=failing[shown],
        diverging_module=module,
        agreeing=names(k for k in inputs[module] if k not in failing and k not in unknown),
        undecided=names(k for k in inputs[module] if k in undecided),
        alone=names(k for k in inputs[module] if k in alone),
        diverging=names(k for k in inputs[module] if k in failing),
        num_before=len(before),
        num_close=sum(1 for key in before if key in close),
        num_undecided=len(open_ones),
        undecided_module=next((name for name in perhaps[:1] if name != module), None),
    )


def _around(module: str, order: list[str]) -> str:
    """The module that called another one: the nearest above it that has a place of its own.

    Of several calls of that, the last that began before; what got no tensors tells when it ended.
    """
    labels = [module_of(key) for key in order]
    before = labels[: labels.index(module)] if module in labels else labels
    path = module.partition("@")[0]
    while "." in path:
        path = path.rpartition(".")[0]
        for label in (*reversed(before), *labels):
            if label.partition("@")[0] == path:
                return label
    return ROOT
