"""Help for testing an attention kernel or a method: one rule for numerical error, tensors and plans to try it on.

The rule is :mod:`adamac.ops.error_budget`'s. No test has a tolerance of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adamac.attention.layout import Layout
from adamac.attention.plan import Clusters, Plan
from adamac.ops.error_budget import over_budget
from adamac.ops.precision import accurate
from adamac.ops.segment import Segments, segment_mean


def assert_within_error_budget(output: Tensor, oracle64: Tensor, eager: Tensor) -> None:
    """Hold an implementation to the rule of :mod:`adamac.ops.error_budget`, in its root mean square error and in its largest error.

    Args:
        output: What the implementation computed.
        oracle64: The same in float64; where it is infinite the output has to be so as well.
        eager: The same, computed eagerly in the dtype of the inputs.

    Raises:
        AssertionError: Saying which error is over which budget.
    """
    assert oracle64.dtype == torch.float64, f"the oracle must be float64, got {oracle64.dtype}"
    assert output.shape == oracle64.shape == eager.shape, (
        f"shapes differ: output {tuple(output.shape)}, oracle {tuple(oracle64.shape)}, eager {tuple(eager.shape)}"
    )
    problem = over_budget(output, oracle64, eager)
    assert problem is None, problem


def attention_like(
    batch: int = 1,
    heads: int = 2,
    tokens: int = 256,
    head_dim: int = 64,
    *,
    topics: int = 16,
    sharpness: float = 4.0,
    noise: float = 0.6,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value that are alike to those of trained attention on video.

    Each token is about a topic, runs of neighbouring tokens about the same one, and topics return. A key is its topic's
    direction and noise, a query looks for keys of its topic, queries differ in length, and values follow the topic too.

    Args:
        batch: Samples.
        heads: Heads, each with its own directions.
        tokens: Length of the sequence.
        head_dim: Width of a head.
        topics: How many topics there are.
        sharpness: Mean logit of a query with a key of its own topic; with other topics it is about 0.
        noise: Spread of keys, queries and values about their topic; 0 makes the tokens of a topic identical but for the
            lengths of the queries.
        dtype: Of the result.
        device: Of the result.
        seed: The same seed gives the same tensors, on any device.

    Returns:
        Three tensors ``[batch, heads, tokens, head_dim]``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    run = max(1, tokens // (3 * topics))  # each topic comes back about three times
    topic = torch.randint(topics, (batch, 1, tokens // run + 1), generator=generator)
    topic = topic.repeat_interleave(run, dim=-1)[..., :tokens, None].expand(-1, heads, -1, head_dim)

    def about(directions: Tensor) -> Tensor:
        points = torch.gather(directions.expand(batch, -1, -1, -1), 2, topic)
        return points + noise * normal(batch, heads, tokens, head_dim)

    directions = normal(1, heads, topics, head_dim)
    length = (0.3 * normal(batch, heads, tokens, 1)).exp() * sharpness / head_dim**0.5
    query, key, value = (
        about(directions) * length,
        about(directions),
        about(normal(1, heads, topics, head_dim)),
    )
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def fake_plan(
    query: Tensor,
    key: Tensor,
    layout: Layout | None = None,
    *,
    q_clusters: int = 5,
    k_clusters: int = 7,
    compensate: bool = True,
    seed: int = 0,
) -> Plan:
    """Make a plan that no method would: clusters at random, the last of them empty, read not at all, in part, or whole.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: Like ``query``.
        layout: Where the video sits; ``None`` means that all tokens are video.
        q_clusters: Clusters of the queries; if there is more than one, the last is empty.
        k_clusters: Clusters of the keys, likewise.
        compensate: Whether skipped tokens enter the softmax through their mean.
        seed: The same seed gives the same plan, on any device.
    """
    layout = layout or Layout.video_only(query.shape[2])
    generator = torch.Generator().manual_seed(seed)
    queries = _random_clusters(layout.video(query), layout, q_clusters, generator)
    keys = _random_clusters(layout.video(key), layout, k_clusters, generator)
    share = (
        torch.rand(*query.shape[:2], q_clusters, k_clusters, generator=generator) * 3 - 1
    )  # a third none, a third all
    reads = (share.clamp(0, 1).to(query.device) * keys.counts.unsqueeze(-2)).round().long()
    return Plan(layout, queries, keys, reads, compensate=compensate)


def _random_clusters(
    points: Tensor, layout: Layout, num_clusters: int, generator: torch.Generator
) -> Clusters:
    labels = torch.randint(max(1, num_clusters - 1), points.shape[:3], generator=generator).to(points.device)
    valid = layout.video_valid()
    if valid is not None:
        labels = labels.masked_fill(~valid, -1)
    members = Segments(labels, num_clusters)
    means = segment_mean(accurate(points), members)
    return Clusters(members, means, means)


def eager_cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    reads: Tensor,
    *,
    compensate: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute cluster attention densely, every step in the dtype of the inputs.

    In float64 it is the oracle, in the tested dtype the eager computation of :func:`assert_within_error_budget`. It shares
    no code with the implementations and computes in another way: a skipped token is replaced by the mean of its cluster,
    and then attended like any other.

    Args:
        query: As in :func:`adamac.ops.cluster_attention.cluster_attention`, and so are the rest.
        key: ``[batch, heads, k_tokens, head_dim]``.
        value: ``[batch, heads, k_tokens, head_dim]``.
        queries: Clusters of the queries.
        keys: Clusters of the keys.
        reads: ``[batch, heads, q_clusters, k_clusters]``.
        compensate: Whether skipped tokens enter through their cluster's means.
        scale: Multiplier on the logits.

    Returns:
        Output like ``query`` and the log-sum-exp of each row's logits, in the dtype of the inputs.
    """
    output, lse = torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf)
    for sample, head, cluster in (
        torch.cartesian_prod(*map(torch.arange, reads.shape[:3])).reshape(-1, 3).tolist()
    ):
        at = (sample, head)
        rows = queries.labels[at] == cluster
        own_key, own_value = key[at].clone(), value[at].clone()
        used = torch.zeros_like(keys.labels[at], dtype=torch.bool)
        for k_cluster, count in enumerate(reads[at][cluster].tolist()):
            members = (keys.labels[at] == k_cluster).nonzero().squeeze(1)
            skipped = members[count:]
            used[members if compensate else members[:count]] = True
            if len(skipped):
                own_key[skipped], own_value[skipped] = key[at][members].mean(0), value[at][members].mean(0)
        if rows.any() and used.any():
            logits = query[at][rows] @ own_key[used].T * scale
            output[at][rows] = logits.softmax(-1) @ own_value[used]
            lse[at][rows] = logits.logsumexp(-1)
    return output, lse


def run_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, time_limit_s: float = 120.0
) -> list[Any]:
    """Run a function on several ranks, processes of this machine that are one gloo process group.

    If a rank fails, the others are ended at once, wherever they wait for it.

    Args:
        function: Of a module that the processes can import, called as ``function(rank, *arguments)``.
        ranks: How many.
        *arguments: The same for every rank; they have to be picklable.
        time_limit_s: After this many seconds all ranks are ended.

    Returns:
        What each rank returned, without gradients; it has to be picklable.

    Raises:
        RuntimeError: With the traceback of the rank that failed first, or with the exit code of one that died.
        TimeoutError: Naming the ranks that had not finished.
    """
    from adamac.moe.ranks import run

    return run(function, ranks, arguments, time_limit_s)
