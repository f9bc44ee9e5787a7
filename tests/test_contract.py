"""The contract of ``MixingModel``: every family, with every method and under training machinery.

Broad tests run every family with the strongest method that it takes (all stages at once), and some
families with every method.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from contract import (
    BROADLY,
    COLUMNS,
    EVERY_FAMILY,
    IN_DEPTH,
    METHODS,
    OUTSIDE,
    blocks_of,
    cell,
    contract,
    hooks,
    images_of,
    make,
    refusal,
    side_of,
    wrap,
)
from more_models import logits_of, unsettle

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")
lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore:.*(dataloader|loops|GPU|deprecated)")

Note = Callable[[str, object], None]

# --- methods


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(cell("Methods", method, family, method) for family in EVERY_FAMILY for method in COLUMNS),
        *((family, method) for family in ("cct", "vit", "hf-vit") for method in OUTSIDE),
        *(case for case in BROADLY if case[1] not in COLUMNS),
    ],
)
def test_step(family: str, method: str, record_property: Note) -> None:
    """A step gives labels that sum to 1, gradients where the model alone has them, and no trace."""
    expected_words = refusal(family, method)
    if expected_words is not None:
        refused(family, method, expected_words, record_property)
        return
    mixing = make(family, method)
    plain = EVERY_FAMILY[family]()
    plain.load_state_dict(mixing.model.state_dict())
    assert type(mixing.model) is type(plain)
    images, targets = images_of(family)
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
    require_gradients_of(mixing, plain)

    assert hooks(mixing.model) == 0
    assert list(mixing.model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(mixing.model.state_dict())  # batch norms have seen other images
    after = logits_of(plain.eval()(images))
    assert torch.equal(logits_of(mixing.eval()(images)), after)
    assert torch.equal(logits_of(mixing.detach()(images)), after)


def require_gradients_of(mixing: vitmix.MixingModel, plain: nn.Module) -> None:
    """Every parameter has a finite gradient, but those that have none in the model alone."""
    unused = {f"model.{name}" for name, value in plain.named_parameters() if value.grad is None}
    for name, parameter in mixing.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert name in unused or parameter.grad.isfinite().all(), name


def refused(family: str, method: str, expected_words: str, record_property: Note) -> None:
    """The refusal comes before the first step, and leaves nothing behind."""
    model = EVERY_FAMILY[family]()
    with pytest.raises(vitmix.UnsupportedModelError, match=expected_words) as error:
        wrap(family, model=model, **METHODS[method](blocks_of(family)))
    assert hooks(model) == 0
    found = re.search(r"found (.*?)(?:\. The model|$)", str(error.value), re.DOTALL)
    assert found is not None
    record_property("contract", f"refused: {found[1]}")


# --- training machinery


def same_step(mixing: vitmix.MixingModel, other: Any, images: Any) -> None:
    """Both do the same from the same generator state."""
    found = []
    for each in (mixing, other):
        torch.manual_seed(1)
        each.generator.manual_seed(1)  # type: ignore[union-attr]
        each.train().zero_grad()
        out = each(*images)
        out.loss().backward()
        found.append((out, [p.grad for p in each.parameters() if p.grad is not None]))
    (first, expected), (second, observed) = found
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.targets, second.targets)
    assert all(map(torch.equal, expected, observed))


def autocast_step(family: str, method: str, device: str, dtype: torch.dtype) -> None:
    """Labels stay float32, and an optimiser can go on from what the loss gives."""
    mixing = make(family, method)
    images, targets = (tensor.to(device) for tensor in images_of(family))
    mixing.to(device).train()
    optimiser = torch.optim.SGD(mixing.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=dtype == torch.float16)
    with torch.autocast(device, dtype=dtype):
        out = mixing(images, targets)
        loss = out.loss()
    assert out.targets.dtype == torch.float32
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(images), device=device))
    assert loss.isfinite()
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    plain = EVERY_FAMILY[family]().to(device).train()
    logits_of(plain(images)).sum().backward()
    require_gradients_of(mixing, plain)
    before = [parameter.detach().clone() for parameter in mixing.parameters()]
    scaler.step(optimiser)
    assert not all(map(torch.equal, before, mixing.parameters()))
    with torch.autocast(device, dtype=dtype):
        assert logits_of(mixing.eval()(images)).isfinite().all()


@contract("bf16 autocast", [*BROADLY, *IN_DEPTH])
def test_bfloat16_autocast(family: str, method: str) -> None:
    autocast_step(family, method, "cpu", torch.bfloat16)


@contract("fp16 autocast")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_float16_autocast(family: str, method: str) -> None:
    autocast_step(family, method, "cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "method"), [*BROADLY, *(("vit", method) for method in METHODS)])
def test_cuda(family: str, method: str, dtype: torch.dtype) -> None:
    autocast_step(family, method, "cuda", dtype)


def through_a_file(mixing: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(mixing, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def copied_step(copied: Callable[[Any], Any], family: str, method: str) -> None:
    """A copy of a mixing model in use is independent of it."""
    mixing = make(family, method).train()
    mixing(*images_of(family)).loss().backward()
    other = copied(mixing)
    same_step(mixing, other, images_of(family, 5))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert any(bool(parameter.any()) for parameter in mixing.parameters())
    same_step(mixing, copied(mixing), images_of(family, 5))


@contract("deepcopy")
def test_deepcopy(family: str, method: str) -> None:
    copied_step(copy.deepcopy, family, method)


@contract("pickle")
def test_pickle(family: str, method: str) -> None:
    copied_step(lambda mixing: pickle.loads(pickle.dumps(mixing)), family, method)


@contract("torch.save")
def test_torch_save(family: str, method: str) -> None:
    copied_step(through_a_file, family, method)


@contract("state_dict", [*BROADLY, *IN_DEPTH])
def test_state_dict(family: str, method: str) -> None:
    """Through a file of weights, of the whole and of the model alone, in both directions."""
    mixing, other = make(family, method), make(family, method, seed=1)
    file = io.BytesIO()
    torch.save(mixing.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_step(mixing, other, images_of(family, 5))
    plain = EVERY_FAMILY[family]()
    plain.load_state_dict(mixing.model.state_dict())
    third = make(family, method, seed=2)
    third.model.load_state_dict(plain.state_dict())
    third.tokens.load_state_dict(mixing.tokens.state_dict())
    same_step(mixing, third, images_of(family, 5))


@contract("timm ModelEmaV3")
def test_timm_average(family: str, method: str) -> None:
    mixing = make(family, method).train()
    optimiser = torch.optim.SGD(mixing.parameters(), lr=0.1)
    ema = timm.utils.ModelEmaV3(mixing, decay=0.75)
    expected = [parameter.detach().clone() for parameter in mixing.parameters()]
    for seed in range(2):
        optimiser.zero_grad()
        mixing(*images_of(family, 4, seed)).loss().backward()
        optimiser.step()
        ema.update(mixing)
        for average, parameter in zip(expected, mixing.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.25)
    for average, parameter in zip(expected, ema.module.parameters(), strict=True):
        torch.testing.assert_close(parameter, average)
    images, _ = images_of(family)
    plain = EVERY_FAMILY[family]()
    plain.load_state_dict(ema.module.model.state_dict())
    assert torch.equal(logits_of(ema(images)), logits_of(plain.eval()(images)))


class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """The least that Lightning trains; keeps the weights that it saw."""

    def __init__(self, mixing: vitmix.MixingModel) -> None:
        super().__init__()
        self.mixing = mixing
        self.stepped: list[list[torch.Tensor]] = []
        self.validated: list[torch.Tensor] = []

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.mixing.parameters()]

    def training_step(self, images: Any, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.mixing(*images).loss()
        return loss

    def on_train_batch_end(self, outputs: Any, images: Any, index: int) -> None:
        self.stepped.append(self.weights())

    def validation_step(self, images: Any, index: int) -> None:
        self.validated = self.weights()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.mixing.parameters(), lr=0.1)


@contract("Lightning averaging")
def test_lightning_exponential_average(family: str, method: str, tmp_path: Path) -> None:
    averaged_training(family, method, "exponential", tmp_path)


@pytest.mark.parametrize("family", ["cct", "vit", "hf-vit"])
def test_lightning_average(family: str, tmp_path: Path) -> None:
    averaged_training(family, "everything", "equal", tmp_path)


def averaged_training(family: str, method: str, kind: str, tmp_path: Path) -> None:
    """Validation sees the average of the weights, and training leaves it in the model."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

    task = Task(make(family, method))
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False,
        callbacks=[WeightAveraging() if kind == "equal" else EMAWeightAveraging(decay=0.75)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    batches = [images_of(family, 4, seed) for seed in range(3)]
    loader = partial(torch.utils.data.DataLoader, batch_size=None)
    trainer.fit(task, loader(batches), loader(batches[:1]))
    average = task.stepped[0]
    for count, weights in enumerate(task.stepped[1:], 2):
        share = 1 / count if kind == "equal" else 0.25
        average = [old.lerp(new, share) for old, new in zip(average, weights, strict=True)]
    assert len(task.stepped) == 3
    torch.testing.assert_close(task.validated, average)
    torch.testing.assert_close(task.weights(), average)
    assert not all(map(torch.equal, task.weights(), task.stepped[-1]))
    images, _ = images_of(family)
    plain = EVERY_FAMILY[family]()
    plain.load_state_dict(task.mixing.model.state_dict())
    assert torch.equal(logits_of(task.mixing.eval()(images)), logits_of(plain.eval()(images)))


@contract("two at once", [*BROADLY, *IN_DEPTH])
def test_two_mixing_models_alive(family: str, method: str) -> None:
    """Two mixing models whose steps overlap share nothing."""
    images = [images_of(family, 4, seed) for seed in range(2)]
    alone, together = [], [make(family, method, seed).train() for seed in range(2)]
    for seed in range(2):
        mixing = make(family, method, seed).train()
        torch.manual_seed(seed)
        out = mixing(*images[seed])
        out.loss().backward()
        alone.append((out, [p.grad for p in mixing.parameters()]))
    outs = []
    for seed, mixing in enumerate(together):
        torch.manual_seed(seed)
        outs.append(mixing(*images[seed]))
    for out in outs:
        out.loss().backward()
    for (expected, gradients), out, mixing in zip(alone, outs, together, strict=True):
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.targets, expected.targets)
        for gradient, parameter in zip(gradients, mixing.parameters(), strict=True):
            assert gradient is parameter.grad or torch.equal(gradient, parameter.grad)
    storages = [{p.data_ptr() for p in mixing.parameters() if p.numel()} for mixing in together]
    assert not storages[0] & storages[1]


