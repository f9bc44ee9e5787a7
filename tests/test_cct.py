"""The compact convolutional transformer: parity, published sizes, names, shapes, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import vitmix.models
from golden import load_golden
from vitmix.errors import InputError
from vitmix.models import CCT, cct_names, create_model, input_side
from vitmix.models import cct as cct_module

LAYER_KEYS = {
    "pre_norm.weight",
    "pre_norm.bias",
    "self_attn.qkv.weight",
    "self_attn.proj.weight",
    "self_attn.proj.bias",
    "norm1.weight",
    "norm1.bias",
    "linear1.weight",
    "linear1.bias",
    "linear2.weight",
    "linear2.bias",
}


def tiny(**kwargs) -> CCT:
    torch.manual_seed(0)
    return CCT(
        **{
            "num_layers": 2,
            "num_heads": 2,
            "mlp_ratio": 2,
            "embed_dim": 16,
            "img_size": 8,
            **kwargs,
        }
    )


def test_eval_logits_equal_the_golden_ones():
    data = load_golden("cct")
    model = CCT(
        num_layers=int(data["num_layers"]),
        num_heads=int(data["num_heads"]),
        mlp_ratio=float(data["mlp_ratio"]),
        embed_dim=int(data["embedding_dim"]),
        num_classes=int(data["num_classes"]),
    )
    prefix = "plain/state/"
    state = {
        k[len(prefix) :]: torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)
    }
    model.load_state_dict(state, strict=True)
    logits = model.eval()(torch.from_numpy(data["images_eval"]))
    expected = torch.from_numpy(data["plain/eval_logits"])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


# Millions of parameters as printed in the paper's tables (CIFAR-10, CIFAR-100, Flowers-102 and
# ImageNet heads), and the length of the token sequence.
@pytest.mark.parametrize(
    ("name", "num_classes", "millions", "tokens"),
    [
        ("cct_2_3x2_32", 10, 0.28, 64),
        ("cct_4_3x2_32", 10, 0.48, 64),
        ("cct_6_3x1_32", 10, 3.23, 256),
        ("cct_6_3x2_32", 10, 3.33, 64),
        ("cct_7_3x1_32", 10, 3.76, 256),
        ("cct_7_3x2_32", 10, 3.85, 64),
        ("cct_7_7x2_224", 102, 4.57, 196),
        ("cct_14_7x2_224", 1000, 22.36, 196),
        ("cct_14_7x2_384", 1000, 22.51, 576),
    ],
)
def test_sizes_are_those_published(name, num_classes, millions, tokens):
    with torch.device("meta"):
        model = getattr(cct_module, name)()
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.011)
    assert model.classifier.fc.out_features == num_classes
    assert model.classifier.positional_emb.shape[1] == tokens
    rows, columns = model.grid_size(model.img_size)
    assert rows * columns == tokens


def test_state_dict_names_are_those_of_the_released_checkpoints():
    model = cct_module.cct_4_3x2_32()
    expected = {
        "tokenizer.conv_layers.0.0.weight",
        "tokenizer.conv_layers.1.0.weight",
        "classifier.positional_emb",
        "classifier.attention_pool.weight",
        "classifier.attention_pool.bias",
        "classifier.norm.weight",
        "classifier.norm.bias",
        "classifier.fc.weight",
        "classifier.fc.bias",
    } | {f"classifier.blocks.{i}.{key}" for i in range(4) for key in LAYER_KEYS}
    assert set(model.state_dict()) == expected


@pytest.mark.parametrize("img_size", [8, 7, 1, (5, 12), (9, 1)])
@pytest.mark.parametrize(("kernel_size", "layers"), [(3, 1), (3, 2), (7, 2)])
def test_grid_size_is_the_tokenizers_grid(img_size, kernel_size, layers):
    model = tiny(img_size=img_size, kernel_size=kernel_size, num_conv_layers=layers).eval()
    height, width = model.img_size
    maps = model.tokenizer.conv_layers(torch.randn(1, 3, height, width))
    assert maps.shape[2:] == model.grid_size(img_size)
    features = model.forward_features(torch.randn(3, 3, height, width))
    assert features.shape == (3, maps.shape[2] * maps.shape[3], 16)
    assert model(torch.randn(1, 3, height, width)).shape == (1, 10)


def test_tokens_are_row_major():
    tokenizer = tiny(img_size=(4, 8)).tokenizer
    images = torch.randn(2, 3, 4, 8)
    maps = tokenizer.conv_layers(images)
    tokens = tokenizer(images)
    columns = maps.shape[3]
    for row in range(maps.shape[2]):
        for column in range(columns):
            assert torch.equal(tokens[:, row * columns + column], maps[:, :, row, column])


def test_forward_is_pooling_and_head_of_the_features():
    model = tiny().eval()
    images = torch.randn(3, 3, 8, 8)
    features = model.forward_features(images)
    scores = model.classifier.attention_pool(features)
    expected = []
    for sample, score in zip(features, scores, strict=True):
        weight = score.squeeze(1).exp() / score.exp().sum()
        expected.append(sum(w * token for w, token in zip(weight, sample, strict=True)))
    torch.testing.assert_close(model(images), model.classifier.fc(torch.stack(expected)))


def test_sine_positions_follow_the_formula_and_stay_frozen():
    model = cct_module.cct_2_3x2_32_sine()
    table = model.classifier.positional_emb
    assert not table.requires_grad
    dim = table.shape[2]
    for position in (0, 1, 63):
        for channel in (0, 1, 2, 77, 126, 127):
            angle = position / 10000 ** (2 * (channel // 2) / dim)
            value = np.sin(angle) if channel % 2 == 0 else np.cos(angle)
            assert table[0, position, channel].item() == pytest.approx(value, abs=1e-6)


def test_without_positions_any_size_is_accepted():
    model = tiny(positional_embedding="none").eval()
    assert "classifier.positional_emb" not in model.state_dict()
    assert model(torch.randn(2, 3, 11, 6)).shape == (2, 10)


def test_attention_is_fused_and_drops_only_in_training(monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append(kwargs["dropout_p"])
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = tiny(attention_dropout=0.3)
    model.train()(torch.randn(2, 3, 8, 8))
    model.eval()(torch.randn(2, 3, 8, 8))
    assert seen == [0.3, 0.3, 0.0, 0.0]


def test_stochastic_depth_rises_linearly_and_keeps_the_mean():
    model = tiny(num_layers=5, stochastic_depth=0.2)
    rates = [block.drop_path.rate for block in model.classifier.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    drop = model.classifier.blocks[4].drop_path
    out = drop(torch.ones(20_000, 3, 2))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    kept = per_sample[:, 0].ne(0).float().mean().item()
    assert kept == pytest.approx(0.8, abs=5 * (0.8 * 0.2 / 20_000) ** 0.5)
    assert set(per_sample[:, 0].unique().tolist()) == {0.0, 1.25}
    assert torch.equal(drop.eval()(torch.ones(4, 3, 2)), torch.ones(4, 3, 2))


def test_training_draws_are_reproducible_and_gradients_reach_every_parameter():
    images = torch.randn(4, 3, 8, 8)
    model = tiny(dropout=0.1, stochastic_depth=0.5).train()
    torch.manual_seed(1)
    first = model(images)
    torch.manual_seed(1)
    assert torch.equal(first, model(images))
    tiny_model = tiny().train()
    tiny_model(images).square().sum().backward()
    silent = {n for n, p in tiny_model.named_parameters() if p.grad is None}
    assert silent == set()


@pytest.mark.parametrize("name", cct_names())
def test_every_published_name_is_a_picklable_function(name):
    function = getattr(vitmix.models.cct, name)
    assert pickle.loads(pickle.dumps(function)) is function
    with torch.device("meta"):
        assert isinstance(function(num_classes=7), CCT)


def test_deepcopy_gives_the_same_logits():
    model = tiny().eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 9), (2, 3, 16, 16), (2, 1, 8, 8), (3, 8, 8), (2, 3, 4, 16)]
)
def test_an_input_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match=r"\(batch, 3, 8, 8\).*got .*Resize"):
        tiny()(torch.randn(shape))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"positional_embedding": "cosine"}, "'learnable'.*'cosine'"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"img_size": 0}, "0x0"),
        ({"num_conv_layers": 0}, "num_conv_layers"),
    ],
)
def test_bad_arguments_are_refused(kwargs, words):
    with pytest.raises(InputError, match=words):
        tiny(**kwargs)


def test_create_model_knows_both_lists():
    pytest.importorskip("timm")
    small = create_model("cct_2_3x2_32", num_classes=3, img_size=(16, 24))
    assert small(torch.zeros(1, 3, 16, 24)).shape == (1, 3)
    vit = create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=(32, 48), embed_dim=24, depth=1
    )
    assert vit(torch.zeros(1, 3, 32, 48)).shape == (1, 5)
    resnet = create_model("resnet18", num_classes=4, img_size=32)
    assert resnet.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_create_model_takes_the_size_that_a_model_is_registered_for():
    pytest.importorskip("timm")
    assert create_model("cct_2_3x2_32", num_classes=3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    vit = create_model("vit_tiny_patch16_384", num_classes=3, depth=1, embed_dim=48)
    assert vit.patch_embed.img_size == (384, 384)


@pytest.mark.parametrize("name", cct_names())
def test_create_model_takes_the_published_size_of_cct(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=3)
    side = input_side(name)
    assert model.img_size == (side, side)
    assert f"_{side}" in name


def test_create_model_takes_the_size_that_a_hub_model_tells(tmp_path):
    pytest.importorskip("timm")
    facts = {"input_size": [3, 384, 384], "fixed_input_size": True}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": facts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    assert input_side(name) == 384
    options = {"num_classes": 3, "depth": 1, "embed_dim": 48}
    assert create_model(name, **options).patch_embed.img_size == (384, 384)
    assert create_model(name, img_size=64, **options).patch_embed.img_size == (64, 64)


def test_a_new_classifier_has_the_dtype_of_the_old():
    model = tiny().bfloat16()
    model.reset_classifier(3)
    size = (model.in_chans, *model.img_size)
    assert model(torch.zeros(2, *size, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_create_model_names_the_nearest():
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=r"'cct_7_3x1'.*'cct_7_3x1_32'"):
        create_model("cct_7_3x1", num_classes=3, img_size=32)
    with pytest.raises(InputError, match="'vit_tiny_patch16_224'"):
        create_model("vit_tinny_patch16_224", num_classes=3, img_size=32)
    with pytest.raises(InputError, match="cct_7_3x1_32"):
        cct_module.cct("cct_8")


def test_create_model_refuses_patches_that_do_not_divide_the_image():
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=r"16x16.*40x48"):
        create_model("vit_tiny_patch16_224", num_classes=5, img_size=(40, 48), depth=1)


@pytest.mark.parametrize(
    ("name", "side"), [("pvt_v2_b0", 258), ("pvt_v2_b0", 32), ("pit_ti_224", 60)]
)
def test_create_model_takes_patches_that_overlap_at_any_size(name, side):
    pytest.importorskip("timm")
    model = create_model(name, num_classes=5, img_size=side)
    assert model.eval()(torch.zeros(1, 3, side, side)).shape == (1, 5)


def test_own_models_need_torch_only():
    code = """
import sys, vitmix.models
vitmix.models.create_model('cct_2_3x2_32', num_classes=3, img_size=32)
print([n for n in ('timm', 'torchvision', 'transformers', 'lightning') if n in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
