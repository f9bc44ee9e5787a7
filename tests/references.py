"""Slow references: loops in float64, written from the papers' equations alone.

Every function takes and gives NumPy arrays. The names are those of `vitmix.functional`; where the
fast function hides a choice (which of two equally good pairings, say), the reference takes the
choice as an argument, and a second one says whether the choice was allowed.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def attention_saliency(attention: Array, *, num_prefix_tokens: int = 0) -> Array:
    """TokenMixup Eq. 3: mean over heads, then over queries; or the class token's row."""
    batch, heads, queries, keys = attention.shape
    out = np.zeros((batch, keys - num_prefix_tokens))
    for b in range(batch):
        for t in range(num_prefix_tokens, keys):
            rows = [0] if num_prefix_tokens else range(queries)
            total = 0.0
            for h in range(heads):
                for q in rows:
                    total += float(attention[b, h, q, t])
            out[b, t - num_prefix_tokens] = total / (heads * len(rows))
    return out


def attention_rollout(attentions: Sequence[Array]) -> Array:
    """TokenMixup Eq. 2: product of the head means, the first layer on the left."""
    batch, heads, tokens, _ = attentions[0].shape
    out = np.zeros((batch, tokens, tokens))
    for b in range(batch):
        product = np.eye(tokens)
        for attention in attentions:
            mean = np.zeros((tokens, tokens))
            for h in range(heads):
                mean += attention[b, h].astype(np.float64) / heads
            following = np.zeros((tokens, tokens))
            for i, j, k in itertools.product(range(tokens), repeat=3):
                following[i, j] += product[i, k] * mean[k, j]
            product = following
        out[b] = product
    return out


def saliency_gain(saliency: Array, candidates: Array, rho: float) -> Array:
    """TokenMixup Eq. 6."""
    gain = np.zeros((len(saliency), len(candidates)))
    for i, own in enumerate(saliency.astype(np.float64)):
        for j, other in enumerate(candidates.astype(np.float64)):
            for t in range(len(own)):
                gain[i, j] += max(other[t] - own[t] - rho, 0.0)
    return gain


def assignments(gain: Array) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every choice of distinct columns, one a row, with its total gain (TokenMixup Eq. 7)."""
    rows, columns = gain.shape
    for choice in itertools.permutations(range(columns), rows):
        yield math.fsum(float(gain[i, j]) for i, j in enumerate(choice)), choice


def optimal_assignment(gain: Array) -> tuple[float, tuple[int, ...]]:
    """The best of all assignments by trying each; few rows only."""
    return max(assignments(gain))


def greedy_assignment(gain: Array) -> list[int]:
    """Row by row the best column that is left."""
    columns: list[int] = []
    for row in gain.tolist():
        left = [column for column in range(len(row)) if column not in columns]
        columns.append(max(left, key=lambda column, row=row: row[column]))  # type: ignore[misc]
    return columns


def grouped_total(gain: Array, easy: Array, count: int) -> float:
    """Total gain of the best pairs within groups of every `count`-th sample, by trying each."""
    total = 0.0
    for first in range(count):
        group = range(first, len(gain), count)
        rows = [i for i in group if easy[i]]
        total += optimal_assignment(gain[np.ix_(rows, group)])[0]
    return total


def replaced_tokens(saliency: Array, easy: Array, partner: Array, rho: float) -> Array:
    """TokenMixup Eq. 9 with M = 0 written as True: the tokens taken from the partner."""
    out = np.zeros(saliency.shape, dtype=bool)
    for i in range(len(saliency)):
        for t in range(saliency.shape[1]):
            difference = float(saliency[partner[i], t]) - float(saliency[i, t])
            out[i, t] = bool(easy[i]) and difference > rho
    return out


def own_weights(saliency: Array, replace: Array, partner: Array) -> Array:
    """TokenMixup Eq. 11: what is left of the own label."""
    out = np.ones(len(saliency))
    for i in range(len(saliency)):
        own = other = 0.0
        for t in range(saliency.shape[1]):
            if replace[i, t]:
                other += float(saliency[partner[i], t])
            else:
                own += float(saliency[i, t])
        if other > 0.0:
            out[i] = own / (own + other)
    return out


def apply_horizontal(
    tokens: Array,
    targets: Array,
    partner: Array,
    replace: Array,
    own_weight: Array,
    *,
    num_prefix_tokens: int = 0,
) -> tuple[Array, Array]:
    """TokenMixup Eq. 10 and 11. Partners are read from the batch as it was."""
    mixed = np.array(tokens)
    labels = np.zeros(targets.shape)
    for i in range(len(tokens)):
        for t in range(replace.shape[1]):
            if replace[i, t]:
                position = t + num_prefix_tokens
                mixed[i, position] = tokens[partner[i], position]
        for c in range(targets.shape[1]):
            own, other = float(targets[i, c]), float(targets[partner[i], c])
            labels[i, c] = own_weight[i] * own + (1.0 - own_weight[i]) * other
    return mixed, labels


def salient_positions(saliency: Array, kappa: int, *, num_prefix_tokens: int = 0) -> Array:
    """TokenMixup Sec. 3.4: places of the kappa most salient tokens in the whole sequence."""
    out = np.zeros((len(saliency), kappa), dtype=np.int64)
    for b, scores in enumerate(saliency):
        left = list(range(len(scores)))
        for k in range(kappa):
            best = left[0]
            for t in left:
                if scores[t] > scores[best]:
                    best = t
            left.remove(best)
            out[b, k] = best + num_prefix_tokens
    return out


def salient_tokens(
    tokens: Array, saliency: Array, kappa: int, *, num_prefix_tokens: int = 0
) -> Array:
    """The tokens at `salient_positions`."""
    places = salient_positions(saliency, kappa, num_prefix_tokens=num_prefix_tokens)
    return np.stack([np.stack([tokens[b, p] for p in row]) for b, row in enumerate(places)])


def align_shares(shares: Array, attention: Array) -> Array:
    """TL-Align: half of what a token was, half of what it attends to."""
    batch, tokens, sources = shares.shape
    heads = attention.shape[1]
    out = np.zeros(shares.shape)
    for b, i, k in itertools.product(range(batch), range(tokens), range(sources)):
        attended = 0.0
        for h in range(heads):
            for j in range(tokens):
                attended += float(attention[b, h, i, j]) / heads * float(shares[b, j, k])
        out[b, i, k] = 0.5 * attended + 0.5 * float(shares[b, i, k])
    return out


def attention_matrix(query: Array, key: Array, scale: float | None = None) -> Array:
    """Softmax of scaled products, `(B, H, N, M)`."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    scale = width**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, queries, keys))
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        logits = [
            scale * math.fsum(float(x) * float(y) for x, y in zip(query[b, h, i], row, strict=True))
            for row in key[b, h]
        ]
        top = max(logits)
        powers = [math.exp(value - top) for value in logits]
        out[b, h, i] = [power / math.fsum(powers) for power in powers]
    return out


