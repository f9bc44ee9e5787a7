"""Figures of the method pages, drawn with the library's own functions on two photos.

Once more, after a change to what they show: ``python docs/figures.py``.

The photos come with scikit-learn: flower.jpg by vultilion and china.jpg by danielbuechele,
both CC BY 2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import timm
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import interpolate, normalize, unfold

import vitmix
from vitmix import functional as F

SIDE, GRID = 224, (14, 14)
OWN, PARTNER = "#0072B2", "#E69F00"  # blue and orange, apart for every eye
SHARES = LinearSegmentedColormap.from_list("shares", [PARTNER, "#ffffff", OWN])


def photo(name: str) -> Tensor:
    """A square photo ``(3, 224, 224)`` in [0, 1]."""
    pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1) / 255
    height, width = pixels.shape[1:]
    left = (width - height) // 2
    square = pixels[None, :, :, left : left + height]
    return interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def patches(images: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` as tokens ``(B, N, 3 * 16 * 16)``."""
    return unfold(images, 16, stride=16).transpose(1, 2)


def contrast(images: Tensor) -> Tensor:
    """``(B, N)`` local contrast, rows of sum 1: stands for a trained model's saliency."""
    saliency = patches(images).std(2)
    return saliency / saliency.sum(1, keepdim=True)


def cells(values: Tensor) -> Tensor:
    """Values of tokens ``(N,)`` or ``(h, w)`` on the pixels ``(224, 224)``."""
    grid = values.reshape(1, 1, *GRID).float()
    return interpolate(grid, (SIDE, SIDE), mode="nearest")[0, 0]


def save(path: Path, panels: list[tuple[str, Tensor, str | None]]) -> None:
    """Write panels, five in a row at most: title, image or map, and the colour of a frame."""
    rows = 1 + (len(panels) > 5)
    columns = len(panels) // rows
    figure = Figure(figsize=(2.1 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, picture, frame) in zip(axes, panels, strict=True):
        if picture.ndim == 3:
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        else:
            heat: dict[str, Any] = {"cmap": "magma"} if frame == "heat" else {
                "cmap": SHARES, "vmin": 0, "vmax": 1,
            }  # fmt: skip
            axis.imshow(picture.numpy(), **heat)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(frame in (OWN, PARTNER))
            if frame in (OWN, PARTNER):
                spine.set_color(frame)
                spine.set_linewidth(3)
    with mpl.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=110)


def pixels(path: Path, images: Tensor, mixes: dict[str, vitmix.PixelMix], seed: int) -> None:
    """Own image, partner, then mask and mixed image of each way of mixing pixels."""
    found = []
    for name, mix in mixes.items():
        generator = torch.Generator().manual_seed(seed)
        plan = mix.plan(2, (SIDE, SIDE), grid=GRID, generator=generator)
        own = interpolate(plan.own[None, :1], (SIDE, SIDE))[0, 0]
        mixed = own * images[0] + (1 - own) * images[1]
        found += [(f"{name}, {100 * float(own.mean()):.0f}% own", mixed, None)]
        if plan.binary:
            found += [("its mask", own, None)]
    first, second = ("own", images[0], OWN), ("partner", images[1], PARTNER)
    two = len(mixes) == 2  # one below the other
    save(path, [first, *found[:2], second, *found[2:]] if two else [first, second, *found])


def tokenmixup(path: Path, images: Tensor) -> None:
    """Saliency of both, the tokens that gain by more than rho, and the result."""
    saliency = contrast(images)
    plan = F.horizontal_plan(saliency, torch.tensor([True, False]), rho=0.002)
    tokens = patches(images)
    targets = torch.eye(2)
    mixed, mixed_targets = F.apply_horizontal(tokens, targets, plan)
    image = torch.nn.functional.fold(
        mixed.transpose(1, 2), (SIDE, SIDE), kernel_size=16, stride=16
    )[0]
    save(
        path,
        [
            ("own", images[0], OWN),
            ("its saliency", cells(saliency[0]), "heat"),
            ("replaced tokens", cells(1 - plan.replace[0].float()), None),
            ("partner", images[1], PARTNER),
            ("its saliency", cells(saliency[1]), "heat"),
            (f"mixed, target {100 * float(mixed_targets[0, 0]):.0f}% own", image, None),
        ],
    )


