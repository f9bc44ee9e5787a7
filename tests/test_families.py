"""The contract of ``MixingModel`` and the brute force over all plain families."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitmix
from home_made import FromEncoder, HandWritten
from models import FAMILIES, NUM_CLASSES, SIZE, batch, make_vit
from more_models import (
    BACKBONES,
    MORE_FAMILIES,
    POSITION_BIASED,
    make_family,
    make_huggingface,
    unsettle,
)
from recorders import CallRecorder
from test_alignment_models import PIXELS, Recorder, brute_force
from test_mixing import METHODS, hooks, horizontal

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")


def all_but_vertical() -> dict[str, Any]:
    return {
        "mix": vitmix.OneOf([vitmix.Mixup(), vitmix.TokenMix()], draw="element"),
        "labels": vitmix.TokenAlignedLabels(),
        "tokens": [horizontal(), vitmix.ManifoldMixup(block=3)],
    }


CONTRACT: dict[str, Callable[[], dict[str, Any]]] = {
    name: METHODS[name] for name in ("tl-align", "transmix", "horizontal", "vertical", "everything")
} | {"all-but-vertical": all_but_vertical}
WITH_VERTICAL = ("vertical", "everything")
ALL = [
    (family, method)
    for family, method in itertools.product(MORE_FAMILIES, CONTRACT)
    if not (family in POSITION_BIASED and method in WITH_VERTICAL)
    and not (family not in POSITION_BIASED and method == "all-but-vertical")
]


def make(family: str, method: str) -> vitmix.MixingModel:
    torch.manual_seed(0)
    model, options = make_family(family)
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
        generator=torch.Generator().manual_seed(0),
        **options,
        **CONTRACT[method](),
    )


def logits_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize(("family", "method"), ALL)
def test_step(family: str, method: str) -> None:
    """A step gives labels that sum to 1, gradients everywhere, and leaves no trace."""
    mixing = make(family, method)
    plain = MORE_FAMILIES[family]()
    plain.load_state_dict(mixing.model.state_dict())
    images, targets = batch()
    before = logits_of(plain.eval()(images))
    assert torch.equal(logits_of(mixing.eval()(images)), before)

    out = mixing.train()(images, targets)
    plain_output = plain.train()(images)
    assert type(out.output) is type(plain_output)
    assert logits_of(out.output) is out.logits
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(images)))
    assert (out.targets >= 0).all()
    out.loss().backward()
    logits_of(plain_output).sum().backward()
    unused = {f"model.{name}" for name, value in plain.named_parameters() if value.grad is None}
    for name, parameter in mixing.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert name in unused or parameter.grad.isfinite().all(), name

    assert hooks(mixing.model) == 0
    assert torch.equal(logits_of(mixing.eval()(images)), before)
    assert list(mixing.model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_following_shares_changes_nothing_else(family: str) -> None:
    """Logits and gradients are those of the plain model on the mixed images."""
    mixing = make(family, "tl-align")
    unsettle(mixing.model)
    plain = copy.deepcopy(mixing.model).train()
    torch.manual_seed(1)  # stochastic depth
    out = mixing.train()(*batch())
    torch.manual_seed(1)
    logits = logits_of(plain(out.trace.images))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)
    out.loss().backward()
    vitmix.functional.soft_cross_entropy(logits, out.targets).backward()
    for (name, found), expected in zip(
        mixing.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-3, rtol=1e-3, msg=name)


class Kernels(TorchDispatchMode):
    """Counts fused attention, and softmaxes that would stand for attention in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kernel in ("scaled_dot_product", "_softmax"):
            self.counts[kernel] += kernel in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_fused_attention_stays_on(family: str) -> None:
    """Following shares calls the kernels that the model alone calls, as often."""
    mixing = make(family, "tl-align").train()
    images, targets = batch()
    with Kernels() as plain:
        mixing.model(images)
    with Kernels() as mixed:
        mixing(images, targets)
    assert sum(plain.counts.values()) >= mixing.backbone.depth
    pools = mixing.backbone.pooling == "attention"  # reads its one row of attention
    plain.counts["_softmax"] += pools
    assert mixed.counts == plain.counts


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_bfloat16_autocast(family: str) -> None:
    mixing = make(family, "all-but-vertical" if family in POSITION_BIASED else "everything")
    images, targets = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixing.train()(images, targets)
        loss = out.loss()
    assert out.targets.dtype == torch.float32
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(images)))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("family", ["naflex", "naflex-rope", "deepseek", "gemma4", "hf-dinov2"])
def test_sizes_that_change(family: str) -> None:
    mixing = make(family, "all-but-vertical").train()
    for size in ((48, 32), (32, 64)):
        images = torch.randn(4, 3, *size)
        out = mixing(images, torch.tensor([0, 1, 2, 3]))
        assert out.trace.horizontal[1].replace.shape == (4, size[0] * size[1] // 64)
        out.loss().backward()


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_same_draws_same_step(family: str) -> None:
    """Copies, pickles and the original do the same from the same generator state."""
    method = "all-but-vertical" if family in POSITION_BIASED else "everything"
    mixing = make(family, method).train()
    images, targets = batch(5)
    copies = [copy.deepcopy(mixing), pickle.loads(pickle.dumps(mixing))]
    torch.manual_seed(1)
    expected = mixing(images, targets)
    for other in copies:
        torch.manual_seed(1)
        out = other(images, targets)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.targets, expected.targets)


