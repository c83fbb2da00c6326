"""Claims about turning tokens into clusters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.attention import Layout
from adamac.attention.cluster import cluster_tokens, refine, regroup, tiles
from adamac.testing import attention_like

side = st.integers(1, 7)


@given(grid=st.tuples(side, side, side), tile=st.tuples(side, side, side))
def test_boxes_cover_the_grid_and_hold_neighbours_alone(grid, tile):
    layout = Layout.video_only(math.prod(grid), grid=grid)
    clusters = tiles(torch.randn(1, 2, math.prod(grid), 3), layout, tile)
    boxes = [
        tuple(place // step for place, step in zip(token, tile, strict=True))
        for token in itertools.product(*map(range, grid))
    ]
    numbers = {box: number for number, box in enumerate(sorted(set(boxes)))}
    assert clusters.labels[0, 1].tolist() == [numbers[box] for box in boxes]
    assert clusters.num_clusters == len(numbers)
    assert clusters.counts.amax() <= math.prod(tile)
    assert (clusters.counts.sum(-1) == math.prod(grid)).all()


@given(tokens=st.integers(1, 50), tile=st.integers(1, 60))
def test_runs_cover_the_sequence(tokens, tile):
    clusters = tiles(torch.randn(1, 1, tokens, 3), Layout.video_only(tokens), tile)
    assert clusters.labels.flatten().tolist() == [token // tile for token in range(tokens)]
    assert clusters.num_clusters == math.ceil(tokens / tile)
    assert clusters.counts.amin() >= 1


def test_tiles_leave_padding_out():
    points = attention_like(2, 2, 24, 8)[1]
    valid = torch.rand(2, 24) < 0.7
    clusters = tiles(points, Layout(24, 0, 24, valid=valid, grid=(2, 3, 4)), (1, 2, 2))
    assert torch.equal(clusters.labels >= 0, valid.unsqueeze(1).expand(2, 2, 24))
    first = points[1, 0][clusters.labels[1, 0] == 0]
    torch.testing.assert_close(clusters.means[1, 0, 0], first.mean(0) if len(first) else torch.zeros(8))


def test_boxes_need_a_grid():
    with pytest.raises(ValueError, match=r"3-D tiles \(1, 2, 2\) need the grid"):
        tiles(torch.randn(1, 1, 24, 3), Layout.video_only(24), (1, 2, 2))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_refining_goes_on_where_the_former_step_stopped(metric):
    points = attention_like(1, 2, 300, 16)[0]
    layout = Layout.video_only(300)
    four = cluster_tokens(points, 12, layout, iterations=4, metric=metric, seed=0)
    three = cluster_tokens(points, 12, layout, iterations=3, metric=metric, seed=0)
    again = refine(points, three.centroids, layout, iterations=1, metric=metric)
    assert torch.equal(again.labels, four.labels)
    assert torch.equal(again.centroids, four.centroids)


def test_means_under_the_cosine_metric_keep_the_length_of_their_members():
    points = attention_like(1, 1, 300, 16)[0]
    clusters = cluster_tokens(points, 12, Layout.video_only(300), iterations=2, metric="cosine", seed=0)
    members = points[0, 0][clusters.labels[0, 0] == 3]
    torch.testing.assert_close(clusters.means[0, 0, 3], members.mean(0))


def test_regrouping_keeps_the_partition_and_renews_the_means():
    old, new = (attention_like(1, 1, 100, 8, seed=seed)[1] for seed in (0, 1))
    former = cluster_tokens(old, 6, Layout.video_only(100), iterations=2, metric="euclidean", seed=0)
    clusters = regroup(new, former)
    assert clusters.labels is former.labels
    torch.testing.assert_close(clusters.means[0, 0, 2], new[0, 0][former.labels[0, 0] == 2].mean(0))


def test_there_are_no_more_clusters_than_tokens():
    points = attention_like(1, 1, 5, 8)[1]
    assert (
        cluster_tokens(
            points, 12, Layout.video_only(5), iterations=1, metric="euclidean", seed=0
        ).num_clusters
        == 5
    )
