"""How far apart two keys are to the queries that meet them, and two queries to the keys.

What a cluster of keys costs when it is read through its mean, or ranked by it, is how much the logits of its members
differ, not how far apart its members lie: a coordinate in which queries are small does not matter. The mean squared
difference of two keys' logits over the queries of a head is ``(a-b) E[q q'] (a-b)``, a quadratic form of one matrix a head.
Queries likewise are alike if they see the same differences between keys: their form is the covariance of the keys, since
what all keys have in common moves no softmax.

Matrices are estimated from evenly spread tokens and read by :func:`adamac.ops.kmeans.kmeans`; no token is transformed.
Not in the paper; docs/decisions/logit-metric.md says what it is worth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamac.ops.precision import accurate

# Tokens that a matrix is estimated from at least, if there are so many: 32 for each coordinate of a head of 128.
_SAMPLES = 4096


def form_of_keys(query: Tensor, valid: Tensor | None = None) -> Tensor:
    """Give the form under which keys are clustered: second moments of the queries.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        valid: ``[batch, 1, tokens]`` bool, ``False`` for padding; ``None`` means no padding.

    Returns:
        ``[batch, heads, head_dim, head_dim]`` in the precision of plans; the largest row sum of its magnitudes is 1.
    """
    sample, weights = _sampled(query, valid)
    return _scaled((sample * weights).transpose(-1, -2) @ sample)


def form_of_queries(key: Tensor, valid: Tensor | None = None) -> Tensor:
    """Give the form under which queries are clustered: the covariance of the keys; see :func:`form_of_keys`."""
    sample, weights = _sampled(key, valid)
    centred = sample - (sample * weights).sum(-2, keepdim=True)
    return _scaled((centred * weights).transpose(-1, -2) @ centred)


def _sampled(tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Some tokens, ``[batch, heads, samples, head_dim]``, and their weights, which add up to 1.

    Every so many in raster order, a number without a common factor with the video's, lest it meet few of its columns.
    """
    count = tokens.shape[-2]
    step = max(1, count // _SAMPLES)
    while math.gcd(step, count) > 1:
        step += 1
    sample = accurate(tokens[..., ::step, :])
    if valid is None:
        return sample, sample.new_full((1, 1, 1, 1), 1 / sample.shape[-2])
    weights = valid[..., ::step, None].to(sample.dtype)
    return sample, weights / weights.sum(-2, keepdim=True).clamp_min(1)


def _scaled(form: Tensor) -> Tensor:
    """Scale each matrix so that no product with it is larger than what it is a product of, in float16 either.

    What has no extent in any direction becomes the identity.
    """
    size = form.abs().sum(-1).amax(-1)[..., None, None]
    identity = torch.eye(form.shape[-1], dtype=form.dtype, device=form.device)
    return torch.where(size > 0, form / size.clamp_min(torch.finfo(form.dtype).tiny), identity)
