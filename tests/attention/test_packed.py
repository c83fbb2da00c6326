"""Claims about what is kept of centroids."""

from __future__ import annotations

import pytest
import torch

from adamac.attention import AdaCluster
from adamac.attention.packed import Packed
from adamac.testing import attention_like


@pytest.mark.parametrize("head_dim", [1, 7, 64])
def test_a_coordinate_is_off_by_a_thirtieth_of_its_range_at_most(head_dim, device):
    centroids = torch.randn(2, 3, 50, head_dim, device=device) * torch.rand(head_dim, device=device) * 9 + 4
    back = Packed.of(centroids).centroids()
    low, high = centroids.aminmax(dim=2, keepdim=True)
    assert back.shape == centroids.shape
    assert ((back - centroids).abs() <= (high - low) / 30 * 1.001).all()
    # The ends of the range are levels of their own.
    torch.testing.assert_close(torch.stack(back.aminmax(dim=2, keepdim=True)), torch.stack([low, high]))


def test_centroids_that_are_all_alike_come_back_as_they_are(device):
    centroids = torch.randn(1, 2, 1, 8, device=device).expand(1, 2, 5, 8)
    assert torch.equal(Packed.of(centroids).centroids(), centroids)


def test_a_plan_keeps_half_a_byte_a_coordinate_and_the_range_of_each(device):
    query, key, _ = attention_like(1, 3, 400, 64, device=device)
    plan = AdaCluster(query_clusters=10, key_clusters=30, outlier_factor=float("inf"))(query, key)
    kept = plan.carried()
    assert kept is not None
    assert kept.state_bytes() == 3 * (10 + 30) * 64 // 2 + 2 * 3 * 64 * (4 + 4)


def test_wan_14b_at_720p_keeps_less_than_half_a_gigabyte_with_as_many_clusters_as_there_can_be():
    tokens, layers, branches, heads, head_dim = 75_600, 40, 2, 40, 128
    queries, start = round(tokens**0.5), round(4 * tokens**0.5)
    most = start + start // 2
    held = sum(
        Packed.of(torch.empty(1, heads, clusters, head_dim, device="meta")).nbytes
        for clusters in (queries, most)
    )
    assert layers * branches * held < 0.5e9
