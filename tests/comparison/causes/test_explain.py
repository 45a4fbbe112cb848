"""What happened, from the golden alone and with both files, of large and small tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness import api
from harness.comparison.cause import Cause
from harness.comparison.comparison import Comparison, render
from harness.comparison.findings import Finding
from harness.comparison.policy import Policy
from harness.errors import UsageError

State = dict[str, torch.Tensor]
Change = Callable[[State], State]
FORMS = [(torch.float32, 96), (torch.float16, 16), (torch.bfloat16, 96)]


def state(dtype: torch.dtype, width: int = 96) -> State:
    """Weights of two layers; `width` 96 has sketches of several blocks, 16 values."""
    g = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * 0.1).to(dtype)

    found = {"embed.weight": weight(2 * width, width)}
    for layer in range(2):
        found |= {
            f"layers.{layer}.norm.weight": weight(width) + 1,
            f"layers.{layer}.q.weight": weight(width, width),
            f"layers.{layer}.k.weight": weight(width, width),
            f"layers.{layer}.conv.weight": weight(width, width // 4, 3, 3),
            f"layers.{layer}.steps.num_batches_tracked": torch.tensor(7 + layer),
        }
    return found


def at(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda old: {k: change(t).contiguous() if k == key else t for k, t in old.items()}


def renamed(rename: Callable[[str], str], cast: torch.dtype | None = None) -> Change:
    def change(old: State) -> State:
        return {
            rename(k): t.to(cast) if cast is not None and t.is_floating_point() else t
            for k, t in old.items()
        }

    return change


Q, EMBED, CONV, NORM = (
    "layers.0.q.weight",
    "embed.weight",
    "layers.0.conv.weight",
    "layers.0.norm.weight",
)


def compare(
    tmp_path: Path, before: State, after: State, how: str, policy: Policy | None = None
) -> Comparison:
    torch.save(before, tmp_path / "before.pt")
    torch.save(after, tmp_path / "after.pt")
    if how == "both files":
        return api.diff(tmp_path / "before.pt", tmp_path / "after.pt", policy=policy)
    golden = api.record(tmp_path / "before.pt", tmp_path / "golden.safetensors", overwrite=True)
    return api.verify(tmp_path / "after.pt", golden, policy=policy)


def of_side(text: str, how: str) -> str:
    """What is said of the golden, of the first of two files."""
    return text if how == "golden alone" else text.replace("the golden", "the first file")


def of_key(comparison: Comparison, key: str) -> Finding:
    [found] = [f for f in comparison.findings if key in (f.key, f.actual_key)]
    return found


def cause_of(comparison: Comparison, key: str) -> Cause:
    return of_key(comparison, key).causes[0]


def interleave(weight: torch.Tensor, heads: int = 4) -> torch.Tensor:
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, 2, rows, -1).transpose(1, 2).reshape(weight.shape)


def swap(old: State) -> State:
    return old | {Q: old["layers.0.k.weight"], "layers.0.k.weight": old[Q]}


def fuse(old: State) -> State:
    new = dict(old)
    for layer in range(2):
        q, k = (new.pop(f"layers.{layer}.{name}.weight") for name in "qk")
        new[f"layers.{layer}.qk.weight"] = torch.cat([q, k])
    return new


def stack(old: State) -> State:
    new = dict(old)
    new["layers.q"] = torch.stack([new.pop(f"layers.{layer}.q.weight") for layer in range(2)])
    return new


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.permute(0, 2, 3, 1).reshape(weight.shape)


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype)


def reset(old: State) -> State:
    return {k: shuffled(t) if t.ndim > 1 else t for k, t in old.items()}


ROWS: list[tuple[str, Change, str, str]] = [
    (Q, swap, "moved", "holds what layers.0.k.weight holds in the golden, and the reverse"),
    (CONV, at(CONV, lambda t: t.flatten(1)), "reshaped", "the same bytes as ["),
    (CONV, at(CONV, lambda t: t.unsqueeze(0)), "reshaped", "the same bytes as [1, "),
    (Q, at(Q, torch.t), "transposed", "transposed"),
    (EMBED, at(EMBED, torch.t), "transposed", "transposed"),
    (CONV, at(CONV, lambda t: t.permute(1, 0, 2, 3)), "transposed", "its dims permuted as [1, 0"),
    (CONV, at(CONV, channels_last), "transposed", "the bytes of channels_last"),
    ("layers.0.q.weight", fuse, "joined", "qk.weight = q.weight and k.weight joined along 0"),
    ("layers.0.q.weight", stack, "stacked", "q = layers.{0,1}.q.weight, stacked"),
    (Q, at(Q, interleave), "rows", "RoPE half-split, now interleaved (4 heads"),
    (EMBED, at(EMBED, lambda t: torch.cat([t, t[:8]])), "rows", "8 added"),
    (
        EMBED,
        at(EMBED, lambda t: torch.cat([shuffled(t)[: len(t) // 2], t[len(t) // 2 :]])),
        "rows",
        "rows 0 to ",
    ),
    (Q, at(Q, torch.zeros_like), "constant", "all zero"),
    (Q, at(Q, torch.ones_like), "constant", "all 1"),
    (Q, at(Q, lambda t: t * 0.5), "scaled", "0.5 × the golden"),
    (Q, at(Q, lambda t: t * 0.3), "scaled", "0.3 × the golden"),
    (Q, at(Q, lambda t: -t), "scaled", "−the golden"),
    (NORM, at(NORM, lambda t: t - 1), "shifted", "the golden − 1"),
    (EMBED, reset, "unrelated", "unrelated values (correlation "),
]


# With both files only the largest: what is read of them is the same for all.
SAID = [("golden alone", *form) for form in FORMS] + [("both files", *FORMS[0])]


@pytest.mark.parametrize(("how", "dtype", "width"), SAID, ids=str)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_what_happened_is_said(
    tmp_path: Path, row: int, width: int, dtype: torch.dtype, how: str
) -> None:
    key, change, kind, text = ROWS[row]
    before = state(dtype, width)
    found = compare(tmp_path, before, change(before), how)
    cause = cause_of(found, key)
    assert (cause.kind, of_side(text, how) in cause.text) == (kind, True), cause.text


def test_what_was_all_zero_in_the_golden_is_said(tmp_path: Path) -> None:
    before = state(torch.float32)
    before[Q] = torch.zeros_like(before[Q])
    found = compare(tmp_path, before, at(Q, shuffled)(before), "golden alone")
    assert cause_of(found, Q).text == "was all zero in the golden"


@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_what_was_split_and_unstacked_is_said(tmp_path: Path, how: str) -> None:
    before = state(torch.float32)
    for change in (fuse, stack):
        found = compare(tmp_path, change(before), before, how)
        kinds = {f.causes[0].kind for f in found.findings}
        assert (kinds, {f.kind for f in found.findings}) == ({"split"}, {"renamed"})


def experts(form: str) -> State:
    """Four experts of two layers: each with its own keys, or stacked in one of the usual ways."""
    g = torch.Generator().manual_seed(3)
    found: State = {}
    for layer in range(2):
        gate, up, down = (
            torch.randn(4, *shape, generator=g) for shape in ((24, 40), (24, 40), (40, 24))
        )
        stem = f"model.layers.{layer}.mlp.experts"
        if form == "each":
            for index in range(4):
                found |= {
                    f"{stem}.{index}.gate_proj.weight": gate[index].clone(),
                    f"{stem}.{index}.up_proj.weight": up[index].clone(),
                    f"{stem}.{index}.down_proj.weight": down[index].clone(),
                }
        else:
            both = torch.cat([gate, up], 1)
            if form == "interleaved":
                both = torch.stack([gate, up], 2).flatten(1, 2)
            if form == "transposed":
                both, down = both.transpose(1, 2), down.transpose(1, 2)
            found |= {f"{stem}.gate_up_proj": both.contiguous(), f"{stem}.down_proj": down.clone()}
    return found


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("form", ["joined", "transposed", "interleaved"])
def test_experts_are_recognised_in_a_stack(tmp_path: Path, form: str, how: str) -> None:
    found = compare(tmp_path, experts("each"), experts(form), how)
    assert {f.kind for f in found.findings} == {"renamed"}
    assert {f.causes[0].kind for f in found.findings} == {"stacked"}
    assert len(found.findings) == 24
    assert "no key in common, but 24 of 24 tensors are equal under other keys" in found.notes
    accept = Policy(accept=("joined", "transposed")[: 1 + (form == "transposed")])
    assert compare(tmp_path, experts("each"), experts(form), how, accept).ok


@pytest.mark.parametrize("form", ["joined", "transposed"])
def test_experts_are_recognised_one_by_one(tmp_path: Path, form: str) -> None:
    found = compare(tmp_path, experts(form), experts("each"), "golden alone")
    assert {(f.kind, f.causes[0].kind) for f in found.findings} == {("renamed", "split")}
    assert len(found.findings) == 4


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 96])
def test_what_was_widened_is_said(tmp_path: Path, width: int, how: str) -> None:
    before = state(torch.bfloat16, width)
    found = compare(tmp_path, before, at(Q, torch.Tensor.float)(before), how)
    assert (found.findings[0].kind, cause_of(found, Q).kind) == ("dtype", "widened")
    more = at(Q, lambda t: t.float() * (1 + 2.0**-14))(before)
    assert cause_of(compare(tmp_path, before, more, how), Q).kind == "rounded"


def test_new_names_and_a_rounding_are_told_together(tmp_path: Path) -> None:
    before = {k: t for k, t in state(torch.float32).items() if t.is_floating_point()}
    change = renamed(lambda key: "model." + key.replace("layers", "blocks"), torch.bfloat16)
    found = compare(tmp_path, before, change(before), "both files")
    assert {f.kind for f in found.findings} == {"renamed"}
    assert {(f.causes[0].kind, f.causes[1].kind) for f in found.findings} == {("moved", "rounded")}
    note = "no key in common, but 9 of 9 tensors are equal under other keys, up to rounding"
    assert note in found.notes
    accept = Policy(accept=("renamed", "rounded"))
    assert compare(tmp_path, before, change(before), "both files", accept).verdict == "close"
    only = Policy(accept=("renamed",))
    assert compare(tmp_path, before, change(before), "both files", only).verdict == "different"


def test_counters_are_one_line_whatever_their_numbers(tmp_path: Path) -> None:
    before = state(torch.float32)
    after = {k: torch.tensor(0) if "tracked" in k else t for k, t in before.items()}
    found = compare(tmp_path, before, after, "golden alone")
    assert {f.causes[0].kind for f in found.findings} == {"counter"}
    assert cause_of(found, "layers.1.steps.num_batches_tracked").text.endswith(
        "reset to 0: 8 before, 0 now"
    )


def test_a_word_that_names_no_cause_is_an_error() -> None:
    with pytest.raises(UsageError, match="no such cause"):
        Policy(accept=("everything",))


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("width", [16, 96])
def test_a_small_change_has_no_cause(tmp_path: Path, width: int, scale: float, how: str) -> None:
    before = state(torch.float32, width)
    found = compare(
        tmp_path, before, at(Q, lambda t: t + scale * t.std() * shuffled(t))(before), how
    )
    assert all(not finding.causes for finding in found.findings)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_change_has_no_cause(tmp_path: Path, rank: int) -> None:
    before = state(torch.float32)
    delta = shuffled(torch.empty(96, rank)) @ shuffled(torch.empty(rank, 96)) * 0.05
    found = compare(tmp_path, before, at(Q, lambda t: t + delta)(before), "golden alone")
    assert [finding.causes for finding in found.findings] == [()]


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 96])
def test_a_rounding_is_said_of_the_narrow_and_of_the_wide_form(
    tmp_path: Path, width: int, how: str
) -> None:
    before = state(torch.float32, width)
    for dtype in (torch.bfloat16, torch.float16):
        for stored in (dtype, torch.float32):
            after = before | {Q: before[Q].to(dtype).to(stored)}
            cause = cause_of(compare(tmp_path, before, after, how), Q)
            assert (cause.kind, cause.dtype) == ("rounded", str(dtype).removeprefix("torch."))
            assert compare(tmp_path, before, after, how, Policy(accept=("rounded",))).ok


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 96])
def test_rows_that_changed_are_named(tmp_path: Path, width: int, how: str) -> None:
    before = state(torch.float32, width)

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        new = torch.cat([weight, weight[:8] + 1])
        new[5] += 0.3
        return new

    cause = cause_of(compare(tmp_path, before, at(EMBED, spoil)(before), how), EMBED)
    assert (cause.kind, cause.changed, cause.num_added) == ("rows", (5,), 8)
    text = f"row 5 differs, the other {2 * width - 1} are the golden's, 8 added"
    assert cause.text == of_side(text, how)


@pytest.mark.parametrize("width", [16, 96])
def test_permuted_rows_and_columns_are_named_with_both_files(tmp_path: Path, width: int) -> None:
    before = state(torch.float32, width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    for change in (lambda t: t[order], lambda t: t[:, order]):
        cause = cause_of(compare(tmp_path, before, at(Q, change)(before), "both files"), Q)
        assert (cause.kind, cause.accept, len(cause.order or ())) == ("rows", ("order",), width)


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_values_in_another_order_are_said(
    tmp_path: Path, dtype: torch.dtype, how: str
) -> None:
    before = state(dtype)

    def shuffle(weight: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(2))
        return weight.flatten()[order].view(weight.shape)

    found = compare(tmp_path, before, at(Q, shuffle)(before), how)
    assert cause_of(found, Q).kind == "reordered"

    def almost(weight: torch.Tensor) -> torch.Tensor:
        new = shuffle(weight)
        # The sum is what it was, and so are the ends; two elements are others.
        middle = new.flatten().abs().argsort()[weight.numel() // 2 : weight.numel() // 2 + 2]
        new.view(-1)[middle] *= torch.tensor([1.125, 0.875], dtype=dtype)
        return new

    found = compare(tmp_path, before, at(Q, almost)(before), how)
    assert all(cause.kind != "reordered" for f in found.findings for cause in f.causes)


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [8, 64])
def test_weight_norm_is_recognised_in_all_its_forms(tmp_path: Path, width: int, how: str) -> None:
    g = torch.Generator().manual_seed(4)
    conv = torch.nn.Conv1d(width, width, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(width, width, 3, generator=g))
    plain = {"conv.weight": conv.weight.detach().clone()}
    normed = torch.nn.utils.parametrizations.weight_norm(conv, dim=0)
    with torch.no_grad():
        normed.parametrizations.weight.original0.mul_(1.5)
    plain = {"conv.weight": normed.weight.detach().clone()}
    new = {f"conv.{k}": t for k, t in normed.state_dict().items() if k != "bias"}
    forms = (("parametrizations.weight.original0", "weight_g"),)
    forms += (("parametrizations.weight.original1", "weight_v"),)
    old = {f"conv.{b}": new[f"conv.{a}"] for a, b in forms}
    found = compare(tmp_path, new, old, how)
    assert {(f.kind, f.causes[1].kind) for f in found.findings} == {("renamed", "weight_norm")}
    found = compare(tmp_path, plain, old, how)
    assert [f.causes[0].text.partition(":")[0] for f in found.findings] == ["weight = g·v/‖v‖"] * 3
    if how == "both files" or width == 8:
        found = compare(tmp_path, new, plain, how)
        assert [f.causes[0].kind for f in found.findings] == ["weight_norm"] * 3
    wrong = {k: t * 1.001 for k, t in plain.items()}
    causes = [c for f in compare(tmp_path, wrong, old, how).findings for c in f.causes]
    assert not any(cause.kind == "weight_norm" for cause in causes)


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: torch.cat([t[:10], shuffled(t[:2]), t[10:]]), "2 added: rows 10, 11"),
        (lambda t: torch.cat([t[:3], t[4:]]), "row 3 removed, the others are the golden's"),
        (lambda t: t.roll(1, 0), "its rows in another order: 192 of 192 moved, row 0 is now row 1"),
        (lambda t: t.flip(1), "its columns in another order: 96 of 96 moved, column 0 is now"),
        (lambda t: t.index_fill(1, torch.tensor([5]), 0.5), "column 5 differs, the other 95"),
    ],
)
def test_rows_are_found_where_they_are_now(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], text: str, how: str
) -> None:
    before = state(torch.float32)
    cause = cause_of(compare(tmp_path, before, at(EMBED, change)(before), how), EMBED)
    assert (cause.kind, of_side(text, how) in cause.text) == ("rows", True), cause.text


def test_without_residues_rows_that_were_cut_off_are_named(tmp_path: Path) -> None:
    before = {EMBED: shuffled(torch.empty(1000, 96))}
    torch.save(before, tmp_path / "before.pt")
    golden = api.record(tmp_path / "before.pt", tmp_path / "g.safetensors", max_size=20_000)
    for start, said in ((0, True), (1, False)):
        torch.save({EMBED: before[EMBED][start : start + 990]}, tmp_path / "after.pt")
        [finding] = api.verify(tmp_path / "after.pt", golden).findings
        texts = [cause.text for cause in finding.causes]
        assert [text.split(" (")[0] for text in texts] == (
            ["rows 0 to 937 are the golden's, 10 removed"] if said else []
        )
        assert "--reference" in texts[0] if said else True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_a_narrow_weight_norm_that_was_folded_is_said_by_the_golden_alone(
    tmp_path: Path, dtype: torch.dtype, dim: int | None
) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(96, 48, 5, generator=g).to(dtype)
    axes = [axis for axis in range(3) if axis != dim]
    norms = v.norm(dim=axes, keepdim=True) if dim is not None else v.norm()
    size = (1.5 * norms * (1 + 0.05 * torch.rand(norms.shape, generator=g))).to(dtype)
    before = {"up.weight_g": size, "up.weight_v": v}
    folded = (size.float() * v.float() / norms.float()).to(dtype)
    texts = {
        name: [
            cause.text
            for finding in compare(tmp_path, before, {"up.weight": there}, "golden alone").findings
            for cause in finding.causes
            if cause.kind == "weight_norm"
        ]
        for name, there in (("folded", folded), ("other", folded * 1.2))
    }
    assert len(texts["folded"]) == 3
    assert not texts["other"]


def test_without_residues_the_rows_of_blocks_that_differ_are_named(tmp_path: Path) -> None:
    before = {EMBED: shuffled(torch.empty(1000, 96))}
    torch.save(before, tmp_path / "before.pt")
    after = before[EMBED].index_fill(0, torch.tensor([417]), 0.5)
    torch.save({EMBED: torch.cat([after, after[:8]])}, tmp_path / "after.pt")
    golden = api.record(tmp_path / "before.pt", tmp_path / "g.safetensors", max_size=20_000)
    assert golden.fingerprint.tensors[EMBED].residues is None
    cause = cause_of(api.verify(tmp_path / "after.pt", golden), EMBED)
    [(first, stop), (begin, end)] = cause.rows or ()
    assert (first, end, stop <= 417 < begin < stop + 250) == (0, 1000, True)
    assert cause.text.endswith("are the golden's, 8 added")


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("shape", [(256, 1), (128, 96)])
def test_great_elements_make_no_values_unrelated(
    tmp_path: Path, shape: tuple[int, int], how: str
) -> None:
    before = {"scale": shuffled(torch.empty(shape))}
    after = before["scale"].clone()
    after[::7, 0] += 5000
    found = compare(tmp_path, before, {"scale": after}, how)
    assert all(cause.kind != "unrelated" for f in found.findings for cause in f.causes)


def test_a_copy_of_what_is_identical_is_said_with_both_files(tmp_path: Path) -> None:
    before = state(torch.float32)
    found = compare(
        tmp_path, before, before | {Q: before["layers.0.k.weight"].clone()}, "both files"
    )
    assert cause_of(found, Q).text == "holds what layers.0.k.weight holds in the first file"


def projections(form: str, groups: int = 1) -> State:
    """Query, key and value of two layers, the last two of half the size: apart, or fused."""
    g = torch.Generator().manual_seed(5)
    found: State = {}
    for layer in range(2):
        parts = [torch.randn(rows, 48, generator=g) for rows in (96, 48, 48)]
        if form == "apart":
            found |= {
                f"h.{layer}.{name}_proj.weight": part
                for name, part in zip("qkv", parts, strict=True)
            }
            continue
        by_group = [part.view(groups, -1, 48) for part in parts]
        whole = torch.cat(by_group, 1).flatten(0, 1)
        found[f"h.{layer}.qkv.weight"] = (whole.t() if form == "transposed" else whole).contiguous()
    return found


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("groups", [1, 4, 48])
@pytest.mark.parametrize("form", ["fused", "transposed"])
def test_projections_are_recognised_in_every_layout(
    tmp_path: Path, form: str, groups: int, how: str
) -> None:
    apart, whole = projections("apart"), projections(form, groups)
    for before, after, kind in ((apart, whole, "joined"), (whole, apart, "split")):
        found = compare(tmp_path, before, after, how)
        assert {(f.kind, f.causes[0].kind) for f in found.findings} == {("renamed", kind)}
        assert {f.causes[0].num_heads for f in found.findings} == {groups if groups > 1 else None}
        accept = Policy(accept=("joined", "transposed"))
        assert compare(tmp_path, before, after, how, accept).ok


def experts_of(dtype: torch.dtype, width: int) -> State:
    g = torch.Generator().manual_seed(9)
    return {f"experts.{i}.w": torch.randn(width, width, generator=g).to(dtype) for i in range(6)}


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize(("dtype", "width"), FORMS, ids=str)
def test_sums_are_said_with_their_factors(
    tmp_path: Path, dtype: torch.dtype, width: int, how: str
) -> None:
    before = experts_of(dtype, width)
    one, two, six = (before[f"experts.{i}.w"].double() for i in (0, 1, 5))
    for value, factor, factors, text in (
        ((one + six) / 2, 0.5, None, "mean of experts.{0,5}.w"),
        (one + two + six, 1.0, None, "sum of experts.{0,1,5}.w"),
        (0.9 * one + 0.1 * two, None, (0.9, 0.1), "0.9 × experts.0.w + 0.1 × experts.1.w"),
        (one - 0.5 * two, None, (1.0, -0.5), "experts.0.w − 0.5 × experts.1.w"),
    ):
        found = compare(tmp_path, before, before | {"experts.0.w": value.to(dtype)}, how)
        cause = cause_of(found, "experts.0.w")
        assert (cause.kind, text in cause.text) == ("sum", True), cause.text
        assert (cause.factor, cause.factors) == (factor, factors)


def test_a_new_tensor_that_is_the_mean_of_what_is_missing_is_said(tmp_path: Path) -> None:
    before = experts_of(torch.float32, 96)
    mean = torch.stack([*before.values()]).mean(0)
    found = compare(tmp_path, before, {"dense.w": mean}, "golden alone")
    assert cause_of(found, "dense.w").text.startswith("mean of experts.{0..5}.w")


def test_what_is_nearly_a_sum_has_no_cause(tmp_path: Path) -> None:
    before = experts_of(torch.float32, 96)
    mean = (before["experts.0.w"] + before["experts.1.w"]) / 2
    after = before | {"experts.0.w": mean * (1 + 1e-3 * torch.randn(96, 96))}
    for how in ("golden alone", "both files"):
        found = compare(tmp_path, before, after, how)
        assert [finding.causes for finding in found.findings] == [()]


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 96])
def test_new_names_and_a_step_of_training_are_told_together(
    tmp_path: Path, width: int, how: str
) -> None:
    before = {k: t for k, t in state(torch.float32, width).items() if t.ndim > 1 and k != EMBED}
    after = {k.replace("layers", "blocks"): t + 1e-4 * shuffled(t) for k, t in before.items()}
    after[Q.replace("layers", "blocks")] = shuffled(before[Q])
    found = compare(tmp_path, before, after, how)
    by_key = {f.key: f for f in found.findings if f.kind == "renamed"}
    assert by_key.keys() == before.keys()
    assert by_key[Q].causes[0].kind in ("unrelated", "reordered")
    assert all(f.actual == f.key.replace("layers", "blocks") for f in by_key.values())
    assert {f.causes[0].accept for f in by_key.values()} == {()}
    assert "nearly the same values, to within 1e-02 of their norm" in render(found)


@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_few_elements_have_the_cause_that_they_prove(tmp_path: Path, how: str) -> None:
    before = {"bias": torch.tensor([0.3, -0.7, 0.1, 0.9]), "pair": torch.tensor([0.3, 0.5])}
    found = compare(tmp_path, before, {k: t + 1 for k, t in before.items()}, how)
    assert cause_of(found, "bias").text == of_side("the golden + 1", how)
    assert not of_key(found, "pair").causes


def whole_of(parts: list[torch.Tensor], axis: int, groups: int = 1) -> torch.Tensor:
    grouped = [p.unflatten(axis, (groups, p.shape[axis] // groups)) for p in parts]
    return torch.cat(grouped, axis + 1).flatten(axis, axis + 1).contiguous()


def moved_and(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda old: {k.replace("layers", "blocks"): change(t) for k, t in old.items()}


def fused_along(axis: int, groups: int, cast: torch.dtype | None = None) -> Change:
    def change(old: State) -> State:
        whole = whole_of([*old.values()], axis, groups)
        return {"layers.0.qkv.weight": whole.to(cast or whole.dtype)}

    return change


def stacked_rows(old: State) -> State:
    return {"experts.w1": torch.cat([t.t() for t in old.values()]).contiguous()}


def stacked_as_text(old: State) -> State:
    return {"experts.w": torch.stack([old[key] for key in sorted(old)])}


def turned(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous()


PARTS = [f"layers.0.{name}.weight" for name in "qkv"]
EXPERTS = [f"experts.{i}.w" for i in range(12)]
ALIKE = ["model.layers.0.a.weight", "model.layers.0.b.weight", "model.embed.weight"]
TOGETHER: list[tuple[list[str], Change, str, str]] = [
    (PARTS, fused_along(1, 1), "joined", "joined along 1"),
    (PARTS, fused_along(1, 8), "joined", "joined along 1, in 8 groups"),
    (PARTS, fused_along(0, 4, torch.bfloat16), "joined", "in 4 groups, rounded to bfloat16"),
    (PARTS, moved_and(turned), "transposed", "in the golden: transposed"),
    (
        PARTS,
        moved_and(lambda t: turned(t).bfloat16()),
        "transposed",
        "transposed, rounded to bfloat16",
    ),
    (PARTS, moved_and(lambda t: t.half().float()), "moved", "float16 (and stored as float32)"),
    (EXPERTS, stacked_rows, "joined", "joined along 0, transposed"),
    (EXPERTS, stacked_as_text, "stacked", "in the order of their names as text: 0, 1, 10, 11, …"),
]


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("width", [16, 96])
@pytest.mark.parametrize("row", range(len(TOGETHER)))
def test_what_happened_at_once_is_said_together(
    tmp_path: Path, row: int, width: int, how: str
) -> None:
    keys, change, kind, text = TOGETHER[row]
    g = torch.Generator().manual_seed(1)
    before = {key: torch.randn(width, width, generator=g) for key in keys}
    found = compare(tmp_path, before, change(before), how)
    assert {f.kind for f in found.findings} == {"renamed"}
    assert {f.causes[0].kind for f in found.findings} == {kind}
    assert of_side(text, how) in found.findings[0].causes[0].text
    accept = found.findings[0].causes[0].accept
    assert compare(tmp_path, before, change(before), how, Policy(accept=accept)).ok
    assert not compare(tmp_path, before, change(before), how, Policy(accept=accept[1:])).ok


@pytest.mark.parametrize("how", ["golden alone", "both files"])
def test_of_names_that_changed_alike_the_rest_is_explained(tmp_path: Path, how: str) -> None:
    g = torch.Generator().manual_seed(1)
    before = {
        f"model.{name}.weight": torch.randn(24, 16, generator=g)
        for name in ("layers.0.q", "layers.1.q", "layers.2.q", "embed")
    }
    after = {k.replace("model.", "net.").replace(".q.", ".query."): t for k, t in before.items()}
    after["net.embed.weight"] = torch.cat([before["model.embed.weight"], torch.zeros(8, 16)])
    after["net.layers.1.query.weight"] = before["model.layers.1.q.weight"] * 0.5
    found = compare(tmp_path, before, after, how)
    assert {f.kind for f in found.findings} == {"renamed"}
    text = of_side("the golden's, 8 added", how)
    assert cause_of(found, "model.embed.weight").text.endswith(text)
    text = of_side("0.5 × the golden", how)
    assert cause_of(found, "model.layers.1.q.weight").text.endswith(text)


NARROW = [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("width", [16, 96])
@pytest.mark.parametrize(("one", "other"), NARROW, ids=str)
def test_casts_in_two_steps_are_said(
    tmp_path: Path, one: torch.dtype, other: torch.dtype, width: int
) -> None:
    names = [str(dtype).removeprefix("torch.") for dtype in (one, other)]
    before = state(torch.float32, width)
    after = at(Q, lambda t: t.to(one).to(other))(before)
    text = cause_of(compare(tmp_path, before, after, "both files"), Q).text
    assert text == f"the first file's values, rounded to {names[0]}, then to {names[1]}"
    middle = at(Q, lambda t: t.to(one))(before)
    found = compare(tmp_path, middle, after, "both files")
    assert cause_of(found, Q).text == f"the first file's values, rounded to {names[1]}"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_a_cast_that_is_not_hashed_is_said_with_its_bound(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    before = state(torch.bfloat16)
    before[Q] *= 1.0 if dtype == torch.float8_e4m3fn else 1e-3
    cause = cause_of(compare(tmp_path, before, at(Q, lambda t: t.to(dtype))(before), "golden"), Q)
    assert (cause.kind, cause.proof, cause.accept) == ("rounded", "sketch", ())
    away = (before[Q].to(dtype).double() - before[Q].double()).norm() / before[Q].double().norm()
    assert away <= (cause.bound or 0.0) < 0.4


@pytest.mark.parametrize("dim", [0, 2])
def test_a_large_weight_norm_that_was_folded_is_proved_by_the_golden_alone(
    tmp_path: Path, dim: int
) -> None:
    g = torch.Generator().manual_seed(3)
    v = torch.randn(24, 96, 12, generator=g)
    shape = [v.shape[axis] if axis == dim else 1 for axis in range(3)]
    size = torch.rand(shape, generator=g) + 0.5
    before = {"conv.weight_g": size, "conv.weight_v": v}
    plain = torch._weight_norm(v, size, dim)
    found = compare(tmp_path, before, {"conv.weight": plain}, "golden alone")
    assert {f.causes[0].kind for f in found.findings} == {"weight_norm"}
    assert len(found.findings) == 3
    other = plain * torch.linspace(1, 1.1, 12)
    found = compare(tmp_path, before, {"conv.weight": other}, "golden alone")
    assert not any(c.kind == "weight_norm" for f in found.findings for c in f.causes)


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("count", [2, 3])
def test_tensors_that_exchanged_their_keys_are_accepted_as_moved(
    tmp_path: Path, count: int, how: str
) -> None:
    before = experts_of(torch.float32, 96)
    keys = [*before][:count]
    after = before | dict(zip(keys, [before[key] for key in (*keys[1:], keys[0])], strict=True))
    found = compare(tmp_path, before, after, how)
    end = "and the reverse" if count == 2 else "in a circle of 3"
    assert {f.causes[0].text.rpartition(", ")[2] for f in found.findings} == {end}
    assert compare(tmp_path, before, after, how, Policy(accept=("moved",))).ok
    assert not compare(tmp_path, before, after, how, Policy(accept=("renamed",))).ok
    lost = after | {keys[0]: before[keys[0]]}
    assert not compare(tmp_path, before, lost, how, Policy(accept=("moved",))).ok


@pytest.mark.parametrize("how", ["golden alone", "both files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_model_that_was_trained_on_a_note_says_so(
    tmp_path: Path, dtype: torch.dtype, how: str
) -> None:
    before = state(dtype)
    g = torch.Generator().manual_seed(8)

    def trained(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=g)
        return (tensor + 0.5 * tensor.float().std() * noise).to(dtype)

    found = compare(tmp_path, before, {k: trained(t) for k, t in before.items()}, how)
    [note] = [note for note in found.notes if "correlate" in note]
    assert note.startswith("9 tensors that differ correlate with what they were (0.")
    assert not any(finding.causes for finding in found.findings)
    one = {**before, Q: trained(before[Q])}
    anew = {
        k: trained(t) if k == Q else t[torch.randperm(len(t))] for k, t in one.items() if t.dim()
    }
    for after in (one, {**before, **anew}):
        assert not any("correlate" in note for note in compare(tmp_path, before, after, how).notes)
