"""Home-made models, described by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from home_made import FromEncoder, HandWritten
from models import NUM_CLASSES, SIZE, batch, make_vit
from more_models import BACKBONES, MORE_FAMILIES
from test_mixing import hooks

pytest.importorskip("timm")


def by_hand(**options: Any) -> vitmix.Backbone:
    model = HandWritten(SIZE, 8, 32, 2, NUM_CLASSES)
    arguments = {
        "blocks": list(model.layers),
        "grid": (4, 4),
        "embed_dim": 32,
        "num_prefix_tokens": 1,
        **options,
    }
    return vitmix.describe(model, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": None}, "expected `grid`"),
        ({"embed_dim": None}, "`embed_dim`"),
        ({"embed_dim": 0}, "`embed_dim` of at least 1"),
        ({"grid": (4,)}, r"rows, columns.*got \(4,\)"),
        ({"grid": (4, 0)}, r"got \(4, 0\)"),
        ({"pooling": "best"}, "got 'best'"),
        ({"pooling": "distilled"}, "at least 2"),
        ({"pooling": "class_token", "class_token": False}, "class token"),
        ({"pooling": "sequence"}, "`pool_scores`"),
        ({"num_prefix_tokens": 0, "class_token": True}, "`num_prefix_tokens` of at least 1"),
        ({"num_prefix_tokens": -1}, "at least 0"),
        ({"blocks": []}, "at least one"),
        ({"blocks": ["layers.0"]}, "got str at 0"),
        ({"blocks": None}, "expected `blocks`"),
    ],
)
def test_bad_descriptions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vitmix.InputError, match=message):
        by_hand(**options)


def test_blocks_of_another_model_are_refused() -> None:
    model, other = (HandWritten(SIZE, 8, 32, 2, NUM_CLASSES) for _ in range(2))
    with pytest.raises(vitmix.UnsupportedModelError, match=r"block 1 .* found a Layer"):
        vitmix.describe(model, blocks=[model.layers[0], other.layers[1]], grid=(4, 4), embed_dim=32)
    with pytest.raises(vitmix.UnsupportedModelError, match="two places"):
        vitmix.describe(model, blocks=[model.layers[0]] * 2, grid=(4, 4), embed_dim=32)
    with pytest.raises(vitmix.UnsupportedModelError, match="not part"):
        vitmix.MixingModel(model, num_classes=NUM_CLASSES, backbone=vitmix.describe(make_vit()))
    with pytest.raises(vitmix.InputError, match="`backbone`"):
        vitmix.MixingModel(model, num_classes=NUM_CLASSES, backbone=[])  # type: ignore[arg-type]


def test_sequences_first_are_refused() -> None:
    layers = [nn.TransformerEncoderLayer(32, 2, 64)]
    with pytest.raises(vitmix.UnsupportedModelError, match="batch_first=False"):
        vitmix.describe(nn.Sequential(*layers), blocks=layers, grid=(4, 4), embed_dim=32)


def test_a_wrong_grid_is_found_at_the_first_block() -> None:
    model = FromEncoder(SIZE, 8, 32, 2, NUM_CLASSES, norm_first=True)
    backbone = vitmix.describe(model, blocks=list(model.encoder.layers), grid=(5, 5), embed_dim=32)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.CutMix(),
        labels=vitmix.TokenAlignedLabels(),
        num_classes=NUM_CLASSES,
        backbone=backbone,
    )
    with pytest.raises(vitmix.UnsupportedModelError, match=r"5 x 5 tokens .* found \(6, 16, 32\)"):
        mixing.train()(*batch())
    assert hooks(model) == 0


def test_a_home_made_bias_refuses_vertical_mixing() -> None:
    model: Any = MORE_FAMILIES["hand-written"]()
    backbone = vitmix.describe(
        model,
        blocks=list(model.layers),
        grid=(4, 4),
        embed_dim=32,
        num_prefix_tokens=1,
        vertical_reason="a position bias of our own",
    )
    with pytest.raises(vitmix.UnsupportedModelError, match="of our own"):
        vitmix.MixingModel(
            model,
            tokens=[vitmix.VerticalTokenMixup(block=1, kappa=3)],
            num_classes=NUM_CLASSES,
            backbone=backbone,
        )


def test_whole_blocks_give_what_their_parts_give() -> None:
    """Vertical mixing around a whole block equals vertical mixing around its attention."""
    torch.manual_seed(0)
    model: Any = MORE_FAMILIES["hand-written"]()
    results = []
    for blocks in (None, list(model.layers)):
        backbone = BACKBONES["hand-written"](model)
        if blocks is not None:
            backbone = vitmix.describe(
                model, blocks=blocks, grid=(4, 4), embed_dim=32, num_prefix_tokens=1
            )
        mixing = vitmix.MixingModel(
            model,
            labels=vitmix.TokenAlignedLabels(),
            mix=vitmix.CutMix(),
            tokens=[vitmix.VerticalTokenMixup(block=2, kappa=3)],
            num_classes=NUM_CLASSES,
            backbone=backbone,
            generator=torch.Generator().manual_seed(0),
        )
        results.append(mixing.train()(*batch()))
    torch.testing.assert_close(results[0].logits, results[1].logits)
    torch.testing.assert_close(results[0].targets, results[1].targets)
