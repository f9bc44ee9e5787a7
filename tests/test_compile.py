"""Compiled training steps: the numbers of the eager ones, in one graph, compiled once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import staged_models
import vitmix
from contract import hooks, horizontal
from models import NUM_CLASSES, batch, make_cct, make_vit
from more_models import make_huggingface, make_torchvision

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")

# Two blocks each: what costs time here is that each is read in Python.
FAMILIES: dict[str, Callable[[], Any]] = {
    "cct": partial(make_cct, num_layers=2),
    "vit": partial(make_vit, depth=2),
    "torchvision": partial(make_torchvision, 2),
    "hf-vit": partial(make_huggingface, "ViT", num_hidden_layers=2),
    "swin": partial(
        staged_models.make_swin, "swin_tiny_patch4_window7_224", depths=(2, 1), num_heads=(1, 2)
    ),
}
# At chance, cross-entropy is log(7) = 1.95: some samples are easy, some are not.
some = partial(horizontal, tau=1.95)
cutmix = {"mix": vitmix.CutMix()}
aligned = {**cutmix, "labels": vitmix.TokenAlignedLabels()}

TABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "transmix": lambda: {**cutmix, "labels": vitmix.AttentionLabels()},
    "tl-align": lambda: aligned,
    "tokenmixup": lambda: {"tokens": [some(), vitmix.VerticalTokenMixup(block=1)]},
    "everything": lambda: {
        "mix": vitmix.OneOf([vitmix.Mixup(), vitmix.TokenMix()], draw="element"),
        "labels": vitmix.TokenAlignedLabels(),
        "tokens": [some(), vitmix.VerticalTokenMixup(block=1), vitmix.ManifoldMixup(block=0)],
    },
    "all-but-vertical": lambda: {**aligned, "tokens": [some(), vitmix.ManifoldMixup(block=0)]},
}
WITH_VERTICAL = ("tokenmixup", "everything")
CASES = [
    (family, method)
    for family in FAMILIES
    for method in TABLE
    if method not in (WITH_VERTICAL if family == "swin" else ("all-but-vertical",))
]
# One family is enough for these.
MORE: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "cutmix": lambda: cutmix,
    "manifold": lambda: {"tokens": [vitmix.ManifoldMixup(block=(0, 1))]},
    "rollout": lambda: {"tokens": [some(block=0, saliency="rollout")]},
    "gradient": lambda: {"tokens": [some(saliency="gradient")]},
    "random": lambda: {
        "tokens": [some(saliency="random", assignment="random", relabel="area", pool="average")]
    },
    "shares": lambda: {"tokens": [horizontal(tau="auto:0.5", rho="auto:0.5")]},
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(method: str, family: str = "vit") -> vitmix.MixingModel:
    torch.manual_seed(0)
    return vitmix.MixingModel(
        FAMILIES[family](),
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
        generator=torch.Generator().manual_seed(0),
        **{**MORE, **TABLE}[method](),
    ).train()


def inputs(family: str, seed: int) -> tuple[Tensor, Tensor]:
    return staged_models.images_for(family, 6, seed) if family == "swin" else batch(6, seed)


def step(run: Any, mixing: vitmix.MixingModel, images: Tensor, targets: Tensor) -> dict[str, Any]:
    torch.manual_seed(1)
    mixing.zero_grad()
    out = run(images, targets)
    out.loss().backward()
    gradients = {name: p.grad.clone() for name, p in mixing.named_parameters()}  # type: ignore[union-attr]
    return {"loss": out.loss(), "targets": out.targets, **out.stats, **gradients}


def compare(run: Any, compiled: vitmix.MixingModel, eager: vitmix.MixingModel, data: Any) -> Any:
    expected = step(eager, eager, *data)
    found = step(run, compiled, *data)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    return found


def check(family: str, method: str, backend: str) -> None:
    eager, compiled = build(method, family), build(method, family)
    counter = CompileCounterWithBackend(backend)
    compiled.compile(backend=counter, fullgraph=True)
    for seed in range(3):
        compare(compiled, compiled, eager, inputs(family, seed))
    # Where a stage draws its block, there is a graph for each.
    assert 1 <= counter.frame_count <= (2 if method == "manifold" else 1)
    assert hooks(compiled.model) == 0
    assert type(compiled.model) is type(eager.model)
    assert list(compiled.model.state_dict()) == list(eager.model.state_dict())


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_step_is_one_graph_with_the_numbers_of_the_eager_step(family: str, method: str) -> None:
    check(family, method, "eager")


@pytest.mark.parametrize("method", MORE)
def test_other_methods(method: str) -> None:
    check("vit", method, "eager")


def test_gradients_through_the_compiler() -> None:
    check("vit", "tokenmixup", "aot_eager")


def test_however_many_samples_are_easy() -> None:
    eager, compiled = build("tokenmixup"), build("tokenmixup")
    for mixing in (eager, compiled):
        stage: Any = mixing.tokens[0]
        nn.init.zeros_(stage.scorenet.fc.weight)
        stage.scorenet.fc.bias.data[0] = 5.0  # the first class is easy, the others are not
    counter = CompileCounterWithBackend("eager")
    compiled.compile(backend=counter, fullgraph=True)
    images, _ = batch()
    for easy in (0, 2, 6, 1):
        targets = (torch.arange(6) >= easy).long()
        found = compare(compiled, compiled, eager, (images, targets))
        assert found["horizontal_1/mixed_samples"] == easy
    assert counter.frame_count == 1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_around_it(fullgraph: bool) -> None:
    """``torch.compile(mixing)`` compiles the same; evaluation is the compiled model."""
    eager, mixing = build("tokenmixup"), build("tokenmixup")
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(mixing, backend=counter, fullgraph=fullgraph)
    data = batch()
    compare(compiled, mixing, eager, data)
    assert counter.frame_count == 1
    compiled.eval()
    eager.eval()
    torch.testing.assert_close(compiled(data[0]), eager(data[0]))
    assert torch.equal(compiled(*data).targets, eager(*data).targets)
    assert counter.frame_count == 2


def test_other_sizes_of_batches() -> None:
    eager, compiled = build("tokenmixup"), build("tokenmixup")
    compiled.compile(backend="eager", fullgraph=True)
    for size in (6, 4, 5):
        compare(compiled, compiled, eager, batch(size))


def test_copies_of_a_compiled_one_are_not_compiled() -> None:
    eager, compiled = build("tokenmixup"), build("tokenmixup")
    compiled.compile(backend="eager", fullgraph=True)
    compare(compiled, compiled, eager, batch())
    copies = copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for other in copies:
            compare(other, other, copy.deepcopy(eager), batch(5))
    finally:
        torch.compiler.set_stance("default")


def broken(method: str) -> vitmix.MixingModel:
    """One whose model cannot be compiled whole."""
    mixing = build(method)
    model: Any = mixing.model
    kind = type(model.blocks[1])

    class Breaking(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor, **options: Any) -> Any:
            torch._dynamo.graph_break()
            return super().forward(x, **options)

    model.blocks[1].__class__ = Breaking
    return mixing


def checkpointed(method: str) -> vitmix.MixingModel:
    mixing = build(method)
    model: Any = mixing.model
    model.set_grad_checkpointing(True)
    return mixing


@pytest.mark.parametrize("make", [broken, checkpointed])
@pytest.mark.parametrize("inside", [False, True])
def test_what_cannot_be_one_graph_runs_uncompiled(
    make: Callable[[str], vitmix.MixingModel], inside: bool
) -> None:
    eager, compiled = make("tokenmixup"), make("tokenmixup")
    counter = CompileCounterWithBackend("eager")
    compiled.compile(backend=counter)
    if inside:
        compiled.model.compile(backend=counter)
    compare(compiled, compiled, eager, batch())
    assert counter.frame_count == 0
    torch._dynamo.reset()
    compiled.compile(backend=counter, fullgraph=True)
    with pytest.raises(RuntimeError, match=r"graph_break|no compiled frames"):
        compiled(*batch())
    assert hooks(compiled.detach()) == 0


@pytest.mark.parametrize("method", ["cutmix", "tokenmixup", "gradient"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_compiled_by_itself(method: str, whole: bool) -> None:
    """It runs compiled in evaluation and where no stage acts inside, uncompiled elsewhere."""
    eager, mixing = build(method), build(method)
    model: Any = mixing.model
    for module in [model] if whole else model.blocks:
        module.compile(backend="eager")
    images, targets = batch()
    for _ in range(2):
        compare(mixing, mixing, eager, (images, targets))
        torch.testing.assert_close(mixing.eval()(images), eager.eval()(images))
        mixing.train()
        eager.train()


def test_a_function_compiled_around_a_step() -> None:
    eager, mixing = build("tokenmixup"), build("tokenmixup")

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = mixing(images, targets).loss()
        return result

    for seed in range(2):
        torch.manual_seed(seed)
        expected = eager(*batch()).loss()
        torch.manual_seed(seed)
        found = torch.compile(loss, backend="eager")(*batch())
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"mixing\.compile\(\)"):
        torch.compile(loss, backend="eager", fullgraph=True)(*batch())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_an_error_inside_leaves_nothing(fullgraph: bool) -> None:
    mixing = build("tokenmixup")
    model: Any = mixing.model
    mixing.compile(backend="eager", fullgraph=fullgraph)
    block = model.blocks[1]
    model.blocks[1] = nn.Identity()
    with pytest.raises((RuntimeError, vitmix.UnsupportedModelError), match="looked for"):
        mixing(*batch())
    assert hooks(model) == hooks(block) == 0
    assert torch.is_grad_enabled()
