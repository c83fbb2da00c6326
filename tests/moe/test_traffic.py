"""Claims about bytes, FLOPs and parameters: what is counted is what the formulas say."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from on_ranks import NAMES, counted_bytes

from adamac.moe import PAPER_MODELS, PRESETS, MoE, MoEConfig, preset
from adamac.moe.dispatch import cheapest
from adamac.moe.traffic import (
    active_parameters,
    bytes_sent,
    copies_sent,
    flops_per_token,
    metadata_bytes,
    model_all_to_all_bytes,
    model_flops,
    model_parameters,
    parameters,
)
from adamac.testing import run_ranks

XL, BATCH = PAPER_MODELS["xl"], 524_288
FINE, BIGMAC = (preset(name, XL.hidden, 64, 8, 0.25) for name in ("fine_grained", "bigmac"))


def test_table_4_of_the_paper_comes_out():
    parameters_b = [model_parameters(config, XL) / 1e9 for config in (FINE, BIGMAC)]
    assert [f"{number:.2f}" for number in parameters_b] == ["3.73", "3.78"]
    assert f"{parameters_b[1] / parameters_b[0] - 1:+.2%}" == "+1.35%"
    flops_t = [model_flops(config, XL, BATCH) / 1e12 for config in (FINE, BIGMAC)]
    assert [f"{number:.2f}" for number in flops_t] == ["3490.67", "3649.00"]
    assert f"{flops_t[1] / flops_t[0] - 1:+.2%}" == "+4.54%"
    assert [model_all_to_all_bytes(c, XL, BATCH, 32) / 2**30 for c in (FINE, BIGMAC)] == [1488, 372]


def test_the_projections_cost_one_part_in_top_k_of_the_routed_flops():
    assert model_flops(BIGMAC, XL, 1) - model_flops(FINE, XL, 1) == 12 * XL.layers * XL.hidden**2 // 4
    routed = 2 * BIGMAC.matrices * BIGMAC.top_k * BIGMAC.width * BIGMAC.ffn
    assert flops_per_token(BIGMAC) - flops_per_token(FINE) == routed // BIGMAC.top_k


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_layer(name):
    for shared in (0, 6):
        config = preset(name, 28, num_experts=8, top_k=2, ratio=0.5, shared_ffn=shared)
        assert parameters(config) == sum(parameter.numel() for parameter in MoE(config).parameters())


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = preset("bigmac", 16, num_experts=8, top_k=2, ratio=0.5, shared_ffn=6)
    layer = MoE(config, impl="reference")
    x = torch.randn(13, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    weighted_sum = 2 * 13 * config.top_k * config.width  # no matrix of the layer's
    assert counter.get_total_flops() - weighted_sum == 13 * flops_per_token(config)
    assert active_parameters(config) < parameters(config)


@pytest.mark.parametrize("ranks", [2, 4])
def test_counted_bytes_equal_the_formula(ranks):
    """Every set of experts once on each rank is an even load exactly."""
    config = MoEConfig(hidden=12, num_experts=8, top_k=3, ffn=4, latent=6)
    sets = list(itertools.combinations(range(8), 3))
    for counted in run_ranks(counted_bytes, ranks, config, sets):
        for name in (*NAMES, "static_gather"):
            for both in (False, True):
                payload, metadata = counted[name, both]
                assert payload == bytes_sent(config, len(sets), ranks, name, 8, backward=both)
                assert metadata == metadata_bytes(config, len(sets), ranks, name, 8, backward=both)


def test_counted_bytes_are_what_any_routing_asks_for():
    config = MoEConfig(hidden=12, num_experts=8, top_k=2, ffn=4, latent=6)
    sets = [(0, 1), (0, 5), (3, 2), (0, 7), (6, 7), (1, 2)]
    for rank, counted in enumerate(run_ranks(counted_bytes, 4, config, sets)):
        owners = [[expert // 2 for expert in experts] for experts in sets]
        copies = sum(owner != rank for token in owners for owner in token)
        distinct = sum(owner != rank for token in owners for owner in set(token))
        row = 6 * 8
        back = {  # answers to the other ranks, which have the same tokens
            "all_to_all": sum(owner == rank for token in owners for owner in token) * 3,
            "per_rank": sum(rank in token for token in owners) * 3,
        }
        assert counted["all_to_all", False][0] == row * (copies + back["all_to_all"])
        assert counted["per_rank", False][0] == row * (distinct + back["per_rank"])
        assert counted["all_gather", False][0] == row * 2 * 3 * len(sets)


def test_the_rule_takes_what_sends_least():
    shape = {"hidden": 1024, "num_experts": 64}
    assert (
        cheapest(preset("bigmac", **shape, top_k=1), 32) == "all_to_all"
    )  # a copy per expert is a copy per rank
    assert cheapest(preset("bigmac", **shape, top_k=8), 8) == "per_rank"
    assert cheapest(preset("bigmac", 4096, 64, 32), 2) == "all_gather"  # every token needs every rank
    config = preset("bigmac", **shape, top_k=8)
    assert round(copies_sent(config, 4, "per_rank"), 2) == Fraction("2.74")
    assert copies_sent(config, 4, "all_to_all") == 6
    assert copies_sent(config, 1, "per_rank") == 0
    with pytest.raises(ValueError, match="dispatcher must be local, all_to_all"):
        copies_sent(config, 4, "pigeon")
