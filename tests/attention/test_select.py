"""Claims about scores and budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.attention import SVG2, AdaCluster, BlockTopK, Clusters, SparseD, Tokens, TopK, TopP
from adamac.attention.select import score_clusters
from adamac.ops.segment import Segments, segment_mean
from adamac.testing import attention_like, fake_plan


@st.composite
def scored(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, with ties, and sizes of clusters, some of them empty but not all."""
    heads, q_clusters, k_clusters = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 15))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    counts = torch.randint(0, 9, (1, heads, k_clusters), generator=generator)
    counts[..., draw(st.integers(0, k_clusters - 1))] = 5
    score = torch.randint(-6, 6, (1, heads, q_clusters, k_clusters), generator=generator).float()
    return score.masked_fill((counts == 0).unsqueeze(-2), -torch.inf), counts


shares = st.floats(0.001, 1.0)


@given(scored(), shares)
def test_the_token_budget_is_met_to_the_token(case, keep):
    score, counts = case
    reads = Tokens(keep).reads(score, counts)
    exact = [max(1, round(total * keep)) for total in counts.sum(-1).flatten().tolist()]
    assert reads.sum(-1).flatten().tolist() == [total for total in exact for _ in range(score.shape[2])]
    assert (reads >= 0).all()
    assert (reads <= counts.unsqueeze(-2)).all()


@given(scored(), shares)
def test_the_token_budget_reads_no_cluster_while_a_better_one_is_unread(case, keep):
    score, counts = case
    reads = Tokens(keep).reads(score, counts)
    left = counts.unsqueeze(-2) - reads
    worst_read = score.masked_fill(reads == 0, torch.inf).amin(-1)
    best_left = score.masked_fill(left == 0, -torch.inf).amax(-1)
    assert (worst_read >= best_left).all()
    assert (((reads > 0) & (left > 0)).sum(-1) <= 1).all()


@given(scored(), shares)
def test_top_k_reads_a_share_of_the_non_empty_clusters_whole(case, keep):
    score, counts = case
    reads = TopK(keep).reads(score, counts)
    chosen = reads > 0
    filled = (counts > 0).sum(-1, keepdim=True)
    expected = [math.ceil(number * keep - 1e-9) for number in filled.flatten().tolist()]
    assert chosen.sum(-1).flatten().tolist() == [number for number in expected for _ in range(score.shape[2])]
    assert torch.equal(reads, torch.where(chosen, counts.unsqueeze(-2), 0))
    assert (
        score.masked_fill(~chosen, torch.inf).amin(-1) >= score.masked_fill(chosen, -torch.inf).amax(-1)
    ).all()


@given(scored(), shares, st.floats(0, 1), shares)
def test_top_p_includes_the_crossing_cluster_and_keeps_floor_and_cap(case, mass, floor, cap):
    score, counts = case
    floor = min(floor, cap)
    chosen = TopP(mass, floor, cap).reads(score, counts) > 0
    for head, row in torch.cartesian_prod(torch.arange(score.shape[1]), torch.arange(score.shape[2])).reshape(
        -1, 2
    ):
        sizes = counts[0, head].float()
        estimate = (score[0, head, row].exp() * sizes).double()
        ranked = (estimate / estimate.sum()).sort(descending=True).values
        filled = int((sizes > 0).sum())
        reached = (ranked.cumsum(0) >= mass - 1e-6).nonzero()
        crossing = int(reached[0]) + 1 if len(reached) else filled
        low, high = math.ceil(filled * floor - 1e-9), math.ceil(filled * cap - 1e-9)
        number = int(chosen[0, head, row].sum())
        # Where the mass is reached to the last digit, either count is right.
        late = int((ranked.cumsum(0) < mass + 1e-6).sum()) + 1
        assert min(max(crossing, low), high) <= number <= min(max(late, low), high)
        kept = estimate[chosen[0, head, row]].amin()
        assert kept >= estimate[~chosen[0, head, row]].amax() - 1e-6 * kept if number < len(sizes) else True


def test_seven_per_cent_of_a_hundred_is_seven():
    counts = torch.ones(1, 1, 100, dtype=torch.long)
    assert 0.07 * 100 > 7  # in floats
    assert TopK(0.07).reads(torch.randn(1, 1, 1, 100), counts).sum() == 7


def test_every_row_costs_the_same_under_a_token_budget():
    query, key, _ = attention_like(2, 3, 333, 32)
    plan = AdaCluster(query_clusters=9, key_clusters=20, budget=Tokens(0.2))(query, key)
    assert plan.reads.sum(-1).eq(67).all()


