"""Each function against its loop reference on random inputs, and the algebra that it must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import references
import vitmix.functional as vf
from vitmix.errors import InputError
from vitmix.functional.grids import refine
from vitmix.functional.reach import halos

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
prefixes = st.sampled_from([0, 1, 5])
rhos = st.sampled_from([0.0, 0.001, 0.02, 0.3])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def randn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape)).float()


def softmax(seed: int, *shape: int, sharpness: float = 2.0) -> Tensor:
    return (sharpness * randn(seed, *shape)).softmax(-1)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def close(fast: Tensor, slow: np.ndarray | float, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(wide(fast), slow, atol=atol, rtol=0)


# Attention to saliency


@few
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), prefixes, dtypes)
def test_saliency_is_eq_3(seed, batch, heads, image_tokens, prefix, dtype):
    tokens = image_tokens + prefix
    attention = softmax(seed, batch, heads, tokens, tokens).to(dtype)
    before = attention.clone()
    fast = vf.attention_saliency(attention, num_prefix_tokens=prefix)
    assert fast.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    slow = references.attention_saliency(wide(attention), num_prefix_tokens=prefix)
    close(fast, slow)
    assert torch.equal(attention, before)


@few
@given(seeds, st.integers(1, 3), st.integers(1, 9))
def test_saliency_of_queries_sums_to_one_and_follows_the_tokens(seed, batch, tokens):
    attention = softmax(seed, batch, 2, tokens, tokens)
    saliency = vf.attention_saliency(attention)
    close(saliency.sum(1), np.ones(batch))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(tokens))
    moved = vf.attention_saliency(attention[:, :, order][..., order])
    close(moved, wide(saliency[:, order]))


@few
@given(seeds, st.integers(2, 9), st.sampled_from([1, 5]))
def test_saliency_of_the_class_token_reads_its_row_only(seed, image_tokens, prefix):
    tokens = image_tokens + prefix
    attention = softmax(seed, 2, 2, tokens, tokens)
    saliency = vf.attention_saliency(attention, num_prefix_tokens=prefix)
    # Not normalised again: what is missing from 1 went to the prefix.
    close(saliency.sum(1), 1 - wide(attention[:, :, 0, :prefix].mean(1).sum(1)))
    other = attention.clone()
    other[:, :, 1:] = softmax(seed + 1, 2, 2, tokens - 1, tokens)
    assert torch.equal(vf.attention_saliency(other, num_prefix_tokens=prefix), saliency)


def test_saliency_of_registers_without_class_token_is_the_mean_over_image_queries():
    attention = softmax(0, 2, 3, 9, 9)
    saliency = vf.attention_saliency(attention, num_prefix_tokens=4, class_token=False)
    image = wide(attention)[:, :, 4:, 4:]
    close(saliency, references.attention_saliency(image))


@pytest.mark.parametrize("prefix", [-1, 4, 7])
def test_saliency_refuses_a_prefix_that_leaves_no_token(prefix):
    with pytest.raises(InputError, match=f"got {prefix}"):
        vf.attention_saliency(softmax(0, 1, 1, 4, 4), num_prefix_tokens=prefix)


def test_saliency_refuses_three_axes():
    with pytest.raises(InputError, match=r"\(2, 4, 4\)"):
        vf.attention_saliency(softmax(0, 2, 4, 4))


@few
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), dtypes)
def test_rollout_is_eq_2(seed, batch, heads, tokens, layers, dtype):
    attentions = [softmax(seed + i, batch, heads, tokens, tokens).to(dtype) for i in range(layers)]
    rollout = vf.attention_rollout(attentions)
    close(rollout, references.attention_rollout([wide(a) for a in attentions]))
    close(vf.attention_rollout(torch.stack(attentions)), wide(rollout))
    if dtype != torch.bfloat16:
        close(rollout.sum(-1), np.ones((batch, tokens)))


@few
@given(seeds, st.integers(1, 6))
def test_rollout_of_one_layer_is_its_head_mean_and_identity_is_neutral(seed, tokens):
    attention = softmax(seed, 2, 3, tokens, tokens)
    identity = torch.eye(tokens).expand(2, 3, tokens, tokens)
    mean = wide(attention).mean(1)
    close(vf.attention_rollout([attention]), mean)
    close(vf.attention_rollout([identity, attention]), mean)
    close(vf.attention_rollout([attention, identity]), mean)


def test_rollout_refuses_no_layers():
    with pytest.raises(InputError, match="at least one"):
        vf.attention_rollout([])


@few
@given(seeds, st.integers(1, 3), st.integers(1, 7), st.integers(0, 4), prefixes, st.booleans())
def test_query_key_forms_equal_explicit_attention(seed, batch, tokens, extra, prefix, scaled):
    tokens += prefix
    query = randn(seed, batch, 2, tokens, 5)
    key = randn(seed + 1, batch, 2, tokens + extra, 5)
    scale = 0.7 if scaled else None
    slow = references.attention_matrix(wide(query), wide(key), scale)
    close(vf.query_key_attention(query, key, scale=scale), slow)
    saliency = vf.query_key_saliency(query, key, scale=scale, num_prefix_tokens=prefix)
    close(
        saliency,
        references.attention_saliency(slow, num_prefix_tokens=prefix)[:, : tokens - prefix],
    )


def test_query_key_saliency_works_in_chunks_and_under_masks(monkeypatch):
    query, key = randn(0, 5, 2, 6, 4), randn(1, 5, 2, 6, 4)
    mask = uniform(2, 5, 1, 6, 6) > 0.3
    mask[..., 0] = True
    bias = torch.zeros(5, 1, 6, 6).masked_fill(~mask, -math.inf)
    for prefix in (0, 1):
        whole = vf.query_key_saliency(query, key, attn_mask=mask, num_prefix_tokens=prefix)
        explicit = (query @ key.mT / 2).masked_fill(~mask, -math.inf).softmax(-1)
        expected = references.attention_saliency(wide(explicit), num_prefix_tokens=prefix)
        close(whole, expected)
        close(vf.query_key_saliency(query, key, attn_mask=bias, num_prefix_tokens=prefix), expected)
        with monkeypatch.context() as patch:
            patch.setattr("vitmix.functional.saliency._HELD_BY_CACHE", 1)
            chunked = vf.query_key_saliency(query, key, attn_mask=mask, num_prefix_tokens=prefix)
        close(chunked, wide(whole))


# Saliency to pairs


@few
@given(seeds, st.integers(0, 4), st.integers(1, 5), st.integers(1, 17), rhos, dtypes)
def test_gain_is_eq_6(seed, rows, batch, tokens, rho, dtype):
    saliency = uniform(seed, rows, tokens).to(dtype)
    candidates = uniform(seed + 1, batch, tokens).to(dtype)
    gain = vf.saliency_gain(saliency, candidates, rho)
    assert gain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(gain, references.saliency_gain(wide(saliency), wide(candidates), rho), atol=5e-6)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 17), rhos)
def test_gain_is_zero_for_oneself_falls_with_rho_and_balances(seed, batch, tokens, rho):
    saliency = uniform(seed, batch, tokens).double()
    gain = vf.saliency_gain(saliency, saliency, rho)
    assert (gain >= 0).all()
    close(gain.diagonal(), np.zeros(batch), atol=1e-12)
    assert (vf.saliency_gain(saliency, saliency, rho + 0.1) <= gain + 1e-12).all()
    free = vf.saliency_gain(saliency, saliency, 0.0)
    total = saliency.sum(1)
    close(free - free.T, wide(total[None, :] - total[:, None]), atol=1e-12)


def test_gain_keeps_its_precision_over_many_tokens():
    saliency = softmax(0, 32, 1024, sharpness=3.0)
    gain = vf.saliency_gain(saliency, saliency, 0.05)
    exact = (wide(saliency)[None] - wide(saliency)[:, None] - 0.05).clip(0).sum(-1)
    close(gain, exact)


def test_gain_refuses_other_tokens():
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 4\)"):
        vf.saliency_gain(torch.rand(2, 3), torch.rand(2, 4), 0.0)


@few
@given(seeds, st.integers(0, 5), st.integers(0, 2), st.sampled_from([0, 2, 1000]), dtypes)
def test_assignment_is_the_best_of_all(seed, rows, more, levels, dtype):
    gain = uniform(seed, rows, rows + more)
    if levels:  # coarse levels give ties
        gain = (gain * levels).round() / levels
    gain = gain.to(dtype)
    columns = vf.optimal_assignment(gain)
    assert columns.dtype == torch.int64
    assert columns.shape == (rows,)
    assert len(set(columns.tolist())) == rows
    best, _ = references.optimal_assignment(wide(gain))
    assert wide(gain)[range(rows), columns.numpy()].sum() == pytest.approx(best, abs=1e-9)


def test_assignment_refuses_more_rows_than_columns_and_nan():
    with pytest.raises(InputError, match=r"\(3, 2\)"):
        vf.optimal_assignment(torch.rand(3, 2))
    with pytest.raises(InputError, match="NaN"):
        vf.optimal_assignment(torch.tensor([[1.0, math.nan]]))


@few
@given(seeds, st.integers(0, 5), st.integers(0, 2), dtypes)
def test_greedy_assignment_takes_the_best_that_is_left(seed, rows, more, dtype):
    gain = uniform(seed, rows, rows + more).to(dtype)
    assume(len(gain.unique()) == gain.numel())
    assert vf.greedy_assignment(gain).tolist() == references.greedy_assignment(wide(gain))


@few
@given(seeds, st.lists(st.booleans(), min_size=1, max_size=13), st.integers(2, 4))
def test_grouped_partners_lie_between_their_groups_and_the_whole_batch(seed, easy, size):
    saliency, mask = uniform(seed, len(easy), 6), np.array(easy)
    partner = vf.grouped_partners(saliency, torch.from_numpy(mask), 0.01, size).numpy()
    np.testing.assert_array_equal(partner[~mask], np.flatnonzero(~mask))
    assert len(set(partner[mask])) == mask.sum()
    gain = references.saliency_gain(wide(saliency), wide(saliency), 0.01)
    total = gain[np.arange(len(easy)), partner][mask].sum()
    assert total >= references.grouped_total(gain, mask, -(-len(easy) // size)) - 1e-5
    exact = vf.optimal_partners(saliency, torch.from_numpy(mask), 0.01).numpy()
    assert total <= gain[np.arange(len(easy)), exact][mask].sum() + 1e-5


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_grouped_partners_keep_97_percent_of_the_gain(share):
    saliency = softmax(0, 96, 49, sharpness=1.0)
    easy = torch.arange(96) < share * 96

    def total(**options):
        plan = vf.horizontal_plan(saliency, easy, 0.005, **options)
        return (saliency[plan.partner] - saliency)[plan.replace].sum().item()

    exact = total()
    assert total(candidates=torch.arange(96).roll(1)) < 0.9 * exact
    assert 0.97 * exact < total(assignment="grouped:32") < exact
    assert 0.95 * exact < total(assignment="greedy") < exact


@few
@given(seeds, st.integers(0, 7), st.integers(7, 9))
def test_one_group_is_the_exact_assignment(seed, batch, size):
    saliency, easy = uniform(seed, batch, 5), uniform(seed + 1, batch) > 0.3
    exact = vf.optimal_partners(saliency, easy, 0.01)
    assert torch.equal(vf.optimal_partners(saliency, easy, 0.01, f"grouped:{size}"), exact)


def test_copies_side_by_side_find_others_in_their_groups():
    """Repeated augmentation puts views of an image side by side."""
    saliency = softmax(0, 4, 16, sharpness=3.0).repeat_interleave(4, 0)
    partner = vf.grouped_partners(saliency, torch.ones(16) > 0, 0.0, 4)
    assert (partner // 4 != torch.arange(16) // 4).all()


@pytest.mark.parametrize("assignment", ["grouped", "grouped:1", "grouped:-8", "best", "random"])
def test_unknown_assignments_are_refused(assignment):
    with pytest.raises(InputError, match="exact, greedy, or grouped:SIZE"):
        vf.optimal_partners(torch.rand(2, 3), torch.ones(2) > 0, 0.0, assignment)


def test_grouped_and_greedy_partners_refuse_nan():
    saliency, easy = torch.full((4, 3), math.nan), torch.ones(4) > 0
    for assignment in ("greedy", "grouped:2"):
        with pytest.raises(InputError, match="NaN"):
            vf.optimal_partners(saliency, easy, 0.0, assignment)


# Pairs to a plan


@st.composite
def batches(draw, least_tokens=1):
    """Saliency, easy samples and rho. Half of the time on a grid where ties are exact."""
    seed, batch = draw(seeds), draw(st.integers(1, 5))
    tokens = draw(st.integers(least_tokens, 12))
    saliency = uniform(seed, batch, tokens)
    rho = draw(rhos | st.just(-0.02))
    if draw(st.booleans()):
        saliency, rho = (saliency * 8).floor() / 64, draw(st.sampled_from([0.0, 1 / 64, 2 / 64]))
    easy = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    return saliency, easy, rho


def check_plan(plan, saliency, easy, rho):
    """A plan is right if its pairs are as good as any, and all else follows from them."""
    partner = plan.partner.numpy()
    rows = np.flatnonzero(easy.numpy())
    assert (plan.partner[~easy] == torch.arange(len(easy))[~easy]).all()
    assert len(set(partner[rows].tolist())) == len(rows)
    gain = references.saliency_gain(wide(saliency)[rows], wide(saliency), rho)
    best, _ = references.optimal_assignment(gain)
    assert gain[range(len(rows)), partner[rows]].sum() == pytest.approx(best, abs=2e-5)
    replace = references.replaced_tokens(wide(saliency), easy.numpy(), partner, rho)
    np.testing.assert_array_equal(plan.replace.numpy(), replace)
    close(plan.own_weight, references.own_weights(wide(saliency), replace, partner))


@few
@given(batches())
def test_plan_is_eq_8_9_11(case):
    saliency, easy, rho = case
    # Away from the threshold by more than the rounding of float32, or exactly on it.
    margin = (saliency[None].double() - saliency[:, None].double() - rho).abs()
    assume(((margin > 1e-6) | (margin == 0)).all())
    plan = vf.horizontal_plan(saliency, easy, rho)
    assert plan.partner.dtype == torch.int64
    assert plan.replace.dtype == torch.bool
    check_plan(plan, saliency, easy, rho)


@few
@given(batches())
def test_plan_of_bf16_saliency_is_that_of_its_values(case):
    saliency, easy, _ = case
    saliency = saliency.bfloat16()
    plan = vf.horizontal_plan(saliency, easy, 0.003)
    check_plan(plan, saliency, easy, 0.003)


def test_plan_refuses_unknown_labels():
    with pytest.raises(InputError, match="'saliency' or 'area', got 'foo'"):
        vf.horizontal_plan(torch.rand(2, 3), torch.ones(2) > 0, 0.0, relabel="foo")


@few
@given(batches())
def test_plan_leaves_hard_samples_and_weights_lie_between_0_and_1(case):
    saliency, easy, rho = case
    plan = vf.horizontal_plan(saliency, easy, rho)
    assert not plan.replace[~easy].any()
    assert (plan.own_weight[~easy] == 1).all()
    assert ((plan.own_weight >= 0) & (plan.own_weight <= 1)).all()
    untouched = ~plan.replace.any(1)
    assert (plan.own_weight[untouched] == 1).all()


@pytest.mark.parametrize("tokens", [1, 7])
def test_plan_without_easy_samples_of_one_sample_and_of_equal_samples_does_nothing(tokens):
    saliency = uniform(0, 3, tokens)
    none_easy = vf.horizontal_plan(saliency, torch.zeros(3, dtype=torch.bool), 0.0)
    alone = vf.horizontal_plan(saliency[:1], torch.ones(1, dtype=torch.bool), 0.0)
    equal = vf.horizontal_plan(saliency[:1].repeat(3, 1), torch.ones(3, dtype=torch.bool), 0.0)
    for plan in (none_easy, alone, equal):
        assert not plan.replace.any()
        assert (plan.own_weight == 1).all()
    assert none_easy.partner.tolist() == [0, 1, 2]
    assert alone.partner.tolist() == [0]


def test_a_plan_is_one_graph_however_many_samples_are_easy():
    saliency = softmax(0, 6, 9)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vf.horizontal_plan, fullgraph=True, backend=frames)
    for count in range(7):
        easy = torch.arange(6) < count
        expected = vf.horizontal_plan(saliency, easy, 0.001)
        for value, same in zip(compiled(saliency, easy, 0.001), expected, strict=True):
            torch.testing.assert_close(value, same, rtol=0, atol=1e-6)
    assert frames.frame_count == 1
    for assignment in ("exact", "greedy", "grouped:2"):
        given = (saliency, easy, torch.tensor(0.001), assignment)
        torch.library.opcheck(torch.ops.vitmix.optimal_partners, given)
    with pytest.raises(InputError, match="NaN"):
        compiled(saliency * math.nan, easy, 0.001)


@few
@given(batches())
def test_given_partners_and_area_labels_are_the_ablations(case):
    saliency, easy, rho = case
    batch = len(easy)
    partners = torch.arange(batch).roll(1)
    plan = vf.horizontal_plan(saliency, easy, rho, candidates=partners, relabel="area")
    assert torch.equal(plan.partner, torch.where(easy, partners, torch.arange(batch)))
    replace = references.replaced_tokens(wide(saliency), easy.numpy(), plan.partner.numpy(), rho)
    assume((plan.replace.numpy() == replace).all())
    close(plan.own_weight, 1 - replace.mean(1))


def best_is_clear(saliency: Tensor, easy: Tensor, rho: float) -> bool:
    gain = references.saliency_gain(wide(saliency[easy]), wide(saliency), rho)
    totals = sorted(total for total, _ in references.assignments(gain))
    return len(totals) < 2 or totals[-1] - totals[-2] > 1e-4


@few
@given(batches(least_tokens=6), seeds)
def test_permuting_the_batch_permutes_the_result(case, seed):
    saliency, easy, rho = case
    assume(best_is_clear(saliency, easy, rho))
    batch, tokens = saliency.shape
    x, y = randn(seed, batch, tokens, 3), softmax(seed, batch, 4)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(batch))
    plan = vf.horizontal_plan(saliency, easy, rho)
    moved = vf.horizontal_plan(saliency[order], easy[order], rho)
    assert torch.equal(order[moved.partner], plan.partner[order])
    assert torch.equal(moved.replace, plan.replace[order])
    mixed, labels = vf.apply_horizontal(x, y, plan)
    moved_mixed, moved_labels = vf.apply_horizontal(x[order], y[order], moved)
    assert torch.equal(moved_mixed, mixed[order])
    close(moved_labels, wide(labels[order]))


# A plan carried out


@few
@given(batches(), seeds, prefixes, dtypes)
def test_apply_is_eq_10_and_11(case, seed, prefix, dtype):
    saliency, easy, rho = case
    plan = vf.horizontal_plan(saliency, easy, rho)
    batch, tokens = saliency.shape
    x, y = randn(seed, batch, prefix + tokens, 3).to(dtype), softmax(seed, batch, 4)
    x_before, y_before = x.clone(), y.clone()
    mixed, labels = vf.apply_horizontal(x, y, plan, num_prefix_tokens=prefix)
    assert mixed.dtype == dtype
    slow_mixed, slow_labels = references.apply_horizontal(
        wide(x),
        wide(y),
        plan.partner.numpy(),
        plan.replace.numpy(),
        wide(plan.own_weight),
        num_prefix_tokens=prefix,
    )
    np.testing.assert_array_equal(wide(mixed), slow_mixed)
    close(labels, slow_labels)
    close(labels.sum(1), np.ones(batch))
    assert torch.equal(mixed[:, :prefix], x[:, :prefix])
    assert torch.equal(mixed[~easy], x[~easy])
    assert torch.equal(labels[~easy], y[~easy])
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    again, again_labels = vf.apply_horizontal(x, y, plan, num_prefix_tokens=prefix)
    assert torch.equal(again, mixed)
    assert torch.equal(again_labels, labels)


@few
@given(batches())
def test_mixing_raises_the_saliency_by_the_gain(case):
    saliency, easy, rho = case
    plan = vf.horizontal_plan(saliency, easy, rho)
    mixed = vf.mix_tokens(saliency[..., None], plan)[..., 0]
    gain = references.saliency_gain(wide(saliency), wide(saliency), rho)
    rows = np.arange(len(easy))
    expected = np.where(easy.numpy(), gain[rows, plan.partner.numpy()], 0.0)
    close((mixed - saliency).sum(1) - rho * plan.replace.sum(1), expected, atol=1e-5)


def test_mixing_twice_equals_once_where_partners_are_hard():
    plan = vf.HorizontalPlan(
        torch.tensor([2, 3, 2, 3]),
        torch.tensor([[True, False], [True, True], [False, False], [False, False]]),
        torch.tensor([0.25, 0.5, 1.0, 1.0]),
    )
    x, y = randn(0, 4, 3, 2), softmax(1, 4, 5)
    once, _ = vf.apply_horizontal(x, y, plan, num_prefix_tokens=1)
    twice, _ = vf.apply_horizontal(once, y, plan, num_prefix_tokens=1)
    assert torch.equal(once, twice)


def test_gradients_reach_the_tokens_that_were_kept_and_taken():
    plan = vf.HorizontalPlan(
        torch.tensor([1, 1]),
        torch.tensor([[True, False], [False, False]]),
        torch.tensor([0.5, 1.0]),
    )
    x = randn(0, 2, 3, 2).requires_grad_()
    mixed, _ = vf.apply_horizontal(x, torch.eye(2), plan, num_prefix_tokens=1)
    mixed.sum().backward()
    assert x.grad[..., 0].tolist() == [[1, 0, 1], [1, 2, 1]]


def test_apply_refuses_tokens_that_do_not_fit():
    plan = vf.horizontal_plan(uniform(0, 2, 4), torch.ones(2, dtype=torch.bool), 0.0)
    with pytest.raises(InputError, match=r"\(2, 5, D\).*\(2, 4, 3\)"):
        vf.apply_horizontal(randn(0, 2, 4, 3), torch.eye(2), plan, num_prefix_tokens=1)


# Vertical


@few
@given(seeds, st.integers(1, 3), st.integers(1, 9), prefixes, st.data())
def test_salient_tokens_are_those_of_sec_3_4(seed, batch, tokens, prefix, data):
    kappa = data.draw(st.integers(1, tokens))
    saliency = uniform(seed, batch, tokens)
    assume(all(len(set(row)) == tokens for row in saliency.tolist()))
    x = randn(seed, batch, prefix + tokens, 3)
    options = {"num_prefix_tokens": prefix}
    places = vf.salient_indices(saliency, kappa, **options)
    slow_places = references.salient_positions(wide(saliency), kappa, **options)
    np.testing.assert_array_equal(places.numpy(), slow_places)
    slow = references.salient_tokens(wide(x), wide(saliency), kappa, **options)
    np.testing.assert_array_equal(wide(vf.salient_tokens(x, saliency, kappa, **options)), slow)


@few
@given(seeds, st.integers(1, 9), prefixes)
def test_all_tokens_are_a_rearrangement_even_with_ties(seed, tokens, prefix):
    saliency = (uniform(seed, 2, tokens) * 3).floor()
    places = vf.salient_indices(saliency, tokens, num_prefix_tokens=prefix)
    expected = torch.arange(prefix, prefix + tokens).expand(2, -1)
    assert torch.equal(places.sort(1).values, expected)
    chosen = saliency.gather(1, places - prefix)
    assert (chosen[:, 1:] <= chosen[:, :-1]).all()


def test_gradients_reach_the_collected_tokens_only():
    x = randn(0, 1, 4, 2).requires_grad_()
    saliency = torch.tensor([[0.1, 0.7, 0.2]])
    vf.salient_tokens(x, saliency, 2, num_prefix_tokens=1).sum().backward()
    assert x.grad[0, :, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kappa", [0, 4])
def test_kappa_out_of_range_is_refused(kappa):
    with pytest.raises(InputError, match=f"kappa.*3.*got {kappa}"):
        vf.salient_tokens(randn(0, 2, 3, 2), uniform(0, 2, 3), kappa)


def test_salient_tokens_refuse_a_forgotten_prefix():
    with pytest.raises(InputError, match=r"\(2, 4, 2\)"):
        vf.salient_tokens(randn(0, 2, 4, 2), uniform(0, 2, 3), 1)


# Shares


@few
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(1, 4))
def test_align_is_the_tl_align_rule(seed, batch, heads, tokens, sources):
    shares = softmax(seed, batch, tokens, sources)
    attention = softmax(seed + 1, batch, heads, tokens, tokens).requires_grad_()
    before = shares.clone()
    aligned = vf.align_shares(shares, attention)
    close(aligned, references.align_shares(wide(shares), wide(attention)))
    close(aligned.sum(-1), np.ones((batch, tokens)))
    assert not aligned.requires_grad
    assert torch.equal(shares, before)


@few
@given(seeds, st.integers(1, 8), st.integers(1, 4))
def test_identity_attention_leaves_labels_where_they_are(seed, tokens, sources):
    shares = softmax(seed, 2, tokens, sources)
    identity = torch.eye(tokens).expand(2, 3, tokens, tokens)
    close(vf.align_shares(shares, identity), wide(shares))
    one_source = torch.ones(2, tokens, 1)
    close(vf.align_shares(one_source, softmax(seed, 2, 3, tokens, tokens)), wide(one_source))


@few
@given(seeds, st.integers(1, 6), st.integers(2, 5), st.integers(1, 4))
def test_shares_give_the_labels_that_dense_labels_give(seed, tokens, classes, layers):
    """A class dimension is never needed: shares times the sources' labels is the same."""
    labels = softmax(seed, 2, 3, classes)  # three sources a sample
    shares = softmax(seed + 1, 2, tokens, 3)
    dense = wide(shares @ labels)
    for layer in range(layers):
        attention = softmax(seed + 2 + layer, 2, 2, tokens, tokens)
        shares = vf.align_shares(shares, attention)
        dense = references.align_shares(dense, wide(attention))
    close(shares @ labels, dense)


