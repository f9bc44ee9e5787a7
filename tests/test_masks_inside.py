"""Attention that hides keys from queries, or shares keys between heads, is read as it is computed.

The same layers with attention written by hand, whose matrix is read off its softmax, say what is
right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitmix
from contract import METHODS, hooks
from home_made import FromMasked
from models import NUM_CLASSES, SIZE, batch

INSIDE = ("transmix", "tl-align", "horizontal", "horizontal-rollout", "vertical", "everything")
KINDS: dict[str, dict[str, Any]] = {
    "causal": {"key_heads": 4, "causal": True},
    "two key heads": {"key_heads": 2, "causal": False},
    "one key head": {"key_heads": 1, "causal": False},
    "causal, two key heads": {"key_heads": 2, "causal": True},
}


def wrap(model: Any, method: str) -> vitmix.MixingModel:
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        generator=torch.Generator().manual_seed(0),
        backbone=vitmix.describe(
            model, blocks=list(model.layers), grid=(SIZE // 8, SIZE // 8), embed_dim=32
        ),
        **METHODS[method](),
    ).train()


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (method, kind)
        for method in INSIDE
        for kind, options in KINDS.items()
        if not (options["causal"] and method in ("vertical", "everything"))
    ],
)
def test_fused_attention_is_read_as_that_written_by_hand(method: str, kind: str) -> None:
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = FromMasked(SIZE, 8, 32, 4, NUM_CLASSES, fused=fused, **KINDS[kind])
        mixing = wrap(model, method)
        out = mixing(*batch())
        out.loss().backward()
        found.append((out, [parameter.grad for parameter in mixing.parameters()]))
    (first, gradients), (second, expected) = found
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.targets, second.targets)
    torch.testing.assert_close(first.trace.saliency, second.trace.saliency)
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)


def test_causal_attention_never_sees_appended_tokens() -> None:
    model = FromMasked(SIZE, 8, 32, 4, NUM_CLASSES, key_heads=4, causal=True, fused=True)
    mixing = wrap(model, "vertical")
    with pytest.raises(vitmix.UnsupportedModelError, match=r"appended .* found is_causal=True"):
        mixing(*batch())
    assert hooks(model) == 0


class WithMask(nn.Module):
    """A layer with a mask of its own."""

    def __init__(self, mask: torch.Tensor, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.mask = nn.Parameter(mask)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1)
        if self.heads:
            parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        y = F.scaled_dot_product_attention(*parts, attn_mask=self.mask)
        return x + (y.transpose(1, 2).flatten(2) if self.heads else y)


class Masked(nn.Module):
    def __init__(self, *layer: Any) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.layers = nn.ModuleList(WithMask(*layer) for _ in range(4))
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("method", ["vertical", "horizontal"])
def test_a_mask_has_no_place_for_appended_tokens(method: str) -> None:
    tokens = (SIZE // 8) ** 2
    mixing = wrap(Masked(torch.zeros(tokens, tokens)), method)
    if method == "horizontal":
        mixing(*batch()).loss().backward()
        return
    with pytest.raises(vitmix.UnsupportedModelError, match=rf"found a mask \({tokens}, {tokens}\)"):
        mixing(*batch())
    wrap(Masked(torch.zeros(1, 1)), method)(*batch()).loss().backward()


@pytest.mark.parametrize("method", ["tl-align", "horizontal"])
def test_attention_without_heads_is_refused(method: str) -> None:
    mixing = wrap(Masked(torch.zeros(1, 1), 0), method)
    with pytest.raises(vitmix.UnsupportedModelError, match=r"\(B, H, N, d\) in WithMask"):
        mixing(*batch())
    assert hooks(mixing.model) == 0
