"""Selection: how much a key cluster matters to a query cluster (scores), and how many to read (budgets).

A score is per *token* and in units of logits: an estimate of the logarithm of the average softmax weight, before
normalisation, that a query of the cluster gives to one token of the key cluster. Adding the logarithm of the cluster's size
gives the cluster's mass.

Scores
    ``centroid``  q.c / sqrt(d): the logit of the mean query with the mean key (SVG2).
    ``quest``     the largest q.k that any key in the cluster's bounding box could have (AdaCluster's TensorQuest): with
                  q+ = max(q, 0) and q- = min(q, 0) it is q+.M + q-.m for the box [m, M], two matrix products. An upper
                  bound of every q.k in the cluster.
    ``moment``    q.c / sqrt(d) + q^2.var / 2d: the second-order estimate of the cluster's log mean weight.
    ``residual``  the moment estimate plus the log of the spread of the logits inside the cluster: what compensating a
                  skipped cluster by its mean cannot repair.

Budgets
    :class:`TopK` reads a share of the clusters (the paper), :class:`Tokens` reads the same number of tokens in every row,
    :class:`TopP` reads until a share of the estimated mass is covered (SVG2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from adamac.attention.plan import Clusters
from adamac.ops.fill import fill
from adamac.ops.precision import accurate
from adamac.ops.segment import segment_min_max, segment_variance

Score = Literal["centroid", "quest", "moment", "residual"]


def score_clusters(score: Score, query_means: Tensor, key: Tensor, keys: Clusters) -> Tensor:
    """Score every key cluster for every query cluster.

    Args:
        score: Which estimate; see the module's description.
        query_means: ``[batch, heads, q_clusters, head_dim]``, mean query of each cluster.
        key: ``[batch, heads, video_tokens, head_dim]``, the keys that ``keys`` clusters.
        keys: Clusters of the keys.

    Returns:
        ``[batch, heads, q_clusters, k_clusters]`` float32, log weight per token; ``-inf`` for empty clusters.
    """
    scale = query_means.shape[-1] ** -0.5
    query_means = accurate(query_means)
    if score == "quest":
        low, high = segment_min_max(key, keys.members)
        logits = quest_bound(query_means, low, high) * scale
    else:
        logits = query_means @ keys.means.transpose(-1, -2) * scale
    if score in ("moment", "residual"):
        variance = keys.variances
        if variance is None:
            variance = segment_variance(key, keys.members, keys.means)
        logit_variance = (query_means.square() @ variance.transpose(-1, -2)) * scale**2
        logits = logits + logit_variance / 2
        if score == "residual":
            logits = logits + 0.5 * logit_variance.clamp_min(1e-12).log()
    return logits.masked_fill((keys.counts == 0).unsqueeze(-2), -torch.inf)


def quest_bound(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bound q.k from above for all keys of a box, as two matrix products.

    Args:
        query: ``[..., q, head_dim]``.
        low: ``[..., k, head_dim]``, elementwise minimum of each cluster's keys.
        high: ``[..., k, head_dim]``, elementwise maximum.

    Returns:
        ``[..., q, k]``.
    """
    return query.clamp_min(0) @ high.transpose(-1, -2) + query.clamp_max(0) @ low.transpose(-1, -2)


def check_score(score: str) -> None:
    """Refuse an unknown score."""
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}; got {score!r}")


