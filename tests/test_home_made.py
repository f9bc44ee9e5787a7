"""Home-made models, described by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from home_made import FromEncoder, FromPairs, HandWritten, InStages
from models import NUM_CLASSES, SIZE, aligned_step, batch, make_vit
from more_models import BACKBONES, MORE_FAMILIES
from recorders import CallRecorder
from staged_models import STAGED, images_for
from test_mixing import hooks, horizontal
from test_staged import brute_force

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
        ({"grid": 4}, "rows, columns.*got 4"),
        ({"pooling": "best"}, "got 'best'"),
        ({"pooling": "distilled"}, "at least 2"),
        ({"pooling": "class_token", "class_token": False}, "class token"),
        ({"pooling": "sequence"}, "`pool_scores`"),
        ({"pool_scores": nn.Linear(32, 1)}, "`pool_scores`.*got pooling 'class_token'"),
        ({"pooling": "class_attention"}, "`class_layers`"),
        ({"class_layers": 2}, "`class_layers`.*got pooling 'class_token' and 2"),
        ({"num_prefix_tokens": 0, "class_token": True}, "`num_prefix_tokens` of at least 1"),
        ({"num_prefix_tokens": -1}, "at least 0"),
        ({"blocks": []}, "at least one"),
        ({"blocks": ["layers.0"]}, "got str at 0"),
        ({"blocks": nn.Linear(32, 32)}, "got one Linear"),
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


def test_bare_attention_is_refused() -> None:
    """Its queries, keys and values would not be mixed together."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    for block in (layer.self_attn, vitmix.Block(layer, layer.self_attn, layer.self_attn)):
        with pytest.raises(vitmix.UnsupportedModelError, match=r"found nn\.MultiheadAttention"):
            vitmix.describe(layer, blocks=[block], grid=(4, 4), embed_dim=32)


def in_windows(grid: tuple[int, int]) -> vitmix.functional.Reach:
    return vitmix.functional.Reach(grid, windows=vitmix.functional.windows(grid, (4, 4)))


def in_stages(model: Any) -> vitmix.Backbone:
    early = [
        vitmix.Block(layer, layer.norm, layer.attention, layout="channels_last", reach=in_windows)
        for layer in model.early
    ]
    late = [
        vitmix.Block(
            layer,
            layer.attention,
            layer.attention,
            layout="channels_first",
            stride=2,
            width=64,
            residual=False,
        )
        for layer in model.late
    ]
    return vitmix.describe(model, blocks=[*early, *late], grid=(8, 8), embed_dim=32)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_stages_windows_and_maps_by_hand(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = InStages(4, 32, NUM_CLASSES)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.CutMix(),
        labels=vitmix.TokenAlignedLabels(),
        tokens=[horizontal(block=block), vitmix.ManifoldMixup(block=block)],
        num_classes=NUM_CLASSES,
        backbone=in_stages(model),
    ).train()
    images, targets = batch()
    recorder = CallRecorder(mixing, monkeypatch)
    out = mixing(images, targets)
    recorder.close()
    soft = vitmix.functional.smooth_targets(targets, NUM_CLASSES)
    expected = brute_force(mixing, out, recorder, soft)
    torch.testing.assert_close(out.targets, expected, atol=1e-5, rtol=0)
    out.loss().backward()
    assert hooks(model) == 0


def test_windows_by_hand_refuse_vertical_mixing() -> None:
    model = InStages(4, 32, NUM_CLASSES)
    stage = vitmix.VerticalTokenMixup(block=1, kappa=3)
    with pytest.raises(vitmix.UnsupportedModelError, match="no place there"):
        vitmix.MixingModel(
            model, tokens=[stage], num_classes=NUM_CLASSES, backbone=in_stages(model)
        )


def test_a_pooling_by_hand_refuses_aligned_labels() -> None:
    model = InStages(4, 32, NUM_CLASSES)
    backbone = vitmix.describe(
        model, list(model.late), grid=(4, 4), embed_dim=64, alignment_reason="the maximum of tokens"
    )
    with pytest.raises(vitmix.UnsupportedModelError, match="found the maximum of tokens"):
        vitmix.MixingModel(
            model,
            labels=vitmix.TokenAlignedLabels(),
            num_classes=NUM_CLASSES,
            backbone=backbone,
        )


