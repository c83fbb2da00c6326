"""Claims about filling a budget from ranked items, against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.ops.fill import fill

IMPLS = ("torch", "triton")


@st.composite
def budgets(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with ties, zeros of both signs and infinities; weights; limits from none to more than all."""
    batch, heads, rows, items = (draw(st.integers(1, high)) for high in (2, 2, 4, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = torch.randint(-3, 3, (batch, heads, rows, items), generator=generator) / 2
    score = torch.where(torch.rand(score.shape, generator=generator) < 0.2, -score * 0.0, score)
    score = score.masked_fill(torch.rand(score.shape, generator=generator) < 0.2, -torch.inf)
    weight = torch.randint(0, 5, (batch, heads, 1, items), generator=generator)
    limit = torch.randint(0, 2 * items + 2, (batch, heads, 1, 1), generator=generator)
    return score, weight, limit


def by_loop(score, weight, limit):
    taken = torch.zeros(score.shape, dtype=weight.dtype)
    for sample, head, row in (
        torch.cartesian_prod(*map(torch.arange, score.shape[:3])).reshape(-1, 3).tolist()
    ):
        left = int(limit[sample, head])
        at = (sample, head, row)
        for item in sorted(range(score.shape[3]), key=lambda i: -float(score[at][i])):
            taken[at][item] = min(left, int(weight[sample, head, 0, item]))
            left -= int(taken[at][item])
    return taken


@pytest.mark.parametrize("impl", IMPLS)
@given(case=budgets())
def test_the_best_are_taken_first_and_of_equals_the_first(impl, case):
    score, weight, limit = case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken = fill(*(part.to(device) for part in case), impl=impl)
    assert torch.equal(taken.cpu().long(), by_loop(score, weight, limit))


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_may_be_shares_of_mass(impl, device):
    mass = torch.rand(2, 3, 5, 100, device=device).softmax(-1)
    taken = fill(mass, mass, mass.new_full((2, 3, 1, 1), 0.4), impl=impl)
    torch.testing.assert_close(taken.sum(-1), torch.full((2, 3, 5), 0.4, device=device))
    worst = torch.where(taken > 0, mass, torch.inf).amin(-1, keepdim=True)
    assert ((taken > 0) | (mass <= worst)).all()


def test_both_implementations_agree_on_many_items(device):
    score = torch.randn(1, 2, 7, 1100, device=device)
    weight = torch.randint(0, 200, (1, 2, 1, 1100), device=device)
    limit = weight.sum(-1, keepdim=True) // 7
    plain, kernel = (fill(score, weight, limit, impl=impl) for impl in IMPLS)
    assert torch.equal(plain, kernel.long())


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_and_limits_that_do_not_fit_the_scores_are_refused(impl, device):
    score = torch.zeros(1, 2, 3, 5, device=device)
    weight, limit = score.long(), torch.ones(1, 2, 1, 1, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \(1, 2, 3, 5\).* got \(1, 2, 2, 5\)"):
        fill(score, weight[:, :, 1:], limit, impl=impl)
    with pytest.raises(ValueError, match=r"limit must have shape \(1, 2, 1, 1\)"):
        fill(score, weight, limit[:, :1], impl=impl)
    with pytest.raises(ValueError, match="weight is on meta, the rest is on"):
        fill(score, weight.to("meta"), limit, impl=impl)
