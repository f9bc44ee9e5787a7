"""Horizontal mixing alone: gains, assignment, mask, tokens and labels of a batch; no model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitmix.benchmarks.baselines import broadcast_gain, broadcast_horizontal
from vitmix.benchmarks.measure import Comparison, Job, Work
from vitmix.benchmarks.options import BenchOptions
from vitmix.functional import (
    apply_horizontal,
    horizontal_plan,
    optimal_partners,
    saliency_gain,
)
from vitmix.functional.matching import require_assignment

__all__ = [
    "VARIANTS",
    "blob_saliency",
    "comparisons",
    "gain_comparison",
    "growth_comparison",
    "horizontal_comparison",
]

VARIANTS = ("exact", "grouped:128", "greedy", "baseline")
SIZES = ((64, 256), (128, 64), (128, 256), (128, 1024), (512, 196), (1024, 196), (4096, 64))
QUICK = ((64, 64),)
CLASSES, RHO = 100, 1.0  # rho in units of the mean saliency of a token
# Of the tensor (B, B, N) of the baseline: above it is left out.
_MOST_BYTES = 3 << 30


def comparisons(options: BenchOptions) -> Iterator[Job]:
    """All of horizontal mixing over batch sizes and numbers of tokens, 384 channels wide."""
    sizes: tuple[tuple[int, int], ...] = QUICK if options.quick else SIZES
    if options.batch_sizes or options.tokens:
        sizes = tuple(
            (batch, tokens)
            for batch in options.batch_sizes or (128,)
            for tokens in options.tokens or (196,)
        )
    for batch, tokens in sizes:
        variants = options.variants or VARIANTS
        if 4 * batch * batch * tokens > _MOST_BYTES:
            variants = tuple(variant for variant in variants if variant != "baseline")
        if variants:
            yield Job(horizontal_comparison, (batch, tokens, 384, options.device, variants), 10)


def blob_saliency(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Saliency ``(B, N)`` that looks like that of photographs: one blob each, and noise.

    Rows sum to 1. A blob has a random centre and width; what lies around it is log-normal.
    """
    generator = torch.Generator().manual_seed(seed)
    side = max(1, round(tokens**0.5))
    places = torch.arange(tokens)
    at = torch.stack((places // side, places % side), -1) / side  # (N, 2)
    centre = torch.rand(batch, 1, 2, generator=generator)
    width = 0.1 + 0.2 * torch.rand(batch, 1, generator=generator)
    blob = torch.exp(-(at - centre).square().sum(-1) / (2 * width.square()))
    noise = torch.randn(batch, tokens, generator=generator)
    return (2.0 * blob + 0.5 * noise).softmax(1)


def horizontal_comparison(
    batch: int,
    tokens: int,
    width: int,
    device: str,
    variants: tuple[str, ...] = VARIANTS,
) -> Comparison:
    """Compare assignments, and the baseline, on tokens ``(batch, tokens, width)``.

    Raises:
        InputError: an unknown assignment.
    """
    for variant in variants:
        if variant != "baseline":
            require_assignment(variant)
    given = _inputs(batch, tokens, width, device)
    return Comparison(
        "horizontal",
        f"batch {batch}, {tokens} tokens, {width} wide",
        variants[0],
        {variant: partial(_maker, variant, *given) for variant in variants},
        {"batch_size": batch, "tokens": tokens, "width": width, "rho": RHO / tokens},
        images=batch,
        figures=partial(_figures, given[2]),
    )


def gain_comparison(batch: int, tokens: int, device: str) -> Comparison:
    """Compare the gain matrix alone."""
    saliency = blob_saliency(batch, tokens).to(device)
    rho = RHO / tokens
    return Comparison(
        "gain",
        f"batch {batch}, {tokens} tokens",
        "exact",
        {
            "exact": lambda: partial(saliency_gain, saliency, saliency, rho),
            "baseline": lambda: partial(broadcast_gain, saliency, saliency, rho),
        },
        {"batch_size": batch, "tokens": tokens, "rho": rho},
        images=batch,
    )


def growth_comparison(small: int, large: int, tokens: int, width: int, device: str) -> Comparison:
    """Compare two batches with groups of 128, and their total gain with the exact assignment's."""
    given = {name: _inputs(name, tokens, width, device) for name in (small, large)}

    def figures(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        shares = {}
        for batch, (_, _, saliency) in given.items():
            easy = torch.ones(batch, dtype=torch.bool, device=saliency.device)
            best = optimal_partners(saliency, easy, RHO / tokens)
            grouped = results[f"batch {batch}"][2]
            share = total_gain(saliency, grouped) / total_gain(saliency, best)
            shares[f"batch {batch}"] = {"gain share": share}
        return shares

    return Comparison(
        "growth",
        f"batch {small} to {large}, {tokens} tokens, {width} wide",
        f"batch {small}",
        {f"batch {batch}": partial(_maker, "grouped:128", *given[batch]) for batch in given},
        {"batch_sizes": [small, large], "tokens": tokens, "width": width, "rho": RHO / tokens},
        figures=figures,
    )


def _inputs(batch: int, tokens: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(batch, tokens, width, device=device)
    labels = torch.eye(CLASSES, device=device)[torch.arange(batch, device=device) % CLASSES]
    return hidden, labels, blob_saliency(batch, tokens).to(device)


def _maker(variant: str, hidden: Tensor, labels: Tensor, saliency: Tensor) -> Work:
    rho = RHO / saliency.shape[1]
    if variant == "baseline":
        return partial(broadcast_horizontal, hidden, labels, saliency, rho)
    easy = torch.ones(len(saliency), dtype=torch.bool, device=saliency.device)

    def mix() -> tuple[Tensor, Tensor, Tensor]:
        plan = horizontal_plan(saliency, easy, rho, assignment=variant)
        return *apply_horizontal(hidden, labels, plan), plan.partner

    return mix


def _figures(saliency: Tensor, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Total gain of each variant's pairs over that of the best."""
    gains = {name: total_gain(saliency, result[2]) for name, result in results.items()}
    best = gains.get("exact", max(gains.values()))
    return {name: {"gain share": gain / best} for name, gain in gains.items()}


def total_gain(saliency: Tensor, partner: Tensor) -> float:
    """Sum over a batch of what the pairs gain (TokenMixup, Eq. 7)."""
    gain = saliency[partner] - saliency - RHO / saliency.shape[1]
    return float(gain.clamp_min(0).double().sum())