def test_bf16_attention_is_averaged_at_the_precision_of_the_shares():
    shares, attention = softmax(0, 2, 5, 3), softmax(1, 2, 4, 5, 5).bfloat16()
    aligned = vf.align_shares(shares, attention)
    assert aligned.dtype == torch.float32
    close(aligned, references.align_shares(wide(shares), wide(attention)))


def test_align_refuses_attention_of_other_tokens():
    with pytest.raises(InputError, match=r"\(2, H, 5, 5\).*\(2, 1, 4, 4\)"):
        vf.align_shares(softmax(0, 2, 5, 3), softmax(1, 2, 1, 4, 4))


@few
@given(
    seeds, st.integers(1, 3), st.integers(1, 7), st.integers(0, 3), st.integers(1, 4), st.booleans()
)
def test_shares_ride_through_fused_attention(seed, batch, tokens, extra, sources, scaled):
    q, k, v = (
        randn(seed + i, batch, 2, n, 5) for i, n in enumerate([tokens] + [tokens + extra] * 2)
    )
    shares = softmax(seed + 3, batch, tokens + extra, sources)
    scale = 0.3 if scaled else None
    output, attended = vf.attend_with_shares(q, k, v, shares, scale=scale)
    matrix = references.attention_matrix(wide(q), wide(k), scale)
    close(output, matrix @ wide(v), atol=5e-6)
    close(attended, np.einsum("bhij,bjk->bik", matrix, wide(shares)) / 2)


