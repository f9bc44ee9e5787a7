"""Home-made transformers that no library knows: what users pass to ``vitmix.describe`` by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, tokens, width = x.shape
        parts = self.qkv(x).view(size, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts
        attention = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return self.out((attention @ value).transpose(1, 2).reshape(size, tokens, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class HandWritten(nn.Module):
    """Softmax attention by hand, a class token."""

    def __init__(self, size: int, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.layers = nn.ModuleList(Layer(width, 2) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class FromTrunk(nn.Module):
    """DINOv3 of transformers, which has no classifier, with one."""

    def __init__(self, size: int, patch: int, width: int, depth: int, classes: int) -> None:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        super().__init__()
        self.trunk = DINOv3ViTModel(
            DINOv3ViTConfig(
                image_size=size,
                patch_size=patch,
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=2,
                intermediate_size=2 * width,
                num_register_tokens=2,
            )
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(images).pooler_output)


class FromEncoder(nn.Module):
    """PyTorch's own encoder, the average of all tokens."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, classes: int, norm_first: bool
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(x).mean(1))


class MaskedLayer(nn.Module):
    """A layer whose tokens see those in front of them, and whose heads may share keys."""

    def __init__(self, width: int, heads: int, key_heads: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.heads = (heads, key_heads, key_heads)
        self.causal = causal
        self.fused = fused
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width * key_heads // heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        parts = (self.query(y), *self.key_value(y).chunk(2, -1))
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, heads in zip(parts, self.heads, strict=True)
        )
        shared = self.heads[0] != self.heads[1]
        if self.fused:
            z = F.scaled_dot_product_attention(
                query, key, value, is_causal=self.causal, enable_gqa=shared
            )
        else:
            times = self.heads[0] // self.heads[1]
            key, value = (each.repeat_interleave(times, 1) for each in (key, value))
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -torch.inf)
            z = scores.softmax(-1) @ value
        return x + z.transpose(1, 2).flatten(2)


class FromMasked(nn.Module):
    """Layers with masks or shared keys, the average of all tokens."""

    def __init__(self, size: int, patch: int, width: int, depth: int, classes: int, **options: Any):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.layers = nn.ModuleList(MaskedLayer(width, 4, **options) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Branch(nn.Module):
    """Norm and attention of a layer; what goes in is added outside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.norm(x))


class Pair(nn.Module):
    """A layer of two branches, each added to what goes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = Branch(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(x)
        return x + self.mlp(x)


class FromPairs(nn.Module):
    """Layers that can be described as wholes, or by their attention branches."""

    def __init__(self, size: int, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, width))
        self.layers = nn.ModuleList(Pair(width, 2) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        self.checkpointing = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return self.head(x.mean(1))


class WindowLayer(nn.Module):
    """Attention within windows of a map ``(B, h, w, D)``."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, height, columns, width = x.shape
        side = self.window
        y = self.norm(x).unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)
        y = self.attention(y.reshape(-1, side * side, width))
        y = y.view(size, height // side, columns // side, side, side, width).transpose(2, 3)
        x = x + y.reshape(x.shape)
        return x + self.mlp(x)


class MapLayer(nn.Module):
    """Attention of all tokens of a map ``(B, D, h, w)``, without a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


class InStages(nn.Module):
    """Windows, then wider tokens on half the grid."""

    def __init__(self, patch: int, width: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.early = nn.ModuleList(WindowLayer(width, 2, 4) for _ in range(2))
        self.merge = nn.Conv2d(width, 2 * width, 2, 2)
        self.late = nn.ModuleList(MapLayer(2 * width, 2) for _ in range(2))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).permute(0, 2, 3, 1)
        for layer in self.early:
            x = layer(x)
        x = self.merge(x.permute(0, 3, 1, 2))
        for layer in self.late:
            x = layer(x)
        return self.head(x.mean((2, 3)))
