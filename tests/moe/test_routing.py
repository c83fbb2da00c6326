"""Claims about routings and routers."""

from __future__ import annotations

import pytest
import torch

from adamac.moe import MoEConfig, Router, Routing
from adamac.moe.routing import beyond_capacity


def router(tokens: int = 40, **changes):
    config = MoEConfig(**{"hidden": 16, "num_experts": 8, "top_k": 3, "ffn": 4, **changes})
    made = Router(config, dtype=torch.float64)
    torch.nn.init.normal_(made.weight)
    return made, torch.randn(tokens, 16, dtype=torch.float64)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_the_scores_of_the_best_experts(score, normalise):
    made, x = router(score=score, normalise=normalise)
    routing, _ = made(x)
    logits = x @ made.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    best = scores.topk(3).values
    torch.testing.assert_close(routing.weights, best / best.sum(-1, keepdim=True) if normalise else best)
    assert torch.equal(scores.gather(1, routing.experts), best)


def test_choosing_before_the_softmax_is_the_same_as_after_if_weights_are_normalised():
    made, x = router()
    routing, _ = made(x)
    best = (x @ made.weight.T).topk(3).values.softmax(-1)
    torch.testing.assert_close(routing.weights, best, rtol=1e-12, atol=1e-12)


def test_the_balance_loss_is_one_at_an_even_load_and_the_number_of_experts_at_the_worst():
    made, _ = router(num_experts=4, top_k=1, hidden=4)
    made.weight.data = 1e3 * torch.eye(4, dtype=torch.float64)
    even, worst = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[[2, 2, 2, 2]]
    assert made(even)[1]["balance"].item() == pytest.approx(1, abs=1e-12)
    assert made(worst)[1]["balance"].item() == pytest.approx(4, abs=1e-12)


def test_the_z_loss_is_the_mean_square_of_the_log_sum_exp():
    made, x = router(z_weight=0.1, balance="none")
    losses = made(x)[1]
    assert list(losses) == ["z"]
    torch.testing.assert_close(losses["z"], (x @ made.weight.T).logsumexp(-1).square().mean())


def test_a_bias_changes_the_choice_but_never_the_weight():
    made, x = router(balance="bias", score="sigmoid", normalise=False)
    made.bias[5] = 100
    routing, losses = made(x)
    assert losses == {}
    assert (routing.experts == 5).any(1).all()
    scores = (x @ made.weight.T).sigmoid()
    torch.testing.assert_close(routing.weights, scores.gather(1, routing.experts))


def test_rebalancing_evens_out_the_load():
    made, x = router(tokens=400, balance="bias", score="sigmoid", bias_rate=0.02)
    made.weight.data[:2] += 0.5
    x += 0.5
    spreads = []
    for _ in range(100):
        load = made(x)[0].load()
        spreads.append((load.max() / load.double().mean()).item())
        made.rebalance(load)
    assert spreads[-1] < 1.2 < spreads[0]


def test_load_counts_what_is_not_dropped():
    experts = torch.tensor([[0, 1], [1, 3], [1, 0]])
    dropped = torch.tensor([[False, False], [True, False], [False, True]])
    weights = torch.ones(3, 2)
    assert Routing(experts, weights, 4).load().tolist() == [2, 3, 0, 1]
    assert Routing(experts, weights, 4, dropped).load().tolist() == [1, 2, 0, 1]


def test_an_expert_without_room_drops_the_least_weight_and_the_later_token():
    experts = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    weights = torch.tensor([[0.5, 0.1], [0.9, 0.4], [0.5, 0.3], [0.7, 0.4]])
    assert beyond_capacity(experts, weights, 3, 2).tolist() == [
        [True, False],  # expert 0 keeps tokens 1 and 3
        [False, False],
        [True, False],
        [False, False],
    ]
    assert beyond_capacity(experts, weights, 3, 1).tolist() == [
        [True, True],
        [False, False],
        [True, False],
        [True, True],
    ]
    assert not beyond_capacity(experts, weights, 3, 4).any()


def test_capacity_is_a_factor_of_the_even_load():
    made, x = router(tokens=41, capacity=1.2)
    routing, _ = made(x)
    room = -(-1.2 * 41 * 3 // 8)
    whole = Routing(routing.experts, routing.weights, 8).load()
    assert torch.equal(routing.load(), whole.clamp_max(int(room)))
    assert whole.max() > room


def test_a_router_computes_in_float32():
    config = MoEConfig(hidden=16, num_experts=8, top_k=2, ffn=4)
    made = Router(config, dtype=torch.bfloat16)
    torch.nn.init.normal_(made.weight)
    x = torch.randn(30, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        routing, _ = made(x)
    assert routing.weights.dtype == torch.float32
    best = (x.float() @ made.weight.float().T).topk(2)
    assert torch.equal(routing.experts, best.indices)


def test_an_even_routing_loads_all_experts_alike_with_sets_at_random():
    routing = Routing.even(64 * 32, 8, 64)
    assert (routing.load() == 8 * 32).all()
    experts = routing.experts.sort(1).values
    assert (experts.diff(dim=1) > 0).all()  # distinct within a token
    on_four_ranks = torch.zeros(len(experts), 4).scatter_(1, experts // 16, 1.0)
    others = on_four_ranks.sum(1).mean() * 3 / 4
    assert others.item() == pytest.approx(2.74, abs=0.1)  # as many as of a free choice
    assert Routing.even(70, 3, 8).load().diff().abs().max() <= 3


def test_half_precision_leaves_the_bias_accurate():
    made, _ = router(balance="bias")
    made.bias.normal_()
    before = made.bias.clone()
    made.bfloat16()
    assert made.weight.dtype == torch.bfloat16
    assert torch.equal(made.bias, before)
    made.to("meta", torch.float16)
    assert (made.bias.device.type, made.bias.dtype) == ("meta", torch.float32)


def test_a_router_built_in_half_precision_has_an_accurate_bias():
    torch.set_default_dtype(torch.bfloat16)
    try:
        made, _ = router(balance="bias")
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.bias.dtype == torch.float32


def test_a_token_whose_sigmoids_all_underflow_leaves_losses_and_gradients_finite():
    made, x = router(tokens=1, score="sigmoid", z_weight=1e-3)
    made.float()
    made.weight.data.abs_()
    x = torch.full((1, 16), -1e3, requires_grad=True)
    routing, losses = made(x)
    assert not routing.weights.any()  # no score is left
    (1e3 * (sum(losses.values()) + routing.weights.sum())).backward()
    assert all(value.isfinite() for value in losses.values())
    assert x.grad.isfinite().all()
    assert made.weight.grad.isfinite().all()


def test_a_router_keeps_tokens_of_half_precision_as_they_are():
    made, x = router(tokens=400)
    made, kept = made.bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append((tuple(tensor.shape), tensor.dtype)) or tensor, lambda tensor: tensor
    ):
        made(x.bfloat16().requires_grad_())
    assert {dtype for shape, dtype in kept if shape == (400, 16)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_the_router_are_those_of_a_linear_map_in_its_precision(dtype):
    made, x = router(balance="loss", z_weight=0.1)
    made, x = made.to(dtype), x.to(dtype).requires_grad_()
    _, losses = made(x)
    found = torch.autograd.grad(losses["z"], (x, made.weight))
    precise = [leaf.detach().to(torch.promote_types(dtype, torch.float32)) for leaf in (x, made.weight)]
    rows, weight = (leaf.requires_grad_() for leaf in precise)
    expected = torch.autograd.grad((rows @ weight.T).logsumexp(-1).square().mean(), (rows, weight))
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right.to(dtype))
