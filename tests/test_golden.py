"""Each function against what the released code computes, its known defects corrected.

`tests/data` holds the smaller cases. With `VITMIX_GOLDEN` set to the folder of recordings, all of
them are run; its README says how they were made and why the tolerances are what they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitmix.functional as vf
from golden import load_golden
from vitmix.functional.pixel_plan import PixelPlan


def cases(file: str, listing: str = "cases") -> list[str]:
    return load_golden(file)[listing].tolist()


def arrays(file: str, case: str) -> dict[str, Any]:
    data = load_golden(file)
    prefix = f"{case}/"
    return {key[len(prefix) :]: data[key] for key in data.files if key.startswith(prefix)}


def tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def close(ours: Tensor, theirs: Any, atol: float) -> None:
    np.testing.assert_allclose(ours.numpy(), theirs, atol=atol, rtol=0)


# Horizontal TokenMixup


HORIZONTAL = [
    (file, prefix, case)
    for file, prefix in (("htm_mean", 0), ("htm_cls", 1))
    for case in cases(file)
]


@pytest.mark.parametrize(("file", "case"), [(file, case) for file, _, case in HORIZONTAL])
def test_gain(file, case):
    data = arrays(file, case)
    saliency = tensor(data["S"])
    gain = vf.saliency_gain(saliency[tensor(data["easy"])], saliency, float(data["rho"]))
    close(gain, data["gain"], 1e-6)


@pytest.mark.parametrize(("file", "prefix", "case"), HORIZONTAL)
def test_horizontal(file, prefix, case):
    data = arrays(file, case)
    rho, easy, index = float(data["rho"]), tensor(data["easy"]), data["easy_index"]

    saliency = vf.attention_saliency(tensor(data["attn"]), num_prefix_tokens=prefix)
    close(saliency, data["S"], 1e-6)
    gain = vf.saliency_gain(saliency[easy], saliency, rho)
    sigma = vf.optimal_assignment(gain).numpy()
    total = gain.numpy()[np.arange(len(index)), sigma].sum()
    assert total == pytest.approx(float(data["assign_total"]), abs=1e-5)

    plan = vf.horizontal_plan(saliency, easy, rho)
    if data["sigma_unique"]:
        np.testing.assert_array_equal(plan.partner.numpy()[index], data["sigma"])
        np.testing.assert_array_equal(sigma, data["sigma"])
    np.testing.assert_array_equal(plan.replace.numpy()[index], data["mask_paper"])
    assert not plan.replace[~easy].any()
    if len(index):
        replaced = plan.replace[easy].sum(1).double().mean()
        assert float(replaced) == pytest.approx(float(data["k_paper"]), abs=1e-5)

    tokens, targets = vf.apply_horizontal(
        tensor(data["x"]), tensor(data["y"]), plan, num_prefix_tokens=prefix
    )
    np.testing.assert_array_equal(tokens.numpy(), data["x_paper"])
    close(targets, data["y_paper"], 1e-6)


# Vertical TokenMixup


@pytest.mark.parametrize("case", cases("vtm", "select_cases"))
def test_vertical_selection(case):
    data = arrays("vtm", f"select_{case}")
    options = {"num_prefix_tokens": int(data["has_cls"])}
    kappa = int(data["kappa"])
    saliency = vf.attention_saliency(tensor(data["attn"]), **options)
    close(saliency, data["S"], 1e-6)
    places = vf.salient_indices(saliency, kappa, **options)
    np.testing.assert_array_equal(places.numpy(), data["index_paper"])
    tokens = vf.salient_tokens(tensor(data["src"]), saliency, kappa, **options)
    np.testing.assert_array_equal(tokens.numpy(), data["tokens_paper"])


@pytest.mark.parametrize("case", cases("vtm", "attend_cases"))
def test_vertical_attention(case):
    """Eq. 13: collected tokens are appended as keys, and need no surgery on the attention."""
    data = {key: tensor(value) for key, value in arrays("vtm", f"attend_{case}").items()}
    vit = "query_bias" in data
    src = data["src"].requires_grad_()
    collected = data["vtokens"].requires_grad_()

    def heads(tokens: Tensor, name: str) -> Tensor:
        out = F.linear(tokens, data[f"{name}_weight"], data.get(f"{name}_bias"))
        return out.unflatten(-1, (int(data["heads"]), -1)).transpose(1, 2)

    def attend(keys: Tensor) -> tuple[Tensor, Tensor]:
        norm = (data["ln_weight"], data["ln_bias"], float(data["ln_eps"]))
        own, both = (F.layer_norm(t, t.shape[-1:], *norm) for t in (src, keys))
        q, k, v = heads(own, "query"), heads(both, "key"), heads(both, "value")
        shares = torch.ones(*keys.shape[:2], 1)
        out, attended = vf.attend_with_shares(q, k, v, shares)
        close(attended, np.ones(attended.shape), 1e-6)
        name = "out" if vit else "proj"
        out = out.transpose(1, 2).flatten(2)
        out = F.linear(out, data[f"{name}_weight"], data[f"{name}_bias"])
        return out, vf.query_key_attention(q, k).detach()

    out, attention = attend(torch.cat((src, *collected), 1))
    close(out.detach(), data["result" if vit else "out"], 1e-5)
    if vit:
        close(attention, data["attn_full"], 1e-6)
    else:
        close(attention[..., : src.shape[1]], data["attn_truncated"], 1e-6)
    if "upstream" in data:
        grads = torch.autograd.grad((out * data["upstream"]).sum(), (src, collected))
        close(grads[0], data["grad_src"], 5e-5)
        close(grads[1], data["grad_vtokens"], 5e-5)
    alone, attention = attend(src)
    close(alone.detach(), data["result_self" if vit else "out_self"], 1e-5)
    if not vit:
        close(attention, data["attn_self"], 1e-6)


# TL-Align


class TinyViT:
    """The recorded ViT, written out with explicit attention; labels travel as shares."""

    def __init__(self, data: Any) -> None:
        self.state = {key[6:]: tensor(data[key]) for key in data.files if key.startswith("state/")}
        self.depth, self.heads = int(data["depth"]), int(data["num_heads"])
        self.patch, self.eps = int(data["patch_size"]), float(data["norm_eps"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def embed(self, images: Tensor) -> Tensor:
        weight, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        patches = F.conv2d(images, weight, bias, stride=self.patch).flatten(2).transpose(1, 2)
        class_token = self.state["cls_token"].expand(len(images), -1, -1)
        return torch.cat((class_token, patches), 1) + self.state["pos_embed"]

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.linear(f"blocks.{layer}.attn.qkv", self.norm(f"blocks.{layer}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        name = f"blocks.{layer}"
        x = x + self.linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def logits(self, x: Tensor) -> Tensor:
        return self.linear("head", self.norm("norm", x)[:, 0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", cases("tlalign"))
def test_aligned_labels_of_a_whole_vit(case, fused):
    """Shares of two sources, carried through every layer, give the dense labels."""
    recorded = load_golden("tlalign")
    data = arrays("tlalign", case)
    images, hard = tensor(recorded["images"]), tensor(recorded["hard_labels"])
    batch = len(images)
    mask = tensor(data["token_mask"])
    plan = PixelPlan(torch.arange(batch).flip(0), 1 - mask[None].float(), binary=True)
    assert plan.lam.tolist() == pytest.approx([float(data["lam"])] * batch)
    mixed = plan.apply(images)
    np.testing.assert_array_equal(mixed.numpy(), data["images_mixed"])

    labels = vf.smooth_targets(hard, int(recorded["num_classes"]), float(data["smoothing"]))
    mixture = plan.mixture((mask.shape[0], mask.shape[1]), num_prefix_tokens=1)
    shares = mixture.shares

    def dense(shares: Tensor) -> Tensor:
        return shares @ labels[mixture.sources]

    close(dense(shares), data["label_in"], 1e-6)
    model = TinyViT(recorded)
    x = model.embed(mixed)
    for layer in range(model.depth):
        q, k, v = model.qkv(layer, x)
        if fused:
            out, attended = vf.attend_with_shares(q, k, v, shares)
            shares = (attended + shares) / 2
        else:
            attention = vf.query_key_attention(q, k)
            out = attention @ v
            shares = vf.align_shares(shares, attention)
        x = model.finish(layer, x, out)
        close(dense(shares), data["label_layers"][layer], 1e-6)
    logits = model.logits(x)
    close(logits, data["logits"], 2e-5)
    target = mixture.targets(shares[:, 0], labels)
    close(target, data["label_cls"], 1e-6)
    loss = vf.soft_cross_entropy(logits, target)
    assert loss.item() == pytest.approx(float(data["loss"]), abs=1e-5)


@pytest.mark.parametrize("grid", cases("tlalign_cutmix", "grids"))
def test_boxes_cover_what_was_asked_for_and_the_released_ones_do_not(grid):
    """The recorded boxes are cut as recorded; drawn for the same lam, ours are right on average."""
    data = arrays("tlalign_cutmix", grid)
    h, w = (int(side) for side in grid.removeprefix("grid").split("x"))
    released, ours = [], []
    generator = torch.Generator().manual_seed(0)
    corners = ("yl", "yu", "xl", "xu")
    for i, lam in enumerate(data["lam_in"].tolist()):
        top, bottom, left, right = (int(data[name][i]) for name in corners)
        mask = torch.zeros(1, h, w, dtype=torch.bool)
        mask[:, top:bottom, left:right] = True
        plan = PixelPlan(torch.arange(1), 1 - mask.float(), binary=True)
        assert plan.lam.item() == pytest.approx(data["lam_out"][i], abs=1e-6)
        released.append(1 - float(data["lam_out"][i]))
        ours.append(vf.box_mask((h, w), lam, generator=generator).float().mean().item())
    asked = 1 - data["lam_in"]
    # A mask's area misses its lam by rounding only: less than one row and one column.
    assert np.abs(np.array(ours) - asked).max() < 1 / h + 1 / w
    error = np.std(np.array(ours) - asked) / len(asked) ** 0.5
    assert abs(np.mean(ours) - asked.mean()) < 5 * error
    assert np.mean(released) < 0.6 * asked.mean()


# TokenMix


def released_target(data: dict[str, Any], own_map: Tensor) -> np.ndarray:
    """The released target from this package's weights: not normalised, smoothed in its own way."""
    mask, hard = tensor(data["mask"]), data["hard_labels"]
    own, partner = vf.activation_weight(own_map, own_map.flip(0), mask)
    classes, smoothing = int(data["num_classes"]), float(data["smoothing"])
    share = smoothing / (2 * classes)
    target = np.full((len(hard), classes), smoothing / classes)
    for i, (label, other) in enumerate(zip(hard, hard[::-1], strict=True)):
        target[i, [label, other]] = share if label != other else 0.0
        target[i, label] += float(own[i]) - smoothing / 2 + share
        target[i, other] += float(partner[i]) - smoothing / 2 + share
    return target


