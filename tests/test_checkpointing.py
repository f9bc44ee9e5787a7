"""Gradient checkpointing gives the gradients of a step that keeps its activations."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vitmix
from contract import METHODS, hooks
from models import NUM_CLASSES, batch, make_vit
from more_models import make_huggingface, make_torchvision

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")


def build(method: str, checkpointed: bool, **options: Any) -> vitmix.MixingModel:
    torch.manual_seed(0)
    model: Any = make_vit(drop_path_rate=0.3, proj_drop_rate=0.1, **options)
    model.set_grad_checkpointing(checkpointed)
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        generator=torch.Generator().manual_seed(0),
        **METHODS[method](),
    ).train()


def gradients(mixing: vitmix.MixingModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in mixing.named_parameters() if p.grad is not None}


def require_same_gradients(expected: vitmix.MixingModel, observed: vitmix.MixingModel) -> None:
    wanted, found = gradients(expected), gradients(observed)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_without(method: str) -> None:
    images, targets = batch()
    found = []
    for checkpointed in (False, True):
        mixing = build(method, checkpointed)
        torch.manual_seed(1)
        out = mixing(images, targets)
        out.loss().backward()
        assert hooks(mixing.model) == 0
        found.append((out, gradients(mixing)))
    (plain, expected), (again, observed) = found
    assert torch.equal(plain.logits, again.logits)
    torch.testing.assert_close(plain.targets, again.targets, atol=1e-6, rtol=0)
    assert expected.keys() == observed.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(observed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["horizontal", "vertical", "tl-align", "horizontal-rollout"])
def test_two_steps_before_their_backward(method: str) -> None:
    """Each second pass finds the plans of its own first pass."""
    batches = [batch(6, 1), batch(6, 2)]
    expected = build(method, False)
    observed = build(method, True)
    for mixing in (expected, observed):
        torch.manual_seed(1)
        outs = [mixing(*each) for each in batches]
        for out in outs:
            out.loss().backward()
        assert hooks(mixing.model) == 0
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(observed)[name], gradient, atol=1e-6, rtol=1e-5)


def test_segments_of_several_blocks() -> None:
    from timm.models import checkpoint_seq

    class InPairs(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_seq(list(self.children()), x, every=2)

    images, targets = batch()
    found = []
    for paired in (False, True):
        mixing = build("horizontal", False)
        if paired:
            model: Any = mixing.model
            model.blocks = InPairs(*model.blocks)
            object.__setattr__(mixing.backbone, "recomputes", lambda: True)
        torch.manual_seed(1)
        mixing(images, targets).loss().backward()
        found.append(gradients(mixing))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_frozen_embedding() -> None:
    images, targets = batch()
    found = []
    for checkpointed in (False, True):
        mixing = build("horizontal", checkpointed)
        model: Any = mixing.model
        for parameter in (*model.patch_embed.parameters(), model.cls_token, model.pos_embed):
            parameter.requires_grad_(False)
        torch.manual_seed(1)
        mixing(images, targets).loss().backward()
        assert hooks(mixing.model) == 0
        found.append(gradients(mixing))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


FROZEN: dict[str, Callable[[Any], list[Any]]] = {
    "all but the head": lambda model: [model.head],
    "all but the last block": lambda model: [model.head, model.blocks[-1]],
    "first blocks": lambda model: [model.head, *model.blocks[2:]],
    "all but adapters": lambda model: [model.head, *(block.attn.proj for block in model.blocks)],
}


@pytest.mark.parametrize("trained", FROZEN)
@pytest.mark.parametrize("method", ["tl-align", "horizontal", "vertical", "everything"])
def test_frozen_parts(method: str, trained: str) -> None:
    found = []
    for checkpointed in (False, True):
        mixing = build(method, checkpointed)
        mixing.model.requires_grad_(False)
        for part in FROZEN[trained](mixing.model):
            part.requires_grad_(True)
        torch.manual_seed(1)
        mixing(*batch()).loss().backward()
        assert hooks(mixing.model) == 0
        found.append(mixing)
    require_same_gradients(*found)


def test_frozen_blocks_run_once() -> None:
    mixing = build("horizontal", True)
    model: Any = mixing.model
    model.requires_grad_(False)
    for block in model.blocks[2:]:
        block.requires_grad_(True)
    passes = [0] * len(model.blocks)
    for index, block in enumerate(model.blocks):

        def count(*_: object, index: int = index) -> None:
            passes[index] += 1

        block.mlp.register_forward_pre_hook(count)
    mixing(*batch()).loss().backward()
    assert passes == [1, 1, 2, 2]


def test_only_the_last_block_is_trained_and_mixed_twice_before_the_backward() -> None:
    """A pass waits for its backward pass even if no block is given anything with a graph."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model: Any = make_vit()
        model.set_grad_checkpointing(checkpointed)
        model.requires_grad_(False)
        model.blocks[-1].requires_grad_(True)
        mixing = vitmix.MixingModel(
            model,
            tokens=[vitmix.HorizontalTokenMixup(block=3, tau=math.inf, rho=0.0)],
            num_classes=NUM_CLASSES,
        ).train()
        for out in [mixing(*batch(6, seed)) for seed in (1, 2)]:
            out.loss().backward()
        found.append(mixing)
    require_same_gradients(*found)


