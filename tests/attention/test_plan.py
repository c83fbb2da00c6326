"""Claims about what a plan says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masks import exact_pairs, skipped_clusters, valid_tokens

from adamac.attention import Layout, Plan
from adamac.ops.segment import Segments
from adamac.testing import attention_like, fake_plan

PADDED = torch.tensor([[True] * 40, [True] * 22 + [False] * 9 + [True] * 4 + [False] * 5])
LAYOUTS = {
    "video only": Layout.video_only(40),
    "text before": Layout(40, 6, 40),
    "text after": Layout(40, 0, 31),
    "text around": Layout(40, 3, 37),
    "padding": Layout(40, 3, 30, valid=PADDED),
    "one padding for all samples": Layout(40, 3, 30, valid=PADDED[1:]),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def plan(request) -> Plan:
    query, key, _ = attention_like(2, 3, 40, 8)
    return fake_plan(query, key, request.param)


def test_density_is_the_share_of_pairs_in_the_mask(plan):
    tokens = valid_tokens(plan, 2).sum(-1, keepdim=True).double()
    torch.testing.assert_close(plan.density(), exact_pairs(plan).sum((-2, -1)) / tokens.square())


def test_cost_adds_the_centroids_that_rows_read(plan):
    tokens = valid_tokens(plan, 2).sum(-1, keepdim=True).double()
    extra = skipped_clusters(plan).sum(-1) / tokens.square()
    torch.testing.assert_close(plan.cost(), plan.density() + extra)
    assert torch.equal(replace(plan, compensate=False).cost(), plan.density())


def test_a_fake_plan_keeps_every_invariant(plan):
    plan.check()
    assert (plan.queries.counts[..., -1] == 0).all()
    assert (plan.keys.counts[..., -1] == 0).all()


def test_a_dense_plan_costs_one_and_says_why():
    plan = Plan.dense(Layout.video_only(8), "because")
    plan.check()
    assert plan.is_dense
    assert plan.dense_reason == "because"
    assert plan.density().item() == plan.cost().item() == 1
    assert plan.state_bytes() == 0


def test_state_is_the_bytes_of_all_tensors(plan):
    clusters = (plan.queries, plan.keys)
    tensors = [plan.reads, *(tensor for c in clusters for tensor in (c.labels, c.counts, c.means))]
    assert plan.state_bytes() == sum(tensor.nbytes for tensor in tensors)
    lists = (plan.keys.members.order, plan.keys.members.starts)  # what is made on demand is held from then on
    assert plan.state_bytes() == sum(tensor.nbytes for tensor in (*tensors, *lists))
    apart = replace(plan.keys, centroids=plan.keys.means.clone())
    assert replace(plan, keys=apart).state_bytes() == plan.state_bytes() + apart.centroids.nbytes


def test_variances_are_not_kept(plan):
    with_them = replace(plan, keys=replace(plan.keys, variances=plan.keys.means.clone()))
    kept = with_them.carried()
    assert kept.keys.variances is None
    assert kept.state_bytes() == plan.carried().state_bytes()


def broken(plan: Plan, side: str, labels: torch.Tensor, counts: torch.Tensor | None = None) -> Plan:
    members = Segments(labels, getattr(plan, side).num_clusters)
    if counts is not None:
        members.counts = counts
    return replace(plan, **{side: replace(getattr(plan, side), members=members)})


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_check_finds_what_is_broken(side):
    query, key, _ = attention_like(2, 3, 40, 8)
    plan = fake_plan(query, key, LAYOUTS["padding"])
    clusters = getattr(plan, side)
    with pytest.raises(ValueError, match=f"{side} label 26 tokens, the video has 27"):
        broken(plan, side, clusters.labels[..., 1:]).check()
    with pytest.raises(ValueError, match=f"{side} labels must lie in -1"):
        broken(plan, side, clusters.labels.masked_fill(clusters.labels == 0, 99)).check()
    with pytest.raises(ValueError, match=f"{side} counts differ from the labels"):
        broken(plan, side, clusters.labels, clusters.counts.flip(-1)).check()
    counts = clusters.counts.clone()
    counts[..., 0] += (clusters.labels < 0).sum(-1)
    with pytest.raises(ValueError, match=f"{side}: exactly the padding must be labelled -1"):
        broken(plan, side, clusters.labels.clamp_min(0), counts).check()


def test_check_finds_reads_beyond_a_cluster(plan):
    for reads in (plan.reads - 1, plan.reads + plan.keys.counts.unsqueeze(-2) + 1):
        with pytest.raises(ValueError, match="reads must lie between 0 and the size of the key cluster"):
            replace(plan, reads=reads).check()


def test_check_finds_a_row_that_reads_more_than_max_reads(plan):
    max_reads = int(plan.reads.sum(-1).max())
    replace(plan, max_reads=max_reads).check()
    with pytest.raises(ValueError, match=f"a row reads {max_reads} tokens, more than max_reads"):
        replace(plan, max_reads=max_reads - 1).check()
