"""Compact Convolutional Transformer (Hassani et al., 2021, arXiv 2104.05704).

A small transformer that learns well from small images: a convolutional tokenizer in place of
patches, and sequence pooling in place of a class token. It is the CIFAR baseline of TokenMixup.

Parameters have the names and shapes of the released checkpoints, so
`model.load_state_dict(torch.load(path, weights_only=True))` reads those. Differences in how the
numbers are computed: attention is `F.scaled_dot_product_attention`, and an input of another size
than the positions were made for is refused instead of broadcast.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitmix.errors import InputError
from vitmix.models._cct_layers import Block, Tokenizer, sine_positions

__all__ = ["CCT", "cct", "cct_names", "cct_side"]

_POSITIONS = ("learnable", "sine", "none")


class Classifier(nn.Module):
    """Positions, blocks, norm, sequence pooling, linear head: everything after the tokenizer."""

    def __init__(
        self,
        num_tokens: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        dropout: float,
        attention_dropout: float,
        stochastic_depth: float,
        positional_embedding: str,
    ) -> None:
        super().__init__()
        self.positional_emb: nn.Parameter | None
        if positional_embedding == "none":
            self.register_parameter("positional_emb", None)
        elif positional_embedding == "sine":
            # A frozen parameter, not a buffer: so it is in the released checkpoints' lists.
            table = sine_positions(num_tokens, embed_dim)
            self.positional_emb = nn.Parameter(table, requires_grad=False)
        else:
            self.positional_emb = nn.Parameter(torch.empty(1, num_tokens, embed_dim))
            nn.init.trunc_normal_(self.positional_emb, std=0.2)
        self.dropout = nn.Dropout(dropout)
        rates = [stochastic_depth * i / max(1, num_layers - 1) for i in range(num_layers)]
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden, dropout, attention_dropout, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.attention_pool = nn.Linear(embed_dim, 1)
        self.fc = _linear_head(embed_dim, num_classes)

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, D)` to the normalised tokens after the last block."""
        if self.positional_emb is not None:
            tokens = tokens + self.positional_emb
        tokens = self.dropout(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:
        """Sequence pooling: mean of the tokens weighted by a learned softmax over them."""
        weights = self.attention_pool(tokens).softmax(dim=1)  # (B, N, 1)
        return (weights.transpose(1, 2) @ tokens).squeeze(1)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.pool(self.forward_features(tokens)))  # type: ignore[no-any-return]


