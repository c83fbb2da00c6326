"""Claims about k-means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.ops import kmeans as kmeans_module
from adamac.ops.kmeans import distances, kmeans, nearest, spread_tokens
from adamac.ops.kmeans import triton as kernels
from adamac.ops.segment import segment_mean, segment_variance
from adamac.testing import attention_like


@pytest.fixture
def points(device) -> torch.Tensor:
    return attention_like(2, 3, 300, 16, device=device)[1]


def test_every_point_gets_its_nearest_centroid(points):
    centroids = spread_tokens(points, 20, seed=0)
    far = torch.cdist(points.double(), centroids.double())
    chosen = far.gather(-1, nearest(points, centroids).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, far.amin(-1))


def test_the_largest_cosine_wins_under_the_cosine_metric(points):
    centroids = spread_tokens(points, 20, seed=0)
    cosine = torch.nn.functional.cosine_similarity(
        points.unsqueeze(3).double(), centroids.unsqueeze(2).double(), dim=-1
    )
    chosen = cosine.gather(-1, nearest(points, centroids, "cosine").unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, cosine.amax(-1), atol=1e-6, rtol=0)


def test_ties_go_to_the_lower_index(device):
    points = torch.zeros(1, 1, 4, 3, device=device)
    assert torch.equal(
        nearest(points, torch.ones(1, 1, 5, 3, device=device), impl="torch"),
        torch.zeros(1, 1, 4, device=device).long(),
    )


def test_slices_do_not_change_the_labels(points, monkeypatch):
    centroids = spread_tokens(points, 20, seed=0)
    whole = nearest(points, centroids)
    monkeypatch.setattr(kmeans_module, "_SLICE_ELEMENTS", {"cpu": 7 * 20 * 6, "other": 7 * 20 * 6})
    assert torch.equal(nearest(points, centroids), whole)


def test_k_means_never_raises_inertia(points):
    start = spread_tokens(points, 24, seed=1)
    found = [kmeans(points, start, iterations=number) for number in range(1, 9)]
    far = torch.stack([distances(points, each.members.labels, each.centroids) for each in found])
    spreads = far.square().sum(-1)
    assert (spreads.diff(dim=0) <= 1e-5 * spreads[0]).all()
    assert (spreads[-1] < spreads[0]).all()


def test_centroids_are_the_means_of_their_members(points):
    found = kmeans(points, spread_tokens(points, 12, seed=0), iterations=2)
    for cluster in range(12):
        members = points[1, 2][found.members.labels[1, 2] == cluster]
        assert len(members) == found.members.counts[1, 2, cluster]
        if len(members):
            torch.testing.assert_close(found.centroids[1, 2, cluster], members.mean(0))


def test_an_empty_cluster_keeps_its_centroid(points):
    start = spread_tokens(points, 6, seed=0)
    start[:, :, 2] = 1e3
    found = kmeans(points, start, iterations=3)
    assert (found.members.counts[:, :, 2] == 0).all()
    assert torch.equal(found.centroids[:, :, 2], start[:, :, 2])
    assert (found.members.labels != 2).all()


def test_spherical_k_means_ignores_length(points):
    lengths = torch.rand(*points.shape[:3], 1, device=points.device) * 9 + 0.1
    start = spread_tokens(points, 10, seed=0)
    plain = kmeans(points, start, iterations=4, metric="cosine")
    scaled = kmeans(points * lengths, start, iterations=4, metric="cosine")
    assert torch.equal(plain.members.labels, scaled.members.labels)
    torch.testing.assert_close(plain.centroids, scaled.centroids)


def test_spherical_centroids_lie_on_the_sphere(points):
    found = kmeans(points, spread_tokens(points, 10, seed=0), iterations=1, metric="cosine")
    lengths = found.centroids[found.members.counts > 0].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_points_left_out_have_no_influence(points):
    include = torch.rand(2, 1, 300, device=points.device) < 0.7
    start = spread_tokens(points, 8, seed=0, include=include)
    garbage = torch.where(include.unsqueeze(-1), points, 1e4)
    clean, dirty = (kmeans(each, start, iterations=3, include=include) for each in (points, garbage))
    assert torch.equal(clean.members.labels, dirty.members.labels)
    assert torch.equal(clean.centroids, dirty.centroids)
    assert torch.equal(clean.members.labels >= 0, include.expand_as(clean.members.labels))
    assert clean.members.counts.sum(-1).eq(include.sum(-1)).all()
    assert (distances(points, clean.members.labels, clean.centroids)[clean.members.labels < 0] == 0).all()


def test_half_precision_points_are_clustered_in_single(points):
    found = kmeans(points.bfloat16(), spread_tokens(points, 8, seed=0).bfloat16(), iterations=2)
    assert found.centroids.dtype == torch.float32


def test_no_iteration_is_refused(points):
    with pytest.raises(ValueError, match="at least one iteration, got 0"):
        kmeans(points, points[:, :, :4], iterations=0)


@given(tokens=st.integers(1, 60), clusters=st.integers(1, 60), seed=st.integers(0, 2**20), data=st.data())
def test_starting_tokens_take_part_and_are_spread_over_the_sequence(tokens, clusters, seed, data):
    include = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    positions = torch.arange(tokens).view(1, 1, tokens, 1)
    chosen = spread_tokens(positions, clusters, seed, include.view(1, 1, tokens)).flatten()
    members = include.nonzero().flatten()
    if len(members):
        assert include[chosen].all()
        place = torch.searchsorted(members, chosen)
        stretch = torch.arange(clusters) * len(members) / clusters
        assert (place + 1 > stretch - 1e-4).all()
        assert (place < stretch + len(members) / clusters + 1e-4).all()
    everywhere = spread_tokens(positions, clusters, seed).flatten()
    assert torch.equal(
        everywhere, spread_tokens(positions, clusters, seed, torch.ones(1, 1, tokens).bool()).flatten()
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8, 1), (2, 3, 63, 40, 5), (1, 2, 100, 128, 70), (1, 1, 33, 80, 16)]
)
def test_the_kernel_finds_a_centroid_as_near_as_the_nearest(shape, dtype, metric, device):
    batch, heads, tokens, dim, clusters = shape
    points = torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2)  # not contiguous
    centroids = torch.randn(batch, heads, clusters, dim, device=device).to(dtype).float()  # nothing to round
    if metric == "cosine":
        centroids = torch.nn.functional.normalize(centroids, dim=-1).to(dtype).float()
    labels = nearest(points, centroids, metric, impl="triton").long()
    if metric == "cosine":
        gain = points.double() @ torch.nn.functional.normalize(centroids.double(), dim=-1).transpose(-1, -2)
    else:
        gain = -torch.cdist(points.double(), centroids.double()).square() / 2
    own = torch.gather(gain, -1, labels.unsqueeze(-1)).squeeze(-1)
    # Sums of a few hundred products differ by their rounding; rounding unit centroids again moves them by the dtype's.
    slack = 1e-4 if metric == "euclidean" else 4 * torch.finfo(dtype).eps
    assert (own >= gain.amax(-1) - slack * points.double().norm(dim=-1).clamp_min(1) ** 2).all()


@pytest.mark.parametrize(("sign", "expected"), [(1, 3), (-1, 15)])
def test_the_kernel_gives_ties_to_the_first_or_last_of_the_first_block(sign, expected, device, monkeypatch):
    monkeypatch.setattr(kernels, "_launch", lambda row_bytes: (16, 16, 1))
    points = torch.full((1, 1, 40, 16), float(sign), device=device)
    centroids = torch.ones(1, 1, 50, 16, device=device)  # nearer than the origin, or farther
    centroids[:, :, :3] = 5
    assert (nearest(points, centroids, impl="triton") == expected).all()


@pytest.mark.parametrize("clusters", [1, 16, 17, 50])
@pytest.mark.filterwarnings("ignore:(invalid|overflow|All-NaN)")
def test_what_fills_up_the_last_block_is_never_nearest(clusters, device, monkeypatch):
    monkeypatch.setattr(kernels, "_launch", lambda row_bytes: (16, 16, 1))
    points = torch.randn(1, 2, 40, 16, device=device) * torch.logspace(-3, 3, 40, device=device)[:, None]
    points[:, :, 0], points[:, :, 1], points[:, :, 2] = (
        torch.nan,
        torch.inf,
        3e38,
    )  # padding may hold anything
    for metric in ("euclidean", "cosine"):
        labels = nearest(points, torch.randn(1, 2, clusters, 16, device=device) - 9, metric, impl="triton")
        assert (labels >= 0).all()
        assert (labels < clusters).all()


def a_form(points):
    """What a hundred points are seen by, some coordinates much more than others."""
    batch, heads, _, dim = points.shape
    seen_by = torch.randn(batch, heads, 100, dim, device=points.device) * torch.logspace(
        -1, 1, dim, device=points.device
    )
    return seen_by.transpose(-1, -2) @ seen_by / 100


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_under_a_form_points_are_clustered_as_if_they_were_transformed(metric, impl, points):
    points, form = points + 2, a_form(points)
    root = torch.linalg.cholesky(form.double())
    centroids = points[:, :, ::15]
    labels = nearest(points, centroids, metric, form=form, impl=impl).long()
    moved, there = points.double() @ root, centroids.double() @ root
    if metric == "cosine":
        gain = moved @ torch.nn.functional.normalize(there, dim=-1).transpose(-1, -2)
    else:
        gain = -torch.cdist(moved, there).square() / 2
    own = torch.gather(gain, -1, labels.unsqueeze(-1)).squeeze(-1)
    slack = 1e-5 if impl == "torch" else 1e-4  # the kernel compares 17 bits
    assert (own >= gain.amax(-1) - slack * moved.norm(dim=-1).clamp_min(1) ** 2).all()


def test_distances_under_a_form_are_those_of_transformed_points(points):
    form, centroids = a_form(points), points[:, :, ::15]
    padding = torch.arange(300, device=points.device) % 7 == 0
    labels = nearest(points, centroids, form=form).long().masked_fill(padding, -1)
    moved = (x.double() @ torch.linalg.cholesky(form.double()) for x in (points, centroids))
    expected = torch.cdist(*moved).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    found = distances(points, labels, centroids, form)
    torch.testing.assert_close(found.double(), expected.masked_fill(labels < 0, 0.0), rtol=1e-3, atol=2e-3)


def test_k_means_never_raises_inertia_under_a_form(points):
    start, form = spread_tokens(points, 24, seed=1), a_form(points)
    found = [kmeans(points, start, iterations=number, form=form) for number in range(1, 9)]
    far = torch.stack([distances(points, each.members.labels, each.centroids, form) for each in found])
    spreads = far.square().sum(-1)
    assert (spreads.diff(dim=0) <= 1e-5 * spreads[0]).all()
    assert (spreads[-1] < spreads[0]).all()


@pytest.mark.parametrize("dim", [8, 40, 128])
@pytest.mark.parametrize("with_form", [False, True])
def test_rounding_a_direction_moves_no_similarity_at_its_centroid(with_form, dim, device):
    centroids = 50 + torch.randn(1, 2, 21, dim, device=device)
    form = a_form(centroids) if with_form else None
    rounded, offsets = kernels.directions(centroids, torch.bfloat16, False, form, 32)
    own = (rounded[:, :, :21].double() * centroids.double()).sum(-1) + offsets[:, :, :21].double()
    seen = centroids.double() if form is None else centroids.double() @ form.double()
    torch.testing.assert_close(own, (seen * centroids.double()).sum(-1) / 2, rtol=1e-5, atol=0)
    assert (offsets[:, :, 21:] < -1e38).all()
    assert (rounded[:, :, 21:] == 0).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_kernels_run_the_same_iterations(metric, device):
    points = attention_like(2, 3, 120, 16, device=device)[1]
    initial = torch.cat([points[:, :, ::12], points[:, :, :1] + 100], dim=2)  # the last one stays empty
    include = torch.rand(2, 1, 120, device=device) < 0.8
    plain, kernel = (
        kmeans(points, initial, iterations=3, metric=metric, include=include, impl=impl)
        for impl in ("torch", "triton")
    )
    assert torch.equal(plain.members.labels, kernel.members.labels.long())
    torch.testing.assert_close(plain.centroids, kernel.centroids)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_centroids_that_do_not_fit_the_points_are_refused(points, impl):
    centroids = spread_tokens(points, 5, seed=0)
    with pytest.raises(ValueError, match=r"centroids must have shape \(2, 3, 5, 16\).* got \(2, 3, 5, 8\)"):
        nearest(points, centroids[..., :8], impl=impl)
    with pytest.raises(ValueError, match=r"centroids must have shape \(2, 3, 5, 16\).* got \(1, 3, 5, 16\)"):
        nearest(points, centroids[:1], impl=impl)
    with pytest.raises(ValueError, match=r"centroids is on meta, the rest is on .*; move all to one device"):
        kmeans(points, centroids.to("meta"), iterations=1, impl=impl)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_kernel_gives_what_lies_in_the_way_of_the_last_update(metric, device):
    points = 5 + attention_like(2, 3, 120, 16, device=device)[1]
    # Far from the means, which makes them hard; the last two stay with one member and with none.
    initial = torch.cat([points[:, :, ::12] + 0.5, points[:, :, :1] + 40, points[:, :, :1] - 90], dim=2)
    points[:, :, 7] = points[:, :, 0] + 40
    found = kmeans(points, initial, iterations=1, metric=metric, impl="triton")
    means = segment_mean(points, found.members)
    if metric == "cosine":
        torch.testing.assert_close(found.means, means)
        assert found.variances is None
        return
    assert found.means is None
    variances = segment_variance(points.double(), found.members, means.double())
    torch.testing.assert_close(found.variances.double(), variances, rtol=1e-4, atol=1e-4)
    assert (found.variances[found.members.counts < 2] == 0).all()
    assert (found.members.counts < 2).any()
