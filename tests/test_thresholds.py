"""Thresholds that keep a share of samples and of tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitmix
import vitmix.functional as vf
from models import NUM_CLASSES, batch, make_cct
from vitmix.errors import InputError

few = settings(max_examples=25, deadline=None)


def follow(draws: np.ndarray, share: float) -> np.ndarray:
    """Share of each batch ``draws[t]`` that lies below the threshold of its step."""
    state = vf.RunningQuantile.start(share)
    below = []
    for values in torch.from_numpy(draws).float():
        state = vf.follow_quantile(state, values, share)
        below.append(float((values < state.value).float().mean()))
    return np.array(below)


DRIFTS = {
    "none": lambda t: (1.0, 0.0),
    "fall": lambda t: (0.3, 2.3 - 1.8 * t),
    "spread": lambda t: (0.02 * 50**t, 2.3),
    "jump": lambda t: (1.0, 5.0 * (t > 0.4)),
}


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.1, 0.9),
    size=st.sampled_from([24, 64, 128]),
    drift=st.sampled_from(sorted(DRIFTS)),
    shape=st.sampled_from(["normal", "exponential", "uniform"]),
)
def test_the_share_is_kept_while_values_drift(
    seed: int, share: float, size: int, drift: str, shape: str
) -> None:
    draws = getattr(np.random.default_rng(seed), shape)(size=(400, size))
    for step in range(400):
        scale, shift = DRIFTS[drift](step / 400)
        draws[step] = scale * draws[step] + shift
    below = follow(draws, share)
    assert below[0] == pytest.approx(share, abs=1 / size)  # its own quantile
    assert below[300:].mean() == pytest.approx(share, abs=0.05)


@few
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.95), drop=st.floats(0, 1))
def test_values_that_do_not_count(seed: int, share: float, drop: float) -> None:
    """NaN is left out; a batch of nothing else leaves the threshold alone."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.random(40)).float()
    kept = torch.from_numpy(rng.random(40) >= drop)
    start = vf.RunningQuantile.start(share)
    state = vf.follow_quantile(start, torch.where(kept, values, torch.nan), share)
    expected = vf.follow_quantile(start, values[kept], share) if kept.any() else start
    torch.testing.assert_close(tuple(state), tuple(expected), equal_nan=True)
    nothing = torch.full((3,), torch.nan)
    again = vf.follow_quantile(state, nothing, share)
    torch.testing.assert_close(tuple(again), tuple(state), equal_nan=True)


def test_of_many_values_every_other_is_looked_at() -> None:
    values = torch.linspace(0, 1, 3 << 20)
    state = vf.follow_quantile(vf.RunningQuantile.start(0.3), values, 0.3)
    assert float(state.value) == pytest.approx(0.3, abs=1e-5)


def mixing(**options: Any) -> vitmix.MixingModel:
    torch.manual_seed(0)
    stage = vitmix.HorizontalTokenMixup(block=1, **options)
    return vitmix.MixingModel(make_cct(), tokens=[stage], num_classes=NUM_CLASSES).train()


def test_first_batch_is_mixed_by_its_own_quantiles() -> None:
    out = mixing(tau="auto:0.5", rho="auto:0.25")(*batch(8))
    stats = {key.split("/")[1]: float(value) for key, value in out.stats.items()}
    assert stats["mixed_samples"] == 4
    assert stats["mixed_share"] == 0.5
    assert stats["replaced_share"] == pytest.approx(0.25, abs=0.05)
    plan = out.trace.horizontal[1]
    mixed = plan.replace.any(1)
    assert stats["replaced_share"] == pytest.approx(float(plan.replace[mixed].float().mean()))
    assert stats["rho"] > 0


def test_rho_stops_at_zero() -> None:
    """No token is replaced by a less salient one, whatever share is asked for."""
    model = mixing(tau=math.inf, rho="auto:0.95")
    for step in range(5):
        out = model(*batch(8, step))
    assert out.stats["horizontal_1/rho"] == 0
    assert 0.2 < out.stats["horizontal_1/replaced_share"] < 0.9


def test_state_is_saved_copied_and_stays_exact() -> None:
    model = mixing(tau="auto:0.5", rho="auto:0.3")
    for step in range(3):
        model(*batch(8, step))
    state = model.state_dict()
    assert {key for key in state if "of_share" in key} == {
        f"tokens.0.{name}_of_share.{part}" for name in ("tau", "rho") for part in ("value", "level")
    }
    other = mixing(tau="auto:0.5", rho="auto:0.3")
    other.load_state_dict(state)
    for twin in (other, copy.deepcopy(model)):
        assert float(twin(*batch(8, 3)).stats["horizontal_1/tau"]) == pytest.approx(
            float(copy.deepcopy(model)(*batch(8, 3)).stats["horizontal_1/tau"])
        )
    assert not [key for key in mixing().state_dict() if "of_share" in key]
    assert torch.equal(model.eval()(batch(2)[0]), model.model(batch(2)[0]))
    assert model.to(torch.bfloat16).tokens[0].tau_of_share.value.dtype == torch.float32


def test_numbers_and_shares_of_one_half_agree() -> None:
    """A threshold found by its share does what the same number does."""
    found = mixing(tau="auto:0.5", rho="auto:0.3")(*batch(8))
    stats = found.stats
    given = mixing(tau=float(stats["horizontal_1/tau"]), rho=float(stats["horizontal_1/rho"]))(
        *batch(8)
    )
    plans = found.trace.horizontal[1], given.trace.horizontal[1]
    assert torch.equal(plans[0].own_weight < 1, plans[1].own_weight < 1)


@pytest.mark.parametrize("text", ["auto", "auto:", "auto:0", "auto:1", "auto:x", "half", "0.5"])
@pytest.mark.parametrize("name", ["tau", "rho"])
def test_bad_shares(name: str, text: str) -> None:
    with pytest.raises(InputError, match=rf"`{name}` as a number, or auto:SHARE .* got '{text}'"):
        vitmix.HorizontalTokenMixup(**{name: text})


def test_share_outside_its_range() -> None:
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        vf.follow_quantile(vf.RunningQuantile.start(0.5), torch.rand(3), 1.0)
