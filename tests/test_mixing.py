"""``MixingModel``: what its stages do, what it says, what it refuses. See also `test_contract`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from contract import METHODS, hooks, horizontal, make
from models import FAMILIES, NUM_CLASSES, batch, make_cct, make_vit
from more_models import make_huggingface

pytest.importorskip("timm")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["cct", "vit", "vit-unfused", "deit-distilled"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_and_odd_batches(family: str, method: str, size: int) -> None:
    mixing = make(family, method).train()
    out = mixing(*batch(size))
    torch.testing.assert_close(out.targets.sum(1), torch.ones(size))
    out.loss().backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["cct", "vit"])
def test_soft_targets_give_what_indices_give(family: str, method: str) -> None:
    images, targets = batch()
    first = make(family, method).train()(images, targets)
    soft = torch.nn.functional.one_hot(targets, NUM_CLASSES).float()
    second = make(family, method).train()(images, soft)
    assert torch.equal(first.targets, second.targets)


@pytest.mark.parametrize("method", ["tl-align", "horizontal", "vertical", "everything"])
@pytest.mark.parametrize("family", ["cct", "vit"])
def test_two_mixing_models_on_one_model(family: str, method: str) -> None:
    """Two wrappers of one model don't see each other."""
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    images, targets = batch()

    def wrap(name: str) -> vitmix.MixingModel:
        torch.manual_seed(5)
        return vitmix.MixingModel(
            model,
            num_classes=NUM_CLASSES,
            generator=torch.Generator().manual_seed(0),
            **METHODS[name](),
        ).train()

    alone = wrap(method)(images, targets)
    first, second = wrap(method), wrap("everything")
    second(images, targets)
    out = first(images, targets)
    assert torch.equal(out.logits, alone.logits)
    assert torch.equal(out.targets, alone.targets)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["cct", "vit"])
def test_nothing_left_after_an_exception(family: str, method: str) -> None:
    mixing = make(family, method).train()
    images, targets = batch()

    def fail(module: nn.Module, args: object) -> None:
        raise BrokenError

    last = mixing.backbone.blocks[-1].attention
    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(BrokenError):
        mixing(images, targets)
    handle.remove()
    assert hooks(mixing.model) == 0
    assert not torch.overrides._get_current_function_mode_stack()
    mixing(images, targets).loss().backward()


def test_shares_of_a_prefix_and_kept_prefix_tokens() -> None:
    """Horizontal mixing keeps class and register tokens."""
    mixing = make("vit-registers", "horizontal").train()
    seen: list[torch.Tensor] = []
    norm = mixing.model.blocks[1].norm1  # type: ignore[union-attr, index]
    before = mixing.model.blocks[0]  # type: ignore[union-attr, index]
    handles = [
        before.register_forward_hook(lambda m, a, o: seen.append(o)),
        norm.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
    ]
    mixing(*batch())
    for handle in handles:
        handle.remove()
    entered, mixed = seen[0], seen[-1]
    assert torch.equal(entered[:, :4], mixed[:, :4])
    assert not torch.equal(entered[:, 4:], mixed[:, 4:])


def test_statistics_are_scalars_without_gradient() -> None:
    out = make("cct", "everything").train()(*batch())
    for name, value in out.stats.items():
        assert value.ndim == 0, name
        assert not value.requires_grad, name
    assert out.stats["horizontal_1/mixed_samples"] == 6
    assert out.stats["horizontal_1/mixed_tokens"] > 0


def test_difficulty_gate() -> None:
    """Only samples below tau are mixed; a hard batch is left alone."""
    images, targets = batch()
    hard = vitmix.MixingModel(make_cct(), tokens=[horizontal(tau=0.0)], num_classes=NUM_CLASSES)
    out = hard.train()(images, targets)
    plain = hard.model(images)
    assert torch.equal(out.logits, plain)
    assert out.stats["horizontal_1/mixed_samples"] == 0
    assert out.aux_loss > 0


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_tau_that_label_smoothing_puts_out_of_reach() -> None:
    """A smoothed label has an entropy, below which no cross-entropy is, so no sample is easy."""

    def build(tau: float | str, smoothing: float) -> None:
        stage = horizontal(tau=tau)
        vitmix.MixingModel(
            make_cct(), tokens=[stage], num_classes=NUM_CLASSES, label_smoothing=smoothing
        )

    smoothed = vitmix.functional.smooth_targets(torch.tensor([0]), NUM_CLASSES, 0.2)
    least = float(vitmix.functional.soft_cross_entropy(smoothed.log(), smoothed))
    with pytest.warns(UserWarning, match=r"will mix no sample.*tau is"):
        build(least - 1e-3, 0.2)
    for tau, smoothing in ((least + 1e-3, 0.2), (least - 1e-3, 0.0), ("auto:0.5", 0.2)):
        build(tau, smoothing)


