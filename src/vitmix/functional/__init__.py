"""The papers' equations as functions of tensors; no model is known here."""

from vitmix.functional.alignment import align_shares, attend_with_shares, pooled_shares
from vitmix.functional.horizontal import (
    HorizontalPlan,
    apply_horizontal,
    horizontal_plan,
    mix_targets,
    mix_tokens,
)
from vitmix.functional.masks import block_mask, box_mask, random_mask
from vitmix.functional.matching import (
    greedy_assignment,
    grouped_partners,
    optimal_assignment,
    optimal_partners,
    saliency_gain,
)
from vitmix.functional.mixture import Mixture
from vitmix.functional.reach import Reach, windows
from vitmix.functional.saliency import (
    attention_rollout,
    attention_saliency,
    query_key_attention,
    query_key_saliency,
)
from vitmix.functional.sharpness import sharpness, top_share
from vitmix.functional.targets import (
    activation_weight,
    smooth_targets,
    soft_cross_entropy,
    soft_cross_entropy_per_sample,
)
from vitmix.functional.thresholds import RunningQuantile, follow_quantile
from vitmix.functional.vertical import salient_indices, salient_tokens

__all__ = [
    "HorizontalPlan",
    "Mixture",
    "Reach",
    "RunningQuantile",
    "activation_weight",
    "align_shares",
    "apply_horizontal",
    "attend_with_shares",
    "attention_rollout",
    "attention_saliency",
    "block_mask",
    "box_mask",
    "follow_quantile",
    "greedy_assignment",
    "grouped_partners",
    "horizontal_plan",
    "mix_targets",
    "mix_tokens",
    "optimal_assignment",
    "optimal_partners",
    "pooled_shares",
    "query_key_attention",
    "query_key_saliency",
    "random_mask",
    "saliency_gain",
    "salient_indices",
    "salient_tokens",
    "sharpness",
    "smooth_targets",
    "soft_cross_entropy",
    "soft_cross_entropy_per_sample",
    "top_share",
    "windows",
]