@dataclass(frozen=True)
class TopK:
    """Read the best share of the clusters, whole.

    Attributes:
        keep: Share of the non-empty clusters, over 0 up to 1. The paper does not print its K; what is known of it points
            at a quarter.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        _check_share("TopK.keep", self.keep)

    def reads(self, score: Tensor, counts: Tensor) -> Tensor:
        """Choose; see :meth:`Tokens.reads`."""
        sizes = counts.unsqueeze(-2)
        chosen = fill(score, (sizes > 0).long(), _at_least(_filled(counts) * self.keep).long())
        return torch.where(chosen > 0, sizes, 0)

    def max_reads(self, tokens: int) -> int | None:
        """Clusters are of any size, so a row may read any number of tokens."""
        return None


@dataclass(frozen=True)
class Tokens:
    """Read the same number of keys in every row, best clusters first.

    The last cluster is read in part, so the budget is met to the token: cost is known before the run, heads are balanced
    across devices, and a step takes the same time whatever the content.

    Attributes:
        keep: Share of the valid video keys that each row reads, over 0 up to 1.
    """

    keep: float = 0.15

    def __post_init__(self) -> None:
        _check_share("Tokens.keep", self.keep)

    def reads(self, score: Tensor, counts: Tensor) -> Tensor:
        """Choose how many tokens of each cluster to read.

        Args:
            score: ``[batch, heads, q_clusters, k_clusters]``, log weight per token.
            counts: ``[batch, heads, k_clusters]``, cluster sizes.

        Returns:
            ``[batch, heads, q_clusters, k_clusters]`` integers.
        """
        # float32 would miss the budget by one beyond 2^24 tokens
        valid = counts.sum(-1, keepdim=True).double()
        budget = (valid * self.keep).round().long().clamp_min(1).unsqueeze(-2)
        return fill(score, counts.unsqueeze(-2), budget)

    def max_reads(self, tokens: int) -> int | None:
        """The most tokens that a row reads of a video of so many, without looking at the device."""
        return max(1, round(tokens * self.keep))


@dataclass(frozen=True)
class TopP:
    """Read the best clusters until they hold a share of the estimated softmax mass, the crossing cluster included.

    Attributes:
        mass: Share of the estimated mass, over 0 up to 1.
        floor: Least share of the non-empty clusters to read.
        cap: Largest share of the non-empty clusters to read.
    """

    mass: float = 0.9
    floor: float = 0.1
    cap: float = 1.0

    def __post_init__(self) -> None:
        _check_share("TopP.mass", self.mass)
        _check_share("TopP.cap", self.cap)
        if not 0 <= self.floor <= self.cap:
            raise ValueError(f"TopP.floor must lie between 0 and cap ({self.cap}), got {self.floor}")

    def reads(self, score: Tensor, counts: Tensor) -> Tensor:
        """Choose; see :meth:`Tokens.reads`."""
        sizes = counts.unsqueeze(-2)
        mass = (score + sizes.clamp_min(1).log()).softmax(-1)
        one, filled = (sizes > 0).long(), _filled(counts)
        least, best = (
            fill(mass, one, _at_least(filled * share).long()) > 0 for share in (self.floor, self.cap)
        )
        enough = fill(mass, mass, mass.new_full((*mass.shape[:2], 1, 1), self.mass)) > 0
        return torch.where(least | (enough & best), sizes, 0)

    def max_reads(self, tokens: int) -> int | None:
        """Clusters are of any size, so a row may read any number of tokens."""
        return None


Budget = TopK | Tokens | TopP


def check_budget(method: object) -> None:
    """Refuse a method whose budget is not one: a bare share, for instance."""
    budget = getattr(method, "budget", None)
    if not (hasattr(budget, "reads") and hasattr(budget, "max_reads")):
        share = f"; a share of the keys is Tokens({budget})" if isinstance(budget, float) else ""
        raise ValueError(
            f"{type(method).__name__}.budget must be Tokens(keep), TopK(keep) or TopP(mass), got {budget!r}{share}"
        )


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be over 0 and at most 1, got {share}")


def _filled(counts: Tensor) -> Tensor:
    """Number of non-empty clusters, shaped to compare with ``[batch, heads, q_clusters, k_clusters]``."""
    return (counts > 0).sum(-1)[..., None, None].double()


def _at_least(number: Tensor) -> Tensor:
    """Round up, but not because of the last bit: 7 % of 100 is 7, though 0.07 * 100 is a little more."""
    return (number - 1e-9).ceil()
