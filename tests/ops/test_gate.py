"""Claims about what a router makes of its logits: the kernel is the reference, in one launch each way."""

from __future__ import annotations

import pytest
import torch

from adamac.ops.gate import gate
from adamac.ops.launch import interpreted
from adamac.testing import assert_within_error_budget

SHAPES = [(63, 100, 5), (1, 1, 1), (9, 64, 8), (33, 8, 8), (100, 300, 3)]
WAYS = [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True)]


@pytest.fixture(autouse=True)
def kernels_can_run(device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")


def outcome(logits, top_k, way, impl, bias=None):
    """Weights by expert, masses, loads; and the gradient of a mixture of them."""
    logits = logits.detach().requires_grad_()
    score, normalise = way
    found = gate(logits, top_k, score, normalise=normalise, bias=bias, impl=impl)
    # By expert rather than by rank: equal scores may be ranked either way.
    weights = torch.zeros_like(logits).scatter(1, found.experts, found.weights)
    slopes = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    ((weights * slopes).sum() + (found.mass * slopes[0].cos()).sum()).backward()
    return found, weights.detach(), logits.grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_the_kernel_errs_no_more_than_eager_torch(tokens, experts, top_k, way, device):
    logits = torch.randn(tokens, experts, device=device) * 3
    bias = torch.randn(experts, device=device) if way[0] == "sigmoid" else None
    exact = outcome(logits.double(), top_k, way, "torch", None if bias is None else bias.double())
    eager, ours = (outcome(logits, top_k, way, impl, bias) for impl in ("torch", "triton"))
    assert torch.equal(ours[0].experts, eager[0].experts)
    assert torch.equal(ours[0].load, eager[0].load)
    assert bool(ours[0].finite)
    assert_within_error_budget(ours[1], exact[1], eager[1])
    assert_within_error_budget(*(found[0].mass.detach() for found in (ours, exact, eager)))
    assert_within_error_budget(ours[2], exact[2], eager[2])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_keep_the_budget_whatever_is_drawn(way, device):
    # One expert often has most of a token's mass: what is left of its gradient is a small difference.
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(63, 100, device=device) * 3
        exact = outcome(logits.double(), 5, way, "torch")
        eager, ours = (outcome(logits, 5, way, impl) for impl in ("torch", "triton"))
        assert_within_error_budget(ours[2], exact[2], eager[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_seen_and_every_choice_is_still_an_expert(value, device):
    logits = torch.randn(40, 12, device=device)
    logits[35, 7] = value
    found = gate(logits, 4, "softmax", impl="triton")
    assert not bool(found.finite)
    assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in found.experts.tolist())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_sigmoids_that_all_underflow_leave_gradients_finite(impl, device):
    logits = torch.full((3, 8), -200.0, device=device)
    _, weights, gradient = outcome(logits, 2, ("sigmoid", True), impl)
    assert bool(weights.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_weights_alone_can_be_differentiated(device):
    logits = torch.randn(5, 8, device=device)
    gradients = []
    for impl in ("torch", "triton"):
        leaf = logits.clone().requires_grad_()
        gate(leaf, 2, "softmax", impl=impl).weights.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