def random_mask(kind: str) -> dict[str, object]:
    allowed = uniform(9, 2, 1, 6, 6) > 0.4
    allowed |= torch.eye(6, dtype=torch.bool)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": allowed},
        "additive": {"attn_mask": randn(9, 2, 1, 6, 6)},
        "of each head": {"attn_mask": randn(9, 3, 6, 6)},
        "three axes": {"attn_mask": randn(9, 1, 6, 6)},
        "forbidding": {"attn_mask": torch.zeros(2, 3, 6, 6).masked_fill(~allowed, -math.inf)},
    }[kind]


@pytest.mark.parametrize(
    "mask", ["none", "causal", "bool", "additive", "of each head", "three axes", "forbidding"]
)
@pytest.mark.parametrize(("width", "value_width"), [(4, 4), (5, 3), (3, 9), (16, 16), (255, 255)])
def test_riding_shares_change_neither_output_nor_gradients(mask, width, value_width):
    """Whatever the widths: within the fused kernels' greatest (256) and beyond, with the shares."""
    shape = (2, 3, 6)
    q, k, v = (randn(i, *shape, d) for i, d in enumerate((width, width, value_width)))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    shares = softmax(3, 2, 6, 2)
    upstream = randn(4, *shape, value_width)
    options = random_mask(mask)
    output, attended = vf.attend_with_shares(*inputs, shares, **options)
    assert not attended.requires_grad
    fast = torch.autograd.grad((output * upstream).sum(), inputs)
    plain_output = F.scaled_dot_product_attention(*inputs, **options)
    plain = torch.autograd.grad((plain_output * upstream).sum(), inputs)
    close(output, wide(plain_output), atol=1e-5)
    for ours, theirs in zip(fast, plain, strict=True):
        close(ours, wide(theirs), atol=5e-5)
    identity = torch.eye(6).expand(2, 3, 6, 6)
    matrix = F.scaled_dot_product_attention(q, k, identity, **options).mean(1)
    close(attended, wide(matrix) @ wide(shares), atol=2e-6)