@pytest.mark.parametrize("method", ["horizontal", "vertical", "everything"])
@pytest.mark.parametrize("ways", ["twice", "loss by loss", "torch.autograd.grad"])
def test_several_backward_passes_over_one_graph(method: str, ways: str) -> None:
    found = []
    for checkpointed in (False, True):
        mixing = build(method, checkpointed)
        for stage in mixing.tokens:
            stage.stop_gradient = False
        torch.manual_seed(1)
        out = mixing(*batch())
        loss = out.loss()
        if ways == "twice":
            loss.backward(retain_graph=True)
            loss.backward()
        elif ways == "loss by loss":
            if out.aux_loss.requires_grad:
                out.aux_loss.backward(retain_graph=True)
            (loss - out.aux_loss).backward()
        else:
            weights = list(mixing.model.parameters())
            first = torch.autograd.grad(loss, weights, retain_graph=True)
            second = torch.autograd.grad(loss, weights)
            assert all(map(torch.equal, first, second))
            for weight, gradient in zip(weights, first, strict=True):
                weight.grad = gradient
        assert hooks(mixing.model) == 0
        found.append(mixing)
    require_same_gradients(*found)


@pytest.mark.parametrize("method", ["tl-align", "transmix"])
def test_labels_alone_have_nothing_to_repeat(method: str) -> None:
    mixing = build(method, True)
    out = mixing(*batch())
    assert hooks(mixing.model) == 0
    out.loss().backward()


@pytest.mark.parametrize("method", ["horizontal", "vertical"])
def test_graphs_that_are_thrown_away_are_freed(method: str) -> None:
    mixing = build(method, True)
    for stage in mixing.tokens:
        stage.stop_gradient = False
    entered = []
    for block in mixing.backbone.blocks:
        block.module.register_forward_hook(lambda *given: entered.append(weakref.ref(given[2])))
    for _ in range(3):
        mixing(*batch())
        gc.collect()
    assert not any(tokens() is not None for tokens in entered)
    assert len(mixing._replays) == 1


def test_an_error_behind_the_pass_leaves_nothing() -> None:
    mixing = build("manifold", True)
    mixing.num_classes += 1
    with pytest.raises(vitmix.InputError, match="logits"):
        mixing(*batch())
    assert hooks(mixing.model) == 0


def test_a_step_that_is_thrown_away_leaves_nothing() -> None:
    images, targets = batch()
    mixing = build("horizontal", True)
    mixing(images, targets)  # its graph is gone at once
    out = mixing(images, targets)
    out.loss().backward()
    assert hooks(mixing.model) == 0
    kept = mixing(images, targets)
    assert hooks(mixing.model) > 0
    mixing.detach()
    assert hooks(mixing.model) == 0
    assert math.isfinite(float(kept.loss().detach()))


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "timm": (make_vit, "Block"),
    "torchvision": (make_torchvision, "EncoderBlock"),
    "torchvision-attention": (make_torchvision, "MultiheadAttention"),
    "torchvision-encoder": (make_torchvision, "Encoder"),
    "transformers": (lambda: make_huggingface("ViT"), "ViTLayer"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_that_checkpoint(name: str) -> None:
    """Of torch, around any module: models that know no checkpointing themselves have it so."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing as wrap,
    )

    make, kind = WRAPPED[name]
    found = []
    for checkpointed in ("no", "before", "after"):
        torch.manual_seed(0)
        model = make()
        if checkpointed == "before":
            wrap(model, check_fn=lambda part: type(part).__name__ == kind)
        mixing = vitmix.MixingModel(
            model,
            mix=vitmix.CutMix(),
            labels=vitmix.TokenAlignedLabels(),
            tokens=[vitmix.HorizontalTokenMixup(1, tau=5.0), vitmix.VerticalTokenMixup(2, kappa=2)],
            num_classes=NUM_CLASSES,
            generator=torch.Generator().manual_seed(0),
        ).train()
        if checkpointed == "after":
            wrap(model, check_fn=lambda part: type(part).__name__ == kind)
        mixing(*batch()).loss().backward()
        assert hooks(model) == 0
        found.append([parameter.grad for parameter in model.parameters()])
    for expected, *observed in zip(*found, strict=True):
        for gradient in observed:
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["horizontal", "horizontal-gradient"])
def test_the_reentrant_kind_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    mixing = build(method, True)
    model: Any = mixing.model

    def reentrant(blocks: Any, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x

    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_seq", reentrant)
    with pytest.raises(vitmix.UnsupportedModelError, match="use_reentrant=False"):
        mixing(*batch())
    assert hooks(model) == 0
