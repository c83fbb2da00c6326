"""Claims about the forms that measure tokens by logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.attention import logit_metric
from adamac.attention.logit_metric import form_of_keys, form_of_queries
from adamac.testing import attention_like


def length(form, apart):
    return (apart.double() @ form.double() * apart.double()).sum(-1)


@pytest.fixture
def tensors(device):
    query, key, _ = attention_like(2, 3, 300, 16, device=device)
    return query, key + 3


def test_two_keys_are_as_far_apart_as_their_logits_over_the_queries(tensors):
    query, key = tensors
    apart = key[:, :, :-1] - key[:, :, 1:]
    logits = (query.double() @ apart.double().transpose(-1, -2)).square().mean(-2)
    found = length(form_of_keys(query), apart)
    ratio = found / logits
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=0)


def test_two_queries_are_as_far_apart_as_they_weigh_keys_differently(tensors):
    query, key = tensors
    apart = query[:, :, :-1] - query[:, :, 1:]
    logits = apart.double() @ key.double().transpose(-1, -2)
    ratio = length(form_of_queries(key), apart) / logits.var(
        -1
    )  # what is common to all keys moves no softmax
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=0)


def test_a_product_with_a_form_is_no_longer_than_what_it_is_a_product_of(tensors):
    query, key = tensors
    query[..., 3] *= 50  # a channel that dwarfs the others
    for form, tokens in ((form_of_keys(query * 1e-3), key), (form_of_queries(key * 1e3), query)):
        assert ((tokens @ form).norm(dim=-1) <= tokens.norm(dim=-1) * 1.0001).all()
        trace = form.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(trace, torch.ones_like(trace), rtol=1e-4, atol=0)


@pytest.mark.parametrize("held", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("find", [form_of_keys, form_of_queries])
def test_padding_has_no_part_in_a_form_whatever_it_holds(find, held, tensors):
    tokens = tensors[1]
    valid = torch.ones(2, 1, 300, dtype=torch.bool, device=tokens.device)
    valid[0, :, 250:] = False
    short = find(tokens[:1, :, :250])
    tokens[0, :, 250:] = held
    torch.testing.assert_close(find(tokens, valid)[:1], short)


@pytest.mark.parametrize("find", [form_of_keys, form_of_queries])
def test_tokens_that_are_all_nothing_see_no_differences(find, device):
    assert (find(torch.zeros(1, 2, 5, 4, device=device)) == 0).all()


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6))
def test_a_sample_of_a_long_video_meets_every_column(width, height, frames):
    count = width * height * frames
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_metric, "_SAMPLES", max(1, count // 5))
        tokens = torch.arange(count).view(1, 1, count, 1).float()
        sample, _ = logit_metric._sampled(tokens, None)
    if sample.shape[2] >= 2 * width * height:  # long enough to come round
        assert len((sample.flatten().long() % width).unique()) == width
    assert sample.shape[2] >= min(count, math.ceil(count / (count // max(1, count // 5) + 12)))


@pytest.mark.parametrize("find", [form_of_keys, form_of_queries])
def test_autocast_does_not_reach_into_a_form(find, tensors):
    tokens = 30 * tensors[1]  # sums of products beyond what float16 holds
    with torch.autocast(tokens.device.type, torch.float16):
        form = find(tokens)
    torch.testing.assert_close(form, find(tokens))