def test_attention_dropout_touches_the_output_and_not_the_shares():
    q, k, v = (randn(i, 2, 3, 6, 4) for i in range(3))
    shares = softmax(3, 2, 6, 2)
    torch.manual_seed(0)
    output, attended = vf.attend_with_shares(q, k, v, shares, dropout_p=0.5)
    torch.manual_seed(0)
    plain = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(output, plain)
    matrix = references.attention_matrix(wide(q), wide(k))
    close(attended, np.einsum("bhij,bjk->bik", matrix, wide(shares)) / 3)


def test_riding_shares_keep_their_precision_in_bf16():
    q, k, v = (randn(i, 2, 3, 16, 8).bfloat16() for i in range(3))
    shares = softmax(3, 2, 16, 2)
    output, attended = vf.attend_with_shares(q, k, v, shares)
    assert output.dtype == torch.bfloat16
    assert attended.dtype == torch.float32
    matrix = references.attention_matrix(wide(q), wide(k))
    close(attended, np.einsum("bhij,bjk->bik", matrix, wide(shares)) / 3, atol=5e-3)
    close(attended.sum(-1), np.ones((2, 16)), atol=5e-3)


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(0, 2), seeds)
def test_mixture_follows_whole_and_blended_tokens(seed, batch, tokens, prefix, other_seed):
    """Shares after each step, times the labels, are the labels that dense tokens would carry."""
    rng = np.random.default_rng(other_seed)
    labels = softmax(seed, batch, 4)
    mixture = vf.Mixture.unmixed(batch, prefix + tokens, torch.device("cpu"))
    dense = labels[:, None].expand(-1, prefix + tokens, -1)
    for _ in range(2):
        partner = torch.from_numpy(rng.integers(batch, size=batch))
        replace = torch.from_numpy(rng.random((batch, tokens)) < 0.5)
        mixture = mixture.replaced(partner, replace)
        gate = F.pad(replace, (prefix, 0))[..., None]
        dense = torch.where(gate, dense[partner], dense)
        weight = torch.from_numpy(rng.random(batch)).float()
        mixture = mixture.blended(partner, weight)
        own = weight[:, None, None]
        dense = own * dense + (1 - own) * dense[partner]
    assert mixture.sources.shape == (batch, 16)
    close(mixture.shares.sum(-1), np.ones((batch, prefix + tokens)), atol=2e-6)
    for token in range(prefix + tokens):
        close(mixture.targets(mixture.shares[:, token], labels), wide(dense[:, token]), atol=2e-6)


