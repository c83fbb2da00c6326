"""Claims about a layer's work: FLOPs and bytes are those of the formulas in adamac.moe.traffic."""

from __future__ import annotations

import pytest

from adamac.moe import PRESETS, preset
from adamac.moe.cost.work import Layer, activation
from adamac.moe.timing import STAGES
from adamac.moe.traffic import bytes_sent, flops_per_token, metadata_bytes

RANKS = {"local": 1, "all_to_all": 4, "per_rank": 4, "all_gather": 4, "static_gather": 4}
COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dispatcher", RANKS)
@pytest.mark.parametrize("backward", [False, True])
def test_flops_and_bytes_sent_are_those_of_the_formulas(name, dispatcher, backward):
    for shared in (0, 6):
        ranks, tokens, itemsize = RANKS[dispatcher], 48, 2
        config = preset(name, 28, num_experts=64, top_k=4, ratio=0.5, shared_ffn=shared)
        work = Layer(config, tokens, ranks, dispatcher, itemsize, "triton").work(backward=backward)
        assert list(work) == list(STAGES)
        everything = [item for items in work.values() for item in items]
        passes = 3 if backward else 1
        assert sum(item.flops for item in everything) == passes * tokens * flops_per_token(config)
        sent = bytes_sent(config, tokens, ranks, dispatcher, itemsize, backward=backward)
        beside = metadata_bytes(config, tokens, ranks, dispatcher, backward=backward)
        counted = sum(item.nbytes for item in everything if item.kind in COLLECTIVES)
        assert counted == pytest.approx(sent + beside, rel=1e-12)


def test_a_stage_that_a_layer_lacks_has_no_work():
    work = Layer(preset("fine_grained", 32), 8, 1, "local", 2, "triton").work()
    assert not work["descend"]
    assert not work["ascend"]
    assert not work["shared"]
    assert not work["send"]


def test_moving_rows_costs_as_their_width():
    wide, narrow = (
        Layer(preset(name, 64, ratio=0.25), 8, 1, "local", 2, "triton").work()["permute"][-1].nbytes
        for name in ("fine_grained", "bigmac")
    )
    assert wide == 4 * narrow


def test_kernels_read_a_row_once_however_often_it_is_copied():
    (torch_bytes, kernel_bytes) = (
        Layer(preset("fine_grained", 64, top_k=4), 8, 1, "local", 2, impl).work()["permute"][-1].nbytes
        for impl in ("torch", "triton")
    )
    row = 64 * 2
    assert torch_bytes == (8 * 4 + 8 * 4) * row
    assert kernel_bytes == (8 + 8 * 4) * row


def test_among_ranks_too_what_kernels_copy_is_read_once():
    """Wherever rows were copied from: the tokens here, those of all ranks, or what has arrived."""
    config, row = preset("fine_grained", 64, num_experts=64, top_k=8), 64 * 2
    here, everybody, choices = 8, 8 * 4, 8 * 8

    def spread(dispatcher: str, impl: str) -> float:
        work = Layer(config, here, 4, dispatcher, 2, impl).work()["permute"]
        return sum(item.nbytes for item in work if item.kind == "spread")

    assert spread("all_gather", "torch") == 2 * choices * row
    assert spread("all_gather", "triton") == (everybody + choices) * row
    assert spread("all_to_all", "triton") == (here + choices + 2 * choices) * row  # and regrouped, one by one
    copies = spread("per_rank", "torch") / row / 2 - choices
    assert here < copies < everybody
    assert spread("per_rank", "triton") == pytest.approx((here + 2 * copies + choices) * row)


def test_a_gate_is_one_more_reading_for_a_kernel_and_three_passes_for_plain_torch():
    passes = {
        (impl, gated, backward): activation(
            1, preset("fine_grained", 64, gated=gated, activation="silu"), 1, impl, backward=backward
        ).nbytes
        for impl in ("torch", "triton")
        for gated in (False, True)
        for backward in (False, True)
    }
    assert [passes["triton", *way] for way in ((False, False), (False, True), (True, False), (True, True))] == [2, 3, 3, 5]  # fmt: skip
    assert [passes["torch", *way] for way in ((False, False), (False, True), (True, False), (True, True))] == [2, 3, 5, 9]  # fmt: skip