@pytest.mark.parametrize("budget", [Tokens(1.0), TopK(1.0)])
def test_a_budget_of_one_reads_everything(budget):
    counts = torch.randint(0, 9, (1, 2, 12))
    score = torch.randn(1, 2, 4, 12).masked_fill((counts == 0).unsqueeze(-2), -torch.inf)
    assert torch.equal(budget.reads(score, counts), counts.unsqueeze(-2).expand(1, 2, 4, 12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tokens(0), r"Tokens\.keep must be over 0 and at most 1, got 0"),
        (lambda: Tokens(1.1), r"Tokens\.keep must be over 0 and at most 1, got 1\.1"),
        (lambda: TopK(-0.5), r"TopK\.keep must be over 0 and at most 1, got -0\.5"),
        (lambda: TopP(0), r"TopP\.mass must be over 0 and at most 1, got 0"),
        (lambda: TopP(0.9, cap=2), r"TopP\.cap must be over 0 and at most 1, got 2"),
        (lambda: TopP(0.9, floor=0.6, cap=0.5), r"TopP\.floor must lie between 0 and cap \(0\.5\), got 0\.6"),
        (
            lambda: AdaCluster(score="best"),
            "score must be one of centroid, quest, moment, residual; got 'best'",
        ),
    ],
)
def test_budgets_and_scores_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def clusters_of(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> Clusters:
    members = Segments(labels, num_clusters)
    return Clusters(members, segment_mean(points, members))


def test_quest_bounds_every_logit_of_the_cluster_from_above():
    query, key, _ = attention_like(1, 2, 200, 16)
    keys = fake_plan(query, key, k_clusters=9).keys
    bound = score_clusters("quest", query, key, keys)
    logits = query @ key.transpose(-1, -2) / 4
    own = bound.gather(-1, keys.labels.unsqueeze(-2).expand_as(logits))
    assert (own >= logits - 1e-5).all()
    assert (own - logits).amin() < 1  # and it is no empty promise


def test_quest_is_exact_for_clusters_of_one_key():
    query, key, _ = attention_like(1, 1, 20, 16)
    labels = torch.arange(20).expand(1, 1, 20)
    score = score_clusters("quest", query, key, clusters_of(key, labels, 20))
    torch.testing.assert_close(score, query @ key.transpose(-1, -2) / 4)


def test_the_centroid_score_is_the_mean_logit():
    query, key, _ = attention_like(1, 1, 60, 16)
    keys = clusters_of(key, torch.arange(60).expand(1, 1, 60) % 4, 4)
    mean_logit = (query @ key.transpose(-1, -2) / 4).view(1, 1, 60, 15, 4).mean(-2)
    torch.testing.assert_close(score_clusters("centroid", query, key, keys), mean_logit)


def one_cluster(spread: float) -> tuple[torch.Tensor, torch.Tensor, Clusters]:
    """A query and a cluster whose coordinates vary one at a time, so that no two of them are correlated."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 3, 8, generator=generator, dtype=torch.float64)
    step = torch.diag(torch.rand(8, generator=generator, dtype=torch.float64) + 1) * spread
    center = torch.randn(8, generator=generator, dtype=torch.float64)
    key = (center + torch.cat([step, -step])).view(1, 1, 16, 8)
    return query, key, clusters_of(key, torch.zeros(1, 1, 16, dtype=torch.long), 1)


def error_of(score: str, spread: float) -> float:
    query, key, keys = one_cluster(spread)
    truth = (query @ key.transpose(-1, -2) / 8**0.5).exp().mean(-1, keepdim=True).log()
    return float((score_clusters(score, query, key, keys) - truth).abs().amax())


def test_the_moment_score_is_the_log_mean_weight_to_second_order():
    # Halving the spread of a symmetric cluster divides a second-order error by 4, and by 16 one of the fourth order.
    assert error_of("centroid", 0.2) / error_of("centroid", 0.1) == pytest.approx(4, rel=0.05)
    assert error_of("moment", 0.2) / error_of("moment", 0.1) == pytest.approx(16, rel=0.05)


def test_the_residual_score_prefers_the_cluster_that_its_mean_represents_worse():
    query, tight, _ = one_cluster(0.01)
    _, wide, _ = one_cluster(0.5)
    key = torch.cat([tight, wide], dim=2)
    keys = clusters_of(key, (torch.arange(32) // 16).expand(1, 1, 32), 2)
    score = score_clusters("residual", query, key, keys)
    assert (score[..., 1] > score[..., 0]).all()


@pytest.mark.parametrize("score", ["centroid", "quest", "moment", "residual"])
def test_empty_clusters_are_never_read(score):
    query, key, _ = attention_like(1, 2, 100, 16)
    plan = fake_plan(query, key, k_clusters=12)
    scores = score_clusters(score, plan.queries.means, key, plan.keys)
    assert torch.isneginf(scores[..., plan.keys.counts[0, 0] == 0]).all()
    assert scores[..., plan.keys.counts[0, 0] > 0].isfinite().all()
    for budget in (Tokens(0.5), TopK(0.5), TopP(0.5)):
        reads = budget.reads(scores, plan.keys.counts)
        assert (reads[..., -1] == 0).all()
        assert (reads.sum(-1) > 0).all()


@pytest.mark.parametrize("make", [AdaCluster, SVG2, BlockTopK, SparseD])
def test_a_bare_share_is_no_budget_and_the_remedy_is_said(make):
    with pytest.raises(
        ValueError, match=rf"{make.__name__}\.budget must be .* got 0\.15; .* is Tokens\(0\.15\)"
    ):
        make(budget=0.15)
