"""Compare what two implementations compute: what must agree, what is structure, where they part.

In: the activations of both sides (`harness.model.outputs`), in execution order. Out: a
`Comparison`. Activations are matched by module path, call and name; names that differ altogether,
by position. What only one side has is structure. Refused (UsageError): globs that fit nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.difference import Measure
from harness.comparison.findings import Divergence
from harness.comparison.policy import Policy, Tolerance, fits
from harness.errors import UsageError
from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
from harness.model.mismatch import brief_keys

ROOT = "(model)"
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
                f"activations={self.activations!r}: there are none",
                hint=f"one of {', '.join(get_args(Activations))}",
            )

    def takes(self, key: str) -> bool:
        """Whether an activation is looked at."""
        if any(fits(glob, [key]) for glob in self.ignore):
            return False
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


def renamed(expected: Fingerprint, policy: Policy, modules: Collection[str]) -> Fingerprint:
    """Give activations the names that the modules have now, as a policy's maps and prefix say."""
    if not (policy.key_map or policy.strip_prefix):
        return expected

    def path_now(path: str) -> str:
        if path == ROOT:
            return path
        named = policy.renamed(f"{path}.").removesuffix(".")
        named = policy.renamed(path) if named == path else named
        wrapped = f"{policy.strip_prefix}{named}"
        return wrapped if named not in modules and wrapped in modules else named

    def key_now(key: str) -> str:
        label, _, rest = key.partition(":")
        path, at, call = label.partition("@")
        return f"{path_now(path) or ROOT}{at}{call}:{rest}"

    return _rekeyed(expected, {key: key_now(key) for key in expected.tensors})


def _rekeyed(found: Fingerprint, names: Mapping[str, str]) -> Fingerprint:
    """The same tensors under other keys; where two would become one, they keep their own."""
    taken = set(names.values())
    if len(taken) < len(names):
        return found
    return replace(
        found,
        tensors={
            names[key]: replace(
                tensor, key=names[key], alias_of=tensor.alias_of and names[tensor.alias_of]
            )
            for key, tensor in found.tensors.items()
        },
    )


def _paired(expected: Fingerprint, actual: Fingerprint) -> Fingerprint:
    """Name the inputs, or outputs, of a call as the actual side does, where no name is common."""
    ours, theirs = _by_place(expected), _by_place(actual)
    names = {key: key for key in expected.tensors}
    for place, keys in ours.items():
        there = theirs.get(place, [])
        if len(keys) == len(there) and not set(keys) & set(there):
            names.update(zip(keys, there, strict=True))
    return _rekeyed(expected, names)


def _by_place(found: Fingerprint) -> dict[tuple[str, str], list[str]]:
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key in found.tensors:
        module, _, name = key.partition(":")
        places[module, name.partition(".")[0]].append(key)
    return places


def compare_activations(
    expected: Fingerprint,
    actual: Fingerprint,
    policy: OutputPolicy,
    measure: Measure,
    selection: Selection,
) -> Comparison:
    """Compare two runs: findings are what must agree and does not, the rest is noted.

    `policy` holds the tolerances. Raises UsageError for globs that fit no activation.
    """
    expected = _paired(expected, actual)
    _check_selection(selection, [*expected.tensors, *actual.tensors])
    both = expected.tensors.keys() & actual.tensors.keys()
    strict = selection.activations == "all"

    def kept(side: Fingerprint) -> dict[str, TensorFingerprint]:
        return {
            key: tensor
            for key, tensor in side.tensors.items()
            if selection.takes(key) and (strict or key in both or is_final(key))
        }

    compared = compare(
        replace(expected, tensors=kept(expected)),
        replace(actual, tensors=kept(actual)),
        policy,
        measure,
        stage="outputs",
    )
    divergence = first_divergence(compared)
    findings, notes = compared.findings, compared.notes
    if not strict:
        # An input alone may be passed over by the module that gets it.
        findings = tuple(f for f in findings if not _is_input(f.key))
        notes = (*notes, *_structure(expected, actual, selection))
    num_ignored = len({*expected.tensors, *actual.tensors}) - len(
        {*compared.expected.tensors, *compared.actual.tensors}
    )
    is_selected = bool(selection.only or selection.ignore)
    found = replace(
        compared,
        findings=findings,
        notes=notes,
        num_ignored=num_ignored if is_selected else 0,
        policy=Policy(atol=policy.atol, rtol=policy.rtol, exact=policy.exact),
    )
    fails = any(finding.fails for finding in findings)
    return replace(found, divergence=divergence if fails else None)


def _is_input(key: str) -> bool:
    return key.partition(":")[2].startswith("in.")


def _check_selection(selection: Selection, keys: Sequence[str]) -> None:
    for glob in selection.only:
        if not fits(glob, keys):
            raise UsageError(
                f"--only {glob}: fits no activation",
                hint=f"they are named like {keys[-1]}: --only '*{glob.strip('*')}*' may fit"
                if keys
                else "the model computes nothing",
            )
    if keys and not any(map(selection.takes, keys)):
        raise UsageError(
            "--only and --ignore leave no activation to compare", hint="leave one of them out"
        )


def _structure(expected: Fingerprint, actual: Fingerprint, selection: Selection) -> list[str]:
    """What only one of two implementations has, in one line."""
    said = []
    for side, other, where in (
        (expected, actual, "the golden"),
        (actual, expected, "this model"),
    ):
        alone = [k for k in side.tensors if k not in other.tensors and not is_final(k)]
        alone = [key for key in alone if selection.takes(key)]
        modules = list(dict.fromkeys(module_of(key).partition("@")[0] for key in alone))
        if alone:
            said.append(f"{len(alone):,} only in {where}, of the modules {brief_keys(modules)}")
    return [f"structure, not compared: activations {'; '.join(said)}"] if said else []


def first_divergence(comparison: Comparison) -> Divergence | None:
    """Find the first module, in the golden's execution order, that got the same and gave another.

    Inputs that changed are the doing of the module around the one that got them.
    """
    failing = {f.key: f for f in comparison.findings if f.fails}
    if not failing:
        return None
    undecided = {f.key for f in comparison.findings if f.kind == "undecided"}
    order = list(comparison.expected.tensors)
    inputs: dict[str, list[str]] = defaultdict(list)
    for key in order:
        if _is_input(key):
            inputs[module_of(key)].append(key)
    first = next((key for key in order if key in failing), next(iter(failing)))
    outputs = [key for key in order if key in failing and not _is_input(key)]
    by_itself = [k for k in outputs if not any(i in failing for i in inputs[module_of(k)])]
    around = _around(module_of(first), order) if _is_input(first) else module_of(first)
    module = module_of(by_itself[0]) if by_itself else around
    shown = first if module == around or not by_itself else by_itself[0]
    before = order[: order.index(first)] if first in order else []

    def names(keys: Iterable[str]) -> tuple[str, ...]:
        return tuple(key.partition(":in.")[2] for key in keys)

    return Divergence(
        finding=failing[shown],
        diverging_module=module,
        agreeing=names(k for k in inputs[module] if k not in failing and k not in undecided),
        undecided=names(k for k in inputs[module] if k in undecided),
        diverging=names(k for k in inputs[module] if k in failing),
        num_before=len(before),
        num_undecided=sum(1 for key in before if key in undecided),
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
