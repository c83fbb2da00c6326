"""Claims that hold for every method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adamac.attention import (
    SVG2,
    AdaCluster,
    BlockTopK,
    Dense,
    Layout,
    Oracle,
    Plan,
    SparseD,
    Tokens,
    TopK,
    TopP,
    attend,
)
from adamac.attention.attend import with_text
from adamac.testing import assert_within_error_budget, attention_like, eager_cluster_attention

SMALL = AdaCluster(query_clusters=5, key_clusters=9)
METHODS = {
    "adacluster": SMALL,
    "adacluster of the paper": replace(AdaCluster.paper(), query_clusters=5, key_clusters=9),
    "adacluster moment top-p": replace(SMALL, score="moment", budget=TopP(0.7)),
    "adacluster residual euclidean": replace(SMALL, score="residual", angular=False),
    "svg2": SVG2(query_clusters=5, key_clusters=9, first_iterations=4),
    "sparsed": SparseD(block=16),
    "runs": BlockTopK(tile=16, budget=TopK(0.3)),
    "boxes": BlockTopK(tile=(2, 2, 2), compensate=True),
    "oracle": Oracle(SMALL, compensate=True),
}
PADDED = torch.ones(2, 130, dtype=torch.bool)
PADDED[1, 100:105] = PADDED[1, 124:] = False
LAYOUTS = {
    "video only": Layout.video_only(130, grid=(2, 5, 13)),
    "text before": Layout(130, 10, 130, grid=(2, 5, 12)),
    "padded text after": Layout(130, 0, 120, valid=PADDED, grid=(2, 5, 12)),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request) -> Layout:
    return request.param


def same(first: Plan, second: Plan) -> bool:
    """Whether two plans hold the same bits."""
    pairs = [(first.reads, second.reads)]
    for one, two in ((first.queries, second.queries), (first.keys, second.keys)):
        pairs += [(one.labels, two.labels), (one.counts, two.counts), (one.means, two.means)]
    return all(torch.equal(one, two) for one, two in pairs)


def test_plans_keep_every_invariant_at_the_first_step_and_the_next(method, layout):
    query, key, _ = attention_like(2, 3, 130, 16)
    plan = method(query, key, layout=layout)
    plan.check()
    again = method(query + 0.1 * torch.randn_like(query), key, layout=layout, previous=plan)
    again.check()
    for each in (plan, again):
        assert not each.is_dense
        assert each.layout is layout
        assert (each.density() < 1).all()
        assert (each.cost() >= each.density()).all()
        assert (each.reads.sum(-1) > 0)[each.queries.counts > 0].all()


@pytest.mark.parametrize("name", ["adacluster", "svg2", "sparsed", "oracle"])
def test_what_is_no_former_plan_is_refused(name):
    query, key, _ = attention_like(1, 2, 130, 16)
    with pytest.raises(ValueError, match=r"previous must be the Plan of this layer's last step, .* got str"):
        METHODS[name](query, key, previous="x")


def test_plans_are_carried_out_within_the_error_budget(method, layout):
    tensors = attention_like(2, 3, 130, 16)
    plan = method(*tensors[:2], layout=layout)
    options = {"compensate": plan.compensate, "scale": 0.25}
    oracle, _ = eager_cluster_attention(*(tensor.double() for tensor in tensors), *with_text(plan), **options)
    eager, _ = eager_cluster_attention(*tensors, *with_text(plan), **options)
    assert_within_error_budget(attend(*tensors, plan), oracle, eager)


def test_the_same_tensors_give_the_same_bits(method, layout):
    query, key, _ = attention_like(2, 3, 130, 16)
    first, second = (method(query, key, layout=layout) for _ in range(2))
    assert same(first, second)
    assert same(*(method(query, key, layout=layout, previous=first) for _ in range(2)))


def test_heads_and_samples_do_not_mix_in_a_warm_step(method):
    query, key, _ = attention_like(2, 3, 130, 16)
    layout = LAYOUTS["video only"]
    previous = method(query, key, layout=layout)
    other = query.clone(), key.clone()
    for tensor in other:
        tensor[1, 2] += torch.randn(130, 16)
    plans = [method(*each, layout=layout, previous=previous) for each in ((query, key), other)]
    assert torch.equal(plans[0].reads[0], plans[1].reads[0])
    assert torch.equal(plans[0].reads[1, :2], plans[1].reads[1, :2])


@pytest.mark.parametrize("shape", [(1, 3, 130, 16), (2, 2, 130, 16), (2, 3, 130, 8), (2, 3, 104, 16)])
def test_the_plan_of_another_shape_is_ignored(method, shape):
    query, key, _ = attention_like(2, 3, 130, 16, seed=1)
    layout = LAYOUTS["video only"]
    tokens = shape[2]
    other = Layout.video_only(tokens, grid=(2, 4, 13) if tokens == 104 else (2, 5, 13))
    previous = method(*attention_like(*shape)[:2], layout=other)
    assert same(method(query, key, layout=layout, previous=previous), method(query, key, layout=layout))


def test_a_plan_of_other_text_is_ignored(method):
    query, key, _ = attention_like(2, 3, 130, 16)
    before, after = Layout(130, 10, 130, grid=(2, 5, 12)), Layout(130, 0, 120, grid=(2, 5, 12))
    previous = method(query, key, layout=before)
    assert same(method(query, key, layout=after, previous=previous), method(query, key, layout=after))


def test_half_precision_is_planned_in_single(method):
    query, key, value = (tensor.bfloat16() for tensor in attention_like(1, 2, 130, 16))
    layout = LAYOUTS["video only"]
    plan = method(query, key, layout=layout)
    assert same(plan, method(query.float(), key.float(), layout=layout))
    assert attend(query, key, value, plan).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_short_sequences_need_no_special_care(method, tokens):
    query, key, value = attention_like(1, 2, tokens, 16)
    layout = Layout.video_only(tokens, grid=(1, 1, tokens))
    plan = method(query, key, layout=layout)
    plan.check()
    assert attend(query, key, value, plan).isfinite().all()


def test_a_sample_of_padding_alone_is_planned_and_attended(method):
    query, key, value = attention_like(2, 3, 130, 16)
    valid = torch.ones(2, 130, dtype=torch.bool)
    valid[0] = False
    layout = Layout(130, 10, 130, valid=valid, grid=(2, 5, 12))
    plan = method(query, key, layout=layout)
    plan.check()
    output = attend(query, key, value, plan)
    assert (output[0] == 0).all()
    assert output.isfinite().all()


def test_padding_has_no_influence_on_the_plan(method):
    query, key, _ = attention_like(2, 3, 130, 16)
    layout = LAYOUTS["padded text after"]
    plan = method(query, key, layout=layout)
    padding = ~PADDED[:, None, :, None]
    garbage = method(query.masked_fill(padding, 1e4), key.masked_fill(padding, -1e4), layout=layout)
    assert same(plan, garbage)


def test_bad_tensors_are_refused(method):
    query, key, _ = attention_like(2, 3, 130, 16)
    for each in (method, Dense()):
        with pytest.raises(ValueError, match=r"key has shape .* but query has"):
            each(query, key[:, :, 1:])
        with pytest.raises(ValueError, match="query must be"):
            each(query[0, 0], key[0, 0])
        with pytest.raises(ValueError, match="0 tokens"):
            each(query[:, :, :0], key[:, :, :0])


def test_the_dense_method_equals_torch():
    query, key, value = attention_like(2, 3, 130, 16)
    plan = Dense()(query, key)
    assert plan.is_dense
    assert torch.equal(
        attend(query, key, value, plan), torch.nn.functional.scaled_dot_product_attention(query, key, value)
    )


def test_sparsed_reuses_its_pattern():
    query, key, _ = attention_like(1, 2, 130, 16)
    method = SparseD(block=16)
    plan = method(query, key)
    later = method(*attention_like(1, 2, 130, 16, seed=5)[:2], previous=plan)
    assert later.reads is plan.reads
    assert later.keys is plan.keys
    assert (plan.age, later.age) == (0, 1)


def test_svg2_and_sparsed_start_afresh_after_a_dense_plan():
    query, key, _ = attention_like(1, 2, 130, 16)
    for method in (METHODS["svg2"], METHODS["sparsed"]):
        dense = Plan.dense(Layout.video_only(130), "another method's")
        assert same(method(query, key, previous=dense), method(query, key))


def test_the_oracle_uses_the_clusters_of_its_clustering():
    query, key, _ = attention_like(1, 2, 130, 16)
    plan = Oracle(SMALL, budget=Tokens(0.3))(query, key)
    assert torch.equal(plan.keys.labels, SMALL(query, key).keys.labels)
    assert plan.reads.sum(-1).eq(39).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseD(block=0), r"SparseD\.block must be positive, got 0"),
        (lambda: BlockTopK(tile=0), r"BlockTopK\.tile must be positive, got 0"),
        (lambda: BlockTopK(tile=(1, 0, 2)), r"BlockTopK\.tile must be positive, got \(1, 0, 2\)"),
        (lambda: BlockTopK(score="best"), "score must be one of .* got 'best'"),
        (lambda: SVG2(query_clusters=0), r"SVG2\.query_clusters must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
