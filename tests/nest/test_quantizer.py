"""Targets against plain loops, masks against their distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.nest.config import MaskingConfig, QuantizerConfig
from harness.nest.quantizer import RandomBlockMasking, RandomProjectionQuantizer

TWO_BOOKS = QuantizerConfig(
    feat_in=5, code_dim=4, num_classes=20, num_books=2, combine_time_steps=3
)


def quantizer(config: QuantizerConfig = TWO_BOOKS) -> RandomProjectionQuantizer:
    torch.manual_seed(0)
    return RandomProjectionQuantizer(config)


def features(batch: int = 2, bands: int = 5, frames: int = 12) -> Tensor:
    return torch.randn(batch, bands, frames, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_nearest_entries_of_each_book() -> None:
    module, mel = quantizer(), features()
    vectors, tokens = module(mel)
    assert (vectors.dtype, tokens.dtype) == (torch.float64, torch.int64)
    assert vectors.shape == (2, 4, 4, 2)
    assert tokens.shape == (2, 4, 2)
    for item in range(2):
        for step in range(4):
            stacked = torch.cat([mel[item, :, 3 * step + k] for k in range(3)])
            projected = module.proj.weight @ stacked
            for book in range(2):
                z = projected[4 * book : 4 * book + 4].double()
                z = z / z.norm()
                distances = (module.codebooks[book] - z).norm(dim=1)
                assert int(tokens[item, step, book]) == int(distances.argmin())


def test_vectors_of_one_book_are_the_codebook_rows() -> None:
    one = QuantizerConfig(feat_in=5, code_dim=4, num_classes=20, num_books=1, combine_time_steps=3)
    module = quantizer(one)
    vectors, tokens = module(features())
    assert torch.equal(vectors[..., 0].transpose(1, 2), module.codebooks[0][tokens[..., 0]])


def test_vectors_of_several_books_are_laid_out_as_nemo_does() -> None:
    module = quantizer()
    vectors, tokens = module(features())
    flat = torch.stack(
        [
            module.codebooks[book, tokens[item, step, book]]
            for item in range(2)
            for book in range(2)
            for step in range(4)
        ]
    )
    assert torch.equal(vectors, flat.reshape(2, 4, 4, 2).transpose(1, 2))


def test_chunks_do_not_change_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module, mel = quantizer(), features()
    whole = module(mel)[1]
    monkeypatch.setattr("harness.nest.quantizer._CHUNK_NUMEL", 1)
    assert torch.equal(module(mel)[1], whole)


def test_frames_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="13 frames are no multiple of combine_time_steps, 3"):
        quantizer()(features(frames=13))


def test_entries_are_unit_vectors_in_float64_and_frozen() -> None:
    module = quantizer()
    torch.testing.assert_close(module.codebooks.norm(dim=2), torch.ones(2, 20).double())
    # not float32 numbers in disguise
    assert not torch.equal(module.codebooks.float().double(), module.codebooks)
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training
    unfrozen = QuantizerConfig(
        feat_in=5, code_dim=4, num_classes=20, num_books=2, combine_time_steps=3, freeze=False
    )
    assert all(p.requires_grad for p in quantizer(unfrozen).parameters())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_leave_the_entries_alone(cast: str) -> None:
    module = quantizer()
    before = module.codebooks.detach().clone()
    getattr(module, cast)()
    assert module.codebooks.dtype == torch.float64
    assert torch.equal(module.codebooks, before)
    assert module.proj.weight.dtype == getattr(torch, {"float": "float32"}.get(cast, cast))


# masking


def masking(**changes: object) -> RandomBlockMasking:
    values: dict[str, object] = {
        "feat_in": 3,
        "block_size": 40,
        "mask_prob": 0.01,
        "allow_overlap": True,
    }
    return RandomBlockMasking(MaskingConfig(**(values | changes)))  # type: ignore[arg-type]


def masked_frames(module: RandomBlockMasking, lengths: Tensor, frames: int) -> Tensor:
    """Draw once; check what holds for every draw; return `(B, T)` bool."""
    x = torch.randn(len(lengths), 3, frames)
    out, masks = module(x, lengths)
    assert masks.shape == x.shape
    assert masks.dtype == x.dtype
    masked = masks[:, 0].bool()
    for band in range(3):
        assert torch.equal(masks[:, band].bool(), masked)
        assert torch.equal(out[:, band][~masked], x[:, band][~masked])
        assert (out[:, band][masked] == module.mask_embedding[band]).all()
    assert not masked[torch.arange(frames) >= lengths.unsqueeze(1)].any()
    return masked


def runs(row: Tensor) -> list[tuple[int, int]]:
    """Start and length of each run of masked frames."""
    edges = torch.diff(row.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return [(int(s), int(e - s)) for s, e in zip(starts, ends, strict=True)]


def test_overlapping_blocks_mask_a_third_in_the_middle_and_less_at_the_edges() -> None:
    torch.manual_seed(0)
    length = 200
    masked = masked_frames(masking(), torch.full((20_000,), length), 208)
    assert min(n for row in masked[:500] for _, n in runs(row)) >= 40
    found = masked.double().mean(0)
    for t in range(length):
        starts = min(t, length - 40) - max(0, t - 39) + 1
        expected = 1 - 0.99**starts
        assert abs(float(found[t]) - expected) < 5 * (expected * (1 - expected) / 20_000) ** 0.5
    assert abs(1 - 0.99**40 - 0.331) < 1e-3


def test_overlapping_blocks_need_room() -> None:
    masked = masked_frames(masking(mask_prob=1.0), torch.tensor([39, 40, 41, 0]), 48)
    assert [runs(row) for row in masked] == [[], [(0, 40)], [(0, 41)], []]


def test_overlapping_blocks_take_one_uniform_draw_of_the_frames() -> None:
    module = masking()
    torch.manual_seed(3)
    draw = torch.rand(4, 300)
    torch.manual_seed(3)
    _, masks = module(torch.zeros(4, 3, 300), torch.full((4,), 290))
    expected = torch.zeros(4, 300, dtype=torch.bool)
    for item, start in (draw < 0.01).nonzero().tolist():
        if start + 40 <= 290:
            expected[item, start : start + 40] = True
    assert torch.equal(masks[:, 0].bool(), expected)
    assert expected.any()


@pytest.mark.parametrize(
    ("length", "block", "blocks"),
    [
        (200, 40, 3),  # ceil(2.5) blocks, four of the five slots
        (1000, 40, 13),
        (100, 33, 2),  # two blocks of 40 do not fit: block size 100 // 3
        (50, 25, 1),
        (3, 1, 1),
        (1, 1, 0),
        (0, 40, 0),
    ],
)
def test_disjoint_blocks_fill_the_share_and_keep_their_distance(
    length: int, block: int, blocks: int
) -> None:
    torch.manual_seed(0)
    module = masking(mask_prob=0.5, allow_overlap=False)
    starts: set[int] = set()
    for _ in range(100):
        row = masked_frames(module, torch.tensor([length]), 1008)[0]
        assert int(row.sum()) == block * blocks
        assert all(n % block == 0 for _, n in runs(row))
        offsets = {s % block for s, _ in runs(row)}
        assert len(offsets) == (1 if blocks else 0)
        starts |= {s for s, _ in runs(row)}
    if blocks and length >= 50:
        assert len(starts) > 10


def test_the_embedding_is_small_noise_or_a_frozen_constant() -> None:
    torch.manual_seed(0)
    wide = masking(feat_in=20_000)
    assert not wide.mask_embedding.requires_grad
    assert float(wide.mask_embedding.std()) == pytest.approx(0.1, rel=0.02)
    assert masking(freeze=False).mask_embedding.requires_grad
    constant = masking(mask_value=0.25, freeze=False).mask_embedding
    assert constant.tolist() == [0.25, 0.25, 0.25]
    assert not constant.requires_grad


def test_padding_has_the_token_0_on_every_machine() -> None:
    # all entries are equally far from it: NeMo leaves the choice to rounding
    module = quantizer()
    module.codebooks.data[:, 7] *= 0.999  # what rounding may do, and then decides
    mel = features(frames=12)
    mel[..., -3:] = 0.0
    _, tokens = module(mel)
    assert tokens[:, -1].tolist() == [[0, 0], [0, 0]]
    assert tokens[:, :-1].any()
