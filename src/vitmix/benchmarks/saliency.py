"""The saliency step alone, as in TokenMixup's Table 3: gradient, attention, rollout, random.

Each detector is run as a training step runs it, on the tokens that a real pass has brought to a
block; a block's queries and keys are computed anew for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vitmix
from vitmix.benchmarks.baselines import (
    ExplicitAttention,
    has_baseline,
    map_saliency,
    tokens_gradient,
)
from vitmix.benchmarks.measure import Comparison, Job
from vitmix.benchmarks.options import BenchOptions
from vitmix.benchmarks.steps import image_side
from vitmix.errors import InputError
from vitmix.functional.targets import smooth_targets
from vitmix.gradient import gradient_saliency
from vitmix.models import create_model
from vitmix.tokens import BlendPlan, Given, TokenContext, TokenMixer, TokenOutcome

__all__ = ["VARIANTS", "comparisons", "saliency_comparison"]

VARIANTS = ("attention", "attention+baseline", "random", "rollout-1", "rollout-2", "rollout-3",
            "rollout-4", "gradient", "gradient+baseline")  # fmt: skip
BLOCK = 2


def comparisons(options: BenchOptions) -> Iterator[Job]:
    """Detectors on the models chosen; by default the CIFAR model of the paper."""
    default = 128 if options.device != "cpu" else 8 if options.quick else 64
    for name in options.models or ("cct_7_3x1_32",):
        for batch in options.batch_sizes or (default,):
            yield Job(
                saliency_comparison,
                (name, batch, options.variants, options.device, options.precision),
                30,
            )


class _Listener(TokenMixer):
    """Mixes nothing and keeps what stages are told."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.context: TokenContext | None = None

    def draw(self, batch: int, tokens: int, generator: torch.Generator | None) -> Given:
        return Given()

    def plan(self, tokens: Tensor, context: TokenContext) -> TokenOutcome:
        self.context, self.tokens = context, tokens.detach()
        own = torch.arange(len(tokens), device=tokens.device)
        return TokenOutcome(BlendPlan(own, torch.ones_like(own)), None, {})


def saliency_comparison(
    name: str,
    batch: int,
    variants: tuple[str, ...],
    device: str,
    precision: str,
) -> Comparison:
    """Compare detectors on a model; the base is attention.

    Args:
        name: model.
        batch: samples.
        variants: of :data:`VARIANTS`; by default all that the model allows.
        device: where.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).

    Raises:
        InputError: an unknown variant.
    """
    side = image_side(name)
    torch.manual_seed(0)
    model = create_model(name, num_classes=100, img_size=side).to(device).train()
    images = torch.randn(batch, 3, side, side, device=device)
    targets = torch.randint(100, (batch,), device=device)
    listener = _Listener(BLOCK)
    mixing = vitmix.MixingModel(model, tokens=[listener], num_classes=100)
    with torch.no_grad():
        mixing(images, targets)
    context, backbone = listener.context, mixing.backbone
    assert context is not None
    soft, prefix = smooth_targets(targets, 100), backbone.num_prefix_tokens
    block = backbone.blocks[BLOCK]
    count = listener.tokens.shape[1] - prefix
    stage = vitmix.HorizontalTokenMixup(block=BLOCK, saliency="random")

    def from_map() -> Tensor:
        with torch.no_grad():
            return map_saliency(explicit.attention(entry(listener.tokens)).float(), prefix)

    def random() -> Tensor:
        drawn = stage.draw(batch, count, None).to(images.device).saliency
        assert drawn is not None
        return drawn

    works: dict[str, Callable[[], Tensor]] = {
        "attention": lambda: context.attention_saliency(0),
        "random": random,
        "gradient": lambda: gradient_saliency(model, backbone, BLOCK, images, soft),
        "gradient+baseline": lambda: tokens_gradient(model, block.module, images, targets, prefix),
    }
    if has_baseline(model):
        explicit = ExplicitAttention(block.attention, lambda attention: None)
        entry: Any = block.entry
        works["attention+baseline"] = from_map
    for steps in range(1, 5):
        if BLOCK + steps < backbone.depth:
            works[f"rollout-{steps}"] = partial(context.attention_saliency, steps)
    names = variants or tuple(variant for variant in VARIANTS if variant in works)
    for variant in names:
        if variant not in works:
            raise InputError(f"expected variants of {', '.join(works)}, got {variant!r}")

    def under_autocast(work: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return work()

    return Comparison(
        "saliency",
        f"{name}, batch {batch}, {precision}",
        names[0],
        {variant: partial(partial, under_autocast, works[variant]) for variant in names},
        {"model": name, "batch_size": batch, "precision": precision, "block": BLOCK},
        images=batch,
    )
