"""Claims about AdaCluster alone: stages for outliers, the dense layer, steps that build on each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from adamac.attention import AdaCluster, Layout, Plan, Tokens, TopK
from adamac.ops.kmeans import distances
from adamac.testing import attention_like

METHOD = AdaCluster(query_clusters=6, key_clusters=8, max_key_clusters=64, outlier_factor=2.0)


def with_outliers(far: int = 20, groups: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and keys that lie close together but for a few, far out in several directions."""
    query, _, _ = attention_like(1, 2, 400, 32)
    key = 0.1 * torch.randn(1, 2, 400, 32)
    direction = torch.nn.functional.normalize(torch.randn(1, 2, groups, 32), dim=-1)
    key[:, :, 3 : 3 + far * 19 : 19] += 10 * direction.repeat_interleave(far // groups, dim=2)
    return query, key


def test_outlier_groups_get_clusters_of_their_own():
    query, key = with_outliers()
    plan = METHOD(query, key)
    assert plan.keys.num_clusters > METHOD.key_clusters
    stop = replace(METHOD, max_key_clusters=None, outlier_factor=math.inf)(query, key)
    assert stop.keys.num_clusters == METHOD.key_clusters
    worst, worst_stop = (distances(key, each.keys.labels, each.keys.means).amax() for each in (plan, stop))
    assert worst < worst_stop / 5


def test_keys_without_outliers_stay_at_the_starting_count():
    query = torch.randn(1, 2, 400, 32)
    assert METHOD(query, query).keys.num_clusters == METHOD.key_clusters


def test_a_layer_beyond_the_cap_is_dense_and_stays_dense():
    query, key = with_outliers()
    method = replace(METHOD, max_key_clusters=METHOD.key_clusters, hard_layers="dense")
    plan = method(query, key)
    assert plan.is_dense
    assert plan.dense_reason == "method: keys need more than 8 clusters"
    easy = torch.randn(1, 2, 400, 32)
    assert not method(easy, easy).is_dense
    later = method(easy, easy, previous=plan)
    assert later.dense_reason == plan.dense_reason


def test_a_layer_beyond_the_cap_makes_do_with_the_cap_if_told_to_stay_sparse():
    query, key = with_outliers()
    plan = replace(METHOD, max_key_clusters=12, hard_layers="sparse")(query, key)
    plan.check()
    assert plan.keys.num_clusters == 12


def test_a_dense_layer_of_another_shape_is_forgotten():
    query, key = with_outliers()
    plan = Plan.dense(Layout.video_only(399), "another")
    assert not METHOD(query, key, previous=plan).is_dense


def test_the_number_of_clusters_is_kept_over_the_steps():
    query, key = with_outliers()
    plan = METHOD(query, key)
    later = METHOD(query, torch.randn_like(key), previous=plan)
    assert later.keys.num_clusters == plan.keys.num_clusters


def test_a_warm_step_refines_the_former_clusters_once():
    query, key, _ = attention_like(1, 2, 400, 32)
    method = replace(METHOD, max_key_clusters=None, outlier_factor=math.inf)
    warm = method(query, key, previous=method(query, key))
    longer = replace(method, first_iterations=4)(query, key)
    assert torch.equal(warm.keys.labels, longer.keys.labels)
    assert torch.equal(warm.queries.labels, longer.queries.labels)


def test_clusters_are_renewed_every_so_many_steps():
    method = replace(METHOD, recluster_every=3)
    plans = [None]
    for step in range(5):
        query, key, _ = attention_like(1, 2, 400, 32, seed=step)
        plans.append(method(query, key, previous=plans[-1]))
    plans = plans[1:]
    assert [plan.age for plan in plans] == [0, 1, 2, 0, 1]
    kept = [torch.equal(one.keys.labels, two.keys.labels) for one, two in itertools.pairwise(plans)]
    assert kept == [True, True, False, True]
    assert not torch.equal(plans[0].reads, plans[1].reads)  # selection is new in every step
    for plan in plans:
        plan.check()


def test_another_seed_gives_other_clusters():
    query, key, _ = attention_like(1, 2, 400, 32)
    first, second = (replace(METHOD, seed=seed)(query, key) for seed in (0, 1))
    assert not torch.equal(first.keys.labels, second.keys.labels)


def test_angular_clusters_do_not_see_the_length_of_queries():
    query, key, _ = attention_like(1, 2, 400, 32)
    longer = query * (torch.rand(1, 2, 400, 1) * 4 + 0.5)
    labels = [METHOD(each, key).queries.labels for each in (query, longer)]
    assert torch.equal(*labels)
    euclidean = [replace(METHOD, angular=False)(each, key).queries.labels for each in (query, longer)]
    assert not torch.equal(*euclidean)


def test_the_papers_settings_are_those_it_prints():
    paper = AdaCluster.paper()
    assert (paper.query_clusters, paper.score, paper.outlier_factor, paper.angular) == (
        65,
        "quest",
        1.5,
        True,
    )
    assert (paper.budget, paper.compensate) == (TopK(0.25), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_clusters": 0}, r"AdaCluster\.query_clusters must be at least 1, got 0"),
        ({"key_clusters": 0}, r"AdaCluster\.key_clusters must be at least 1, got 0"),
        ({"iterations": 0}, r"AdaCluster\.iterations must be at least 1, got 0"),
        ({"recluster_every": 0}, r"AdaCluster\.recluster_every must be at least 1, got 0"),
        (
            {"max_key_clusters": 7, "key_clusters": 8},
            r"max_key_clusters \(7\) must not be below key_clusters \(8\)",
        ),
        ({"hard_layers": "skip"}, r'AdaCluster\.hard_layers must be "sparse" or "dense", got \'skip\''),
        ({"max_key_clusters": 40}, r"give a finite one \(the paper's is 1\.5\), or leave these two out"),
        ({"hard_layers": "dense"}, r"give a finite one \(the paper's is 1\.5\), or leave these two out"),
        ({"metric": "cosine"}, r'AdaCluster\.metric must be "logits" or "tokens", got \'cosine\''),
        ({"outlier_factor": 0.0}, r"AdaCluster\.outlier_factor must be positive, got 0\.0"),
        ({"outlier_factor": math.nan}, r"AdaCluster\.outlier_factor must be positive, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaCluster(**changes)


@pytest.mark.parametrize("side", ["keys", "queries"])
@pytest.mark.parametrize("warm", [False, True])
def test_what_the_other_side_does_not_see_splits_no_cluster(side, warm):
    query, key, _ = attention_like(1, 2, 400, 32)
    unseen, seen = (key, query) if side == "keys" else (query, key)
    unseen[..., 0], seen[..., 0] = 0.0, 0.0

    def labels(method):
        plan = method(query, key, previous=method(query, key).carried() if warm else None)
        return getattr(plan, side).labels

    # Angles see the length of what is compared, so queries are clustered by distance here.
    by_logits = replace(METHOD, max_key_clusters=None, outlier_factor=math.inf, angular=False)
    by_tokens = replace(by_logits, metric="tokens")
    before = [labels(method) for method in (by_logits, by_tokens)]
    unseen[..., 0] = 40 * torch.randn(1, 2, 400)
    after = [labels(method) for method in (by_logits, by_tokens)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_outliers_that_no_query_sees_get_no_clusters_of_their_own():
    query, key = with_outliers()
    key[..., 16:] = 0.1 * torch.randn(1, 2, 400, 16)  # they lie far out in the first coordinates
    query[..., :16] = 0
    assert METHOD(query, key).keys.num_clusters == METHOD.key_clusters
    assert replace(METHOD, metric="tokens")(query, key).keys.num_clusters > METHOD.key_clusters


def test_a_key_far_from_all_others_is_read_where_nothing_else_stands_for_it():
    # An attention sink: a cluster of its own, without spread, which a score for compensated clusters would put last.
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 512, 16), torch.randn(1, 1, 512, 16)
    query[..., 0], key[..., 0] = 4.0, 0.0
    key[:, :, 100] = 0.0
    key[:, :, 100, 0] = 12.0
    layout = Layout.video_only(512)
    method = AdaCluster(query_clusters=8, key_clusters=64, budget=Tokens(0.1), compensate=False)
    _, keys, reads = method(query, key, layout=layout).parts()
    sink = int(keys.members.labels[0, 0, 100])
    assert (reads[0, 0, :, sink] == keys.counts[0, 0, sink]).all()
    forced = replace(method, score="residual")(query, key, layout=layout).parts()[2]
    assert (forced[0, 0, :, sink] == 0).all()