class ScoredTokens(nn.Module):
    """Sequence pooling of image tokens alone, beside a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.vit: Any = make_vit(depth=2)
        self.score = nn.Linear(32, 1)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.vit.forward_features(images)[:, 1:]
        return self.head((self.score(tokens).softmax(1) * tokens).sum(1))


def test_scores_of_image_tokens_alone() -> None:
    torch.manual_seed(0)
    model = ScoredTokens()
    backbone = vitmix.describe(
        model, list(model.vit.blocks), grid=(4, 4), embed_dim=32, num_prefix_tokens=1,
        pooling="sequence", pool_scores=model.score,
    )  # fmt: skip
    found: list[torch.Tensor] = []
    model.score.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    out = aligned_step(model, backbone, *batch(), record=True)
    _, mixture = out.trace.record.history[-1]
    expected = (mixture.shares[:, 1:] * found[0].softmax(1)).sum(1)
    torch.testing.assert_close(out.trace.weights, expected)


def test_class_attention_by_hand() -> None:
    """Labels are those of the model's own description."""
    cait: Any = STAGED["cait"].make()
    layers = [vitmix.Block(block, block.norm1, block.attn) for block in cait.blocks]
    known = vitmix.describe(cait)
    by_hand = vitmix.describe(
        cait, layers, grid=known.grid, embed_dim=known.width(0),
        pooling="class_attention", class_layers=len(cait.blocks_token_only),
    )  # fmt: skip
    images = images_for("cait")
    assert torch.equal(*(aligned_step(cait, found, *images).targets for found in (known, by_hand)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "rows"}, "`layout` of block 0 as one of tokens"),
        ({"stride": 0}, "`stride` of block 0 of at least 1, got 0"),
        ({"width": 0}, "`width` of block 0"),
        ({"attentions": 0}, "`attentions` of block 0"),
    ],
)
def test_bad_blocks(options: dict[str, Any], message: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    block = vitmix.Block(layer, layer, layer, **options)
    with pytest.raises(vitmix.InputError, match=message):
        vitmix.describe(layer, blocks=[block], grid=(4, 4), embed_dim=32)


def test_prefix_tokens_have_no_place_in_a_map() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    block = vitmix.Block(layer, layer, layer, reach=in_windows)
    with pytest.raises(vitmix.InputError, match="`num_prefix_tokens` of 0"):
        vitmix.describe(layer, blocks=[block], grid=(4, 4), embed_dim=32, num_prefix_tokens=1)


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


class ByKeyword(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x=x)


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        (horizontal(), "Pair"),
        (horizontal(saliency="gradient"), "Pair"),
        (vitmix.VerticalTokenMixup(block=1, kappa=3), "Attention"),
    ],
    ids=["horizontal", "gradient", "vertical"],
)
def test_tokens_by_keyword_are_refused(stage: vitmix.TokenStage, named: str) -> None:
    model: Any = FromPairs(SIZE, 8, 32, 2, NUM_CLASSES)
    layers = list(model.layers)
    attentions = [layer.attend.attention for layer in layers]
    for index, layer in enumerate(layers):
        if named == "Pair":
            model.layers[index] = ByKeyword(layer)
        else:
            layer.attend.attention = ByKeyword(attentions[index])
    blocks = [
        vitmix.Block(layer, attention, attention)
        for layer, attention in zip(layers, attentions, strict=True)
    ]
    backbone = vitmix.describe(model, blocks=blocks, grid=(SIZE // 8, SIZE // 8), embed_dim=32)
    mixing = vitmix.MixingModel(model, tokens=[stage], num_classes=NUM_CLASSES, backbone=backbone)
    with pytest.raises(vitmix.UnsupportedModelError, match=f"{named}, found none.* keyword"):
        mixing.train()(*batch())
    assert hooks(model) == 0