# torch 2.15 corrupts memory in the backward pass of the plain model, on the CPU.
CRASHES_IN_CHANNELS_LAST = ("fastvit",)


@contract("channels last")
def test_channels_last(family: str, method: str, record_property: Note) -> None:
    if family in CRASHES_IN_CHANNELS_LAST:
        record_property("contract", "model: its backward pass crashes in torch")
        return
    images, targets = images_of(family)
    mixing, other = (make(family, method).train() for _ in range(2))
    unsettle(mixing.model)  # no two tokens that rounding could take for each other
    other.load_state_dict(mixing.state_dict())
    for module in (*mixing.modules(), *other.modules()):
        if "batchnorm" in type(module).__name__.lower():
            module.eval()  # of single tokens a batch, it would enlarge what is rounded
    other.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = mixing(images, targets)
    torch.manual_seed(1)
    out = other(images.to(memory_format=torch.channels_last), targets)
    assert out.trace.images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.targets, expected.targets, atol=1e-5, rtol=0)
    out.loss().backward()


@contract("changing image size")
def test_changing_image_size(family: str, method: str, record_property: Note) -> None:
    mixing = make(family, method).train()
    side = side_of(family)
    sizes = ((side * 3 // 2, side), (side, side * 2), (side, side))
    with torch.no_grad():
        try:
            mixing.model(torch.randn(2, 3, *sizes[0]))
        except Exception:
            record_property("contract", "model: takes one size of images")
            return
    for size in sizes:
        images = torch.randn(4, 3, *size)
        out = mixing(images, torch.tensor([0, 1, 2, 3]))
        for index, plan in out.trace.horizontal.items():
            rows, columns = mixing.backbone.block_grid(index, mixing.backbone.grid(size))
            assert plan.replace.shape == (4, rows * columns)
        torch.testing.assert_close(out.targets.sum(1), torch.ones(4))
        out.loss().backward()


def checkpoint_gradients(model: Any) -> bool:
    """Turn gradient checkpointing on, if the model has it."""
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return True
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError):
        return False
    return True


@contract("gradient checkpointing")
def test_gradient_checkpointing(family: str, method: str, record_property: Note) -> None:
    """Gradients equal those without; transformers runs a layer again inside its hooks."""
    found = []
    for checkpointed in (False, True):
        mixing = make(family, method).train()
        unsettle(mixing.model)  # no two tokens that rounding could take for each other
        if checkpointed and not checkpoint_gradients(mixing.model):
            record_property("contract", "model: has no gradient checkpointing")
            return
        assert mixing.backbone.recomputes() is checkpointed
        torch.manual_seed(1)
        mixing(*images_of(family)).loss().backward()
        assert hooks(mixing.model) == 0
        found.append([p.grad for p in mixing.parameters() if p.grad is not None])
    for expected, observed in zip(*found, strict=True):
        torch.testing.assert_close(observed, expected, atol=1e-5, rtol=1e-4)
