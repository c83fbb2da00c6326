"""Claims about moving rows to the order of experts and back."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from adamac.moe import MoEConfig, Router, Routing
from adamac.moe.rows import by_expert, by_label, by_run, gathered, spread
from adamac.moe.rows import triton as kernels
from adamac.ops.launch import interpreted
from adamac.testing import assert_within_error_budget

# Some choices dropped, or none.
CAPACITIES = pytest.mark.parametrize("capacity", [None, 0.7])


def routed(
    tokens: int, capacity: float | None, width: int = 16, top_k: int = 3
) -> tuple[Routing, torch.Tensor]:
    config = MoEConfig(hidden=width, num_experts=8, top_k=top_k, ffn=4, capacity=capacity)
    made = Router(config, dtype=torch.float64)
    torch.nn.init.normal_(made.weight)
    x = torch.randn(tokens, width, dtype=torch.float64)
    return made(x)[0].detached(), x


@CAPACITIES
def test_sorting_conserves_tokens(capacity):
    routing, x = routed(40, capacity)
    order, counts = by_expert(routing)
    assert torch.equal(counts, routing.load())
    rows = spread(x, order)
    assert len(rows) == counts.sum()
    copies = 3 if routing.dropped is None else (~routing.dropped).sum(1, keepdim=True)
    torch.testing.assert_close(gathered(rows, order), copies * x, rtol=1e-12, atol=1e-12)
    assert (routing.dropped is None) == (len(rows) == 40 * 3)


def test_rows_lie_expert_by_expert_and_token_by_token():
    routing, x = routed(40, None)
    order, counts = by_expert(routing)
    expected = [x[(routing.experts == expert).any(1)] for expert in range(8)]
    assert [len(part) for part in expected] == counts.tolist()
    assert torch.equal(spread(x, order), torch.cat(expected))


@CAPACITIES
def test_gradients_of_moving_rows_are_right(capacity):
    routing, x = routed(7, capacity)
    order, _ = by_expert(routing)
    rows, weights = spread(x, order).requires_grad_(), routing.weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spread(x, order), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda r, w: gathered(r, order, w), (rows, weights))
    assert torch.autograd.gradcheck(lambda r: gathered(r, order), rows)


@CAPACITIES
@pytest.mark.parametrize(
    ("tokens", "width", "top_k", "dtype"),
    [
        (63, 100, 3, torch.bfloat16),
        (1, 1, 1, torch.float32),
        (9, 1030, 8, torch.float32),
        (0, 16, 3, torch.bfloat16),
    ],
)
def test_the_kernel_errs_no_more_than_eager_torch(capacity, tokens, width, top_k, dtype, device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")
    routing, _ = routed(tokens, capacity, width, top_k)
    order, _ = by_expert(
        Routing(
            routing.experts.to(device),
            routing.weights,
            8,
            None if routing.dropped is None else routing.dropped.to(device),
        )
    )
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    weights = routing.weights.float().to(device)
    wanted = torch.randn(tokens, width, dtype=dtype, device=device)
    results = {}
    for name, impl, cast in (
        ("triton", "triton", dtype),
        ("eager", "torch", dtype),
        ("oracle", "torch", torch.float64),
    ):
        leaves = [
            x.to(cast).requires_grad_(),
            weights.to(torch.promote_types(cast, torch.float32)).requires_grad_(),
        ]
        rows = spread(leaves[0], order, impl=impl)
        out = gathered(rows, order, leaves[1], impl=impl)
        plain = gathered(rows, order, impl=impl)
        results[name] = [
            out.detach(),
            plain.detach(),
            *torch.autograd.grad(out, (rows, leaves[1]), wanted.to(cast), retain_graph=True),
        ]
        results[name] += torch.autograd.grad(rows, leaves[0], results[name][2])
    for found, oracle, eager in zip(results["triton"], results["oracle"], results["eager"], strict=True):
        assert found.dtype == eager.dtype
        if found.numel():
            assert_within_error_budget(found, oracle, eager)


@pytest.mark.parametrize(
    ("tokens", "slots", "number"), [(63, 3, 8), (1, 1, 1), (700, 2, 5), (40, 8, 100), (300, 1, 3)]
)
@pytest.mark.parametrize("empty", [False, True])
def test_the_kernel_puts_labels_in_the_same_order_as_a_stable_sort(tokens, slots, number, empty, device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")
    low, high = (-1, number + 1) if empty else (0, number)
    labels = torch.randint(low, high, (tokens, slots), device=device)
    (found, counts), (expected, lengths) = (
        by_label(labels, number, full=not empty, impl=impl) for impl in ("triton", "torch")
    )
    assert torch.equal(counts, lengths)
    assert torch.equal(found.flat, expected.flat)
    assert torch.equal(found.where, expected.where)
    assert torch.equal(found.source, expected.source)


@pytest.mark.parametrize("shape", [(1, 4), (2, 8), (5, 3)])
def test_the_kernel_puts_runs_in_the_same_order_as_a_stable_sort(shape, device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")
    lengths = torch.randint(0, 20, shape, device=device) * torch.randint(0, 3, shape, device=device)
    lengths[0, -1] = 9000  # more than the programs of a run write in one turn
    found, expected = (by_run(lengths, int(lengths.sum()), impl=impl) for impl in ("triton", "torch"))
    assert torch.equal(found.flat, expected.flat)
    assert torch.equal(found.where, expected.where)


@pytest.mark.parametrize("width", [1, 63, 70])
def test_rows_that_lie_anyhow_are_copied_and_added_up_by_the_kernel_that_was_asked_for(
    width, device, monkeypatch
):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")
    through = Mock(wraps=kernels.copies)
    monkeypatch.setattr(kernels, "copies", through)
    labels, rows = torch.randint(-1, 4, (20, 3), device=device), torch.randn(2 * width, 20, device=device)
    order, _ = by_label(labels, 3)
    anyhow = rows.T[:, ::2]
    copies = spread(anyhow, order, impl="triton")
    assert through.call_count == 1
    assert torch.equal(copies, anyhow[order.source])
    sums = [gathered(each, order, impl="triton") for each in (copies, copies.T.contiguous().T)]
    assert torch.equal(*sums)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("spare", [0, 1, 20])
@pytest.mark.parametrize(("low", "high"), [(0, 4), (-2, 6), (4, 6)])
def test_an_order_with_room_to_spare_is_that_of_the_rows_and_names_places_that_there_are(
    low, high, spare, impl, device
):
    if impl == "triton" and device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")
    labels = torch.randint(low, high, (30, 3), device=device)
    exact, counts = by_label(labels, 4, impl="torch")
    number = len(exact.flat)
    room = min(number + spare, labels.numel())
    order, found = by_label(labels, 4, room=room, impl=impl)
    assert len(order.flat) == len(order.source) == room
    assert torch.equal(found, counts)
    assert torch.equal(order.where, exact.where)
    assert torch.equal(order.flat[:number], exact.flat)
    assert torch.equal(order.source[:number], exact.source)
    for places, end in ((order.flat, labels.numel()), (order.source, len(labels))):
        assert bool(((places >= 0) & (places < end)).all())
