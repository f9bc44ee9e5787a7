"""The parts of a compact convolutional transformer: tokenizer, block, sinusoidal positions."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "DropPath", "Tokenizer", "sine_positions"]

_HIDDEN_CHANNELS = 64


class Tokenizer(nn.Module):
    """Images `(B, C, H, W)` to tokens `(B, N, D)`, row-major; each stage is conv, ReLU, pooling."""

    def __init__(self, in_chans: int, embed_dim: int, kernel_size: int, num_layers: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = max(1, kernel_size // 2 - 1)
        self.padding = max(1, kernel_size // 2)
        widths = [in_chans, *[_HIDDEN_CHANNELS] * (num_layers - 1), embed_dim]
        self.conv_layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(c_in, c_out, kernel_size, self.stride, self.padding, bias=False),
                    nn.ReLU(),
                    nn.MaxPool2d(3, stride=2, padding=1),
                )
                for c_in, c_out in itertools.pairwise(widths)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.conv_layers(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that an image of this size becomes."""
        return self._length(height), self._length(width)

    def _length(self, size: int) -> int:
        for _ in self.conv_layers:
            size = (size + 2 * self.padding - self.kernel_size) // self.stride + 1
            size = (size + 2 - 3) // 2 + 1
        return size


class Attention(nn.Module):
    """Multi-head self-attention through the fused kernel; the query, key, value map has no bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, N, D / H)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples, and scale up those kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Block(nn.Module):
    """A CCT layer. Unlike in ViT, the sum after attention is normalised, and kept so."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, num_heads, dropout, attention_dropout)
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout2 = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.self_attn(self.pre_norm(x)))
        x = self.norm1(x)
        hidden = self.dropout1(F.gelu(self.linear1(x)))
        return x + self.drop_path(self.dropout2(self.linear2(hidden)))  # type: ignore[no-any-return]


def sine_positions(num_tokens: int, dim: int) -> Tensor:
    """Sinusoidal positions `(1, num_tokens, dim)`: sines in even channels, cosines in odd ones."""
    position = torch.arange(num_tokens, dtype=torch.float64).unsqueeze(1)
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return table.unsqueeze(0).to(torch.get_default_dtype())
