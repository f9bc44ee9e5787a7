"""The methods as their papers' formulas are usually coded: what vitmix is measured against.

Attention is written out, so that its map is at hand; labels of tokens are dense, one probability a
class; gains are broadcast over samples, partners and tokens. The numbers are those of vitmix (see
``tests/test_baselines.py``), the cost is not. Nothing here is used to train.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmix.backbones import describe
from vitmix.errors import InputError
from vitmix.functional.targets import soft_cross_entropy
from vitmix.pixels import PixelMix
from vitmix.scorenet import ScoreNet

__all__ = [
    "ExplicitAttention",
    "PlainMixing",
    "broadcast_gain",
    "broadcast_horizontal",
    "has_baseline",
    "map_saliency",
    "tokens_gradient",
]


def broadcast_gain(saliency: Tensor, candidates: Tensor, rho: float) -> Tensor:
    """TokenMixup's Eq. 6 through a tensor ``(B', B, N)``; arguments as ``saliency_gain``."""
    return (candidates[None] - saliency[:, None] - rho).clamp_min(0).sum(-1)


def broadcast_horizontal(
    tokens: Tensor, labels: Tensor, saliency: Tensor, rho: float, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TokenMixup's Eq. 6 to 11 on a batch of easy samples.

    Args:
        tokens: ``(B, num_prefix_tokens + N, D)``.
        labels: ``(B, C)``.
        saliency: ``(B, N)``.
        rho: least gain for which a token is replaced.
        num_prefix_tokens: tokens in front, which are kept.

    Returns:
        Mixed tokens and labels, partners ``(B,)`` and the mask ``(B, N)``, 1 for what is kept.
    """
    from scipy.optimize import linear_sum_assignment

    gain = broadcast_gain(saliency, saliency, rho)
    _, columns = linear_sum_assignment(-gain.cpu().numpy())
    partner = torch.as_tensor(columns, device=tokens.device)
    other = saliency[partner]
    kept = (other - saliency <= rho).to(tokens.dtype)
    mask = F.pad(kept, (num_prefix_tokens, 0), value=1.0)[..., None]
    mixed = mask * tokens + (1 - mask) * tokens[partner]
    own, mixed_in = (kept * saliency).sum(1), ((1 - kept) * other).sum(1)
    weight = (own / (own + mixed_in))[:, None].to(labels.dtype)
    return mixed, weight * labels + (1 - weight) * labels[partner], partner, kept


