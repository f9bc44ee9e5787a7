"""Pixel stage: what is drawn, and what the draws do to images and shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import vitmix

SIZE = (24, 20)
GRID = (6, 5)
MIXERS = {
    "mixup": vitmix.Mixup,
    "cutmix": vitmix.CutMix,
    "cutmix-aligned": lambda **o: vitmix.CutMix(align=True, **o),
    "tokenmix": vitmix.TokenMix,
    "tokenmix-random": lambda **o: vitmix.TokenMix(mask="random", **o),
    "tokenmix-box": lambda **o: vitmix.TokenMix(mask="box", **o),
}


def one_of(**options: object) -> vitmix.OneOf:
    return vitmix.OneOf([vitmix.Mixup(0.8), vitmix.CutMix(), vitmix.TokenMix()], **options)


ALL = {**MIXERS, "one-of": one_of}
DRAWS = ("batch", "pair", "element")
PAIRINGS = ("permutation", "flip")


def plan(mixer: vitmix.PixelMix, batch: int, seed: int = 0) -> vitmix.PixelPlan:
    generator = torch.Generator().manual_seed(seed)
    return mixer.plan(batch, SIZE, grid=GRID, generator=generator)


@given(
    seed=st.integers(0, 2**32 - 1), raster=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)), last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_one_raster_for_all_is_that_raster_for_each(
    seed: int, raster: tuple[int, int], more: tuple[int, int], last: bool, dtype: torch.dtype
) -> None:
    """Pasting rectangles is choosing pixel by pixel."""
    torch.manual_seed(seed)
    own = (torch.rand(1, *raster) < 0.5).float()
    images = torch.randn(3, 2, raster[0] + more[0], raster[1] + more[1], dtype=dtype)
    if last:
        images = images.to(memory_format=torch.channels_last)
    partner = torch.randperm(3)
    pasted = vitmix.PixelPlan(partner, own, binary=True).apply(images)
    chosen = vitmix.PixelPlan(partner, own.expand(3, -1, -1), binary=True).apply(images)
    assert torch.equal(pasted, chosen)
    assert pasted.stride() == images.stride()
    assert pasted.dtype == dtype


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("draw", "pairing"), list(itertools.product(DRAWS, PAIRINGS)))
@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_apply_is_the_sum_of_sources(name: str, draw: str, pairing: str, batch: int) -> None:
    """Every pixel is its share of own and partner; shares of tokens are the mean over pixels."""
    drawn = plan(ALL[name](draw=draw, pairing=pairing), batch)
    images = torch.rand(batch, 3, *SIZE)
    kept = images.clone()
    mixed = drawn.apply(images)
    assert torch.equal(images, kept)
    given_to = torch.full_like(images, float("nan"))
    assert drawn.apply(images, out=given_to) is given_to
    assert drawn.apply(kept, out=kept) is kept
    assert torch.equal(mixed, given_to)
    assert torch.equal(mixed, kept)
    leaf = images.clone().requires_grad_()
    followed = drawn.apply(leaf)
    assert torch.equal(mixed, followed.detach())
    (gradient,) = torch.autograd.grad(followed.sum(), leaf)
    every_pixel = torch.full((3, *SIZE), float(batch))
    torch.testing.assert_close(gradient.sum(0), every_pixel, atol=1e-5, rtol=0)
    # Constant images show the share of the own image at every pixel.
    basis = torch.eye(batch)[:, :, None, None].expand(-1, -1, *SIZE)
    shares = drawn.apply(basis)
    expected = torch.einsum("bshw,schw->bchw", shares, images)
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(shares.sum(1), torch.ones(batch, *SIZE), atol=1e-6, rtol=0)

    mixture = drawn.mixture(GRID, num_prefix_tokens=2)
    assert mixture.shares.shape == (batch, 2 + 30, 2)
    assert torch.equal(mixture.sources[:, 0], torch.arange(batch))
    tokens = torch.nn.functional.avg_pool2d(shares, 4).flatten(2).transpose(1, 2)
    dense = torch.zeros(batch, 30, batch)
    for k in range(2):
        index = mixture.sources[:, k][:, None, None].expand(-1, 30, 1)
        dense.scatter_add_(2, index, mixture.shares[:, 2:, k : k + 1])
    torch.testing.assert_close(dense, tokens, atol=1e-5, rtol=0)
    prefix = mixture.shares[:, :1, 0]
    torch.testing.assert_close(prefix[:, 0], drawn.lam, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("draw", "pairing"), list(itertools.product(DRAWS, PAIRINGS)))
def test_same_generator_same_plan(name: str, draw: str, pairing: str) -> None:
    mixer = ALL[name](draw=draw, pairing=pairing)
    first, second, third = plan(mixer, 9, 1), plan(mixer, 9, 1), plan(mixer, 9, 2)
    assert torch.equal(first.own, second.own)
    assert torch.equal(first.partner, second.partner)
    same = first.own.shape == third.own.shape and torch.equal(first.own, third.own)
    assert not same or not torch.equal(first.partner, third.partner)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("batch", [6, 7])
def test_pairs_share_a_draw(name: str, pairing: str, batch: int) -> None:
    drawn = plan(ALL[name](draw="pair", pairing=pairing), batch)
    partner = drawn.partner
    assert torch.equal(partner[partner], torch.arange(batch))
    assert (partner == torch.arange(batch)).sum() == batch % 2
    own = drawn.own.expand(batch, -1, -1)
    assert torch.equal(own, own[partner])


def test_flip_pairs_first_with_last() -> None:
    assert plan(vitmix.Mixup(pairing="flip"), 5).partner.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("draw", DRAWS)
def test_permutations_are_uniform(draw: str) -> None:
    """Every partner is equally likely (with pairs: every other one)."""
    mixer = vitmix.Mixup(draw=draw)
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros((4, 4))
    for _ in range(4000):
        partner = mixer.plan(4, SIZE, generator=generator).partner.numpy()
        counts[np.arange(4), partner] += 1
    if draw == "pair":
        assert (np.diag(counts) == 0).all()
        observed = counts[~np.eye(4, dtype=bool)]
    else:
        observed = counts.ravel()
    assert stats.chisquare(observed).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_follow_beta(alpha: float) -> None:
    drawn = plan(vitmix.Mixup(alpha, draw="element"), 4000)
    assert stats.kstest(drawn.lam.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_probability_of_mixing(name: str, prob: float) -> None:
    """Mixed as often as asked, sample by sample and batch by batch."""
    drawn = plan(
        ALL[name](prob=prob, draw="element", alpha=5.0)
        if name != "one-of"
        else vitmix.OneOf([vitmix.Mixup(5.0), vitmix.Mixup(5.0)], prob=prob, draw="element"),
        2000,
    )
    mixed = int((drawn.lam < 1).sum())
    if prob in (0.0, 1.0):
        assert mixed == pytest.approx(prob * 2000, abs=20)
    else:
        assert stats.binomtest(mixed, 2000, prob).pvalue > 1e-4


def test_per_batch_probability() -> None:
    mixer = vitmix.Mixup(prob=0.3)
    mixed = sum(bool(plan(mixer, 4, seed).lam[0] < 1) for seed in range(1000))
    assert stats.binomtest(mixed, 1000, 0.3).pvalue > 1e-4


@pytest.mark.parametrize("name", ["cutmix-aligned", "tokenmix-random", "tokenmix-box"])
def test_token_masks_cover_what_was_asked(name: str) -> None:
    """The share of the own image is lam on average: 1/2 for Beta(1, 1)."""
    drawn = plan(MIXERS[name](draw="element"), 6000)
    error = drawn.lam.std() / 6000**0.5
    assert abs(float(drawn.lam.mean()) - 0.5) < 4 * float(error)


def test_blocks_cover_nearly_what_was_asked() -> None:
    drawn = plan(vitmix.TokenMix(draw="element"), 4000)
    assert 0.5 <= float(drawn.lam.mean()) < 0.54


def test_pixel_box_is_that_of_the_paper() -> None:
    """Clipped boxes of side sqrt(1 - lam): expected area by direct simulation."""
    drawn = plan(vitmix.CutMix(draw="element"), 6000)
    rng = np.random.default_rng(0)
    areas = []
    for lam in rng.beta(1, 1, 6000):
        height, width = int(SIZE[0] * np.sqrt(1 - lam)), int(SIZE[1] * np.sqrt(1 - lam))
        top = rng.integers(SIZE[0]) - height // 2
        left = rng.integers(SIZE[1]) - width // 2
        rows = min(SIZE[0], top + height) - max(0, top)
        columns = min(SIZE[1], left + width) - max(0, left)
        areas.append(rows * columns / (SIZE[0] * SIZE[1]))
    assert stats.ks_2samp(1 - drawn.lam.numpy(), np.array(areas)).pvalue > 1e-4


@pytest.mark.parametrize("align", [False, True])
def test_box_placement(align: bool) -> None:
    """One rectangle each; no side of the image is preferred."""
    drawn = plan(vitmix.CutMix(draw="element", align=align), 4000)
    masks = drawn.mask.numpy()
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    assert (masks.sum((1, 2)) == rows * columns).all()
    mean = masks.mean(0)
    for flipped in (mean[::-1], mean[:, ::-1]):
        np.testing.assert_allclose(mean, flipped, atol=0.05)


@pytest.mark.parametrize("name", MIXERS)
def test_elements_are_independent(name: str) -> None:
    """Neighbouring samples of a batch draw independent shares."""
    lam = plan(MIXERS[name](draw="element"), 3000).lam.numpy()
    assert abs(stats.spearmanr(lam[:-1], lam[1:]).statistic) < 0.08


def test_one_of_switches_as_weighted() -> None:
    mixer = vitmix.OneOf([vitmix.Mixup(2.0), vitmix.CutMix()], weights=[3, 1], draw="element")
    own = plan(mixer, 2000).own
    blended = int(((own > 0) & (own < 1)).flatten(1).any(1).sum())
    assert stats.binomtest(blended, 2000, 0.75).pvalue > 1e-4
    batches = [plan(vitmix.OneOf([vitmix.Mixup(2.0), vitmix.CutMix()]), 4, s) for s in range(400)]
    assert stats.binomtest(sum(not p.binary for p in batches), 400, 0.5).pvalue > 1e-4


def test_released_token_mix() -> None:
    drawn = vitmix.TokenMix.released().plan(4, (224, 224), grid=(14, 14))
    assert drawn.partner.tolist() == [3, 2, 1, 0]
    assert 100 <= int(drawn.mask.sum()) <= 112
    # Stored results were made by these draws.
    rng = torch.Generator().manual_seed(0)
    drawn = vitmix.TokenMix.released().plan(4, (224, 224), grid=(14, 14), generator=rng)
    assert drawn.mask[0].sum(1).tolist() == [4, 12, 12, 12, 9, 9, 5, 6, 11, 9, 6, 5, 8, 4]


@pytest.mark.parametrize("alpha", [0.02, 1.0])
def test_a_fixed_share_knows_no_alpha(alpha: float) -> None:
    """Beta(0.02, 0.02) is 1 within rounding in one of four draws."""
    drawn = plan(vitmix.TokenMix(alpha, mask="random", lam=0.5, draw="element"), 200)
    assert drawn.lam.tolist() == [0.5] * 200


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(9, 40), st.integers(9, 40)),
)
@settings(max_examples=60, deadline=None)
def test_shares_keep_the_area_on_any_grid(grid: tuple[int, int], size: tuple[int, int]) -> None:
    """The mean over tokens is that over pixels, also where the grid does not divide the image."""
    drawn = vitmix.CutMix(draw="element").plan(3, size, grid=grid)
    assert torch.allclose(drawn.cells(grid).mean((1, 2)), drawn.lam, atol=1e-5)
    assert drawn.cells(grid).min() >= -1e-6
    assert drawn.cells(grid).max() <= 1 + 1e-6


@pytest.mark.parametrize("grid", [(1, 16), (16, 1), (1, 1), (3, 11)])
@pytest.mark.parametrize("name", MIXERS)
def test_thin_grids(name: str, grid: tuple[int, int]) -> None:
    drawn = MIXERS[name](draw="element").plan(5, (16, 16), grid=grid)
    assert drawn.apply(torch.rand(5, 1, 16, 16)).shape == (5, 1, 16, 16)


def test_bad_images() -> None:
    drawn = plan(vitmix.CutMix(), 4)
    with pytest.raises(vitmix.InputError, match="expected images"):
        drawn.apply(torch.rand(3, 3, *SIZE))
    with pytest.raises(vitmix.InputError, match="floating"):
        drawn.apply(torch.zeros(4, 3, *SIZE, dtype=torch.uint8))
    images = torch.rand(4, 3, *SIZE)
    with pytest.raises(vitmix.InputError, match="expected `out` "):
        drawn.apply(images, out=torch.rand(4, 1, *SIZE))
    with pytest.raises(vitmix.InputError, match="expected `out` "):
        drawn.apply(images, out=images.double())
    with pytest.raises(vitmix.InputError, match="without gradient"):
        drawn.apply(images.requires_grad_(), out=torch.rand(4, 3, *SIZE))
    with pytest.raises(vitmix.InputError, match="grid"):
        vitmix.TokenMix().plan(4, SIZE)
    with pytest.raises(vitmix.InputError, match="grid"):
        vitmix.TokenMix().plan(4, SIZE, grid=(30, 2))
    with pytest.raises(vitmix.InputError, match="at least one sample"):
        vitmix.Mixup().plan(0, SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_dtype_and_format_are_kept(name: str, dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, *SIZE, dtype=dtype).to(memory_format=torch.channels_last)
    mixed = plan(ALL[name](), 4).apply(images)
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
