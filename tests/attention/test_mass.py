"""Claims about the true softmax mass between clusters."""

from __future__ import annotations

import torch

from adamac.attention import Layout, Tokens
from adamac.attention import mass as mass_module
from adamac.attention.mass import mass_score, softmax_mass
from adamac.attention.select import score_clusters
from adamac.testing import attention_like, fake_plan


def case():
    query, key, _ = attention_like(2, 2, 90, 16)
    valid = torch.rand(2, 90) < 0.8
    return query, key, fake_plan(query, key, Layout(90, 0, 90, valid=valid), k_clusters=9)


def test_mass_is_the_mean_share_of_the_softmax(monkeypatch):
    query, key, plan = case()
    monkeypatch.setattr(mass_module, "_ROWS", 32)
    mass = softmax_mass(query, key, plan.queries, plan.keys)
    logits = (query[1, 0] @ key[1, 0].T / 4).masked_fill(plan.keys.labels[1, 0] < 0, -torch.inf)
    rows = logits.softmax(-1)[plan.queries.labels[1, 0] == 2]
    torch.testing.assert_close(mass[1, 0, 2, 3], rows[:, plan.keys.labels[1, 0] == 3].sum(1).mean())


def test_mass_sums_to_one_in_every_query_cluster_that_has_members():
    query, key, plan = case()
    total = softmax_mass(query, key, plan.queries, plan.keys).sum(-1)
    torch.testing.assert_close(total, (plan.queries.counts > 0).float())


def test_no_score_keeps_more_mass_than_the_oracle_at_the_same_token_budget():
    query, key, _ = attention_like(1, 2, 300, 16, sharpness=3.0)
    plan = fake_plan(query, key, k_clusters=40)
    mass = softmax_mass(query, key, plan.queries, plan.keys)

    def kept(score: torch.Tensor) -> torch.Tensor:
        reads = Tokens(0.2).reads(score, plan.keys.counts)
        return (mass * reads / plan.keys.counts.clamp_min(1).unsqueeze(-2)).sum(-1)

    best = kept(mass_score(query, key, plan.queries, plan.keys))
    for score in ("centroid", "quest", "moment", "residual"):
        assert (kept(score_clusters(score, plan.queries.means, key, plan.keys)) <= best + 1e-6).all()


def test_mass_that_rounds_to_zero_is_still_above_an_empty_cluster():
    query, key, plan = case()
    score = mass_score(100 * query, key, plan.queries, plan.keys)
    assert torch.equal(torch.isneginf(score), (plan.keys.counts == 0).unsqueeze(-2).expand_as(score))
    assert not score.isnan().any()