def map_saliency(attention: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """TokenMixup's Eq. 3 from the whole map ``(B, H, N, N)``."""
    mean = attention.mean(1)
    return mean[:, 0, num_prefix_tokens:] if num_prefix_tokens else mean.mean(1)


def tokens_gradient(
    model: nn.Module, block: nn.Module, images: Tensor, targets: Tensor, num_prefix_tokens: int = 0
) -> Tensor:
    """Saliency ``(B, N)`` from the gradient by the tokens in front of a block, over its sum.

    One more pass forth and back, as gradients of everything are usually computed; those of
    parameters are dropped.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    handle = block.register_forward_pre_hook(keep)
    try:
        F.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]
    finally:
        handle.remove()
    model.zero_grad()
    gradient = seen[0].grad
    assert gradient is not None
    norms: Tensor = gradient.norm(dim=-1)[:, num_prefix_tokens:]
    return norms / norms.sum(1, keepdim=True)


def has_baseline(model: nn.Module) -> bool:
    """Whether :class:`PlainMixing` knows a model."""
    return describe(model).family in ("timm VisionTransformer", "CCT")


class ExplicitAttention(nn.Module):
    """The attention of a ViT or CCT block written out.

    Args:
        fused: the block's own, whose parameters are used.
        on_map: is given the map ``(B, H, N, M)`` before dropout.

    Attributes:
        extra: ``(B, M - N, D)`` further tokens to attend to, or None.
    """

    def __init__(self, fused: Any, on_map: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.fused = fused
        self.on_map = on_map
        self.extra: Tensor | None = None
        drop = getattr(fused, "attn_drop", None)
        self.drop = nn.Dropout(fused.attention_dropout if drop is None else drop.p)

    def parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, H, N, d)``."""
        split = self.fused.qkv(tokens).unflatten(-1, (3, self.fused.num_heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        return query, key, value

    def attention(self, tokens: Tensor) -> Tensor:
        """The map ``(B, H, N, N)``."""
        query, key, _ = self.parts(tokens)
        scores: Tensor = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return scores.softmax(-1)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Attend as the block's own attention does, and to ``extra``."""
        count = tokens.shape[1]
        seen = tokens if self.extra is None else torch.cat((tokens, self.extra), 1)
        query, key, value = self.parts(seen)
        scores = query[:, :, :count] @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        attention = scores.softmax(-1)
        self.on_map(attention)
        output = (self.drop(attention) @ value).transpose(1, 2).flatten(2)
        return self.fused.proj_drop(self.fused.proj(output))  # type: ignore[no-any-return]


class PlainMixing(nn.Module):
    """A model with the methods around it as they are usually coded; every sample is easy.

    Args:
        model: timm's VisionTransformer or a CCT; its attention modules are replaced.
        num_classes: classes of the targets.
        mix: pixel stage, or None.
        labels: ``"area"``, ``"attention"`` (TransMix) or ``"aligned"`` (TL-Align).
        horizontal: block of horizontal mixing, or None.
        rho: least gain for which a token is replaced.
        vertical: block of vertical mixing, or None.
        kappa: tokens collected from each earlier block.

    Raises:
        InputError: another model.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        mix: PixelMix | None = None,
        labels: str = "area",
        horizontal: int | None = None,
        rho: float = 0.005,
        vertical: int | None = None,
        kappa: int = 3,
    ) -> None:
        super().__init__()
        self.backbone = describe(model)
        if not has_baseline(model):
            raise InputError(
                "expected timm's VisionTransformer or a CCT for baselines, "
                f"got {self.backbone.family}"
            )
        prefix = self.backbone.num_prefix_tokens
        self.model, self.num_classes, self.mix = model, num_classes, mix
        self.rule, self.rho, self.kappa = labels, rho, kappa
        self.horizontal, self.vertical, self.prefix = horizontal, vertical, prefix
        self.scorenet = None
        if horizontal is not None:
            self.scorenet = ScoreNet(
                self.backbone.embed_dim, num_classes, "auto", prefix, self.backbone.class_token
            )
        self.attentions: list[ExplicitAttention] = []
        self.collected: list[tuple[Tensor, Any]] = []
        self.scores: Tensor | None = None
        for index, block in enumerate(self.backbone.blocks):
            explicit = ExplicitAttention(block.attention, partial(self._read, index))
            for name, child in block.module.named_children():
                if child is block.attention:
                    setattr(block.module, name, explicit)
            self.attentions.append(explicit)
            block.module.register_forward_pre_hook(partial(self._enter, index))
        if self.backbone.pool_scores is not None:
            self.backbone.pool_scores.register_forward_hook(self._keep_scores)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix and run the model.

        Args:
            images: ``(B, C, H, W)``.
            targets: ``(B,)`` class indices.

        Returns:
            Logits and targets ``(B, C)``, and ScoreNet's loss.
        """
        soft = F.one_hot(targets, self.num_classes).float()
        size = (int(images.shape[2]), int(images.shape[3]))
        grid = self.backbone.grid(size)
        tokens = self.prefix + grid[0] * grid[1]
        own = soft.new_ones(len(soft), tokens, 1)
        partner = torch.arange(len(soft), device=images.device)
        if self.mix is not None:
            plan = self.mix.plan(len(images), size, grid=grid).to(images.device)
            images, partner = plan.apply(images), plan.partner
            own = plan.mixture(grid, num_prefix_tokens=self.prefix).shares[..., :1]
        area = own[:, self.prefix :].mean(1)
        self.targets = area * soft + (1 - area) * soft[partner]
        if self.rule == "aligned":
            self.token_labels = own * soft[:, None] + (1 - own) * soft[partner][:, None]
        self.loss, self.collected, self.scores = soft.new_zeros(()), [], None
        logits = self.model(images)
        if self.rule == "aligned":
            return logits, self.backbone.pool_shares(self.token_labels, self.scores), self.loss
        if self.rule == "attention":
            saliency = map_saliency(self.map, self.prefix)
            saliency = saliency / saliency.sum(1, keepdim=True)
            weight = (saliency * own[:, self.prefix :, 0]).sum(1, keepdim=True)
            return logits, weight * soft + (1 - weight) * soft[partner], self.loss
        return logits, self.targets, self.loss

    def step_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of a training step."""
        logits, mixed, auxiliary = self(images, targets)
        loss: Tensor = soft_cross_entropy(logits, mixed) + auxiliary
        return loss

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, attention = args[0], self.attentions[index]
        entry: Any = self.backbone.blocks[index].entry
        if index == self.horizontal:
            assert self.scorenet is not None
            scores = self.scorenet(tokens.detach())
            self.loss = soft_cross_entropy(scores, self.targets)
            with torch.no_grad():
                saliency = map_saliency(attention.attention(entry(tokens)).float(), self.prefix)
            tokens, self.targets, partner, kept = broadcast_horizontal(
                tokens, self.targets, saliency, self.rho, self.prefix
            )
            if self.rule == "aligned":
                mask = F.pad(kept, (self.prefix, 0), value=1.0)[..., None]
                labels = self.token_labels
                self.token_labels = mask * labels + (1 - mask) * labels[partner]
        self.tokens = tokens
        if index == self.vertical:
            attention.extra = entry(torch.cat([part for part, _ in self.collected], 1))
        return (tokens, *args[1:])

    @torch.no_grad()
    def _read(self, index: int, attention: Tensor) -> None:
        self.map = attention.detach()
        self.attentions[index].extra = None
        if self.vertical is not None and index < self.vertical:
            saliency = map_saliency(self.map, self.prefix)
            places = saliency.topk(self.kappa, 1).indices[..., None] + self.prefix
            with torch.enable_grad():
                tokens = self.tokens.gather(1, places.expand(-1, -1, self.tokens.shape[2]))
            labels = None
            if self.rule == "aligned":
                labels = self.token_labels.gather(1, places.expand(-1, -1, self.num_classes))
            self.collected.append((tokens, labels))
        if self.rule == "aligned":
            keys = self.token_labels
            if index == self.vertical:
                keys = torch.cat((keys, *(labels for _, labels in self.collected)), 1)
            attended = self.map.mean(1).to(keys.dtype) @ keys
            self.token_labels = (attended + self.token_labels) / 2

    def _keep_scores(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.scores = output
