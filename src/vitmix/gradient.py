"""Saliency from the gradient: the detector that attention saliency is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitmix.aside import aside
from vitmix.backbones import Backbone
from vitmix.compilation import uncompiled
from vitmix.functional.targets import soft_cross_entropy
from vitmix.replay import add_to_tokens, require_graph, tokens_of

__all__ = ["gradient_saliency", "logits_of"]

# Of the loss, for gradients that float16 would round to 0. A power of two changes no other digit.
SCALE = 2.0**10


def logits_of(output: Any) -> Any:
    """Logits in what a model returns: itself, or its ``.logits`` (transformers)."""
    return getattr(output, "logits", output)


def gradient_saliency(
    model: nn.Module, backbone: Backbone, index: int, images: Tensor, targets: Tensor
) -> Tensor:
    """Saliency by back-propagation: norm of the loss's gradient by the tokens in front of a block.

    The baseline of TokenMixup's Table 3 (after Co-Mixup, Kim et al., ICLR 2021): one more forward
    pass and a backward pass down to the block. Normalised to sum 1 as attention saliency is, so
    that rho has the same unit. Gradients of parameters are not touched.

    Args:
        model: the model.
        backbone: its description.
        index: the block.
        images: ``(B, C, H, W)`` as fed.
        targets: ``(B, C)``.

    Returns:
        ``(B, N)`` float32.

    Raises:
        UnsupportedModelError: gradient checkpointing of the reentrant kind.
    """
    block = backbone.blocks[index]
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        require_graph()
        leaves.append(tokens_of(module, args).detach().requires_grad_())
        return (leaves[0], *args[1:])

    def join(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Lead the gradient past a block whose tokens are added to its result outside."""
        return add_to_tokens(output, leaves[0] - leaves[0].detach())

    handles = [block.module.register_forward_pre_hook(cut)]
    if block.skip_outside:
        handles.append(block.module.register_forward_hook(join))
    try:
        with uncompiled(), aside([model], images.device), torch.enable_grad():
            logits = logits_of(model(images))
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss = soft_cross_entropy(logits, targets) * SCALE
            (gradient,) = torch.autograd.grad(loss, leaves)
    finally:
        for handle in handles:
            handle.remove()
    tokens = block.flatten(gradient)
    norms: Tensor = tokens.float().norm(dim=-1)[:, backbone.num_prefix_tokens :]
    total: Tensor = norms.sum(1, keepdim=True)
    return norms / total.clamp_min(torch.finfo(norms.dtype).tiny)