@pytest.mark.parametrize("case", cases("tokenmix_target", "dense_cases"))
def test_activation_weights_of_dense_maps(case):
    data = arrays("tokenmix_target", f"dense_{case}")
    target = released_target(data, tensor(data["own_map"]))
    np.testing.assert_allclose(target, data["target"], atol=1e-6, rtol=0)
    mask = tensor(data["mask"])
    plan = PixelPlan(torch.arange(len(target)).flip(0), 1 - mask[None].float(), binary=True)
    assert plan.lam[0].item() == pytest.approx(float(data["lam"]), abs=1e-6)
    if "images" in data:
        mixed = plan.apply(tensor(data["images"]).double())
        np.testing.assert_array_equal(mixed.numpy(), data["images_mixed"])


@pytest.mark.parametrize("case", cases("tokenmix_target", "topk_cases"))
def test_activation_weights_of_cropped_maps(case):
    data = arrays("tokenmix_target", f"topk_{case}")
    hard = data["hard_labels"]
    own_map = tensor(data["roi_maps"][np.arange(len(hard)), hard])
    target = released_target(data, own_map)
    np.testing.assert_allclose(target, data["target"], atol=5e-5, rtol=0)


def test_mixup_branch():
    data = arrays("tokenmix_target", "mixup_branch")
    images, hard = tensor(data["images"]), tensor(data["hard_labels"])
    batch = len(images)
    own = torch.full((1, 1, 1), float(data["lam"]))
    plan = PixelPlan(torch.arange(batch).flip(0), own, binary=False)
    close(plan.apply(images), data["images_mixed"], 1e-6)
    labels = vf.smooth_targets(hard, int(data["num_classes"]), float(data["smoothing"]))
    close(vf.mix_targets(labels, plan.partner, plan.lam), data["target"], 1e-6)
