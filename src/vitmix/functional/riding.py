"""Shares as extra value channels of one fused attention call.

Fused kernels want queries, keys and values of one width, so all three are padded by zeros: that
changes no product, and the first channels of the output are what they would have been. On the CPU
the backward pass runs at the original width: the extra channels carry no gradient, and the kernel
needs only the output and the normaliser of each row, which padding leaves as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitmix.functional.precision import wide

__all__ = ["MAX_WIDTH", "attend", "padded_width"]

# Widths that fused kernels take are multiples of the step, up to the greatest.
_STEP = 8
MAX_WIDTH = 256


def padded_width(width: int) -> int:
    """Least width of at least ``width`` that fused kernels take."""
    return -(-width // _STEP) * _STEP


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    riders: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention output and attended riders, from one kernel call.

    Args:
        query: ``(B, H, N, d)``.
        key: ``(B, H, M, d)``.
        value: ``(B, H, M, e)``.
        riders: ``(B, H, M, K)``, of the dtype of ``value``; no gradient.
        attn_mask: as for ``scaled_dot_product_attention``.
        is_causal: as for ``scaled_dot_product_attention``.
        scale: factor on the products.

    Returns:
        ``(B, H, N, e)`` with gradient; ``(B, N, K)``, the mean over heads, without.
    """
    if attn_mask is not None and attn_mask.ndim == 3:  # the CPU's kernel takes two axes or four
        attn_mask = attn_mask[None]
    if _cpu_kernel_fits(query, key, value, attn_mask):
        output, attended = _RideOnCpu.apply(query, key, value, riders, attn_mask, is_causal, scale)
        return output, attended
    both = F.scaled_dot_product_attention(
        *_padded(query, key, torch.cat((value, riders), -1)),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
    width = value.shape[-1]
    attended = both[..., width : width + riders.shape[-1]].detach()
    return both[..., :width], wide(attended).mean(1)


def _padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = padded_width(max(query.shape[-1], value.shape[-1]))
    padded = [F.pad(t, (0, width - t.shape[-1])) for t in (query, key, value)]
    return padded[0], padded[1], padded[2]


def _cpu_kernel_fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and (mask is None or (not mask.requires_grad and mask.dtype == query.dtype))
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    )


def _widened(heads: Tensor, extra: int) -> Tensor:
    """``(B, H, N, d)`` with extra channels of zeros."""
    return torch.cat((heads, heads.new_zeros(1).expand(*heads.shape[:-1], extra)), -1)


class _RideOnCpu(torch.autograd.Function):
    """PyTorch's flash attention of the CPU, forward wide and backward at the original width."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        riders: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        # This kernel takes any width: no more channels than there are riders.
        both, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _widened(query, riders.shape[-1]),
            _widened(key, riders.shape[-1]),
            torch.cat((value, riders), -1),
            0.0,
            is_causal,
            attn_mask=attn_mask,
            scale=scale,
        )
        width = value.shape[-1]
        output = both[..., :width].transpose(1, 2).contiguous().transpose(1, 2)
        attended = wide(both[..., width:]).mean(1)
        ctx.save_for_backward(query, key, value, output, normaliser, attn_mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.mark_non_differentiable(attended)
        return output, attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normaliser, attn_mask = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient,
            query,
            key,
            value,
            output,
            normaliser,
            0.0,
            ctx.is_causal,
            attn_mask=attn_mask,
            scale=ctx.scale,
        )
        return (*gradients, None, None, None, None)