def test_scorenet_stop_gradient() -> None:
    """With stop-gradient, ScoreNet's loss reaches no parameter of the model."""
    for stop in (True, False):
        torch.manual_seed(0)
        mixing = vitmix.MixingModel(
            make_cct(), tokens=[horizontal(stop_gradient=stop)], num_classes=NUM_CLASSES
        ).train()
        mixing(*batch()).aux_loss.backward()
        reached = any(parameter.grad is not None for parameter in mixing.model.parameters())
        assert reached is not stop


@pytest.mark.parametrize("pool", ["average", "attention", "class_token"])
def test_scorenet_pools(pool: str) -> None:
    mixing = vitmix.MixingModel(make_vit(), tokens=[horizontal(pool=pool)], num_classes=NUM_CLASSES)
    mixing.train()(*batch()).loss().backward()


def test_ablations_of_horizontal_mixing() -> None:
    images, targets = batch()
    for options in (
        {"saliency": "random"},
        {"assignment": "random"},
        {"assignment": "greedy"},
        {"assignment": "grouped:2"},
        {"relabel": "area"},
        {"saliency": "rollout", "rollout_steps": 2},
    ):
        mixing = vitmix.MixingModel(
            make_cct(), tokens=[horizontal(**options)], num_classes=NUM_CLASSES
        )
        out = mixing.train()(images, targets)
        plan = out.trace.horizontal[1]
        if options.get("relabel") == "area":
            torch.testing.assert_close(plan.own_weight, 1 - plan.replace.float().mean(1))
        torch.testing.assert_close(out.targets.sum(1), torch.ones(len(images)))


BAD: list[tuple[str, Callable[[], object], str]] = [
    ("block", lambda: make_with([horizontal(block=4)]), r"from 0 to 3 .* got 4"),
    ("vertical block", lambda: make_with([vitmix.VerticalTokenMixup(block=9)]), "got 9"),
    ("vertical at 0", lambda: vitmix.VerticalTokenMixup(block=0), "block 1 or later"),
    ("kappa", lambda: vitmix.VerticalTokenMixup(kappa=0), "kappa"),
    ("part of a token", lambda: vitmix.VerticalTokenMixup(kappa=2.5), "an integer"),
    ("rollout", lambda: make_with([horizontal(saliency="rollout", rollout_steps=3)]), "rollout"),
    ("rho", lambda: horizontal(rho=-1.0), "rho"),
    ("tau", lambda: horizontal(tau=math.nan), "tau"),
    ("saliency", lambda: horizontal(saliency="magic"), "magic"),
    ("alpha", lambda: vitmix.CutMix(alpha=0.0), "alpha"),
    ("prob", lambda: vitmix.CutMix(prob=1.5), "prob"),
    ("draw", lambda: vitmix.CutMix(draw="row"), "draw"),
    ("pairing", lambda: vitmix.CutMix(pairing="best"), "pairing"),
    ("mask", lambda: vitmix.TokenMix(mask="star"), "mask"),
    ("one of none", lambda: vitmix.OneOf([]), "mixer"),
    ("one of classes", lambda: vitmix.OneOf([vitmix.Mixup]), "as PixelMix"),
    ("smoothing", lambda: make_with([], label_smoothing=1.0), "label_smoothing"),
    ("classes", lambda: make_with([], num_classes=1), "num_classes"),
    ("mix kind", lambda: make_with([], mix="cutmix"), "mix"),
    ("labels kind", lambda: make_with([], labels="area"), "labels"),
    ("tokens kind", lambda: make_with(["htm"]), "tokens"),
    ("stage without a deed", lambda: make_with([vitmix.TokenStage()]), "TokenMixer or Vertical"),
    ("no list of tokens", lambda: make_with(None), "tokens"),
    ("class token", lambda: make_with([horizontal(pool="class_token")]), "class token"),
    ("one block", lambda: make_with([horizontal(), horizontal(tau=1.0)]), "two .* at block 1"),
    (
        "blocks that overlap",
        lambda: make_with([vitmix.ManifoldMixup((0, 1)), vitmix.ManifoldMixup((2, 1))]),
        "one ManifoldMixup a block",
    ),
]


def make_with(tokens: Any, **options: Any) -> vitmix.MixingModel:
    arguments = {"num_classes": NUM_CLASSES, **options}
    return vitmix.MixingModel(make_cct(), tokens=tokens, **arguments)