@pytest.mark.parametrize("family", sorted(POSITION_BIASED))
@pytest.mark.parametrize("method", WITH_VERTICAL)
def test_vertical_mixing_is_refused_with_positions(family: str, method: str) -> None:
    with pytest.raises(vitmix.UnsupportedModelError, match=r"found (rotary|relative) position"):
        make(family, method)


def test_rollout_is_refused_where_blocks_are_given_more_than_tokens() -> None:
    model, _ = make_family("eva-mixed-rope")
    mixing = vitmix.MixingModel(
        model, tokens=[horizontal(saliency="rollout")], num_classes=NUM_CLASSES
    )
    with pytest.raises(vitmix.UnsupportedModelError, match="further tensors"):
        mixing.train()(*batch())
    assert hooks(model) == 0


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize(("pixels", "with_tokens"), [("box", False), ("box", True), ("none", True)])
def test_aligned_labels_equal_dense_labels(
    family: str, pixels: str, with_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, options = make_family(family)
    unsettle(model)
    tokens: list[vitmix.TokenStage] = []
    if with_tokens:
        tokens = [horizontal(rho=0.001)]
        if family not in POSITION_BIASED:
            tokens.append(vitmix.VerticalTokenMixup(block=2, kappa=3))
    mixing = vitmix.MixingModel(
        model,
        mix=PIXELS[pixels](),
        labels=vitmix.TokenAlignedLabels(),
        tokens=tokens,
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
        **options,
    ).train()
    images, targets = batch()
    recorder = record(family, mixing, monkeypatch)
    out = mixing(images, targets)
    recorder.close()
    soft = vitmix.functional.smooth_targets(targets, NUM_CLASSES, 0.1)
    expected = brute_force(mixing, out, recorder, soft)
    torch.testing.assert_close(out.targets, expected, atol=1e-5, rtol=0)
    if pixels != "none":
        area = vitmix.functional.mix_targets(soft, out.trace.pixels.partner, out.trace.pixels.lam)
        assert (out.targets - area).abs().max() > 1e-3


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_attention_labels_equal_explicit_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, options = make_family(family)
    unsettle(model)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.TokenMix(),
        labels=vitmix.AttentionLabels(),
        num_classes=NUM_CLASSES,
        **options,
    ).train()
    recorder = record(family, mixing, monkeypatch)
    out = mixing(*batch())
    recorder.close()
    prefix = mixing.backbone.num_prefix_tokens
    last = recorder.attention[mixing.backbone.depth - 1].mean(1)
    row = last[:, 0, prefix:] if mixing.backbone.class_token else last[:, prefix:, prefix:].mean(1)
    row = row / row.sum(1, keepdim=True)
    own = (row * out.trace.pixels.own.flatten(1)).sum(1)
    torch.testing.assert_close(out.trace.weights[:, 0], own, atol=1e-6, rtol=0)


