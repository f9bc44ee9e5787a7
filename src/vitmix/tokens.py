"""Second stage, tokens: what happens to hidden tokens in front of a block?

A stage that mixes samples makes a plan (:meth:`TokenMixer.plan`) from what :class:`TokenContext`
tells it; the plan then moves tokens, targets and the mixture. What it leaves to chance is drawn
before the pass (:meth:`TokenMixer.draw`), so that a pass is a function of tensors alone. Vertical
mixing has no plan: it works within a sample.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmix.errors import InputError
from vitmix.functional.draws import host_generator
from vitmix.functional.horizontal import (
    HorizontalPlan,
    horizontal_plan,
    mix_targets,
    mix_tokens,
)
from vitmix.functional.matching import optimal_partners, require_assignment
from vitmix.functional.mixture import Mixture
from vitmix.functional.precision import wide
from vitmix.functional.targets import soft_cross_entropy, soft_cross_entropy_per_sample
from vitmix.processes import Exchange, gather, world_size
from vitmix.scorenet import Pool, ScoreNet
from vitmix.thresholds import share_threshold

__all__ = [
    "BlendPlan",
    "Given",
    "HorizontalTokenMixup",
    "ManifoldMixup",
    "TokenContext",
    "TokenMixer",
    "TokenOutcome",
    "TokenStage",
    "VerticalTokenMixup",
]


class Given(NamedTuple):
    """What a stage is given before the pass.

    Attributes:
        partner: ``(B,)`` int64, drawn, or None.
        own_weight: ``(B,)`` share of the own tokens, drawn, or None.
        saliency: ``(B, N)`` drawn, or from the gradient, or None.
    """

    partner: Tensor | None = None
    own_weight: Tensor | None = None
    saliency: Tensor | None = None

    def to(self, device: torch.device) -> Given:
        """Copy to a device without waiting for it."""
        return Given(*(t if t is None else t.to(device, non_blocking=True) for t in self))


@dataclass(frozen=True)
class TokenContext:
    """What a token stage may ask for.

    Attributes:
        targets: ``(B, C)`` labels of the samples as they are mixed so far.
        num_prefix_tokens: tokens in front that stand for no image region.
        attention_saliency: saliency ``(B, N)`` of the tokens at hand from the attention of this
            block (0) or rolled out over that many further blocks.
        given: what was drawn or computed before this pass.
    """

    targets: Tensor
    num_prefix_tokens: int
    attention_saliency: Callable[[int], Tensor]
    given: Given


@dataclass(frozen=True)
class BlendPlan:
    """Every token is interpolated with the partner's (Manifold Mixup).

    Attributes:
        partner: ``(B,)`` int64.
        own_weight: ``(B,)`` share of the own tokens and of the own label.
    """

    partner: Tensor
    own_weight: Tensor


@dataclass(frozen=True)
class TokenOutcome:
    """What a stage decided for a batch.

    Attributes:
        plan: what to do with the tokens.
        loss: scalar to be added to the training loss, or None.
        stats: scalars without gradient, for logging.
        exchange: where partners of other processes come from; the plan's ``partner`` then counts
            over the batches of all processes. None: partners are in the batch.
        saliency: ``(B, N)`` that the plan was made by, or None.
        difficulty: ``(B,)`` nats, what ScoreNet made of each sample, or None.
    """

    plan: HorizontalPlan | BlendPlan
    loss: Tensor | None
    stats: dict[str, Tensor]
    exchange: Exchange | None = None
    saliency: Tensor | None = None
    difficulty: Tensor | None = None

    def mix_tokens(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """Mix tokens ``(B, T, D)``."""
        if isinstance(self.plan, HorizontalPlan):
            if self.exchange is not None:
                replace = F.pad(self.plan.replace, (num_prefix_tokens, 0))[..., None]
                return torch.where(replace, self.exchange.fetch(tokens), tokens)
            return mix_tokens(tokens, self.plan, num_prefix_tokens=num_prefix_tokens)
        weight = self.plan.own_weight.to(tokens.dtype)[:, None, None]
        return torch.lerp(tokens.index_select(0, self.plan.partner), tokens, weight)

    def mix_targets(self, targets: Tensor) -> Tensor:
        """Mix targets ``(B, C)`` (TokenMixup, Eq. 11)."""
        if self.exchange is not None:
            own = self.plan.own_weight.to(targets.dtype)[:, None]
            return own * targets + (1 - own) * self.exchange.fetch(targets)
        return mix_targets(targets, self.plan.partner, self.plan.own_weight)

    def pad_shares(self, shares: Tensor) -> Tensor:
        """Shares ``(B, M, K)`` of tokens that stay unmixed, among the 2 K sources after mixing."""
        return torch.cat((shares, torch.zeros_like(shares)), -1)

    def mix_shares(self, mixture: Mixture) -> Mixture:
        """Follow the sources of every token."""
        if isinstance(self.plan, HorizontalPlan):
            if self.exchange is not None:
                others = Mixture(*map(self.exchange.fetch, mixture))
                return mixture.replaced_from(others, self.plan.replace)
            return mixture.replaced(self.plan.partner, self.plan.replace)
        return mixture.blended(self.plan.partner, self.plan.own_weight)


class TokenStage(nn.Module):
    """Something that happens to tokens at a block.

    Attributes:
        block: the block in front of which it happens, counted from 0; or several, of which one is
            drawn for each batch.
        short_name: names the stage in statistics.
    """

    block: int | tuple[int, ...]
    short_name: str = "tokens"

    @property
    def reads_attention(self) -> bool:
        """Whether the stage looks at what the model attends to."""
        return False

    def attach(
        self, embed_dim: int, num_classes: int, num_prefix_tokens: int, class_token: bool
    ) -> None:
        """Make the stage's own parameters for a model; called once by ``MixingModel``."""

    def release(self) -> None:
        """Drop what :meth:`attach` made."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks at which the stage may act."""
        return (self.block,) if isinstance(self.block, int) else self.block

    def draw_block(self, generator: torch.Generator | None) -> int:
        """Return the block at which the stage acts in the next pass."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        return int(host_generator(generator).choice(self.blocks))


class TokenMixer(TokenStage):
    """A stage that mixes the tokens of different samples."""

    @abstractmethod
    def draw(self, batch: int, tokens: int, generator: torch.Generator | None) -> Given | None:
        """Draw for one pass; None if nothing is to be mixed in it.

        Args:
            batch: number of samples B.
            tokens: number of tokens N behind the prefix at the block.
            generator: source of draws; the global one if None.
        """

    @abstractmethod
    def plan(self, tokens: Tensor, context: TokenContext) -> TokenOutcome:
        """Decide what to mix.

        Args:
            tokens: ``(B, T, D)``, input of the block.
            context: labels, saliency, draws.
        """


class HorizontalTokenMixup(TokenMixer):
    """Replace tokens of easy samples by more salient ones of others (TokenMixup, Sec. 3.1 to 3.3).

    Args:
        block: block in front of which tokens are mixed, counted from 0; its attention gives the
            saliency.
        tau: samples whose ScoreNet cross-entropy is below ``tau`` nats are mixed (Eq. 1, 8). The
            released configurations scale the loss by 0.1: their 0.2 is 2.0 here. ``math.inf`` mixes
            every sample (ablation without ScoreNet, which is trained all the same).
            ``"auto:0.5"`` follows the difficulty of the batches, so that half of all samples are
            mixed.
        rho: a token is replaced if that raises its saliency by more than ``rho`` (Eq. 9).
            ``"auto:0.3"`` follows the gains, so that 30% of the tokens of mixed samples are
            replaced. ``rho`` is never below 0: where fewer tokens than that have a more salient
            counterpart in the partner, all that have one are replaced and the share stays lower.
        pool: how ScoreNet pools tokens; see :class:`vitmix.scorenet.ScoreNet`.
        stop_gradient: whether ScoreNet's loss is kept from the model's own parameters.
        scorenet_weight: weight of ScoreNet's loss in the training loss. Released: 0.001 without
            stop-gradient (CCT), 1.0 with it (ViT).
        saliency: ``"attention"`` of the block (Eq. 3), its ``"rollout"`` over the next
            ``rollout_steps`` blocks (Eq. 2), ``"gradient"`` of the loss by the tokens, or
            ``"random"`` (ablation).
        rollout_steps: further blocks of a rollout.
        assignment: ``"exact"`` optimal assignment (Eq. 7); for large batches ``"grouped:128"``, the
            optimum within groups of 128 samples, or ``"greedy"``, the best that is left, sample by
            sample (what they lose: :func:`vitmix.functional.optimal_partners`); or ``"random"``
            pairs (ablation).
        relabel: label weights by ``"saliency"`` (Eq. 11) or by ``"area"``, the number of tokens
            (ablation).
        gather: look for partners in the batches of all processes of a distributed run, so that N
            processes mix as one with N times the batch does. Saliency and difficulty are gathered,
            the same assignment is solved everywhere, and the tokens of chosen partners travel.
            False: each process pairs its own batch.

    Raises:
        InputError: a parameter outside its range.
    """

    short_name = "horizontal"

    def __init__(
        self,
        block: int = 2,
        tau: float | str = 2.0,
        rho: float | str = 0.005,
        pool: Pool = "auto",
        stop_gradient: bool = True,
        scorenet_weight: float = 1.0,
        saliency: Literal["attention", "rollout", "gradient", "random"] = "attention",
        rollout_steps: int = 1,
        assignment: str = "exact",
        relabel: Literal["saliency", "area"] = "saliency",
        gather: bool = False,
    ) -> None:
        super().__init__()
        _require_block(block)
        tau_of_share, rho_of_share = share_threshold("tau", tau), share_threshold("rho", rho)
        if not isinstance(rho, str) and rho < 0:
            raise InputError(f"expected `rho` of at least 0, got {rho}")
        if not scorenet_weight >= 0:
            raise InputError(f"expected `scorenet_weight` of at least 0, got {scorenet_weight}")
        _require_choice("saliency", saliency, ("attention", "rollout", "gradient", "random"))
        if assignment != "random":
            require_assignment(assignment)
        _require_choice("relabel", relabel, ("saliency", "area"))
        if gather and assignment == "random":
            raise InputError(
                "expected assignment='exact', 'greedy' or 'grouped:SIZE' with gather=True, got "
                "'random': random pairs are drawn in each process; leave gather out"
            )
        if rollout_steps < 1:
            raise InputError(f"expected `rollout_steps` of at least 1, got {rollout_steps}")
        self.block: int = block
        self.tau = tau
        self.rho = rho
        self.pool: Pool = pool
        self.stop_gradient = stop_gradient
        self.scorenet_weight = scorenet_weight
        self.saliency = saliency
        self.rollout_steps = rollout_steps
        self.assignment = assignment
        self.relabel: Literal["saliency", "area"] = relabel
        self.gather = gather
        self.scorenet: ScoreNet | None = None
        self.tau_of_share, self.rho_of_share = tau_of_share, rho_of_share

    @property
    def reads_attention(self) -> bool:
        """Whether saliency comes from attention."""
        return self.saliency in ("attention", "rollout")

    @property
    def last_block(self) -> int:
        """Last block whose attention is read."""
        return self.block + (self.rollout_steps if self.saliency == "rollout" else 0)

    def extra_repr(self) -> str:
        """Name the hyper-parameters."""
        return f"block={self.block}, tau={self.tau}, rho={self.rho}, saliency={self.saliency!r}"

    def attach(
        self, embed_dim: int, num_classes: int, num_prefix_tokens: int, class_token: bool
    ) -> None:
        """Make ScoreNet."""
        self.scorenet = ScoreNet(embed_dim, num_classes, self.pool, num_prefix_tokens, class_token)

    def release(self) -> None:
        """Drop ScoreNet."""
        self.scorenet = None

    def draw(self, batch: int, tokens: int, generator: torch.Generator | None) -> Given:
        """Draw what the ablations leave to chance."""
        partner = saliency = None
        if self.saliency == "random":
            values = host_generator(generator).random((batch, tokens), dtype="float32")
            saliency = torch.from_numpy(values / values.sum(1, keepdims=True))
        if self.assignment == "random":
            partner = torch.from_numpy(host_generator(generator).permutation(batch))
        return Given(partner=partner, saliency=saliency)

    def plan(self, tokens: Tensor, context: TokenContext) -> TokenOutcome:
        """Assess difficulty, then pair and mark tokens (TokenMixup, Algorithm 1)."""
        if self.scorenet is None:
            raise InputError("expected a stage inside a MixingModel, got one without its ScoreNet")
        scores = self.scorenet(tokens.detach() if self.stop_gradient else tokens)
        with torch.no_grad():
            difficulty = soft_cross_entropy_per_sample(scores, context.targets)
            saliency = wide(self._saliency(context))
            gathers = self.gather and world_size() > 1
            if gathers:
                difficulty, saliency = gather(difficulty), gather(saliency)
            easy = self._easy(difficulty)
            partner = context.given.partner
            if partner is None:
                partner = optimal_partners(saliency, easy, self._rho_so_far(), self.assignment)
            exchange = Exchange(partner, len(tokens)) if gathers else None
            if exchange is not None:
                partner = exchange.partner
            rho = self._least_gain(saliency, easy, partner)
            plan = horizontal_plan(saliency, easy, rho, candidates=partner, relabel=self.relabel)
            stats = self._stats(difficulty, easy, saliency, plan)
            if self.tau_of_share is not None:
                stats["tau"] = self.tau_of_share.value.clone()
            if self.rho_of_share is not None:
                stats["rho"] = torch.as_tensor(rho)
            if exchange is not None:
                plan = HorizontalPlan(*map(exchange.own, plan))
                saliency, difficulty = exchange.own(saliency), exchange.own(difficulty)
        # The loss enters every step, so that ScoreNet's parameters always have a gradient.
        loss = self.scorenet_weight * soft_cross_entropy(scores, context.targets)
        return TokenOutcome(plan, loss, stats, exchange, saliency, difficulty)

    def _saliency(self, context: TokenContext) -> Tensor:
        if self.saliency == "attention":
            return context.attention_saliency(0)
        if self.saliency == "rollout":
            return context.attention_saliency(self.rollout_steps)
        if context.given.saliency is None:
            raise InputError(f"expected a {self.saliency} saliency before the pass, got none")
        return context.given.saliency

    def _easy(self, difficulty: Tensor) -> Tensor:
        if isinstance(self.tau, str):
            assert self.tau_of_share is not None
            return difficulty < self.tau_of_share.follow(difficulty)
        return difficulty < self.tau if self.tau < math.inf else torch.ones_like(difficulty) > 0

    def _rho_so_far(self) -> float | Tensor:
        if isinstance(self.rho, str):
            assert self.rho_of_share is not None
            return -self.rho_of_share.value.nan_to_num().clamp_max(0)
        return self.rho

    def _least_gain(self, saliency: Tensor, easy: Tensor, partner: Tensor) -> float | Tensor:
        """Rho for this batch, whose pairs were made by what was known before it."""
        if self.rho_of_share is not None:
            # Replaced are the tokens whose gain is above rho: whose loss is below minus rho.
            loss = saliency - saliency[partner]
            self.rho_of_share.follow(torch.where(easy[:, None], loss, torch.nan))
        return self._rho_so_far()

    @staticmethod
    def _stats(
        difficulty: Tensor, easy: Tensor, saliency: Tensor, plan: HorizontalPlan
    ) -> dict[str, Tensor]:
        mixed = easy.sum()
        replaced = plan.replace.sum()
        gain = torch.where(plan.replace, saliency[plan.partner] - saliency, 0).sum()
        tokens = replaced / mixed.clamp_min(1)
        return {
            "mixed_samples": mixed.float(),
            "mixed_tokens": tokens,
            "mixed_share": mixed / len(easy),
            "replaced_share": tokens / plan.replace.shape[1],
            "difficulty": difficulty.mean(),
            "saliency_gain": gain / mixed.clamp_min(1),
            "own_weight": plan.own_weight.mean(),
        }


class VerticalTokenMixup(TokenStage):
    """Attend also to the most salient tokens of all earlier blocks (TokenMixup, Sec. 3.4, Eq. 13).

    Args:
        block: block whose keys and values are extended, counted from 0; at least 1.
        kappa: tokens collected from the input of each earlier block; in a model whose stages have
            different grids, of each earlier block of the same stage.
        stop_gradient: whether collected tokens carry no gradient.

    Raises:
        InputError: block 0, which no block precedes, or ``kappa`` not an integer of at least 1.
    """

    short_name = "vertical"

    def __init__(self, block: int = 3, kappa: int = 3, stop_gradient: bool = False) -> None:
        super().__init__()
        if block == 0:
            raise InputError(
                "expected VerticalTokenMixup at block 1 or later, got block 0: "
                "no earlier block has tokens to collect"
            )
        _require_block(block)
        if isinstance(kappa, bool) or not isinstance(kappa, int) or kappa < 1:
            raise InputError(f"expected `kappa` as an integer of at least 1, got {kappa!r}")
        self.block = block
        self.kappa = kappa
        self.stop_gradient = stop_gradient

    @property
    def reads_attention(self) -> bool:
        """Attention says which tokens are salient, and is extended by them."""
        return True

    def extra_repr(self) -> str:
        """Name the hyper-parameters."""
        return f"block={self.block}, kappa={self.kappa}"


class ManifoldMixup(TokenMixer):
    """Interpolate all tokens with those of a random partner (Verma et al., ICML 2019).

    Args:
        block: block in front of which tokens are mixed, counted from 0; of several, one is drawn
            for each batch.
        alpha: both parameters of the Beta distribution that the share of the own tokens is drawn
            from, once for a batch.
        prob: probability that a batch is mixed.

    Raises:
        InputError: a parameter outside its range.
    """

    short_name = "manifold"

    def __init__(
        self, block: int | Sequence[int] = (0, 1, 2), alpha: float = 2.0, prob: float = 1.0
    ) -> None:
        super().__init__()
        blocks = (block,) if isinstance(block, int) else tuple(block)
        if not blocks:
            raise InputError("expected at least one block, got none")
        for index in blocks:
            _require_block(index)
        if not alpha > 0:
            raise InputError(f"expected `alpha` above 0, got {alpha}")
        if not 0 <= prob <= 1:
            raise InputError(f"expected `prob` in [0, 1], got {prob}")
        self.block = blocks
        self.alpha = alpha
        self.prob = prob

    def extra_repr(self) -> str:
        """Name the hyper-parameters."""
        return f"block={self.block}, alpha={self.alpha}, prob={self.prob}"

    def draw(self, batch: int, tokens: int, generator: torch.Generator | None) -> Given | None:
        """Draw partners and one share."""
        rng = host_generator(generator)
        if rng.random() >= self.prob:
            return None
        share = float(rng.beta(self.alpha, self.alpha))
        partner = torch.from_numpy(rng.permutation(batch))
        return Given(partner=partner, own_weight=torch.full((batch,), share))

    def plan(self, tokens: Tensor, context: TokenContext) -> TokenOutcome:
        """Take what was drawn."""
        partner, own_weight, _ = context.given
        if partner is None or own_weight is None:
            raise InputError("expected partners and a share drawn before the pass, got none")
        return TokenOutcome(BlendPlan(partner, own_weight), None, {"own_share": own_weight.mean()})


def _require_block(block: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        raise InputError(f"expected `block` as an integer of at least 0, got {block!r}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"expected `{name}` as one of {', '.join(choices)}, got {value!r}")
