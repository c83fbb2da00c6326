"""Claims about the list that travels beside rows: each choice finds its row, its expert and its weight on the other side."""

from __future__ import annotations

import pytest
import torch

from adamac.moe import Routing
from adamac.moe.choices import Choices, by_rank, tabled
from adamac.ops.launch import interpreted

SHAPES = pytest.mark.parametrize(
    ("tokens", "top_k", "local", "ranks"),
    [(63, 3, 4, 2), (1, 1, 1, 1), (40, 8, 2, 4), (300, 2, 1, 7), (1100, 5, 16, 3), (9, 6, 1, 100)],
)
DROPPED = pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])


def routed(tokens: int, top_k: int, experts: int, dropped: float, device=None) -> Routing:
    chosen = torch.rand(tokens, experts, device=device).topk(top_k).indices
    lost = torch.rand(tokens, top_k, device=device) < dropped if dropped else None
    return Routing(chosen, torch.rand(tokens, top_k, device=device), experts, lost)


def made(choices: Choices) -> tuple[int, int]:
    """How many rows and choices there are in all."""
    copies, taken = choices.counts.sum(0).tolist()
    return copies, taken


@SHAPES
@DROPPED
def test_each_rank_gets_the_rows_that_need_it_and_their_experts_and_weights(
    tokens, top_k, local, ranks, dropped
):
    routing = routed(tokens, top_k, local * ranks, dropped)
    choices = by_rank(routing, local, ranks)
    copies, taken = made(choices)
    rows = choices.copies.first(copies).source.split(choices.counts[:, 0].tolist())
    order = choices.order.first(taken)
    weights = routing.weights.flatten()[order.flat].split(choices.counts[:, 1].tolist())
    codes = choices.codes[:taken].split(choices.counts[:, 1].tolist())
    kept = torch.ones_like(routing.experts) if routing.dropped is None else ~routing.dropped
    scattered = torch.zeros(tokens, local * ranks)
    expected = scattered.scatter(1, routing.experts, routing.weights * kept).split(local, 1)
    slots = min(local, top_k)
    for rank in range(ranks):
        assert torch.equal(rows[rank], expected[rank].any(1).nonzero().squeeze(1))
        experts, table = tabled(codes[rank], weights[rank], len(rows[rank]), local, slots)
        # Empty slots say an expert beyond the last one, whose weights are all 0.
        said = torch.where(experts < 0, local, experts).long()
        found = torch.zeros(len(experts), local + 1).scatter_add(1, said, table)
        assert torch.equal(found[:, :local], expected[rank][rows[rank]])
        assert not found[:, local].any()


@SHAPES
@DROPPED
def test_the_kernels_put_choices_in_the_same_order_as_plain_torch(
    tokens, top_k, local, ranks, dropped, device
):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")
    routing = routed(tokens, top_k, local * ranks, dropped, device)
    found, expected = (by_rank(routing, local, ranks, impl=impl) for impl in ("triton", "torch"))
    assert torch.equal(found.counts, expected.counts)
    copies, taken = made(expected)
    for name, length in (("copies", copies), ("order", taken)):
        one, other = (getattr(choices, name).first(length) for choices in (found, expected))
        assert torch.equal(one.flat, other.flat)
        assert torch.equal(one.where, other.where)
        assert torch.equal(one.source, other.source)
        assert one.full == other.full
    assert torch.equal(found.codes[:taken], expected.codes[:taken])
    slots = min(local, top_k)
    weights = routing.weights.flatten()[expected.order.flat[:taken]].requires_grad_()
    one, other = (
        tabled(found.codes[:taken], weights, copies, local, slots, impl=impl) for impl in ("triton", "torch")
    )
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    wanted = torch.rand(copies, slots, device=device)
    assert torch.equal(*(torch.autograd.grad(table[1], weights, wanted)[0] for table in (one, other)))


def test_the_gradient_of_a_weight_is_that_of_its_slot():
    routing = routed(12, 3, 8, 0.3)
    choices = by_rank(routing, 4, 2)
    copies, taken = made(choices)
    weights = torch.rand(taken, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: tabled(choices.codes[:taken], w, copies, 4, 3)[1], weights)


def test_nothing_chosen_is_an_empty_table():
    choices = by_rank(routed(0, 2, 8, 0.0), 4, 2)
    assert made(choices) == (0, 0)
    experts, table = tabled(choices.codes, torch.empty(0), 0, 4, 2)
    assert experts.shape == table.shape == (0, 2)