def record(family: str, mixing: vitmix.MixingModel, patch: pytest.MonkeyPatch) -> Any:
    """The softmax method of a tensor cannot be replaced: that attention from its projections."""
    return Recorder(mixing) if family == "hand-written" else CallRecorder(mixing, patch)


EXPECTED = {
    "eva-rope": ("class_token", 3, True),
    "eva-mixed-rope": ("average", 0, False),
    "eva-post-norm": ("attention", 1, True),
    "hf-deit": ("class_token", 2, True),
    "hf-deit-teacher": ("distilled", 2, True),
    "hf-beit": ("average", 1, True),
    "hf-beit-no-bias": ("class_token", 1, True),
    "hf-dinov2": ("class_and_average", 1, True),
    "hf-dinov2-registers": ("class_and_average", 4, True),
    "hf-ijepa": ("average", 0, False),
    "hand-written": ("class_token", 1, True),
    "encoder-norm-first": ("average", 0, False),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_described(family: str) -> None:
    model, options = make_family(family)
    backbone = options.get("backbone") or vitmix.describe(model)
    found = (backbone.pooling, backbone.num_prefix_tokens, backbone.class_token)
    assert found == EXPECTED[family]
    assert backbone.grid((SIZE, SIZE)) == (4, 4)
    assert (backbone.depth, backbone.embed_dim) == (4, 32)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_described_pooling_is_what_reaches_the_logits(family: str) -> None:
    """The tokens with a gradient are those that the description pools."""
    torch.manual_seed(0)
    model, options = (FAMILIES[family](), {}) if family in FAMILIES else make_family(family)
    unsettle(model)
    backbone = options.get("backbone") or vitmix.describe(model)
    last: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)
        last[0].retain_grad()

    backbone.blocks[-1].module.register_forward_hook(keep)
    logits_of(model.eval()(batch()[0])).square().sum().backward()
    assert last[0].grad is not None
    reached = set(last[0].grad.abs().sum((0, 2)).nonzero().flatten().tolist())
    first, tokens = backbone.num_prefix_tokens, last[0].shape[1]
    images = set(range(first, tokens))
    expected = {
        "class_token": {0},
        "distilled": {0, 1},
        "average": images,
        "average_all": set(range(tokens)),
        "class_and_average": {0} | images,
        "sequence": images,
        "attention": set(range(tokens)) if backbone.pool_prefix else images,
    }
    assert reached == expected[backbone.pooling]


CHECKPOINTED = {
    "eva-grouped": "all-but-vertical",
    "hf-beit": "all-but-vertical",
    "hf-data2vec-eager": "everything",
    "hf-dinov2": "everything",
    "hf-vit": "everything",
    "naflex": "everything",
}


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing(family: str) -> None:
    """Gradients equal those without; transformers runs a layer again inside its hooks."""
    found = []
    for checkpointed in (False, True):
        mixing = make(family, CHECKPOINTED[family]).train()
        model: Any = mixing.model
        if checkpointed and hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing()
        elif checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert mixing.backbone.recomputes() is checkpointed
        torch.manual_seed(1)
        mixing(*batch()).loss().backward()
        assert hooks(model) == 0
        found.append([p.grad for p in mixing.parameters() if p.grad is not None])
    for expected, observed in zip(*found, strict=True):
        torch.testing.assert_close(observed, expected, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    mixing = make("hf-vit", "vertical").train()
    model: Any = mixing.model
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(vitmix.UnsupportedModelError, match="use_reentrant=False"):
        mixing(*batch())
    assert hooks(model) == 0


def test_attention_that_cannot_be_read_is_refused() -> None:
    model = make_huggingface("ViT")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vitmix.UnsupportedModelError, match=r"sdpa.*found 'flash_attention_2'"):
        vitmix.describe(model)


def test_no_library_is_imported() -> None:
    """Families are found among modules already imported: a home-made model imports none."""
    import subprocess

    code = (
        "import sys, torch, vitmix\n"
        "try:\n    vitmix.describe(torch.nn.Linear(1, 1))\n"
        "except vitmix.UnsupportedModelError as error:\n    assert 'Linear' in str(error)\n"
        "assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Home-made models.


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
    with pytest.raises(vitmix.UnsupportedModelError, match=r"\(6, 25, D\) .* found \(6, 16, 32\)"):
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
