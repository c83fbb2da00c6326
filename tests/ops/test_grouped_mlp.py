"""Claims about experts' two products with an activation between."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from adamac.ops.activation import ACTIVATIONS, activate
from adamac.ops.grouped_mlp import grouped_mlp
from adamac.ops.grouped_mlp import triton as kernels
from adamac.testing import assert_within_error_budget

COUNTS = {
    "ragged": [17, 0, 40, 1],
    "first empty": [0, 3, 33, 3],
    "one has all": [0, 0, 50, 0],
    "three groups": [16, 32, 15],
    "no rows": [0] * 4,
}


def operands(counts, dtype, device, width=24, inner=40):
    rows = torch.randn(sum(counts), width, dtype=dtype, device=device)
    up = torch.randn(len(counts), width, inner, dtype=dtype, device=device) * width**-0.5
    down = torch.randn(len(counts), inner, width, dtype=dtype, device=device) * inner**-0.5
    return (rows, up, down), torch.tensor(counts, device=device)


def passes(tensors, counts, activation, impl, cast, wanted):
    leaves = [tensor.to(cast).requires_grad_() for tensor in tensors]
    out = grouped_mlp(*leaves, counts, activation, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, wanted.to(cast))]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_err_no_more_than_a_loop_does(counts, activation, dtype, device):
    tensors, lengths = operands(counts, dtype, device)
    wanted = torch.randn_like(tensors[0])
    found = passes(tensors, lengths, activation, "fused", dtype, wanted)
    oracle = passes(tensors, lengths, activation, "reference", torch.float64, wanted)
    eager = passes(tensors, lengths, activation, "reference", dtype, wanted)
    for a, b, c in zip(found, oracle, eager, strict=True):
        if a.numel():
            assert_within_error_budget(a, b, c)


def test_without_gradients_the_answer_is_the_same_and_nothing_is_kept_for_them(device, monkeypatch):
    tensors, counts = operands(COUNTS["ragged"], torch.bfloat16, device)
    tensors[1].requires_grad_()
    through = Mock(wraps=kernels.up_activated)
    monkeypatch.setattr(kernels, "up_activated", through)
    with torch.no_grad():
        quiet = grouped_mlp(*tensors, counts, "gelu", impl="fused")
    assert torch.equal(quiet, grouped_mlp(*tensors, counts, "gelu", impl="fused"))
    assert [call.kwargs["keep_inner"] for call in through.call_args_list] == [False, True]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(
    ("impl", "by", "gated"),
    [
        ("fused", "torch", False),
        ("torch", "triton", False),
        ("torch", "triton", True),
        ("torch", "torch", True),
        ("reference", "torch", True),
    ],
)
def test_rows_beyond_the_counts_change_nothing(counts, impl, by, gated, device, monkeypatch):
    """They are NaN here, as is memory that is never written."""
    monkeypatch.setattr("adamac.ops.activation.chosen", lambda *_: by)
    (rows, up, down), lengths = operands(counts, torch.bfloat16, device)
    down, total = down[:, : 24 if gated else 40], len(rows)
    up = torch.cat([up, up], 2)[:, :, :48] if gated else up
    beyond = rows.new_full((50, rows.shape[1]), float("nan"))
    found = []
    for more in (rows[:0], beyond):
        leaves = [leaf.detach().requires_grad_() for leaf in (torch.cat([rows, more]), up, down)]
        out = grouped_mlp(*leaves, lengths, "gelu", gated=gated, impl=impl)
        wanted = torch.cat([rows.cos(), more])
        of_rows, *of_matrices = torch.autograd.grad(out, leaves, wanted)
        assert len(out) == len(of_rows) == len(wanted)
        found.append((out[:total].detach(), of_rows[:total], *of_matrices))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_activation_is_told_how_many_rows_there_are(impl, device, monkeypatch):
    through = Mock(wraps=activate)
    monkeypatch.setattr("adamac.ops.grouped_mlp.activate", through)
    (rows, up, down), counts = operands(COUNTS["ragged"], torch.bfloat16, device)
    grouped_mlp(torch.cat([rows, rows]), up, down, counts, "gelu", impl=impl)
    assert [int(call.kwargs["rows"]) for call in through.call_args_list] == [len(rows)]


def test_gated_experts_refuse_to_be_fused(device):
    (rows, up, down), counts = operands(COUNTS["ragged"], torch.float32, device)
    with pytest.raises(ValueError, match=r"gated experts.*use impl=\"auto\""):
        grouped_mlp(rows, up, down[:, :20], counts, "silu", gated=True, impl="fused")
    assert len(grouped_mlp(rows, up, down[:, :20], counts, "silu", gated=True)) == len(rows)


def test_what_a_row_cannot_be_cut_into_is_refused(device):
    (rows, up, down), counts = operands(COUNTS["ragged"], torch.bfloat16, device, width=12)
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        grouped_mlp(rows, up, down, counts, "gelu", impl="fused")
