"""What ``describe`` finds in models of all families, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from contract import horizontal, wrap
from models import FAMILIES, NUM_CLASSES, SIZE, aligned_step, batch, make_vit
from more_models import (
    MORE_FAMILIES,
    logits_of,
    make_family,
    make_huggingface,
    make_naflex,
    make_timm,
    unsettle,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")


EXPECTED = {
    "eva-rope": ("class_token", 3, True),
    "eva-mixed-rope": ("average", 0, False),
    "eva-post-norm": ("attention_all", 1, True),
    "hf-deit": ("class_token", 2, True),
    "hf-deit-teacher": ("distilled", 2, True),
    "hf-beit": ("average", 1, True),
    "hf-beit-no-bias": ("class_token", 1, True),
    "hf-dinov2": ("class_and_average", 1, True),
    "hf-dinov2-registers": ("class_and_average", 4, True),
    "hf-ijepa": ("average", 0, False),
    "hf-clip": ("average", 1, True),
    "hf-siglip": ("average", 0, False),
    "hf-timm": ("class_token", 1, True),
    "vit-pytorch": ("class_token", 1, True),
    "vit-pytorch-mean": ("average_all", 0, False),
    "vit-pytorch-simple": ("average_all", 0, False),
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


@pytest.mark.parametrize(
    ("family", "reads", "pool"),
    [
        ("cct", False, "attention"),
        ("vit", True, "class_token"),
        ("vit-average", False, "average"),
        ("vit-average-all", True, "class_token"),
        ("hf-beit", False, "average"),
        ("hf-dinov2", True, "class_token"),
    ],
)
def test_a_class_token_without_use_is_not_read(family: str, reads: bool, pool: str) -> None:
    """Neither for saliency nor by ScoreNet, unless it is asked for."""
    mixing = wrap(family, tokens=[horizontal()])
    assert mixing.backbone.reads_class_token is reads
    assert mixing.tokens[0].scorenet.pool == pool
    if mixing.backbone.class_token:
        asked = wrap(family, tokens=[horizontal(pool="class_token")])
        assert asked.tokens[0].scorenet.pool == "class_token"


@pytest.mark.parametrize("every", [True, False])
def test_a_query_that_pools_may_leave_the_class_token_out(every: bool) -> None:
    model: Any = make_vit(global_pool="map", pool_include_prefix=every)
    backbone = vitmix.describe(model)
    assert backbone.pooling == ("attention_all" if every else "attention")
    assert backbone.reads_class_token is every


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
        "attention": images,
        "attention_all": set(range(tokens)),
    }
    assert reached == expected[backbone.pooling]


def test_hybrids_without_positions_take_other_sizes() -> None:
    model = MORE_FAMILIES["hybrid"]()
    assert vitmix.describe(model).grid((SIZE, SIZE)) == (4, 4)
    assert vitmix.describe(model).grid((2 * SIZE, SIZE)) == (8, 4)


READING: dict[str, Callable[[], dict[str, Any]]] = {
    "transmix": lambda: {"labels": vitmix.AttentionLabels()},
    "tl-align": lambda: {"labels": vitmix.TokenAlignedLabels()},
    "horizontal": lambda: {"tokens": [vitmix.HorizontalTokenMixup(1)]},
    "vertical": lambda: {"tokens": [vitmix.VerticalTokenMixup(1)]},
}
OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "manifold": lambda: {"tokens": [vitmix.ManifoldMixup(1)]},
    "random": lambda: {"tokens": [vitmix.HorizontalTokenMixup(1, saliency="random")]},
    "gradient": lambda: {"tokens": [vitmix.HorizontalTokenMixup(1, saliency="gradient")]},
}


def make_unreadable() -> Any:
    """Attention by a function that is none of torch's, as far as anybody knows."""
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register("own_kernel", sdpa_attention_forward)
    return make_huggingface("ViT", attention="own_kernel")


@pytest.mark.parametrize("method", READING)
def test_attention_that_cannot_be_read_is_refused_where_it_is_needed(method: str) -> None:
    model = make_unreadable()
    with pytest.raises(vitmix.UnsupportedModelError, match=r"found .*'own_kernel'.*'sdpa'"):
        vitmix.MixingModel(model, num_classes=NUM_CLASSES, **READING[method]())


@pytest.mark.parametrize("method", OTHERS)
def test_attention_that_cannot_be_read_is_no_matter_where_it_is_not_needed(method: str) -> None:
    mixing = vitmix.MixingModel(make_unreadable(), num_classes=NUM_CLASSES, **OTHERS[method]())
    mixing.train()(*batch(), record=True).loss().backward()


def test_support_says_what_cannot_be_read_or_followed() -> None:
    flash = make_huggingface("ViT")
    flash.config._attn_implementation = "flash_attention_2"
    for model, refused, words in (
        (flash, {"attention", "aligned", "horizontal", "vertical"}, "'flash_attention_2'"),
        (DROPPING["vit"](), {*READ_OR_MIXED}, r"patch_drop_rate=0.25"),
    ):
        support = vitmix.describe(model).support
        assert {name for name, reason in support.items() if reason} == refused
        assert all(words in reason for reason in support.values() if reason)


