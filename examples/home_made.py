"""Your own models: one written by hand, one of ``nn.TransformerEncoder``.

Run it: ``python examples/home_made.py``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import vitmix
from digits import NUM_CLASSES, SIDE, loader

PATCH, WIDTH, HEADS, DEPTH = 4, 64, 4, 4
GRID = (SIDE // PATCH, SIDE // PATCH)


class Attention(nn.Module):
    """Norm and self-attention; what goes in is added by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.result = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T, D)`` to tokens."""
        parts = self.queries_keys_values(self.norm(x)).unflatten(2, (3, HEADS, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.result(heads.transpose(1, 2).flatten(2))
        return out


class HandWritten(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, GRID[0] * GRID[1] + 1, WIDTH))
        self.attentions = nn.ModuleList(Attention() for _ in range(DEPTH))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH)
            )
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits."""
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1) + self.positions
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        logits: Tensor = self.head(x[:, 0])
        return logits


class FromEncoder(nn.Module):
    """PyTorch's own encoder; the mean of all tokens goes to the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, GRID[0] * GRID[1], WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 256, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


def describe_hand_written(model: HandWritten) -> vitmix.Backbone:
    """The blocks are attention branches: `x + attention(x)` is done outside of them."""
    return vitmix.describe(
        model,
        blocks=[
            vitmix.Block(module=part, entry=part, attention=part, skip_outside=True)
            for part in model.attentions
        ],
        grid=GRID,
        embed_dim=WIDTH,
        num_prefix_tokens=1,
    )


def describe_from_encoder(model: FromEncoder) -> vitmix.Backbone:
    """Whole layers, each called once with tokens ``(B, T, D)``: nothing more to say."""
    return vitmix.describe(model, blocks=model.encoder.layers, grid=GRID, embed_dim=WIDTH)


def train(model: nn.Module, backbone: vitmix.Backbone, epochs: int, steps: int | None) -> float:
    """Train, then return the accuracy."""
    mixing = vitmix.MixingModel(
        model,
        backbone=backbone,
        mix=vitmix.CutMix(alpha=1.0),
        labels=vitmix.TokenAlignedLabels(),
        tokens=[vitmix.HorizontalTokenMixup(block=1), vitmix.VerticalTokenMixup(block=3, kappa=3)],
        num_classes=NUM_CLASSES,
    )
    optimizer = torch.optim.AdamW(mixing.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(epochs):
        mixing.train()
        for step, (images, labels) in enumerate(loader(train=True)):
            if step == steps:
                break
            loss = mixing(images, labels).loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{type(model).__name__} epoch {epoch} loss {loss.item():.3f}")
    mixing.eval()
    with torch.no_grad():
        batches = [(mixing(images).argmax(1) == labels) for images, labels in loader(train=False)]
    return float(torch.cat(batches).float().mean())


def main(epochs: int, steps: int | None) -> float:
    """Train both, then return the lower accuracy."""
    torch.manual_seed(0)
    by_hand, from_encoder = HandWritten(), FromEncoder()
    return min(
        train(by_hand, describe_hand_written(by_hand), epochs, steps),
        train(from_encoder, describe_from_encoder(from_encoder), epochs, steps),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps an epoch")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.epochs, arguments.steps):.3f}")
