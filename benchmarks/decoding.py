"""Time decoders of images on one processor: which one should feed the training?

Each decodes the same images to ``(3, H, W)`` tensors, alone and followed by the random resized crop
of a training image. The decoders take turns; printed are medians of processor time an image.

    python benchmarks/decoding.py --images path/to/photographs --size 500x375
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Decoder = Callable[[bytes], torch.Tensor]


def tensor_decoder(decode_image: Any) -> Decoder:
    """TorchCodec's or torchvision's decoder of bytes."""
    return lambda data: decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB"
    )


def decoders(crop: Callable[[Any], Any]) -> dict[str, Decoder]:
    """Those that are installed, each alone and with a crop."""
    from torchvision.io import decode_image

    def opened(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def as_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    found = {"torchvision": tensor_decoder(decode_image)}
    try:
        import torchcodec.decoders

        found["torchcodec"] = tensor_decoder(torchcodec.decoders.decode_image)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec is left out: {error}")
    return {
        "pillow": lambda data: as_tensor(opened(data)),
        **found,
        "pillow + crop": lambda data: as_tensor(crop(opened(data))),
        **{f"{name} + crop": _then(decode, crop) for name, decode in found.items()},
    }


def _then(decode: Decoder, crop: Callable[[Any], Any]) -> Decoder:
    return lambda data: crop(decode(data))


def read(folder: Path, size: str | None) -> list[bytes]:
    """Encoded images; with a size, brought to it and saved as JPEG of quality 92."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:256]
    if not paths:
        raise SystemExit(f"expected images in {folder}, found none")
    if size is None:
        return [path.read_bytes() for path in paths]
    width, height = map(int, size.split("x"))
    found = []
    for path in paths:
        buffer = io.BytesIO()
        image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=92)
        found.append(buffer.getvalue())
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder, searched to the bottom")
    parser.add_argument("--size", help="WIDTHxHEIGHT to bring them to first (default: as they are)")
    parser.add_argument("--side", type=int, default=224, help="side of the crop")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    images = read(options.images, options.size)
    crop = v2.RandomResizedCrop(options.side, interpolation=v2.InterpolationMode.BICUBIC)
    milliseconds: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        for name, decode in decoders(crop).items():
            torch.manual_seed(turn)  # the same crops for all
            start = time.process_time()
            for data in images:
                decode(data)
            spent = (time.process_time() - start) / len(images) * 1e3
            milliseconds.setdefault(name, []).append(spent)
    print(f"{len(images)} images{f' of {options.size}' if options.size else ''}, one thread")
    for name, values in milliseconds.items():
        print(f"{name:20}{statistics.median(values):8.3f} ms")


if __name__ == "__main__":
    main()