@pytest.mark.parametrize(("build", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(vitmix.InputError, match=message):
        build()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 7]), "0 to 6, got 7"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), "got -1"),
        (torch.full((6, NUM_CLASSES), 0.5), "sum to 1"),
        (torch.tensor([[1.5, -0.5] + [0.0] * 5] * 6), "at least 0"),
        (torch.zeros(6, 3), "targets"),
        (torch.zeros(6), "integer"),
        (torch.zeros(5, dtype=torch.long), "as many targets"),
        (torch.tensor(3), "as many targets"),
        (None, "targets in training"),
    ],
)
def test_bad_targets(targets: torch.Tensor | None, message: str) -> None:
    mixing = make("cct", "everything").train()
    with pytest.raises(vitmix.InputError, match=message):
        mixing(batch()[0], targets)
    assert hooks(mixing.model) == 0


@pytest.mark.parametrize("method", ["horizontal", "cutmix"])
def test_an_empty_batch(method: str) -> None:
    images, targets = batch()
    with pytest.raises(vitmix.InputError, match="at least one"):
        make("cct", method).train()(images[:0], targets[:0])


def test_kappa_beyond_the_tokens() -> None:
    stage = vitmix.VerticalTokenMixup(block=2, kappa=65)
    with pytest.raises(vitmix.InputError, match="64 tokens"):
        make_with([stage]).train()(*batch())


def test_wrong_number_of_classes() -> None:
    mixing = make_with([], num_classes=5).train()
    with pytest.raises(vitmix.InputError, match="logits"):
        mixing(batch()[0], torch.zeros(6, dtype=torch.long))


def test_a_single_stage_and_an_iterator_of_stages() -> None:
    expected = make_with([horizontal()]).tokens
    assert repr(make_with(horizontal()).tokens) == repr(expected)
    assert repr(make_with(iter([horizontal()])).tokens) == repr(expected)


def test_stages_are_of_floating_point_beside_quantised_weights() -> None:
    model = make_cct()
    model.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.uint8), False))
    assert not next(model.parameters()).is_floating_point()
    mixing = vitmix.MixingModel(model, tokens=horizontal(), num_classes=NUM_CLASSES)
    assert {parameter.dtype for parameter in mixing.tokens.parameters()} == {torch.float32}
    mixing.train()(*batch()).loss().backward()


def test_a_model_without_parameters() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mixing = vitmix.MixingModel(pooled, mix=vitmix.CutMix(), num_classes=3).train()
    mixing(torch.rand(2, 3, 8, 8), torch.tensor([0, 2])).loss()


def test_a_stage_belongs_to_one_model() -> None:
    stage = horizontal()
    make_with([stage])
    with pytest.raises(vitmix.InputError, match="its own"):
        make_with([stage])


def test_a_stage_can_be_used_again_after_a_refusal() -> None:
    first, second = horizontal(), horizontal(block=2, pool="class_token")
    with pytest.raises(vitmix.InputError, match="class token"):
        make_with([first, second])
    with pytest.raises(vitmix.InputError, match="twice"):
        make_with([first, first])
    make_with([first]).train()(*batch()).loss().backward()


