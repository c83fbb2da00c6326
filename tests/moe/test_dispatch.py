"""Claims about dispatchers: whatever is sent, the answer is that of one rank."""

from __future__ import annotations

import pytest
from on_ranks import (
    in_half_precision,
    layer_errors,
    order_of_arrival,
    static_and_announced,
    static_lengths,
    ways_of_training,
    worst_errors,
    worst_errors_by_kernels,
    worst_errors_of_static_shapes,
)

from adamac.moe import preset
from adamac.ops.launch import interpreted
from adamac.testing import assert_within_error_budget, run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_equals_one(ranks):
    for errors in run_ranks(worst_errors, ranks, 21):
        assert max(errors.values()) < 1e-12, {case: e for case, e in errors.items() if not e < 1e-12}


def test_orders_found_by_kernels_give_the_same_answers():
    if not interpreted():
        pytest.skip("the ranks are on a CPU: needs Triton's interpreter")
    for errors in run_ranks(worst_errors_by_kernels, 2, 9):
        assert max(errors.values()) < 1e-12, {case: e for case, e in errors.items() if not e < 1e-12}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_static_shapes_give_the_same_answers(ranks):
    for errors in run_ranks(worst_errors_of_static_shapes, ranks, 20):
        assert max(errors.values()) < 1e-12, {case: e for case, e in errors.items() if not e < 1e-12}


SMALL = {"hidden": 16, "num_experts": 8, "top_k": 3, "ratio": 0.5}
CASES = [
    (preset(shape, **SMALL), name, chunks)
    for shape, chunks in (("fine_grained", 1), ("bigmac", 3), ("bigmac_stable", 1))
    for name in ("all_to_all", "per_rank", "all_gather")
] + [
    (preset("bigmac", **SMALL, shared_ffn=8, gated=True, activation="silu"), "per_rank", 2),
    (preset("bigmac", **SMALL, shared_ffn=8, z_weight=1e-3, balance="none"), "all_to_all", 1),
    (preset("fine_grained", **SMALL), "auto", 1),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_on_several_ranks_equals_the_layer_on_one(ranks):
    for errors in run_ranks(layer_errors, ranks, CASES):
        assert max(errors) < 1e-12, [case for case, e in zip(CASES, errors, strict=True) if not e < 1e-12]


def test_recomputing_and_not_training_change_nothing_and_every_stage_is_timed():
    config = preset("bigmac", **SMALL, shared_ffn=8)
    for found in run_ranks(ways_of_training, 2, config):
        assert found == {
            "bytes not counted": 0,
            "recomputed": 0,
            "without gradients": 0,
            "stages unseen": 0,
        }


STATIC = [
    (preset("fine_grained", **SMALL), 1),
    (preset("bigmac", **SMALL, capacity=0.6), 1),  # of what may come less than what is sent
    (preset("bigmac", **SMALL, capacity=1.2, shared_ffn=8), 3),
    (preset("bigmac_stable", **SMALL), 2),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_of_static_shapes_equals_one_that_announces_and_reads_nothing(ranks):
    for found in run_ranks(static_and_announced, ranks, STATIC):
        assert max(each["worst"] for each in found) < 1e-12
        for each in found:
            assert each["reads"] == {"all_gather": ["tolist"], "static_gather": []}


@pytest.mark.parametrize("ranks", [2, 4])
def test_static_shapes_have_room_for_what_may_come_and_no_more(ranks):
    local, many = 8 // ranks, {**SMALL, "top_k": 6}
    cases = [
        (preset("bigmac", **SMALL), 1),
        (preset("bigmac", **many), 1),
        (preset("bigmac", **SMALL, capacity=0.3), 1),
        (preset("bigmac", **SMALL, capacity=0.3), 3),
    ]
    whole, chunk = ranks * 12, ranks * 4
    expected = [
        [whole * min(3, local)],
        [whole * local],  # a token has at most that many experts here
        [ranks * local * 2],  # of each rank an expert takes two tokens
        [min(chunk * min(3, local), ranks * local * 2)] * 3,  # which may be in one chunk
    ]
    assert run_ranks(static_lengths, ranks, cases) == [expected] * ranks


def test_rows_are_waited_for_last():
    """So that the host, which must know how many there are, and the device sort while the rows travel."""
    aside = ["metadata", "metadata", "order", "payload"]
    for done in run_ranks(order_of_arrival, 2, preset("bigmac", **SMALL)):
        assert done == {"all_to_all": ["order", "payload"], "per_rank": aside, "all_gather": aside}


def test_half_precision_errs_no_more_than_on_one_rank():
    for results in run_ranks(in_half_precision, 2, preset("bigmac", **SMALL)):
        for output, oracle, eager in results.values():
            assert_within_error_budget(output, oracle, eager)
