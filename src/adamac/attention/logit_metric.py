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

# About how many tokens a matrix is estimated from: 32 for each coordinate of a head of 128. Where the steps near have a
# common factor with the video's length it can be half as many.
_SAMPLES = 4096
# A single product of so long a sum would keep a GPU's multiprocessors waiting for one of them.
_PIECES = 8


def form_of_keys(query: Tensor, valid: Tensor | None = None) -> Tensor:
    """Give the form under which keys are clustered: second moments of the queries.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        valid: ``[batch, 1, tokens]`` bool, ``False`` for padding; ``None`` means no padding.

    Returns:
        ``[batch, heads, head_dim, head_dim]`` in the precision of plans, with a trace of 1, so that a product with it is no
        longer than what it is a product of; zeros if the queries are.
    """
    sample, there = _sampled(query, valid)
    return _products(sample if there is None else sample.masked_fill(~there, 0))


def form_of_queries(key: Tensor, valid: Tensor | None = None) -> Tensor:
    """Give the form under which queries are clustered: the covariance of the keys; see :func:`form_of_keys`."""
    sample, there = _sampled(key, valid)
    if there is None:
        return _products(sample - sample.mean(-2, keepdim=True))
    count = there.sum(-2, keepdim=True).clamp_min(1)
    mean = sample.masked_fill(~there, 0).sum(-2, keepdim=True) / count
    return _products((sample - mean).masked_fill(~there, 0))


def _sampled(tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Some tokens, ``[batch, heads, samples, head_dim]``, and whether each is none of padding; ``None`` if all are.

    Every so many in raster order, a number without a common factor with the video's, lest it meet few of its columns.
    """
    count = tokens.shape[-2]
    step = max(1, count // _SAMPLES)
    while math.gcd(step, count) > 1:
        step += 1
    return accurate(tokens[..., ::step, :]), None if valid is None else valid[..., ::step, None]


def _products(sample: Tensor) -> Tensor:
    """Sum of the products of every sample with itself, scaled to a trace of 1."""
    pieces = _PIECES if sample.device.type == "cuda" and sample.shape[-2] >= _PIECES else 1
    whole = sample.shape[-2] // pieces * pieces
    sample = sample[..., :whole, :].unflatten(-2, (pieces, -1))
    with torch.autocast(sample.device.type, enabled=False):  # float16 could not hold the sums
        form = (sample.transpose(-1, -2) @ sample).sum(-3)
    trace = form.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return form / trace.clamp_min(torch.finfo(form.dtype).tiny)
