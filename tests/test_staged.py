"""Models with stages and windows: aligned labels against brute force, and the whole contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from contract import hooks, horizontal, images_of
from models import NUM_CLASSES
from more_models import MORE_FAMILIES, logits_of, unsettle
from recorders import CallRecorder
from staged_models import STAGED, images_for, make_maxxvit
from test_families import Kernels
from vitmix.functional.reach import Reach

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")


def methods(family: str) -> dict[str, Callable[[], dict[str, Any]]]:
    staged = STAGED[family]

    def everything() -> dict[str, Any]:
        tokens = [horizontal(block=staged.block), vitmix.ManifoldMixup(block=staged.block)]
        if staged.vertical is not None:
            tokens.append(vitmix.VerticalTokenMixup(block=staged.vertical, kappa=2))
        return {
            "mix": vitmix.OneOf([vitmix.Mixup(), vitmix.TokenMix()], draw="element"),
            "labels": vitmix.TokenAlignedLabels(),
            "tokens": tokens,
        }

    return {
        "tl-align": lambda: {"mix": vitmix.CutMix(), "labels": vitmix.TokenAlignedLabels()},
        "transmix": lambda: {"mix": vitmix.CutMix(), "labels": vitmix.AttentionLabels()},
        "horizontal": lambda: {"tokens": [horizontal(block=staged.block)]},
        "everything": everything,
    }


METHODS = ["tl-align", "transmix", "horizontal", "everything"]


def make(family: str, method: str) -> vitmix.MixingModel:
    torch.manual_seed(0)
    model = STAGED[family].make()
    unsettle(model)
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
        generator=torch.Generator().manual_seed(0),
        **methods(family)[method](),
    )


# Brute force, from the definition.


def merge(
    labels: torch.Tensor, prefix: int, old: Any, new: Any, stride: Any = None
) -> torch.Tensor:
    """Labels of merged tokens: the mean over the cell of each, cut off at the border."""
    if old == new:
        return labels
    stride = stride or (-(-old[0] // new[0]), -(-old[1] // new[1]))
    grid = labels[:, prefix:].reshape(len(labels), *old, -1)
    cells = [
        grid[:, r * stride[0] : (r + 1) * stride[0], c * stride[1] : (c + 1) * stride[1]].mean(
            (1, 2)
        )
        for r in range(new[0])
        for c in range(new[1])
    ]
    return torch.cat([labels[:, :prefix], torch.stack(cells, 1)], 1)


def head_mean(backbone: Any, index: int, attention: torch.Tensor) -> torch.Tensor:
    """Mean over heads ``(B', N, M)`` of a recorded map, by where its heads are."""
    block = backbone.blocks[index]
    if block.heads:
        attention = attention.reshape(-1, block.heads, *attention.shape[1:])
    if block.heads_first:
        return attention.mean(1).flatten(0, 1)
    return attention.mean(-3).flatten(0, -3)


def tables(reach: Any) -> list[tuple[list[int], list[int]]]:
    """Queries and keys of each window, by number."""
    queries = reach.windows if reach.query_windows is None else reach.query_windows
    return list(zip(queries.tolist(), reach.windows.tolist(), strict=True))


def dense(reach: Any, mean: torch.Tensor, size: int) -> torch.Tensor:
    """The explicit matrix of tokens by tokens, from attention within windows."""
    if reach.windows is None:
        return mean
    rows, columns = reach.queries or reach.grid
    matrix = mean.new_zeros(size, rows * columns + 1, reach.grid[0] * reach.grid[1] + 1)
    mean = mean.reshape(size, -1, *mean.shape[-2:])
    for w, (queries, keys) in enumerate(tables(reach)):
        for place, query in enumerate(queries):
            matrix[:, query, keys] = mean[:, w, place]
    matrix = matrix[:, :-1, :-1]
    return matrix / matrix.sum(-1, keepdim=True)


def saliency_of(reach: Any, backbone: Any, mean: torch.Tensor, size: int) -> torch.Tensor:
    """Eq. 3 on the explicit matrix, padding included; a reduced key's is divided evenly."""
    prefix, (rows, columns) = reach.num_prefix_tokens, reach.grid
    if reach.windows is not None:
        result = (reach.queries or reach.grid)[0] * (reach.queries or reach.grid)[1]
        out = mean.new_zeros(size, rows * columns + 1)
        mean = mean.reshape(size, -1, *mean.shape[-2:])
        for w, (queries, keys) in enumerate(tables(reach)):
            real = [place for place, query in enumerate(queries) if query < result]
            for place, key in enumerate(keys):
                out[:, key] += mean[:, w, real, place].sum(1) / result
        return out[:, :-1]
    row = mean[:, 0, prefix:] if backbone.reads_class_token else mean[:, prefix:, prefix:].mean(1)
    if reach.keys is None:
        return row
    stride = reach.cell or (-(-rows // reach.keys[0]), -(-columns // reach.keys[1]))
    out = row.new_zeros(size, rows, columns)
    for key in range(row.shape[1]):
        r, c = divmod(key, reach.keys[1])
        cell = out[:, r * stride[0] : (r + 1) * stride[0], c * stride[1] : (c + 1) * stride[1]]
        cell += (row[:, key] / (cell.shape[1] * cell.shape[2]))[:, None, None]
    return out.flatten(1)


def enlarged(labels: torch.Tensor, old: Any, new: Any) -> torch.Tensor:
    """Labels of a coarser grid for each token of a finer one."""
    stride = (-(-new[0] // old[0]), -(-new[1] // old[1]))
    cells = labels.reshape(len(labels), *old, -1)
    tokens = [
        cells[:, r // stride[0], c // stride[1]] for r in range(new[0]) for c in range(new[1])
    ]
    return torch.stack(tokens, 1)


def brute_force(
    mixing: vitmix.MixingModel, out: vitmix.MixOutput, recorder: Any, soft: torch.Tensor
) -> torch.Tensor:
    """Dense labels through explicit attention matrices."""
    backbone, size = mixing.backbone, len(soft)
    prefix = backbone.num_prefix_tokens
    side = out.trace.images.shape[2]
    grid = first = backbone.grid((side, side))
    plan = out.trace.pixels
    own = plan.cells(grid).expand(size, -1, -1).flatten(1)[..., None]
    labels = own * soft[:, None] + (1 - own) * soft[plan.partner][:, None]
    labels = torch.cat([labels.mean(1, keepdim=True).expand(-1, prefix, -1), labels], 1)
    verticals = [s for s in mixing.tokens if isinstance(s, vitmix.VerticalTokenMixup)]
    kept: list[torch.Tensor] = []
    for index, block in enumerate(backbone.blocks):
        now = backbone.block_grid(index, first)
        labels, grid = merge(labels, prefix, grid, now), now
        plan = out.trace.horizontal.get(index)
        if plan is not None:
            replace = nn.functional.pad(plan.replace, (prefix, 0))[..., None]
            labels = torch.where(replace, labels[plan.partner], labels)
        blend = out.trace.blended.get(index)
        if blend is not None:
            weight = blend.own_weight[:, None, None]
            labels = weight * labels + (1 - weight) * labels[blend.partner]
        reach = backbone.reach(index, grid)
        mean = head_mean(backbone, index, recorder.attention[index])
        keys = merge(labels, prefix, grid, reach.keys, reach.cell) if reach.keys else labels
        if any(stage.block == index for stage in verticals):
            keys = torch.cat([labels, *kept], 1)
        for stage in verticals:
            if index < stage.block and backbone.stage(index) == backbone.stage(stage.block):
                saliency = saliency_of(reach, backbone, mean, size)
                top = saliency.argsort(dim=1, descending=True)[:, : stage.kappa] + prefix
                kept.append(torch.stack([labels[i, top[i]] for i in range(size)]))
        attended = dense(reach, mean, size)[:, : labels.shape[1]] @ keys
        own_labels = labels
        if reach.queries and reach.restored:
            attended = enlarged(attended, reach.queries, grid)
        elif reach.queries:
            own_labels, grid = merge(labels, prefix, grid, reach.queries), reach.queries
        labels = (attended + own_labels) / 2 if block.residual else attended
    return pooled(backbone, labels, recorder)


def pooled(backbone: Any, labels: torch.Tensor, recorder: Any) -> torch.Tensor:
    prefix = backbone.num_prefix_tokens
    if backbone.pooling == "class_token":
        return labels[:, 0]
    if backbone.pooling == "distilled":
        return labels[:, :2].mean(1)
    if backbone.pooling == "class_attention":
        token = labels.mean(1)
        for row in recorder.rows:
            seen = torch.cat([token[:, None], labels], 1)
            token = ((row.mean(1)[:, 0, :, None] * seen).sum(1) + token) / 2
        return token
    if backbone.pooling == "sequence":
        return (labels * recorder.scores.detach().softmax(1)).sum(1)
    assert backbone.pooling == "average"
    return labels[:, prefix:].mean(1)


@pytest.mark.parametrize("family", STAGED)
@pytest.mark.parametrize("method", ["tl-align", "everything"])
def test_aligned_labels_equal_dense_labels(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixing = make(family, method).train()
    images, targets = images_for(family)
    recorder = CallRecorder(mixing, monkeypatch)
    out = mixing(images, targets)
    recorder.close()
    soft = vitmix.functional.smooth_targets(targets, NUM_CLASSES, 0.1)
    expected = brute_force(mixing, out, recorder, soft)
    torch.testing.assert_close(out.targets, expected, atol=1e-5, rtol=0)
    if method == "tl-align":
        plan = out.trace.pixels
        area = vitmix.functional.mix_targets(soft, plan.partner, plan.lam)
        assert (out.targets - area).abs().max() > 1e-4


@pytest.mark.parametrize("family", STAGED)
def test_attention_labels_equal_explicit_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixing = make(family, "transmix").train()
    images, targets = images_for(family)
    recorder = CallRecorder(mixing, monkeypatch)
    out = mixing(images, targets)
    recorder.close()
    backbone, last = mixing.backbone, mixing.backbone.depth - 1
    first = backbone.grid((images.shape[2], images.shape[3]))
    grid = backbone.block_grid(last, first)
    mean = head_mean(backbone, last, recorder.attention[last])
    row = saliency_of(backbone.reach(last, grid), backbone, mean, len(images))
    row = row / row.sum(1, keepdim=True)
    plan = out.trace.pixels
    own = plan.cells(first).expand(len(images), -1, -1).flatten(1)[..., None]
    steps = [backbone.block_grid(index, first) for index in range(backbone.depth)]
    for old, new in zip([first, *steps], steps, strict=False):
        own = merge(own, 0, old, new)
    own = (row * own[..., 0]).sum(1)
    torch.testing.assert_close(out.trace.weights[:, 0], own, atol=1e-6, rtol=0)


@torch.no_grad()
def make_pointwise(model: nn.Module) -> None:
    """Leave of each convolution that keeps the grid nothing but its centre."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.stride == (1, 1):
            centre = torch.zeros_like(part.weight)
            rows, columns = (side // 2 for side in part.kernel_size)
            centre[:, :, rows, columns] = 1
            part.weight.mul_(centre)


@pytest.mark.parametrize("family", STAGED)
def test_tokens_reach_what_the_table_says(family: str) -> None:
    """Change one token in front of a block: of the others, only those in its window change."""
    model = STAGED[family].make().eval()
    unsettle(model)
    make_pointwise(model)
    backbone = vitmix.describe(model)
    seen: dict[int, Any] = {}
    handles = [
        block.attention.register_forward_pre_hook(
            lambda m, a, k, index=index: seen.update({index: (a, k)}), with_kwargs=True
        )
        for index, block in enumerate(backbone.blocks)
    ]
    entered: dict[int, Any] = {}
    handles += [
        block.module.register_forward_pre_hook(
            lambda m, a, k, index=index: entered.update({index: (a, k)}), with_kwargs=True
        )
        for index, block in enumerate(backbone.blocks)
    ]
    images, _ = images_for(family, 1)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    first = backbone.grid((images.shape[2], images.shape[3]))
    for index, block in enumerate(backbone.blocks):
        args, kwargs = entered[index]
        reach = backbone.reach(index, backbone.block_grid(index, first))
        if reach.windows is None:
            continue
        flat = block.flatten(args[0])
        spreads = False
        follower = backbone.blocks[min(index + 1, backbone.depth - 1)]
        for token in (0, flat.shape[1] // 2 + 1, flat.shape[1] - 1):
            changed = flat.clone()
            changed[:, token] += torch.randn_like(changed[:, token])
            outputs = []
            with torch.no_grad():
                for tokens in (flat, changed):
                    given = block.restore(tokens, args[0])
                    output = block.module(given, *args[1:], **kwargs)
                    output = output[0] if isinstance(output, tuple) else output
                    same = output.shape[1:-1] == args[0].shape[1:-1]
                    outputs.append((block if same else follower).flatten(output))
            moved = (outputs[0] - outputs[1]).abs().amax((0, 2)) > 1e-7
            result = reach.queries or reach.grid
            step = reach.grid[1] // result[1]
            row, column = divmod(token, reach.grid[1])
            allowed = {row // step * result[1] + column // step}
            for queries, keys in tables(reach):
                allowed |= set(queries) if token in keys else set()
            assert set(moved.nonzero().flatten().tolist()) <= allowed
            spreads |= bool(moved.sum() > 1) or len(allowed) == 1
        assert spreads  # one token alone may see nothing but padding


# The contract.


@pytest.mark.parametrize("family", STAGED)
@pytest.mark.parametrize("method", METHODS)
def test_step(family: str, method: str) -> None:
    """A step gives labels that sum to 1, gradients everywhere, and leaves no trace."""
    mixing = make(family, method)
    plain = STAGED[family].make()
    plain.load_state_dict(mixing.model.state_dict())
    images, targets = images_for(family)
    before = logits_of(plain.eval()(images))
    assert torch.equal(logits_of(mixing.eval()(images)), before)
    out = mixing.train()(images, targets)
    plain_output = plain.train()(images)
    assert type(out.output) is type(plain_output)
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(images)))
    assert (out.targets >= 0).all()
    out.loss().backward()
    logits_of(plain_output).sum().backward()
    unused = {f"model.{name}" for name, value in plain.named_parameters() if value.grad is None}
    for name, parameter in mixing.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert name in unused or parameter.grad.isfinite().all(), name
    if method in ("horizontal", "everything"):
        assert out.trace.horizontal[STAGED[family].block].replace.any()
    assert hooks(mixing.model) == 0
    assert list(mixing.model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", STAGED)
def test_following_shares_changes_nothing_else(family: str) -> None:
    """Logits and gradients are those of the plain model on the mixed images."""
    mixing = make(family, "tl-align")
    plain = copy.deepcopy(mixing.model).train()
    torch.manual_seed(1)
    out = mixing.train()(*images_for(family))
    torch.manual_seed(1)
    logits = logits_of(plain(out.trace.images))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)
    out.loss().backward()
    vitmix.functional.soft_cross_entropy(logits, out.targets).backward()
    for (name, found), expected in zip(
        mixing.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", STAGED)
def test_the_kernels_stay_the_same(family: str) -> None:
    """Following shares calls attention kernels as often as the model alone, none less fused."""
    mixing = make(family, "tl-align").train()
    images, targets = images_for(family)
    with Kernels() as plain:
        mixing.model(images)
    with Kernels() as mixed:
        mixing(images, targets)
    pools = {"attention": 1, "class_attention": mixing.backbone.class_layers}
    plain.counts["_softmax"] += pools.get(mixing.backbone.pooling, 0)
    assert mixed.counts.total() <= plain.counts.total()
    assert mixed.counts["_softmax"] <= plain.counts["_softmax"]


def test_a_plain_pass_before_the_backward_pass_is_not_mixed() -> None:
    """The same images tell no second pass, which begins from them, from another pass."""
    mixing = make("hf-pvt-v2", "horizontal").train()
    model: Any = mixing.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = copy.deepcopy(model)
    images, targets = images_for("hf-pvt-v2")
    out = mixing(images, targets)
    torch.manual_seed(1)
    found = model(images).logits
    torch.manual_seed(1)
    assert torch.equal(found, plain(images).logits)
    out.loss().backward()
    assert hooks(model) == 0


@pytest.mark.parametrize("family", STAGED)
def test_vertical_mixing(family: str) -> None:
    staged = STAGED[family]
    if staged.vertical is not None:
        stage = vitmix.VerticalTokenMixup(block=staged.vertical, kappa=2)
        mixing = vitmix.MixingModel(staged.make(), tokens=[stage], num_classes=NUM_CLASSES)
        mixing.train()(*images_for(family)).loss().backward()
        return
    model = staged.make()
    with pytest.raises(vitmix.UnsupportedModelError, match="The model was not changed"):
        vitmix.MixingModel(
            model, tokens=[vitmix.VerticalTokenMixup(block=1)], num_classes=NUM_CLASSES
        )
    assert hooks(model) == 0


@pytest.mark.parametrize("saliency", ["attention", "gradient"])
def test_looking_ahead_leaves_running_statistics(saliency: str) -> None:
    """Batch normalisation counts a step once."""
    stage = vitmix.HorizontalTokenMixup(block=1, saliency=saliency)
    mixing = vitmix.MixingModel(STAGED["coatnet"].make(), tokens=[stage], num_classes=NUM_CLASSES)
    mixing.train()(*images_for("coatnet"))
    counts = [b for name, b in mixing.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 1 for count in counts)


@pytest.mark.parametrize("family", ["efficientvit", "parallel-attentions"])
def test_saliency_of_a_block_is_the_mean_of_its_attentions(family: str) -> None:
    """A look ahead at the tokens of a block finds what is read while they pass."""
    torch.manual_seed(0)
    model = STAGED[family].make() if family in STAGED else MORE_FAMILIES[family]()
    unsettle(model)
    assert vitmix.describe(model).blocks[0].attentions == 2
    stage = vitmix.HorizontalTokenMixup(block=0, tau=-1.0)  # mixes nothing
    labels = vitmix.AttentionLabels(block=0)
    mixing = vitmix.MixingModel(model, labels=labels, tokens=stage, num_classes=NUM_CLASSES)
    trace = mixing.train()(*images_of(family), record=True).trace
    assert trace.record is not None
    torch.testing.assert_close(trace.saliency[0], trace.record.evidence.attention)


def test_two_attentions_side_by_side_are_refused() -> None:
    model = make_maxxvit(("PM",), (1,))
    with pytest.raises(vitmix.UnsupportedModelError, match="found one within windows beside"):
        vitmix.describe(model)


def test_keys_that_are_averages_row_by_row() -> None:
    reach = Reach((4, 4), keys=(1, 4), cell=(1, 4), flat_keys=True)
    shares = torch.rand(2, 16, 3)
    averages = shares.reshape(2, 4, 4, 3).mean(2)
    torch.testing.assert_close(reach.key_shares(shares), averages)
    saliency = torch.rand(2, 4)
    torch.testing.assert_close(reach.image_saliency(saliency), saliency.repeat_interleave(4, 1) / 4)


@pytest.mark.parametrize("side", [224, 256, 320])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_pooled_keys_are_those_of_the_models_own_pool(library: str, side: int) -> None:
    """PVT v2 with linear attention averages to 7 x 7 keys, in cells that may overlap."""
    backbone = vitmix.describe(linear_pvt(library))
    first = backbone.grid((side, side))
    for index, block in enumerate(backbone.blocks):
        grid = backbone.block_grid(index, first)
        shares = torch.rand(2, grid[0] * grid[1], 2, requires_grad=True)
        maps = shares.transpose(1, 2).unflatten(2, grid)
        expected = block.attention.pool(maps).flatten(2).transpose(1, 2)
        reach = backbone.reach(index, grid)
        torch.testing.assert_close(reach.key_shares(shares), expected)
        saliency = torch.rand(2, 49)
        (spread,) = torch.autograd.grad(expected, shares, saliency[..., None].expand(-1, -1, 2))
        torch.testing.assert_close(reach.image_saliency(saliency), spread[..., 0])


def linear_pvt(library: str) -> Any:
    if library == "timm":
        import timm

        return timm.create_model(
            "pvt_v2_b2_li", depths=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 1, 1)
        )
    import transformers

    config = transformers.PvtV2Config(
        linear_attention=True, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 1, 1],
    )  # fmt: skip
    return transformers.PvtV2ForImageClassification(config)