class CCT(nn.Module):
    """Compact Convolutional Transformer.

    Args:
        num_layers: Number of blocks.
        num_heads: Attention heads a block.
        mlp_ratio: Hidden width of the MLP as a multiple of `embed_dim`.
        embed_dim: Width of a token.
        kernel_size: Side of the tokenizer's convolutions (published: 3 or 7).
        num_conv_layers: Number of those convolutions; each is followed by a pooling that halves.
        num_classes: Number of classes; 0 for a model without a classifier, which gives `(B, D)`.
        img_size: Side of the input in pixels, or `(height, width)`.
        in_chans: Channels of the input.
        dropout: Dropout of embeddings, projections and MLP.
        attention_dropout: Dropout of attention weights.
        stochastic_depth: Probability of dropping the last block's branches; rises linearly from 0.
        positional_embedding: `"learnable"`, `"sine"` or `"none"`. With `"none"`, images of other
            sizes than `img_size` are accepted.

    Raises:
        InputError: If an argument does not fit, or an input is not `(B, in_chans, *img_size)`.

    Example:
        >>> import torch
        >>> model = CCT(num_layers=2, num_heads=2, mlp_ratio=1, embed_dim=64, img_size=(32, 24))
        >>> model.grid_size((32, 24))
        (16, 12)
        >>> model(torch.zeros(5, 3, 32, 24)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float,
        embed_dim: int,
        kernel_size: int = 3,
        num_conv_layers: int = 1,
        num_classes: int = 10,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.1,
        stochastic_depth: float = 0.1,
        positional_embedding: str = "learnable",
    ) -> None:
        super().__init__()
        if positional_embedding not in _POSITIONS:
            raise InputError(
                f"Expected positional_embedding to be one of {', '.join(map(repr, _POSITIONS))}, "
                f"but got {positional_embedding!r}."
            )
        if embed_dim % num_heads:
            raise InputError(
                f"Expected embed_dim to be a multiple of num_heads, but got embed_dim={embed_dim} "
                f"and num_heads={num_heads}."
            )
        if num_conv_layers < 1:
            raise InputError(f"Expected num_conv_layers of at least 1, but got {num_conv_layers}.")
        self.img_size = _pair(img_size)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.tokenizer = Tokenizer(in_chans, embed_dim, kernel_size, num_conv_layers)
        rows, columns = self.grid_size(self.img_size)
        self.classifier = Classifier(
            num_tokens=rows * columns,
            embed_dim=embed_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            dropout=dropout,
            attention_dropout=attention_dropout,
            stochastic_depth=stochastic_depth,
            positional_embedding=positional_embedding,
        )
        self.apply(_init_weights)

    def grid_size(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of `img_size` pixels."""
        return self.tokenizer.grid_size(*_pair(img_size))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new linear head in the place of the old one, as in timm; 0: none."""
        self.num_classes = num_classes
        head = _linear_head(self.embed_dim, num_classes)
        head.apply(_init_weights)
        self.classifier.fc = head.to(self.classifier.norm.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to tokens `(B, N, D)` after the final norm."""
        self._check(images)
        return self.classifier.forward_features(self.tokenizer(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to logits `(B, num_classes)`."""
        self._check(images)
        return self.classifier(self.tokenizer(images))  # type: ignore[no-any-return]

    def _check(self, images: Tensor) -> None:
        size = (self.in_chans, *self.img_size)
        any_size = self.classifier.positional_emb is None
        if (
            images.ndim != 4
            or images.shape[1] != size[0]
            or not (any_size or images.shape[2:] == self.img_size)
        ):
            raise InputError(
                f"Expected images of shape (batch, {', '.join(map(str, size))}), but got "
                f"{tuple(images.shape)}. Resize the images, or build the model with another "
                "img_size or in_chans."
            )


def _linear_head(embed_dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"Expected a positive image size, but got {height}x{width}.")
    return height, width


class _Size(NamedTuple):
    num_layers: int
    num_heads: int
    mlp_ratio: float
    embed_dim: int


_SIZES = {
    "cct_2": _Size(num_layers=2, num_heads=2, mlp_ratio=1, embed_dim=128),
    "cct_4": _Size(num_layers=4, num_heads=2, mlp_ratio=1, embed_dim=128),
    "cct_6": _Size(num_layers=6, num_heads=4, mlp_ratio=2, embed_dim=256),
    "cct_7": _Size(num_layers=7, num_heads=4, mlp_ratio=2, embed_dim=256),
    "cct_14": _Size(num_layers=14, num_heads=6, mlp_ratio=3, embed_dim=384),
}
_PUBLISHED: dict[str, dict[str, Any]] = {}


class _Factory(Protocol):
    def __call__(self, **kwargs: Any) -> CCT: ...


def _publish(name: str, num_classes: int) -> _Factory:
    """Enter a published configuration; `cct_7_3x1_32_sine` reads size, kernel x layers, pixels."""
    _, depth, convolutions, img_size, *variant = name.split("_")
    kernel_size, num_conv_layers = map(int, convolutions.split("x"))
    _PUBLISHED[name] = {
        **_SIZES[f"cct_{depth}"]._asdict(),
        "kernel_size": kernel_size,
        "num_conv_layers": num_conv_layers,
        "img_size": int(img_size),
        "positional_embedding": "sine" if variant else "learnable",
        "num_classes": num_classes,
    }

    def factory(**kwargs: Any) -> CCT:
        return cct(name, **kwargs)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"`{name}`, by default for {num_classes} classes; arguments as in `CCT`."
    return factory


def cct_names() -> list[str]:
    """Names of the published configurations.

    Example:
        >>> "cct_7_3x1_32" in cct_names()
        True
    """
    return list(_PUBLISHED)


def cct_side(name: str) -> int:
    """Side in pixels of the images that a published configuration takes.

    Example:
        >>> cct_side("cct_7_3x1_32_sine")
        32
    """
    side: int = _PUBLISHED[name]["img_size"]
    return side


def cct(name: str, **kwargs: Any) -> CCT:
    """Build a published configuration with random weights.

    Args:
        name: One of `cct_names`: `cct_{blocks}_{kernel}x{convolutions}_{pixels}`, and `_sine` for
            sinusoidal positions.
        **kwargs: Arguments of `CCT` that replace the published ones.

    Raises:
        InputError: If there is no such configuration, or an argument does not fit.

    Example:
        >>> sum(p.numel() for p in cct("cct_7_3x1_32").parameters())
        3760139
    """
    if name not in _PUBLISHED:
        raise InputError(f"Expected one of {', '.join(_PUBLISHED)}, but got {name!r}.")
    return CCT(**{**_PUBLISHED[name], **kwargs})


cct_2_3x2_32 = _publish("cct_2_3x2_32", 10)
cct_2_3x2_32_sine = _publish("cct_2_3x2_32_sine", 10)
cct_4_3x2_32 = _publish("cct_4_3x2_32", 10)
cct_4_3x2_32_sine = _publish("cct_4_3x2_32_sine", 10)
cct_6_3x1_32 = _publish("cct_6_3x1_32", 10)
cct_6_3x1_32_sine = _publish("cct_6_3x1_32_sine", 10)
cct_6_3x2_32 = _publish("cct_6_3x2_32", 10)
cct_6_3x2_32_sine = _publish("cct_6_3x2_32_sine", 10)
cct_7_3x1_32 = _publish("cct_7_3x1_32", 10)
cct_7_3x1_32_sine = _publish("cct_7_3x1_32_sine", 10)
cct_7_3x2_32 = _publish("cct_7_3x2_32", 10)
cct_7_3x2_32_sine = _publish("cct_7_3x2_32_sine", 10)
cct_7_7x2_224 = _publish("cct_7_7x2_224", 102)
cct_7_7x2_224_sine = _publish("cct_7_7x2_224_sine", 102)
cct_14_7x2_224 = _publish("cct_14_7x2_224", 1000)
cct_14_7x2_384 = _publish("cct_14_7x2_384", 1000)
__all__ += list(_PUBLISHED)
