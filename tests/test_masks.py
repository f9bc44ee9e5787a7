"""The draws of masks: area, placement, number of parts, generators; on grids of any shape.

The statistical tests draw from fixed seeds, so they give the same verdict every time. Bounds are in
standard errors of what was drawn.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from golden import load_golden
from vitmix.errors import InputError
from vitmix.functional import block_mask, box_mask, random_mask

MASKS = [box_mask, block_mask, random_mask]
GRIDS = [(14, 14), (8, 8), (7, 3), (3, 11), (16, 2), (1, 12), (5, 1), (1, 1)]

few = settings(max_examples=40, deadline=None)
grids = st.tuples(st.integers(1, 16), st.integers(1, 16))
shares = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)
any_mask = st.sampled_from(MASKS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(function, grid, lam, n, seed=0, **kwargs) -> np.ndarray:
    generator = seeded(seed)
    return np.stack([function(grid, lam, generator=generator, **kwargs).numpy() for _ in range(n)])


# Every mask, every grid


@few
@given(any_mask, grids, shares, seeds)
def test_shape_dtype_and_no_more_than_asked_for(function, grid, lam, seed):
    mask = function(grid, lam, generator=seeded(seed))
    assert mask.shape == grid
    assert mask.dtype == torch.bool
    assert mask.device.type == "cpu"
    if function is not box_mask:
        assert mask.sum() <= math.floor((1 - lam) * mask.numel() + 1)


@few
@given(any_mask, grids, seeds)
def test_lam_1_takes_nothing_and_lam_0_everything(function, grid, seed):
    assert not function(grid, 1.0, generator=seeded(seed)).any()
    assert function(grid, 0.0, generator=seeded(seed)).all()


@few
@given(any_mask, grids, shares, seeds)
def test_a_generator_repeats_the_draw_and_leaves_the_global_one_alone(function, grid, lam, seed):
    state = torch.get_rng_state()
    first = function(grid, lam, generator=seeded(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(function(grid, lam, generator=seeded(seed)), first)
    torch.manual_seed(seed)
    assert torch.equal(function(grid, lam), first)
    torch.set_rng_state(state)


@pytest.mark.parametrize("function", MASKS)
def test_the_state_of_a_generator_moves_by_the_same_amount_each_draw(function):
    """So what is drawn after a mask does not depend on how many tries the mask took."""
    after = set()
    for lam in (0.0, 0.1, 0.5, 0.9, 1.0):
        generator = seeded(3)
        function((14, 14), lam, generator=generator)
        after.add(float(torch.rand((), generator=generator)))
    assert len(after) == 1


@pytest.mark.parametrize("function", MASKS)
def test_successive_draws_are_independent(function):
    masks = draw(function, (6, 6), 0.5, 2000).reshape(2000, -1).astype(float)
    masks -= masks.mean(0)
    covariance = (masks[1:] * masks[:-1]).mean(0)
    deviation = masks.var(0)
    assert np.abs(covariance / deviation).max() < 4.5 / 2000**0.5


@pytest.mark.parametrize("function", MASKS)
@pytest.mark.parametrize("lam", [-0.01, 1.01, math.nan])
def test_lam_outside_0_to_1_is_refused(function, lam):
    with pytest.raises(InputError, match=rf"lam.*\[0, 1\], got {lam}"):
        function((4, 4), lam)


@pytest.mark.parametrize("function", MASKS)
@pytest.mark.parametrize("grid", [(0, 4), (4, 0), (-1, 3)])
def test_an_empty_grid_is_refused(function, grid):
    with pytest.raises(InputError, match="grid"):
        function(grid, 0.5)


# Area


@pytest.mark.parametrize("function", [box_mask, random_mask])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lam", [0.93, 0.5, 0.21])
def test_expected_area_is_exactly_that_asked_for(function, grid, lam):
    n = 800
    areas = draw(function, grid, lam, n).mean((1, 2))
    error = max(areas.std(), 0.01) / n**0.5
    assert abs(areas.mean() - (1 - lam)) < 4 * error


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lam", [0.8, 0.5, 0.2])
def test_blocks_cover_nearly_what_was_asked_for(grid, lam):
    """Never more; a little less when no further rectangle fits."""
    n = 400
    areas = draw(block_mask, grid, lam, n).mean((1, 2))
    error = max(areas.std(), 0.01) / n**0.5
    assert areas.mean() < 1 - lam + 4 * error
    assert areas.mean() > 0.96 * (1 - lam) - 4 * error


@pytest.mark.parametrize("grid", [(24, 24), (14, 14)])
def test_a_region_smaller_than_the_least_block_is_one_block(grid):
    areas = draw(block_mask, grid, 0.95, 300).sum((1, 2))
    assert areas.min() > 0
    assert areas.mean() > 0.9 * 0.05 * grid[0] * grid[1]


def test_random_masks_have_one_of_two_counts():
    counts = draw(random_mask, (5, 7), 0.59, 1000).sum((1, 2))  # 14.35 of 35
    assert set(counts.tolist()) == {14, 15}
    assert counts.mean() == pytest.approx(14.35, abs=4 * 0.48 / 1000**0.5)


# Placement


@few
@given(grids, shares, seeds)
def test_a_box_is_one_rectangle(grid, lam, seed):
    mask = box_mask(grid, lam, generator=seeded(seed)).numpy()
    assert references.is_box(mask)
    assert references.connected_parts(mask) <= 1


@few
@given(st.integers(2, 16), st.floats(0.05, 0.95), seeds)
def test_boxes_have_the_aspect_of_the_grid(side, lam, seed):
    cells = np.argwhere(box_mask((side, side), lam, generator=seeded(seed)).numpy())
    if len(cells):
        height, width = cells.max(axis=0) - cells.min(axis=0) + 1
        exact = side * math.sqrt(1 - lam)
        assert abs(height - exact) < 1 + 1e-6
        assert abs(width - exact) < 3.5


def test_every_position_of_a_box_is_equally_likely():
    n = 5000
    masks = draw(box_mask, (8, 8), 0.75, n)  # always 4 x 4: 5 x 5 positions
    tops, lefts = masks.any(2).argmax(1), masks.any(1).argmax(1)
    counts = np.bincount(5 * tops + lefts, minlength=25)
    assert len(counts) == 25
    expected = n / 25
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 51.2  # 24 degrees of freedom, one in a thousand


@pytest.mark.parametrize("grid", [(6, 4), (1, 9), (9, 1)])
def test_every_token_of_a_random_mask_is_equally_likely(grid):
    n, lam = 3000, 0.3
    masks = draw(random_mask, grid, lam, n)
    error = (lam * (1 - lam) / n) ** 0.5
    assert np.abs(masks.mean(0) - (1 - lam)).max() < 4.5 * error


@pytest.mark.parametrize("function", [box_mask, block_mask])
def test_marginals_have_the_symmetries_of_the_grid(function):
    n = 3000
    marginal = draw(function, (7, 7), 0.5, n).mean(0)
    error = (0.5 / n) ** 0.5  # of the difference of two cells, at most
    for mirrored in (marginal[::-1], marginal[:, ::-1], marginal.T):
        assert np.abs(marginal - mirrored).max() < 4.5 * error


@pytest.mark.parametrize("grid", [(1, 20), (20, 1), (2, 9)])
def test_blocks_reach_every_token_of_a_strip(grid):
    marginal = draw(block_mask, grid, 0.5, 500).mean(0)
    assert marginal.min() > 0.1
    assert marginal.max() < 0.95


# Blocks against the recorded draws


@pytest.mark.parametrize(
    ("case", "kwargs"),
    [
        ("block_min14", {}),
        ("block_min14", {"min_block_tokens": 14}),
        ("block_extra0", {"min_block_tokens": 1}),
        ("block", {"min_block_tokens": 1, "extra_tokens": 14}),
    ],
)
def test_blocks_are_distributed_as_recorded(case, kwargs):
    data = load_golden("tokenmix_target")
    recorded = {key: data[f"stats_{case}/{key}"] for key in ("marginal", "count_hist", "lam_in")}
    draws = int(data[f"stats_{case}/draws"])
    n = 1500
    masks = draw(block_mask, (14, 14), float(recorded["lam_in"]), n, **kwargs)

    marginal = recorded["marginal"]
    error = (marginal * (1 - marginal) * (1 / n + 1 / draws)) ** 0.5
    assert (np.abs(masks.mean(0) - marginal) < 4.5 * error).all()

    counts = masks.sum((1, 2))
    mean, deviation = (float(data[f"stats_{case}/{kind}_count"]) for kind in ("mean", "std"))
    assert abs(counts.mean() - mean) < 4.5 * deviation / n**0.5
    assert counts.max() <= np.flatnonzero(recorded["count_hist"]).max()

    parts = np.array([references.connected_parts(mask) for mask in masks])
    mean, deviation = (float(data[f"stats_{case}/{kind}_components"]) for kind in ("mean", "std"))
    assert abs(parts.mean() - mean) < 4.5 * deviation * (1 / n + 1 / draws) ** 0.5
    observed = np.bincount(parts, minlength=100)[:100] / n
    expected = data[f"stats_{case}/components_hist"] / draws
    assert np.abs(observed - expected).max() < 4.5 * (0.25 / n) ** 0.5


def test_random_masks_are_distributed_as_recorded_but_for_the_added_tokens():
    """The released masks have 14 tokens more than lam asks for: 112 instead of 98."""
    data = load_golden("tokenmix_target")
    draws, n = int(data["stats_random/draws"]), 1500
    masks = draw(random_mask, (14, 14), 1 - 112 / 196, n)
    assert (masks.sum((1, 2)) == 112).all()
    marginal = data["stats_random/marginal"]
    error = (marginal * (1 - marginal) * (1 / n + 1 / draws)) ** 0.5
    assert (np.abs(masks.mean(0) - marginal) < 4.5 * error).all()
    parts = np.array([references.connected_parts(mask) for mask in masks])
    mean, deviation = (float(data[f"stats_random/{kind}_components"]) for kind in ("mean", "std"))
    assert abs(parts.mean() - mean) < 4.5 * deviation * (1 / n + 1 / draws) ** 0.5


def test_a_larger_least_block_makes_fewer_parts():
    def mean_parts(masks: np.ndarray) -> float:
        return float(np.mean([references.connected_parts(mask) for mask in masks]))

    many, some, one = (
        mean_parts(draw(block_mask, (14, 14), 0.5, 300, min_block_tokens=least))
        for least in (1, 14, 90)
    )
    single = mean_parts(draw(random_mask, (14, 14), 0.5, 100))
    assert one < some < many < single
    assert one < 1.1


@pytest.mark.parametrize("least", [0, -3])
def test_a_least_block_without_tokens_is_refused(least):
    with pytest.raises(InputError, match=f"min_block_tokens.*got {least}"):
        block_mask((4, 4), 0.5, min_block_tokens=least)
