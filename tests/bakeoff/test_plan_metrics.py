"""Claims about the judge of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adamac.attention import AdaCluster, Layout, Plan, Tokens, attend
from adamac.bakeoff.metrics.plan import DenseRows, judge_plan
from adamac.testing import attention_like, fake_plan

VALID = torch.ones(2, 90, dtype=torch.bool)
VALID[1, 70:] = VALID[0, 3] = False
LAYOUTS = [Layout.video_only(90), Layout(90, 8, 90), Layout(90, 2, 80, valid=VALID)]


@pytest.fixture(params=LAYOUTS, ids=["video only", "text before", "padding"])
def layout(request) -> Layout:
    return request.param


@pytest.fixture
def tensors():
    return attention_like(2, 3, 90, 16, dtype=torch.float64)


def test_the_error_is_that_of_the_whole_output_when_all_rows_are_judged(tensors, layout):
    plan = fake_plan(*tensors[:2], layout)
    judged = judge_plan(*tensors, plan, rows=90, text=True)
    output, dense = attend(*tensors, plan), attend(*tensors, Plan.dense(layout, "test"))
    if layout.valid is None:  # else samples differ in how many rows they have
        expected = (output - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
        torch.testing.assert_close(judged.output_error, expected)
        assert judged.overall_error == pytest.approx(float((output - dense).norm() / dense.norm()))
    assert torch.equal(judged.density, plan.density())
    assert torch.equal(judged.cost, plan.cost())


def test_the_mass_kept_is_the_softmax_on_what_is_read(tensors):
    plan = fake_plan(*tensors[:2], compensate=True)
    mass = judge_plan(*tensors, plan, rows=90).mass_kept
    logits = tensors[0] @ tensors[1].transpose(-1, -2) / 4
    kept = torch.zeros(2, 3, 90, dtype=torch.float64)
    for sample, head, row in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
        weights = logits[sample, head, row].softmax(0)
        for cluster, count in enumerate(
            plan.reads[sample, head, plan.queries.labels[sample, head, row]].tolist()
        ):
            members = (plan.keys.labels[sample, head] == cluster).nonzero().flatten()
            kept[sample, head, row] += weights[members[:count]].sum()
    torch.testing.assert_close(mass, kept.mean(-1))


def test_a_full_plan_has_no_error_and_keeps_all_mass(tensors, layout):
    plan = fake_plan(*tensors[:2], layout)
    full = replace(plan, reads=plan.keys.counts.unsqueeze(-2).expand_as(plan.reads))
    judged = judge_plan(*tensors, full)
    assert judged.overall_error < 1e-12
    torch.testing.assert_close(judged.mass_kept, torch.ones(2, 3, dtype=torch.float64))


def test_a_dense_plan_is_perfect_and_costs_one(tensors, layout):
    summary = judge_plan(*tensors, Plan.dense(layout, "test")).summary()
    assert summary == {
        "output_error": 0,
        "output_error_worst_head": 0,
        "mass_kept": 1,
        "density": 1,
        "cost": 1,
    }


def test_a_sample_of_the_rows_is_close_to_all_of_them():
    tensors = attention_like(1, 2, 3000, 16)
    plan = AdaCluster(query_clusters=12, key_clusters=24)(*tensors[:2])
    sampled, whole = (judge_plan(*tensors, plan, rows=rows) for rows in (500, 3000))
    assert sampled.overall_error == pytest.approx(whole.overall_error, rel=0.1)
    torch.testing.assert_close(sampled.mass_kept, whole.mass_kept, rtol=0.05, atol=0)


def test_text_rows_and_padding_are_judged_only_on_request(tensors):
    layout = LAYOUTS[2]
    video = DenseRows.sample(*tensors, layout, rows=90).tokens
    both = DenseRows.sample(*tensors, layout, rows=90, text=True).tokens
    assert video.amin() >= 2
    assert video.amax() < 80
    assert both.amin() == 0
    for tokens in (video, both):
        assert VALID.gather(1, tokens).all()
        assert (tokens.diff(dim=1) >= 0).all()
        assert len(tokens[0].unique()) > 0.6 * tokens.shape[1]


def test_reading_more_tokens_lowers_the_error():
    tensors = attention_like(1, 2, 600, 16)
    method = AdaCluster(query_clusters=12, key_clusters=24, compensate=False)
    errors = [
        judge_plan(*tensors, replace(method, budget=Tokens(keep))(*tensors[:2])).overall_error
        for keep in (0.1, 0.3, 0.6)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_sample_of_padding_alone_cannot_be_judged(tensors):
    valid = VALID.clone()
    valid[0] = False
    with pytest.raises(ValueError, match="no row to judge a plan by"):
        DenseRows.sample(*tensors, Layout(90, 2, 80, valid=valid))