def test_gradient_saliency_of_samples_without_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a cross-entropy of 1e-5 the gradient, by itself, is below what float16 tells from 0."""
    torch.manual_seed(0)
    model, (images, _) = make_vit(), batch()
    model.head.weight.data.mul_(60)  # type: ignore[union-attr, operator]
    targets = torch.eye(NUM_CLASSES)[model(images).argmax(1)]

    def found() -> torch.Tensor:
        backbone = vitmix.describe(model)
        return vitmix.gradient.gradient_saliency(model, backbone, 1, images, targets)

    wide = found()
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(found(), wide, atol=1e-3, rtol=0)
    monkeypatch.setattr(vitmix.gradient, "SCALE", 1.0)
    assert torch.equal(found(), wide)


def test_gradient_saliency_of_two_blocks() -> None:
    stages = [horizontal(block=block, saliency="gradient") for block in (1, 2)]
    out = make_with(stages).train()(*batch())
    assert sorted(out.trace.horizontal) == [1, 2]


def test_unsupported_models_are_refused_untouched() -> None:
    from timm.models.vision_transformer import DiffParallelScalingBlock

    models = [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 7)),
        make_vit(block_fn=DiffParallelScalingBlock),
        make_vit(patch_drop_rate=0.2),
    ]
    for model in models:
        keys = list(model.state_dict())
        for options in ({"labels": vitmix.TokenAlignedLabels()}, {"tokens": [horizontal()]}):
            with pytest.raises(vitmix.UnsupportedModelError, match=r"(?i)looked for .* found"):
                vitmix.MixingModel(model, num_classes=NUM_CLASSES, **options)
        assert hooks(model) == 0
        assert list(model.state_dict()) == keys
    with pytest.raises(vitmix.UnsupportedModelError, match="pooling"):
        vitmix.MixingModel(
            make_vit(global_pool="max"),
            labels=vitmix.TokenAlignedLabels(),
            num_classes=NUM_CLASSES,
        )


@pytest.mark.parametrize("method", ["none", "mixup", "cutmix", "tokenmix", "tokenmix-teacher"])
def test_pixels_of_any_classifier_can_be_mixed(method: str) -> None:
    convolutions = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES)
    )
    mixing = vitmix.MixingModel(convolutions, num_classes=NUM_CLASSES, **METHODS[method]())
    out = mixing.train()(*batch())
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(out.targets)))
    out.loss().backward()


@pytest.mark.parametrize("mix", [vitmix.CutMix(), vitmix.TokenMix(mask="random"), vitmix.Mixup()])
@pytest.mark.parametrize("draw", ["batch", "element"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_shares_are_those_of_patches_where_an_image_is_cropped(
    mix: vitmix.pixels.PixelMix, draw: Any, library: str
) -> None:
    """At 38 pixels, 4 patches of 8 a side; the last 6 pixels are not seen."""
    huggingface = partial(make_huggingface, "Dinov2", use_mask_token=False)
    model = make_vit(img_size=38) if library == "timm" else huggingface()
    mix = vitmix.OneOf([mix], draw=draw)
    mixing = vitmix.MixingModel(model, mix=mix, num_classes=NUM_CLASSES).train()
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 38, 38).contiguous()
    out = mixing(images, torch.arange(6), record=True)
    mixture = out.trace.record.evidence.mixture
    patches = nn.functional.avg_pool2d(out.trace.images[:, :1], 8).flatten(1)
    expected = (mixture.shares[:, 1:] * mixture.sources[:, None]).sum(2)
    torch.testing.assert_close(patches, expected)
    assert torch.equal(out.trace.images[..., 32:], images[..., 32:])


def test_a_block_without_attention_is_an_error() -> None:
    """A hook or a tap that sees nothing is never a silent no-op."""
    model = make_vit()
    model.blocks[2].attn = nn.Identity()  # type: ignore[union-attr, index, operator]
    model.blocks[2].attn.forward = lambda x, **_: x  # type: ignore[union-attr, index]
    mixing = vitmix.MixingModel(
        model, mix=vitmix.CutMix(), labels=vitmix.TokenAlignedLabels(), num_classes=NUM_CLASSES
    )
    with pytest.raises(vitmix.UnsupportedModelError, match="block 2"):
        mixing.train()(*batch())
    assert hooks(model) == 0


def test_replicas_of_data_parallel_only_predict() -> None:
    mixing = make("cct", "cutmix").train()
    replica: Any = mixing._replicate_for_data_parallel()  # what nn.DataParallel runs in threads
    replica.model = mixing.model
    with pytest.raises(vitmix.UnsupportedModelError, match=r"DistributedDataParallel .* torchrun"):
        replica(*batch())
    images, _ = batch()
    assert torch.equal(replica.eval()(images), mixing.eval()(images))


def test_distilled_training_uses_both_heads() -> None:
    mixing = make("deit-distilled", "tl-align").train()
    mixing.model.set_distilled_training(True)  # type: ignore[operator]
    out = mixing(*batch())
    assert isinstance(out.logits, tuple)
    out.loss().backward()


def test_evaluation_with_targets() -> None:
    mixing = make("cct", "everything").eval()
    images, targets = batch()
    out = mixing(images, targets)
    assert torch.equal(out.logits, mixing.model(images))
    assert torch.equal(out.targets.argmax(1), targets)
    assert out.aux_loss == 0


def test_channels_last_and_non_square_input() -> None:
    from vitmix.models.cct import CCT

    model = CCT(
        num_layers=2, num_heads=2, mlp_ratio=1, embed_dim=32, num_classes=7, img_size=(32, 48)
    )
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.TokenMix(),
        labels=vitmix.TokenAlignedLabels(),
        tokens=[horizontal()],
        num_classes=7,
    ).train()
    images = torch.randn(3, 3, 32, 48).to(memory_format=torch.channels_last)
    out = mixing(images, torch.tensor([1, 2, 3]))
    assert out.trace.images.is_contiguous(memory_format=torch.channels_last)
    out.loss().backward()


def test_attention_dropout_leaves_labels_alone() -> None:
    """Shares see attention before dropout."""
    torch.manual_seed(0)
    state = make_cct().state_dict()
    images, targets = batch()
    found = []
    for rate in (0.0, 0.5):
        model = make_cct(attention_dropout=rate)
        model.load_state_dict(state)
        # One block: behind it, tokens differ by dropout, and so would attention.
        model.classifier.blocks = model.classifier.blocks[:1]  # type: ignore[union-attr]
        mixing = vitmix.MixingModel(
            model,
            mix=vitmix.CutMix(),
            labels=vitmix.TokenAlignedLabels(),
            num_classes=NUM_CLASSES,
            generator=torch.Generator().manual_seed(0),
        ).train()
        out = mixing(images, targets)
        found.append(out.trace.weights)
    # Pooling weights come from tokens that dropout changed; the total is the same up to that.
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0)
