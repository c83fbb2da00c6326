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
        ``[batch, heads, head_dim, head_dim]`` in the precision of plans, with a trace of 1, so that a product with it is no
        longer than what it is a product of; zeros if the queries are.
    """
    sample, weight = _sampled(query, valid)
    return _products(sample if weight is None else sample * weight)


def form_of_queries(key: Tensor, valid: Tensor | None = None) -> Tensor:
    """Give the form under which queries are clustered: the covariance of the keys; see :func:`form_of_keys`."""
    sample, weight = _sampled(key, valid)
    precise = accurate(sample)
    if weight is None:
        return _products((precise - precise.mean(-2, keepdim=True)).to(sample.dtype))
    mean = (precise * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)
    return _products(((precise - mean) * weight).to(sample.dtype))


def _sampled(tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Some tokens, ``[batch, heads, samples, head_dim]``, and 1 or 0 for each, or ``None`` if none is padding.

    Every so many in raster order, a number without a common factor with the video's, lest it meet few of its columns.
    """
    count = tokens.shape[-2]
    step = max(1, count // _SAMPLES)
    while math.gcd(step, count) > 1:
        step += 1
    # On a GPU products of bfloat16 are quick and good enough for a form; float16 could not hold their sums.
    sample = tokens[..., ::step, :]
    sample = sample.bfloat16() if sample.device.type == "cuda" else accurate(sample)
    return sample, None if valid is None else valid[..., ::step, None].to(sample.dtype)


def _products(sample: Tensor) -> Tensor:
    """Sum of the products of every sample with itself, scaled to a trace of 1."""
    form = accurate(sample.transpose(-1, -2) @ sample)
    trace = form.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return form / trace.clamp_min(torch.finfo(form.dtype).tiny)