@few
@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_pooled_shares_are_the_weighted_mean(seed, tokens, sources):
    shares, weights = softmax(seed, 2, tokens, sources), softmax(seed + 1, 2, tokens)
    slow = np.zeros((2, sources))
    for b in range(2):
        for t in range(tokens):
            slow[b] += wide(weights)[b, t] * wide(shares)[b, t]
    close(vf.pooled_shares(shares, weights), slow)


# Targets


@few
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_activation_weights_are_the_visible_parts(seed, batch, rows, columns, shared):
    # Well above the 1e-8 that a map's sum is padded with.
    own, partner = (0.1 + uniform(seed + i, batch, rows, columns) for i in range(2))
    mask = uniform(seed + 2, *([] if shared else [batch]), rows, columns) < 0.5
    before = own.clone()
    fast = vf.activation_weight(own, partner, mask)
    slow = references.activation_weight(wide(own), wide(partner), mask.numpy())
    close(fast[0], slow[0])
    close(fast[1], slow[1])
    assert torch.equal(own, before)
    same = vf.activation_weight(own, own, mask)
    close(same[0] + same[1], np.ones(batch), atol=1e-5)
    scaled = vf.activation_weight(own * 7, partner * 0.3, mask)
    close(scaled[0], slow[0])
    close(scaled[1], slow[1])