def make_hiera(**options: Any) -> Any:
    import timm

    return timm.models.hiera.Hiera(
        img_size=(SIZE, SIZE), num_classes=NUM_CLASSES, embed_dim=16, stages=(1, 1), q_pool=1,
        mask_unit_size=(4, 4), mask_unit_attn=(True, False), **options,
    )  # fmt: skip


READ_OR_MIXED = ("attention", "aligned", "horizontal", "manifold", "vertical")
DROPPING: dict[str, Callable[[], Any]] = {
    "vit": lambda: make_timm(
        "vision_transformer", "VisionTransformer", patch_size=4, patch_drop_rate=0.25
    ),
    "naflex": lambda: make_naflex(patch_size=4, patch_drop_rate=0.25),
    "eva": lambda: make_timm("eva", "Eva", patch_size=4, patch_drop_rate=0.25),
    "hiera": lambda: make_hiera(patch_drop_rate=0.25),
}


@pytest.mark.parametrize("family", DROPPING)
def test_models_that_drop_patches_take_pixel_stages_alone(family: str) -> None:
    """Cells of masks are the model's patches."""
    model = DROPPING[family]()
    for options in (*READING.values(), *OTHERS.values()):
        with pytest.raises(vitmix.UnsupportedModelError, match=r"patch_drop_rate=0.25|windows"):
            vitmix.MixingModel(model, num_classes=NUM_CLASSES, **options())
    mixing = vitmix.MixingModel(model, mix=vitmix.TokenMix(), num_classes=NUM_CLASSES)
    out = mixing.train()(*batch(), record=True)
    out.loss().backward()
    assert out.trace.pixels.own.shape[1:] == (8, 8)


def test_pixel_stages_see_the_patches_of_timm_where_blocks_are_refused() -> None:
    from timm.models.vision_transformer import DiffParallelScalingBlock

    model = make_vit(block_fn=DiffParallelScalingBlock)
    mixing = vitmix.MixingModel(model, mix=vitmix.TokenMix(), num_classes=NUM_CLASSES)
    assert mixing.backbone.grid((SIZE, SIZE)) == (4, 4)
    assert mixing.train()(*batch()).trace.pixels.own.shape[1:] == (4, 4)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, nn.Sequential])
def test_pixel_stages_see_the_patches_of_models_run_otherwise(wrap: Any) -> None:
    wrapped = wrap(FAMILIES["vit"]())
    mixing = vitmix.MixingModel(wrapped, mix=vitmix.TokenMix(), num_classes=NUM_CLASSES)
    cells = (2, 2) if wrap is nn.Sequential else (4, 4)
    assert mixing.backbone.grid((SIZE, SIZE)) == cells


def test_pixel_stages_see_what_a_compiled_model_sees() -> None:
    """DINOv2 leaves out what an image has beyond whole patches."""
    model = MORE_FAMILIES["hf-dinov2"]()
    mixing = vitmix.MixingModel(torch.compile(model), mix=vitmix.CutMix(), num_classes=NUM_CLASSES)
    assert mixing.backbone.seen((SIZE + 3, SIZE)) == (SIZE, SIZE)
    assert not mixing.backbone.is_readable


class Adapted(nn.Module):
    """Names what it wraps as models of PEFT do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        return self.model


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (Adapted, "give what its get_base_model"),
        (torch.compile, "compile the MixingModel"),
        (nn.DataParallel, "wrap the MixingModel"),
    ],
)
def test_wrapped_models_are_refused_with_what_to_give(wrap: Any, words: str) -> None:
    with pytest.raises(vitmix.UnsupportedModelError, match=words) as caught:
        vitmix.describe(wrap(FAMILIES["vit"]()))
    assert "`backbone`" not in str(caught.value)


def test_a_part_that_is_known_is_named_and_can_be_described() -> None:
    """As behind a layer that normalises images."""
    vit = FAMILIES["vit"]()
    whole = nn.Sequential(nn.Identity(), vit)
    with pytest.raises(vitmix.UnsupportedModelError, match="'1' is a timm VisionTransformer"):
        vitmix.describe(whole)
    known = vitmix.describe(vit)
    assert torch.equal(*(aligned_step(model, known, *batch()).targets for model in (vit, whole)))


def test_no_library_is_imported() -> None:
    """Families are found among modules already imported: a home-made model imports none."""
    code = (
        "import sys, torch, vitmix\n"
        "try:\n    vitmix.describe(torch.nn.Linear(1, 1))\n"
        "except vitmix.UnsupportedModelError as error:\n    assert 'Linear' in str(error)\n"
        "assert not {'timm', 'transformers', 'torchvision', 'vit_pytorch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