def activation_weight(own_map: Array, partner_map: Array, mask: Array) -> tuple[Array, Array]:
    """TokenMix Sec. 3: the part of each image's activation that is left in the mixed image."""
    own, partner = np.zeros(len(own_map)), np.zeros(len(own_map))
    _, rows, columns = own_map.shape
    for b in range(len(own_map)):
        own_total = math.fsum(own_map[b].ravel().tolist()) + 1e-8
        partner_total = math.fsum(partner_map[b].ravel().tolist()) + 1e-8
        for r, c in itertools.product(range(rows), range(columns)):
            from_partner = mask[b, r, c] if mask.ndim == 3 else mask[r, c]
            if from_partner:
                partner[b] += float(partner_map[b, r, c]) / partner_total
            else:
                own[b] += float(own_map[b, r, c]) / own_total
    return own, partner


def smooth_targets(targets: Array, smoothing: float) -> Array:
    """Label smoothing: `smoothing / C` for every class, the rest by the label."""
    out = np.zeros(targets.shape)
    for b, c in np.ndindex(targets.shape):
        out[b, c] = smoothing / targets.shape[1] + (1.0 - smoothing) * float(targets[b, c])
    return out


def soft_cross_entropy(logits: Array, targets: Array) -> float:
    """Mean over samples of `-sum_c y_c log softmax(z)_c`."""
    losses = []
    for z, y in zip(logits, targets, strict=True):
        top = max(float(v) for v in z)
        log_total = top + math.log(math.fsum(math.exp(float(v) - top) for v in z))
        losses.append(
            math.fsum(float(p) * (log_total - float(v)) for p, v in zip(y, z, strict=True))
        )
    return math.fsum(losses) / len(logits)


def connected_parts(mask: Array) -> int:
    """Number of regions of True cells that hang together by their sides."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    parts = 0
    while left:
        parts += 1
        border = [left.pop()]
        while border:
            r, c = border.pop()
            for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if cell in left:
                    left.remove(cell)
                    border.append(cell)
    return parts


def is_box(mask: Array) -> bool:
    """Whether the True cells are exactly one rectangle (or none)."""
    cells = np.argwhere(mask)
    if not len(cells):
        return True
    height, width = cells.max(axis=0) - cells.min(axis=0) + 1
    return bool(len(cells) == height * width)