def test_activation_weights_at_the_ends():
    own, partner = uniform(0, 3, 2, 5) + 0.1, uniform(1, 3, 2, 5) + 0.1
    nothing, everything = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    kept, taken = vf.activation_weight(own, partner, nothing)
    close(kept, np.ones(3))
    assert taken.tolist() == [0, 0, 0]
    kept, taken = vf.activation_weight(own, partner, everything)
    assert kept.tolist() == [0, 0, 0]
    close(taken, np.ones(3))
    blank, _ = vf.activation_weight(torch.zeros(3, 2, 5), partner, nothing)
    assert blank.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_activation_weights_of_any_dtype_and_fractional_masks(dtype):
    maps = torch.tensor([[[100, 100]], [[0, 0]], [[0, 200]]], dtype=dtype)
    own, partner = vf.activation_weight(maps, maps, torch.tensor([[0.5, 0.25]]))
    assert own.dtype == torch.float32
    close(own, [0.625, 0, 0.75])
    close(partner, [0.375, 0, 0.25])


def test_activation_weight_refuses_shapes_that_do_not_fit():
    with pytest.raises(InputError, match=r"\(2, 3, 3\) and \(2, 4, 3\)"):
        vf.activation_weight(uniform(0, 2, 3, 3), uniform(0, 2, 4, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match=r"\(3, 4\)"):
        vf.activation_weight(uniform(0, 2, 3, 3), uniform(0, 2, 3, 3), torch.ones(3, 4))


def test_activation_weight_refuses_negative_activation():
    maps = torch.tensor([[[1.0, -0.5]]])
    with pytest.raises(InputError, match="negative"):
        vf.activation_weight(maps, maps, torch.tensor([[True, False]]))


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.5]))
def test_smoothing(seed, batch, classes, smoothing):
    soft = softmax(seed, batch, classes)
    fast = vf.smooth_targets(soft, classes, smoothing)
    close(fast, references.smooth_targets(wide(soft), smoothing))
    close(fast.sum(1), np.ones(batch))
    index = torch.from_numpy(np.random.default_rng(seed).integers(classes, size=batch))
    hard = references.smooth_targets(np.eye(classes)[index.numpy()], smoothing)
    close(vf.smooth_targets(index, classes, smoothing), hard)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_labels_of_low_precision_sum_to_one_afterwards(dtype):
    """Rounded to 8 bits, probabilities of 1,000 classes sum to 1 within a few thousandths."""
    soft = softmax(0, 256, 1000).to(dtype)
    if dtype == torch.bfloat16:
        assert (soft.float().sum(1) - 1).abs().max() > 1e-3
    close(vf.smooth_targets(soft, 1000).sum(1), np.ones(256), atol=1e-6)
    with pytest.raises(InputError, match="sum to 1"):
        vf.smooth_targets(soft * 0.96, 1000)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor([0, 4]), "0 to 3, got 4"),
        (torch.tensor([-1, 2]), "got -1"),
        (torch.tensor([[1.5, -0.5, 0.0, 0.0]]), "at least 0"),
        (torch.tensor([[0.5, 0.0, 0.0, 0.0]]), "sum to 1"),
        (torch.tensor([[math.nan, 0.0, 0.0, 0.0]]), "soft labels"),
        (torch.tensor([[0.5, 0.5]]), r"\(1, 2\)"),
        (torch.tensor([1.0, 2.0]), "float32"),
    ],
)
def test_labels_that_are_none_are_refused(targets, words):
    with pytest.raises(InputError, match=words):
        vf.smooth_targets(targets, num_classes=4)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 7), st.sampled_from([1.0, 100.0]), dtypes)
