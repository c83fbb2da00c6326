"""Claims about decisions for a whole layer whose heads are on several ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from adamac.attention import AdaCluster, Layout, Plan
from adamac.testing import attention_like, run_ranks

METHOD = AdaCluster(
    query_clusters=8, key_clusters=16, max_key_clusters=80, outlier_factor=1.5, metric="tokens"
)


def heads_of_unlike_need() -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of three heads, of which the last has some keys far from all others."""
    query, key, _ = attention_like(heads=3, tokens=300, head_dim=16)
    far = torch.arange(300) % 13 == 0
    key[:, 2, far] *= 5
    return query, key


def plans(rank: int, method: AdaCluster) -> tuple[Plan, Plan]:
    """This rank's heads (two of three, and one) by themselves, and among those of the other rank."""
    query, key = (part[:, [0, 1]] if rank == 0 else part[:, [2]] for part in heads_of_unlike_need())
    spread = replace(Layout.video_only(300), ranks=dist.group.WORLD)
    alone, among = (method(query, key, layout=layout) for layout in (Layout.video_only(300), spread))
    return alone, replace(among, layout=Layout.video_only(300))  # a process group stays in its process


def test_clusters_of_a_layer_are_as_on_one_rank_whatever_heads_a_rank_has():
    whole = METHOD(*heads_of_unlike_need())
    found = run_ranks(plans, 2, METHOD)
    assert (
        len({alone.parts()[1].num_clusters for alone, _ in found}) == 2
    )  # by themselves the ranks would not agree
    for rank, (_, among) in enumerate(found):
        heads = slice(0, 2) if rank == 0 else slice(2, 3)
        for mine, expected in zip(among.parts()[:2], whole.parts()[:2], strict=True):
            assert torch.equal(mine.members.labels, expected.members.labels[:, heads])
            assert torch.equal(mine.means, expected.means[:, heads])
        assert torch.equal(among.parts()[2], whole.parts()[2][:, heads])


def test_a_layer_is_dense_on_all_ranks_if_it_is_too_hard_on_one():
    method = replace(METHOD, max_key_clusters=32, hard_layers="dense")
    found = run_ranks(plans, 2, method)
    assert {alone.is_dense for alone, _ in found} == {True, False}
    assert [among.dense_reason for _, among in found] == ["method: keys need more than 32 clusters"] * 2
