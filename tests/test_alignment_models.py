"""Aligned and attention labels of whole models against brute force.

The brute force knows nothing of taps or shares: it takes queries and keys from the projections,
builds the explicit attention matrices, and pushes a dense label tensor ``(B, T, C)`` through them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import vitmix
from golden import load_golden
from models import FAMILIES, NUM_CLASSES, batch

pytest.importorskip("timm")

PIXELS = {
    "box": lambda: vitmix.CutMix(draw="element"),
    "blocks": lambda: vitmix.TokenMix(),
    "blend": lambda: vitmix.Mixup(draw="element"),
    "none": lambda: None,
}
BRUTE = [
    "cct",
    "vit",
    "vit-average",
    "vit-average-all",
    "vit-no-class-token",
    "vit-registers",
    "vit-unfused",
    "vit-layer-scale-qk-norm",
    "vit-res-post",
    "deit-distilled",
]


class Recorder:
    """Queries and keys of every block, and pooling scores, from module outputs alone."""

    def __init__(self, mixing: vitmix.MixingModel) -> None:
        self.projected: dict[int, tuple[Any, torch.Tensor]] = {}
        self.attention: dict[int, torch.Tensor] = {}
        self.scores: torch.Tensor | None = None
        self.handles = []
        for index, block in enumerate(mixing.backbone.blocks):
            inner: Any = block.attention
            self.handles.append(
                inner.qkv.register_forward_hook(
                    lambda m, a, o, index=index, inner=inner: self._keep(index, inner, o)
                )
            )
        if mixing.backbone.pool_scores is not None:
            self.handles.append(
                mixing.backbone.pool_scores.register_forward_hook(
                    lambda m, a, o: setattr(self, "scores", o)
                )
            )

    def _keep(self, index: int, inner: Any, qkv: torch.Tensor) -> None:
        self.projected[index] = (inner, qkv.detach())  # the last call is the real one

    def close(self) -> None:
        """Stop; make the matrices now, for the tap sees every softmax inside a pass."""
        for handle in self.handles:
            handle.remove()
        for index, (inner, qkv) in self.projected.items():
            size, tokens, width = qkv.shape
            heads = inner.num_heads
            query, key, _ = qkv.reshape(size, tokens, 3, heads, width // 3 // heads).unbind(2)
            if hasattr(inner, "q_norm"):
                query, key = inner.q_norm(query), inner.k_norm(key)
            scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(query.shape[-1])
            self.attention[index] = scores.softmax(-1).detach()


def brute_force(
    mixing: vitmix.MixingModel, out: vitmix.MixOutput, recorder: Any, soft: torch.Tensor
) -> torch.Tensor:
    """Dense labels through explicit attention, with horizontal and vertical mixing."""
    backbone = mixing.backbone
    prefix = backbone.num_prefix_tokens
    grid = backbone.grid((out.trace.images.shape[2], out.trace.images.shape[3]))
    size = len(soft)
    labels = soft[:, None].repeat(1, grid[0] * grid[1], 1)
    plan = out.trace.pixels
    if plan is not None:
        cell = out.trace.images.shape[2] // grid[0]
        own = plan.own.expand(size, -1, -1)
        scale = out.trace.images.shape[2] // own.shape[1]
        own = own.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        own = torch.nn.functional.avg_pool2d(own[:, None], cell).flatten(1)
        labels = own[..., None] * labels + (1 - own[..., None]) * labels[plan.partner]
    area = labels.mean(1, keepdim=True)
    labels = torch.cat([area.expand(-1, prefix, -1), labels], 1)
    verticals = [s for s in mixing.tokens if isinstance(s, vitmix.VerticalTokenMixup)]
    kept: list[torch.Tensor] = []
    for index in range(backbone.depth):
        horizontal = out.trace.horizontal.get(index)
        if horizontal is not None:
            replace = torch.nn.functional.pad(horizontal.replace, (prefix, 0))
            labels = torch.where(replace[..., None], labels[horizontal.partner], labels)
        mean = recorder.attention[index].mean(1)
        tokens = labels.shape[1]
        keys = labels
        if any(stage.block == index for stage in verticals):
            keys = torch.cat([labels, *kept], 1)
        for stage in verticals:
            if index < stage.block:
                if prefix and backbone.reads_class_token:
                    saliency = mean[:, 0, prefix:tokens]
                else:
                    saliency = mean[:, prefix:tokens, prefix:tokens].mean(1)
                top = saliency.argsort(dim=1, descending=True)[:, : stage.kappa] + prefix
                kept.append(torch.stack([labels[i, top[i]] for i in range(size)]))
        labels = (mean[:, :tokens] @ keys + labels) / 2
    if backbone.pooling == "class_token":
        return labels[:, 0]
    if backbone.pooling == "distilled":
        return (labels[:, 0] + labels[:, 1]) / 2
    if backbone.pooling == "average":
        return labels[:, prefix:].mean(1)
    if backbone.pooling == "average_all":
        return labels.mean(1)
    if backbone.pooling == "class_and_average":
        return (labels[:, 0] + labels[:, prefix:].mean(1)) / 2
    if backbone.pooling in ("attention", "attention_all"):
        return (labels[:, -recorder.pool.shape[1] :] * recorder.pool[..., None]).sum(1)
    assert recorder.scores is not None
    return (labels * recorder.scores.detach().softmax(1)).sum(1)


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("family", BRUTE)
@pytest.mark.parametrize("with_tokens", [False, True])
def test_aligned_labels_equal_dense_labels(family: str, pixels: str, with_tokens: bool) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():  # attention far from uniform
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    tokens: list[vitmix.TokenStage] = []
    if with_tokens:
        tokens = [
            vitmix.HorizontalTokenMixup(block=1, tau=math.inf, rho=0.001),
            vitmix.VerticalTokenMixup(block=2, kappa=3),
        ]
    mixing = vitmix.MixingModel(
        model,
        mix=PIXELS[pixels](),
        labels=vitmix.TokenAlignedLabels(),
        tokens=tokens,
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
    ).train()
    images, targets = batch()
    recorder = Recorder(mixing)
    out = mixing(images, targets)
    recorder.close()
    soft = vitmix.functional.smooth_targets(targets, NUM_CLASSES, 0.1)
    expected = brute_force(mixing, out, recorder, soft)
    torch.testing.assert_close(out.targets, expected, atol=1e-5, rtol=0)
    if pixels != "none":
        area = vitmix.functional.mix_targets(soft, out.trace.pixels.partner, out.trace.pixels.lam)
        if pixels != "blend" or with_tokens:
            assert (out.targets - area).abs().max() > 1e-3
    if with_tokens:
        assert out.trace.weights.shape[1] == (2 if pixels == "none" else 4)


@pytest.mark.parametrize("family", BRUTE)
def test_attention_labels_equal_explicit_attention(family: str) -> None:
    torch.manual_seed(0)
    mixing = vitmix.MixingModel(
        FAMILIES[family](),
        mix=vitmix.TokenMix(),
        labels=vitmix.AttentionLabels(),
        num_classes=NUM_CLASSES,
    ).train()
    recorder = Recorder(mixing)
    out = mixing(*batch())
    recorder.close()
    prefix = mixing.backbone.num_prefix_tokens
    last = recorder.attention[mixing.backbone.depth - 1].mean(1)
    row = (
        last[:, 0, prefix:]
        if mixing.backbone.reads_class_token
        else last[:, prefix:, prefix:].mean(1)
    )
    row = row / row.sum(1, keepdim=True)
    own = (row * out.trace.pixels.own.flatten(1)).sum(1)
    torch.testing.assert_close(out.trace.weights[:, 0], own, atol=1e-6, rtol=0)


def test_attention_pooling_is_followed() -> None:
    """With a learned pooling query the label is what that query attends to."""
    torch.manual_seed(0)
    model: Any = FAMILIES["vit-attention-pool"]()
    mixing = vitmix.MixingModel(
        model, mix=vitmix.CutMix(), labels=vitmix.TokenAlignedLabels(), num_classes=NUM_CLASSES
    ).train()
    found: list[torch.Tensor] = []
    pool = model.attn_pool
    handle = pool.kv.register_forward_hook(lambda m, a, o: found.append(o.detach()))
    recorder = Recorder(mixing)
    out = mixing(*batch())
    recorder.close()
    handle.remove()
    size, tokens, _ = found[0].shape
    key = found[0].reshape(size, tokens, 2, pool.num_heads, pool.head_dim)[:, :, 0]
    query = pool.q(pool.latent).reshape(1, 1, pool.num_heads, pool.head_dim)[:, 0]
    weights = torch.einsum("bnhd,bhd->bhn", key, query.expand(size, -1, -1))
    weights = (weights / math.sqrt(pool.head_dim)).softmax(-1).mean(1)
    soft = torch.nn.functional.one_hot(batch()[1], NUM_CLASSES).float()
    labels = soft[:, None].repeat(1, tokens, 1)
    own = out.trace.pixels.cells((4, 4)).flatten(1)[..., None]
    labels = own * labels + (1 - own) * labels[out.trace.pixels.partner]
    for index in range(4):
        labels = (recorder.attention[index].mean(1) @ labels + labels) / 2
    expected = (weights[..., None] * labels).sum(1)
    torch.testing.assert_close(out.targets, expected, atol=1e-5, rtol=0)


class FixedBox(vitmix.PixelMix):
    """A box that is given, on the token grid."""

    def __init__(self, own: np.ndarray) -> None:
        super().__init__(pairing="flip")
        self.own = own

    def own_shares(self, count: int, size: Any, grid: Any, rng: Any) -> tuple[np.ndarray, bool]:
        return self.own[None].astype(np.float32), True


def tlalign_cases() -> list[str]:
    return [str(case) for case in load_golden("tlalign")["cases"]]


@pytest.mark.parametrize("case", tlalign_cases())
def test_run_of_released_tl_align(case: str) -> None:
    import timm

    data = load_golden("tlalign")
    model = timm.models.VisionTransformer(
        img_size=int(data["img_size"]),
        patch_size=int(data["patch_size"]),
        embed_dim=int(data["embed_dim"]),
        depth=int(data["depth"]),
        num_heads=int(data["num_heads"]),
        mlp_ratio=float(data["mlp_ratio"]),
        num_classes=int(data["num_classes"]),
    )
    state = {k[6:]: torch.from_numpy(data[k]) for k in data.files if k.startswith("state/")}
    model.load_state_dict(state)
    mixing = vitmix.MixingModel(
        model,
        mix=FixedBox(~data[f"{case}/token_mask"]),
        labels=vitmix.TokenAlignedLabels(),
        num_classes=int(data["num_classes"]),
        label_smoothing=float(data[f"{case}/smoothing"]),
    ).train()
    out = mixing(torch.from_numpy(data["images"]), torch.from_numpy(data["hard_labels"]))
    np.testing.assert_array_equal(out.trace.images, data[f"{case}/images_mixed"])
    np.testing.assert_allclose(out.logits.detach(), data[f"{case}/logits"], atol=2e-5)
    np.testing.assert_allclose(out.targets, data[f"{case}/label_cls"], atol=1e-6)
    np.testing.assert_allclose(out.loss().item(), data[f"{case}/loss"], atol=1e-5)
    np.testing.assert_allclose(out.trace.pixels.lam, data[f"{case}/lam"], atol=1e-6)


def test_identity_attention_leaves_labels_where_they_are() -> None:
    """With attention of each token to itself, aligned labels are area labels."""
    model: Any = FAMILIES["vit-no-class-token"]()
    for block in model.blocks:
        size = block.attn.qkv.weight.shape[1]
        torch.nn.init.zeros_(block.attn.qkv.bias)
        block.attn.qkv.weight.data[: 2 * size] = 40 * torch.eye(size).repeat(2, 1)
    mixing = vitmix.MixingModel(
        model, mix=vitmix.CutMix(), labels=vitmix.TokenAlignedLabels(), num_classes=NUM_CLASSES
    ).train()
    images, targets = batch()
    out = mixing(images, targets)
    torch.testing.assert_close(out.trace.weights[:, 0], out.trace.pixels.lam, atol=1e-3, rtol=0)
