"""The contract of ``MixingModel`` over all plain families."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitmix
from models import NUM_CLASSES, batch
from more_models import MORE_FAMILIES, POSITION_BIASED, logits_of, make_family, unsettle
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
    """Counts fused attention, softmaxes that would stand for it in pieces, and (T, T) products."""

    def __init__(self, tokens: int = 0) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self._tokens = tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kernel in ("scaled_dot_product", "_softmax"):
            self.counts[kernel] += kernel in str(func)
        result = func(*args, **(kwargs or {}))
        if "bmm" in str(func) and result.shape[-2:] == (self._tokens, self._tokens):
            self.counts["square"] += 1
        return result


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_fused_attention_stays_on(family: str) -> None:
    """Following shares calls the kernels that the model alone calls, and makes no matrix more."""
    mixing = make(family, "tl-align").train()
    images, targets = batch()
    rows, columns = mixing.backbone.grid((images.shape[2], images.shape[3]))
    tokens = mixing.backbone.num_prefix_tokens + rows * columns
    with Kernels(tokens) as plain:
        mixing.model(images)
    with Kernels(tokens) as mixed:
        mixing(images, targets)
    assert sum(plain.counts.values()) >= mixing.backbone.depth
    # Reads its one row of attention, or makes weights of the scores.
    pools = mixing.backbone.pooling in ("attention", "sequence")
    plain.counts["_softmax"] += pools
    assert mixed.counts.pop("square", 0) <= plain.counts.pop("square", 0)
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


CHECKPOINTED = {
    "eva-grouped": "all-but-vertical",
    "hf-beit": "all-but-vertical",
    "hf-data2vec-eager": "everything",
    "hf-clip": "everything",
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