def test_soft_cross_entropy_is_the_formula(seed, batch, classes, scale, dtype):
    logits = (scale * randn(seed, batch, classes)).to(dtype).requires_grad_()
    targets = softmax(seed + 1, batch, classes)
    loss = vf.soft_cross_entropy(logits, targets)
    assert loss.shape == ()
    slow = references.soft_cross_entropy(wide(logits), wide(targets))
    assert loss.item() == pytest.approx(slow, rel=1e-5, abs=1e-6)
    loss.backward()
    expected = (wide(logits.double().softmax(-1)) - wide(targets)) / batch
    close(logits.grad, expected, atol=4e-3 if dtype == torch.bfloat16 else 1e-6)
    each = vf.soft_cross_entropy_per_sample(logits, targets)
    assert each.shape == (batch,)
    assert each.mean().item() == pytest.approx(loss.item(), rel=1e-6)


def test_soft_cross_entropy_refuses_other_shapes():
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 4\)"):
        vf.soft_cross_entropy(randn(0, 2, 3), softmax(0, 2, 4))


# Grids


@pytest.mark.parametrize(
    "make", [lambda: vf.windows((6, 4), (2, 2), (1, 1)), lambda: halos((6, 4), 2, 1)]
)
def test_tables_of_windows_belong_to_their_caller(make):
    """Whatever one does to a table, and wherever the first was made, the next is right."""
    with torch.device("meta"), torch.inference_mode():
        first = make().clone()
    assert first.device.type == "cpu"
    make().add_(1)
    assert torch.equal(make(), first)
    assert not make().is_inference()


@pytest.mark.parametrize(("old", "new"), [((4, 4), (9, 9)), ((2, 3), (5, 7)), ((1, 4), (1, 9))])
def test_tokens_left_over_have_the_shares_of_the_last_cell(old, new):
    """A query grid that was rounded down leaves a row and a column that no query stands for."""
    shares = softmax(0, 2, 1 + old[0] * old[1], 3)
    fine = refine(shares, old, new, num_prefix_tokens=1)
    close(fine.sum(-1), np.ones(fine.shape[:2]))
    coarse, fine = shares[:, 1:].view(2, *old, 3), fine[:, 1:].view(2, *new, 3)
    close(fine[:, -1, -1], coarse[:, -1, -1])
    close(fine[:, 0, 0], coarse[:, 0, 0])


def test_reduced_queries_are_restored_on_any_grid():
    reach = vf.Reach((9, 9), queries=(4, 4), restored=True)
    merged = reach.merged(softmax(0, 2, 16, 3))
    close(merged.sum(-1), np.ones((2, 81)))
