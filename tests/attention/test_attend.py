"""Claims about carrying out a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks import exact_pairs, valid_tokens

from adamac.attention import AdaCluster, Layout, Plan, attend
from adamac.attention.attend import _masked_dense_attention, with_text
from adamac.testing import assert_within_error_budget, attention_like, eager_cluster_attention, fake_plan

sdpa = torch.nn.functional.scaled_dot_product_attention

PADDED = torch.ones(2, 70, dtype=torch.bool)
PADDED[1, 50:55] = PADDED[1, 62:] = PADDED[0, 2] = False
LAYOUTS = {
    "video only": Layout.video_only(70),
    "text before": Layout(70, 9, 70),
    "text after": Layout(70, 0, 58),
    "padded text after": Layout(70, 0, 58, valid=PADDED),
    "padding everywhere": Layout(70, 5, 60, valid=PADDED),
    "one padding for all samples": Layout(70, 5, 60, valid=PADDED[1:]),
}
IMPLS = ("reference", "gather", "triton")


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request, device) -> Layout:
    valid = request.param.valid
    return replace(request.param, valid=None if valid is None else valid.to(device))


@pytest.fixture
def tensors(device):
    return attention_like(2, 2, 70, 64, device=device)


def masked(tensors, plan, pairs):
    """Dense attention over the given pairs, in float64 and eagerly; rows that read nothing are zero."""
    pairs = pairs.to(tensors[0].device)
    none = ~pairs.any(-1, keepdim=True)
    wide = [tensor.double() for tensor in tensors]
    return tuple(sdpa(*each, attn_mask=pairs | none).masked_fill(none, 0.0) for each in (wide, tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_attended_is_exactly_what_the_plan_selects(tensors, layout, impl):
    plan = fake_plan(*tensors[:2], layout, compensate=False)
    output = attend(*tensors, plan, impl=impl)
    assert_within_error_budget(output, *masked(tensors, plan, exact_pairs(plan)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_full_plan_equals_dense_whether_it_compensates_or_not(tensors, layout, impl):
    plan = fake_plan(*tensors[:2], layout)
    full = replace(plan, reads=plan.keys.counts.unsqueeze(-2).expand_as(plan.reads))
    plain = attend(*tensors, replace(full, compensate=False), impl=impl)
    compensated = attend(*tensors, full, impl=impl)
    valid = valid_tokens(plan, 2)
    everything = (valid[:, None, :, None] & valid[:, None, None, :]).expand(2, 2, -1, -1)
    oracle, eager = masked(tensors, plan, everything)
    assert_within_error_budget(plain, oracle, eager)
    assert_within_error_budget(compensated, oracle, eager)
    if impl == "gather":  # which leaves no room for means; the reference adds columns of weight zero
        assert torch.equal(compensated, plain)
    assert_within_error_budget(attend(*tensors, Plan.dense(layout, "test"), impl=impl), oracle, eager)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_compensation_keeps_the_error_budget_with_text_and_padding(layout, impl, dtype, device):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernel takes no float64")
    tensors = attention_like(2, 2, 70, 64, dtype=dtype, device=device)
    plan = fake_plan(*tensors[:2], layout)
    output, lse = attend(*tensors, plan, impl=impl, return_lse=True)
    assert output.dtype == dtype
    options = {"compensate": True, "scale": 64**-0.5}
    wide = [tensor.double() for tensor in tensors]
    oracle, oracle_lse = eager_cluster_attention(*wide, *with_text(plan), **options)
    eager, eager_lse = eager_cluster_attention(*tensors, *with_text(plan), **options)
    assert_within_error_budget(output, oracle, eager)
    assert_within_error_budget(lse, oracle_lse, eager_lse)


@pytest.mark.parametrize("garbage", [1e4, float("nan")])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dense", [True, False])
def test_padding_is_zero_and_has_no_influence(tensors, impl, dense, garbage, device):
    layout = replace(LAYOUTS["padding everywhere"], valid=PADDED.to(device))
    plan = Plan.dense(layout, "test") if dense else fake_plan(*tensors[:2], layout)
    output, lse = attend(*tensors, plan, impl=impl, return_lse=True)
    padding = ~layout.valid.unsqueeze(1).expand(2, 2, 70)
    assert (output[padding] == 0).all()
    assert torch.isneginf(lse[padding]).all()
    spoilt = [tensor.masked_fill(padding.unsqueeze(-1), garbage) for tensor in tensors]
    again, lse_again = attend(*spoilt, plan, impl=impl, return_lse=True)
    assert torch.equal(again, output)
    assert torch.equal(lse_again, lse)


def test_the_mask_that_a_gpu_needs_keeps_out_what_is_no_number(tensors, device):
    valid = PADDED.to(device)
    spoilt = [tensor.masked_fill(~valid[:, None, :, None], float("nan")) for tensor in tensors]
    clean = _masked_dense_attention(*tensors, valid, 0.25)
    assert torch.equal(_masked_dense_attention(*spoilt, valid, 0.25), clean)


def test_the_dense_log_sum_exp_is_that_of_a_full_plan(tensors, layout):
    plan = fake_plan(*tensors[:2], layout)
    full = replace(plan, reads=plan.keys.counts.unsqueeze(-2).expand_as(plan.reads))
    lse = attend(*tensors, Plan.dense(layout, "test"), return_lse=True)[1]
    torch.testing.assert_close(lse, attend(*tensors, full, return_lse=True)[1])


def test_samples_do_not_mix(tensors, layout):
    plan = fake_plan(*tensors[:2], layout)
    other = [torch.cat([tensor[:1], tensor[1:].flip(2)]) for tensor in tensors]
    assert torch.equal(attend(*tensors, plan)[0], attend(*other, plan)[0])


def test_a_sample_of_padding_alone_gives_zeros(tensors, device):
    valid = torch.ones(2, 70, dtype=torch.bool, device=device)
    valid[1] = False
    layout = Layout(70, 5, 60, valid=valid)
    for plan in (Plan.dense(layout, "test"), fake_plan(*tensors[:2], layout)):
        output = attend(*tensors, plan)
        assert (output[1] == 0).all()
        assert output[0].abs().amin(-1).gt(0).all()


@given(
    before=st.integers(0, 4),
    video=st.integers(1, 12),
    after=st.integers(0, 4),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_text_is_one_more_cluster_that_all_read_and_that_reads_all(before, video, after, padded, seed):
    tokens = before + video + after
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(1, tokens, generator=generator) < 0.7 if padded else None
    layout = Layout(tokens, before, before + video, valid=valid)
    query = torch.randn(1, 2, tokens, 4, generator=generator)
    plan = fake_plan(query, query, layout, q_clusters=3, k_clusters=4, seed=seed)
    queries, keys, reads = with_text(plan)
    q_labels, k_labels = queries.labels, keys.labels
    rank = torch.stack(
        [(k_labels[..., :i] == k_labels[..., i : i + 1]).sum(-1) for i in range(tokens)], dim=-1
    )
    limit = torch.stack(
        [reads[:, head][:, q_labels[0, head]][..., k_labels[0, head]] for head in range(2)], dim=1
    )
    pairs = (rank.unsqueeze(-2) < limit) & (q_labels >= 0).unsqueeze(-1) & (k_labels >= 0).unsqueeze(-2)
    assert torch.equal(pairs, exact_pairs(plan))


def test_another_scale_is_used(tensors):
    plan = Plan.dense(Layout.video_only(70), "test")
    assert torch.equal(attend(*tensors, plan, scale=0.3), sdpa(*tensors, scale=0.3))


def test_a_plan_for_other_tensors_is_refused(tensors):
    plan = fake_plan(*tensors[:2])
    one = [tensor[:1] for tensor in tensors]
    with pytest.raises(ValueError, match=r"plan is for batch and heads \(2, 2\) but query has \(1, 2\)"):
        attend(*one, plan)
    with pytest.raises(ValueError, match=r"layout is for 70 tokens but query has 69"):
        attend(*(tensor[:, :, 1:] for tensor in tensors), plan)
    query, key, value = tensors
    with pytest.raises(ValueError, match=r"value has shape \(2, 2, 69, 64\) but query has \(2, 2, 70, 64\)"):
        attend(query, key, value[:, :, 1:], plan)
    elsewhere = [tensor.to("meta") for tensor in tensors]
    with pytest.raises(ValueError, match=r"plan is on .* but query is on meta; make the plan from the same"):
        attend(*elsewhere, plan)


@pytest.mark.parametrize("plan", [None, "dense", AdaCluster()])
def test_what_is_no_plan_is_refused(tensors, plan):
    with pytest.raises(ValueError, match=f"plan must be a Plan, .* got {type(plan).__name__}$"):
        attend(*tensors, plan)


@pytest.mark.parametrize("dense", [True, False])
def test_an_unknown_implementation_is_refused_even_if_the_plan_is_dense(tensors, dense):
    plan = Plan.dense(Layout.video_only(70), "test") if dense else fake_plan(*tensors[:2])
    with pytest.raises(
        ValueError, match="impl must be one of auto, reference, gather, triton, hopper; got 'fast'"
    ):
        attend(*tensors, plan, impl="fast")
