"""Claims about the grouped matrix product."""

from __future__ import annotations

import pytest
import torch

from adamac.ops.grouped_mm import chosen, grouped_mm
from adamac.testing import assert_within_error_budget

COUNTS = {
    "ragged": [4, 0, 9, 1],
    "first empty": [0, 3, 3, 3],
    "one has all": [0, 0, 7, 0],
    "no rows": [0] * 4,
}


def operands(counts, dtype=torch.float32, device="cpu", width=(16, 24)):
    rows = torch.randn(sum(counts), width[0], dtype=dtype, device=device, requires_grad=True)
    weights = torch.randn(len(counts), *width, dtype=dtype, device=device, requires_grad=True)
    return rows, weights, torch.tensor(counts, device=device)


def row_by_row(rows, weights, counts):
    """Each row times its own copy of its group's matrix."""
    group = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return torch.bmm(rows.unsqueeze(1), weights[group]).squeeze(1)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_reference_multiplies_each_row_by_its_groups_matrix(counts):
    rows, weights, lengths = operands(counts, torch.float64, width=(5, 7))
    out, right = grouped_mm(rows, weights, lengths), row_by_row(rows, weights, lengths)
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    wanted = torch.randn_like(out)
    found = torch.autograd.grad(out, (rows, weights), wanted)
    for a, b in zip(found, torch.autograd.grad(right, (rows, weights), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernel_errs_no_more_than_a_loop_does(counts, dtype, device):
    rows, weights, lengths = operands(counts, dtype, device)
    wanted = torch.randn(sum(counts), 24, dtype=dtype, device=device)
    results = {}
    for name, impl, cast in (
        ("torch", "torch", dtype),
        ("eager", "reference", dtype),
        ("oracle", "reference", torch.float64),
    ):
        leaves = [leaf.detach().to(cast).requires_grad_() for leaf in (rows, weights)]
        out = grouped_mm(*leaves, lengths, impl=impl)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, wanted.to(cast))]
    for out, oracle, eager in zip(results["torch"], results["oracle"], results["eager"], strict=True):
        if out.numel():
            assert_within_error_budget(out, oracle, eager)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_rows_beyond_the_counts_change_nothing(counts, dtype, impl, device):
    rows, weights, lengths = operands(counts, dtype, device)
    total, wanted = len(rows), torch.randn(len(rows), 24, dtype=dtype, device=device)
    out = grouped_mm(rows, weights, lengths, impl=impl)
    right = [out, *torch.autograd.grad(out, (rows, weights), wanted)]
    for poison in (1e3, float("nan")):
        longer, further = (
            torch.cat([each.detach(), each.new_full((70, each.shape[1]), poison)]) for each in (rows, wanted)
        )
        out = grouped_mm(longer.requires_grad_(), weights, lengths, impl=impl)
        assert out.shape == further.shape
        found = [out, *torch.autograd.grad(out, (longer, weights), further)]
        for a, b in zip((found[0][:total], found[1][:total], found[2]), right, strict=True):
            torch.testing.assert_close(a, b)
        if impl == "reference":
            assert not bool(found[0][total:].any() or found[1][total:].any())


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_an_expanded_gradient_is_taken(impl):
    rows, weights, counts = operands([4, 0, 9, 1])
    grouped_mm(rows, weights, counts, impl=impl).sum().backward()
    assert (weights.grad[1] == 0).all()
    torch.testing.assert_close(rows.grad[0], weights.detach()[0].sum(1))


def test_auto_takes_torchs_kernel_where_it_works():
    rows, weights, _ = operands([3, 4])
    assert chosen("auto", rows, weights) == "torch"
    assert chosen("auto", rows.double(), weights.double()) == "reference"
    assert chosen("auto", rows[:, :5], weights[:, :5]) == "reference"


def test_what_does_not_fit_is_refused_in_one_line():
    rows, weights, counts = operands([3, 4])
    for arguments, options, message in (
        ((rows[:, :8], weights, counts), {}, r"expected rows .* got \(7, 8\) and \(2, 16, 24\)"),
        ((rows, weights, counts[:1]), {}, "a count for each of 2 groups"),
        ((rows[:6], weights, counts), {"impl": "reference"}, "counts add up to 7, but there are 6 rows"),
        ((rows.double(), weights, counts), {}, "rows are torch.float64 but weights are torch.float32"),
        ((rows, weights, counts), {"impl": "cuda"}, "impl must be one of auto, torch, reference; got 'cuda'"),
        ((rows[:, :5], weights[:, :5], counts), {"impl": "torch"}, "no multiple of 16 bytes"),
        (
            (rows.double(), weights.double(), counts),
            {"impl": "torch"},
            "it takes float32, bfloat16 and float16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_mm(*arguments, **options)