def tl_align(path: Path, images: Tensor) -> None:
    """Shares of tokens before and after layers of attention between similar patches."""
    generator = torch.Generator().manual_seed(5)
    mask = F.box_mask(GRID, 0.55, generator=generator)
    own = 1 - cells(mask)
    mixed = own * images[0] + (1 - own) * images[1]
    tokens = patches(mixed[None])
    similar = normalize(tokens - tokens.mean(1, keepdim=True), dim=2)
    attention = (similar @ similar.transpose(1, 2) / 0.3).softmax(2)[:, None]
    shares = torch.stack((~mask, mask), 2).reshape(1, -1, 2).float()
    panels = [("mixed", mixed, None), ("shares at the input", cells(shares[0, :, 0]), None)]
    for layer in range(1, 9):
        shares = F.align_shares(shares, attention)
        if layer in (1, 3, 8):
            panels += [(f"after {layer} layer{'s' * (layer > 1)}", cells(shares[0, :, 0]), None)]
    save(path, panels)


def transmix(path: Path, images: Tensor) -> None:
    """The same box weighs more where attention lies."""
    generator = torch.Generator().manual_seed(5)
    mask = F.box_mask(GRID, 0.55, generator=generator)
    own = 1 - cells(mask)
    mixed = own * images[0] + (1 - own) * images[1]
    attention = contrast(mixed[None])[0]
    weight = float((attention * (~mask).flatten()).sum())
    save(
        path,
        [
            ("mixed", mixed, None),
            (f"mask, {100 * float(own.mean()):.0f}% own", own, None),
            ("attention", cells(attention), "heat"),
            (f"target {100 * weight:.0f}% own", cells(attention) * own, "heat"),
        ],
    )


def preview(path: Path, images: Tensor) -> None:
    """What ``mixing.preview`` shows, of a model with random weights."""
    torch.manual_seed(0)
    mixing = vitmix.MixingModel(
        timm.create_model("vit_tiny_patch16_224", num_classes=2),
        mix=vitmix.CutMix(),
        tokens=[
            vitmix.HorizontalTokenMixup(block=2, tau="auto:0.9", rho="auto:0.3"),
            vitmix.VerticalTokenMixup(block=3, kappa=3),
        ],
        labels=vitmix.TokenAlignedLabels(),
        num_classes=2,
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = (torch.cat((images, images.flip(3))) - mean[:, None, None]) / std[:, None, None]
    mixing.preview(
        batch, torch.tensor([0, 1, 0, 1]), classes=["flower", "pagoda"], mean=mean.tolist(),
        std=std.tolist(), samples=1, draws=4,
    ).save(path)  # fmt: skip


def draw_figures(folder: Path) -> None:
    """Write all figures, in 256 colours each."""
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.stack((photo("flower.jpg"), photo("china.jpg")))
    pixels(folder / "mixup.png", images, {"Mixup": vitmix.Mixup(alpha=2.0)}, 3)
    pixels(folder / "cutmix.png", images, {"CutMix": vitmix.CutMix(alpha=2.0)}, 8)
    blocks, tokens = vitmix.TokenMix(alpha=4.0), vitmix.TokenMix(alpha=4.0, mask="random")
    pixels(folder / "tokenmix.png", images, {"blocks": blocks, "single tokens": tokens}, 4)
    tokenmixup(folder / "tokenmixup.png", images)
    tl_align(folder / "tl-align.png", images)
    transmix(folder / "transmix.png", images)
    preview(folder / "preview.png", images)
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            few = picture.convert("RGB").quantize(256)
        few.save(path, optimize=True)


if __name__ == "__main__":
    draw_figures(Path(__file__).parent / "images" / "methods")
