"""Claims about predictions: exact where the machine is simple, near where others measured, and consistent with themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from adamac.advise import Cost, Machine, Network, compare, machine_of, predict, project
from adamac.moe import MoEConfig, preset
from adamac.moe.cost.constants import KINDS
from adamac.moe.traffic import bytes_sent, flops_per_token, metadata_bytes

FINE, BIGMAC = (preset(name, 2048, 64, 8, 0.25) for name in ("fine_grained", "bigmac"))
DISPATCHERS = ("all_to_all", "per_rank", "all_gather")
FREE = Machine("nothing takes time", {kind: Cost() for kind in KINDS})
# The constants of the table of predicted times that this model grew out of; no launches, no latencies.
PAPER_LIKE = machine_of(
    flops_per_s=650e12,
    grouped_flops_per_s=450e12,
    bytes_per_s=3.6e12,
    link_bytes_per_s=350e9,
    launch_ms=0.0,
    latency_ms=0.0,
)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("config", [FINE, BIGMAC])
@pytest.mark.parametrize("backward", [False, True])
def test_with_free_computation_time_is_bytes_by_bandwidth(dispatcher, config, backward):
    bandwidth = 45e9
    said = predict(config, 4096, 8, dispatcher, FREE.linked(bandwidth), backward=backward)
    sent = bytes_sent(config, 4096, 8, dispatcher, backward=backward)
    beside = metadata_bytes(config, 4096, 8, dispatcher, backward=backward)
    assert said.time_ms == pytest.approx(1e3 * (sent + beside) / bandwidth, rel=1e-12)
    assert said.bytes_sent == sent


def test_with_products_alone_time_is_flops_by_rate():
    rate = 1e14
    machine = FREE.changed(**{kind: Cost(flops_per_s=rate) for kind in ("dense", "grouped", "gate")})
    for config in (FINE, BIGMAC):
        said = predict(config, 4096, 8, "per_rank", machine, backward=True)
        assert said.time_ms == pytest.approx(3e3 * 4096 * flops_per_token(config) / rate, rel=1e-12)


def test_a_slower_fabric_never_helps():
    for config in (FINE, BIGMAC):
        for name in DISPATCHERS:
            times = [
                predict(config, 4096, 8, name, PAPER_LIKE.linked(bandwidth)).time_ms
                for bandwidth in (1e9, 1e10, 45e9, 350e9, 1e12)
            ]
            assert times == sorted(times, reverse=True)


# Fewer bytes, but projections and a wider inner width: on a fast fabric it loses.
WIDE = MoEConfig(hidden=6144, num_experts=128, top_k=4, ffn=3072)
NARROW = replace(WIDE, ffn=6144, latent=3072)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("network", [None, Network(4, 45e9)])
def test_at_the_break_even_bandwidth_both_sides_are_equal(backward, network):
    ranks = 64
    found = compare(WIDE, NARROW, 4096, ranks, PAPER_LIKE, backward=backward, network=network)
    limit = found.break_even_bytes_per_s
    assert limit is not None
    assert 0 < limit < math.inf
    for factor, ahead in ((0.99, True), (1, None), (1.01, False)):
        changed = {
            "machine": PAPER_LIKE if network else PAPER_LIKE.linked(factor * limit),
            "network": network and replace(network, bytes_per_s=factor * limit),
        }
        ratio = compare(WIDE, NARROW, 4096, ranks, **changed, backward=backward).ratio
        if ahead is None:
            assert ratio == pytest.approx(1, abs=1e-6)
        else:
            assert (ratio > 1) is ahead


def test_projections_that_narrow_nothing_only_cost():
    same = preset("bigmac", 2048, 64, 8, 1.0)
    base = preset("fine_grained", 2048, 64, 8, 1.0)
    found = compare(base, same, 4096, 8, machine_of())
    assert found.ratio < 1
    assert all(found.candidate[name].time_ms > said.time_ms for name, said in found.baseline.items())
    assert found.break_even_bytes_per_s == 0
    assert "not faster on a slow fabric" in found.break_even()
    assert found.rho == 0


def test_rho_is_that_of_the_published_formula():
    machine = machine_of(flops_per_s=600e12, link_bytes_per_s=350e9)
    # K (1 - r) / (r h) x F / BW x (R - 1) / R
    expected = 8 * 0.75 / (0.25 * 2048) * 600e12 / 350e9 * 3 / 4
    assert compare(FINE, BIGMAC, 4096, 4, machine).rho == pytest.approx(expected, rel=1e-12)
    assert round(expected) == 15


# Predicted forward milliseconds of an XL layer, 16k tokens a rank: one rank, two and four with a copy per expert, with a
# copy per rank, and 32 on four nodes. That prediction read and wrote all rows four times whatever the dispatcher. So does a copy
# per expert; one rank and a copy per rank move fewer, and the baseline, whose rows are wide, gains most by that.
BEFORE = [
    (1, "local", None, 2.50, 1.93, 0.18),
    (2, "per_rank", None, 2.88, 2.03, 0.18),
    (4, "per_rank", None, 3.55, 2.19, 0.05),
    (2, "all_to_all", None, 4.03, 2.31, 0.05),
    (4, "all_to_all", None, 4.80, 2.51, 0.05),
    (32, "all_to_all", Network(4, 45e9), 20.4, 6.4, 0.01),
]
# It had no router beyond the FLOPs, and no sorting; its rows were moved by plain torch.
BEFORE_ON = replace(PAPER_LIKE, rows="torch").changed(gate=Cost(flops_per_s=650e12), sort=Cost())


@pytest.mark.parametrize(("ranks", "dispatcher", "network", "fine_ms", "bigmac_ms", "off"), BEFORE)
def test_an_earlier_prediction_comes_out_within_reason(ranks, dispatcher, network, fine_ms, bigmac_ms, off):
    for config, expected in ((FINE, fine_ms), (BIGMAC, bigmac_ms)):
        said = predict(config, 16384, ranks, dispatcher, BEFORE_ON, network=network).time_ms
        assert abs(said / expected - 1) < off, (said, expected)


def test_an_earlier_prediction_of_a_large_gated_layer_comes_out_within_five_percent():
    fine = MoEConfig(hidden=7168, num_experts=256, top_k=8, ffn=2048, gated=True, activation="silu")
    bigmac = replace(fine, ffn=8192, latent=1792)
    for ranks, network, times in ((8, None, (18.3, 15.7)), (64, Network(8, 45e9), (50.2, 23.7))):
        for config, expected in zip((fine, bigmac), times, strict=True):
            said = predict(config, 8192, ranks, "per_rank", BEFORE_ON, network=network).time_ms
            assert abs(said / expected - 1) < 0.05, (said, expected)


# Measured on two H200: fabric GB/s, tokens, top-k, fine-grained and BigMac milliseconds, a copy per expert, plain torch.
MEASURED = [
    (233e9, 16384, 4, 2.45, 1.45),
    (233e9, 16384, 8, 4.43, 2.44),
    (23e9, 4096, 4, 3.32, 1.14),
    (23e9, 4096, 8, 6.46, 2.05),
    (2.5e9, 4096, 4, 29.4, 7.5),
    (2.5e9, 4096, 8, 59.7, 14.8),
]


@pytest.mark.parametrize(("bandwidth", "tokens", "top_k", "fine_ms", "bigmac_ms"), MEASURED)
def test_ratios_measured_on_three_fabrics_are_met_within_ten_percent(
    bandwidth, tokens, top_k, fine_ms, bigmac_ms
):
    machine = replace(machine_of().linked(bandwidth), rows="torch")
    fine, bigmac = (
        predict(preset(name, 2048, 64, top_k), tokens, 2, "all_to_all", machine).time_ms
        for name in ("fine_grained", "bigmac")
    )
    assert abs(fine / bigmac / (fine_ms / bigmac_ms) - 1) < 0.10
    assert abs(fine / fine_ms - 1) < 0.3
    assert abs(bigmac / bigmac_ms - 1) < 0.3


def test_the_ratio_measured_without_sending_is_met_within_ten_percent():
    machine = replace(machine_of().linked(math.inf, 0.0), rows="torch")
    fine, bigmac = (predict(side, 16384, 2, "all_to_all", machine).time_ms for side in (FINE, BIGMAC))
    assert abs(fine / bigmac / 1.32 - 1) < 0.10


def test_a_projection_of_one_node_is_a_prediction_and_more_nodes_cost_more():
    one = project(FINE, BIGMAC, 4096, 8, PAPER_LIKE, Network(1, 45e9))
    plain = compare(FINE, BIGMAC, 4096, 8, PAPER_LIKE)
    for name in DISPATCHERS:
        assert one.baseline[name].time_ms == pytest.approx(plain.baseline[name].time_ms, rel=1e-12)
    four = project(FINE, BIGMAC, 4096, 8, PAPER_LIKE, Network(4, 45e9))
    assert four.best[0].time_ms > plain.best[0].time_ms
    assert four.verdict().startswith("Projection: ")
    assert not plain.verdict().startswith("Projection")


def test_what_travels_hides_behind_the_shared_expert_but_no_more_than_there_is():
    with_shared = replace(BIGMAC, shared_ffn=64)
    busy = FREE.linked(45e9, 0.0).changed(dense=Cost(flops_per_s=1e12))
    said = predict(with_shared, 4096, 8, "all_to_all", busy)
    there = 1e3 * bytes_sent(BIGMAC, 4096, 8) / 2 / 45e9
    beside = 1e3 * metadata_bytes(BIGMAC, 4096, 8) / 45e9
    left = max(0.0, there - said.stages_ms["shared"])
    assert said.stages_ms["send"] == pytest.approx(left + beside, rel=1e-9)
    assert said.stages_ms["collect"] == pytest.approx(there, rel=1e-12)


def test_a_small_layer_takes_what_the_host_takes():
    slow_host = replace(machine_of(), least_ms={"local": 1.0}, least_both_ms={"local": 3.0})
    for backward, least in ((False, 1.0), (True, 3.0)):
        said = predict(FINE, 1, 1, "local", slow_host, backward=backward)
        assert said.time_ms == pytest.approx(least)
        assert 0 < said.host_ms < least


def test_verdicts_say_which_way_and_why():
    fast, slow = (machine_of(link_bytes_per_s=bandwidth) for bandwidth in (10e12, 5e9))
    pays = compare(FINE, BIGMAC, 16384, 8, slow)
    assert pays.answer == "pays"
    assert "it saves" in pays.verdict()
    assert "it adds experts" in pays.verdict()
    assert pays.ratio_by_copies >= pays.ratio
    loses = replace(compare(WIDE, NARROW, 4096, 8, fast), error=0.001)
    assert loses.answer == "does not pay"
    unsure = compare(WIDE, NARROW, 4096, 8, fast)
    assert unsure.answer == "within the model's error"
    alone = compare(FINE, BIGMAC, 4096, 1, fast)
    assert (alone.break_even_bytes_per_s, alone.rho, alone.ratio_by_copies) == (None, None, None)
    assert set(alone.baseline) == {"local"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((BIGMAC, 16, 3, "all_to_all"), "divisible by the ranks"),
        ((BIGMAC, 0, 2, "all_to_all"), "tokens and ranks must be at least 1"),
        ((BIGMAC, 16, 2, "local"), '"local" is for one rank'),
        ((BIGMAC, 16, 1, "per_rank"), '"local" is for one rank'),
        ((BIGMAC, 16, 2, "pigeon"), "dispatcher must be one of"),
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        predict(*arguments, PAPER_LIKE)


def test_nodes_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        predict(BIGMAC, 16, 8, "all_to_all", PAPER_LIKE, network=Network(3, 1e9))


def measured_on(ranks, **errors):
    fits = {kind: Cost(1e-3, 1e15, 1e12, "measured", (0.01, -0.01)) for kind in KINDS}
    return Machine("measured", fits, ranks=ranks, **errors)


def test_the_error_of_a_comparison_holds_for_the_ranks_and_the_fabric_that_it_was_made_on():
    two = measured_on(2, ratio_error=0.08)
    assert compare(FINE, BIGMAC, 4096, 2, two).error == 0.08
    assert compare(FINE, BIGMAC, 4096, 1, two).error == 0.08
    # Another number of ranks: at least as much. Another fabric, of which somebody only says so: much more.
    assert compare(FINE, BIGMAC, 4096, 8, two).error >= 0.08
    slow = two.linked(1e9)
    assert compare(FINE, BIGMAC, 4096, 2, slow).error > 0.2


def test_what_is_only_assumed_decides_nothing_within_a_third():
    found = compare(FINE, BIGMAC, 16384, 2, machine_of())
    assert found.error == pytest.approx(0.3)
    assert found.answer == "within the model's error"


@pytest.mark.parametrize(("ranks", "name"), [(1, "local"), (2, "static_gather")])
@pytest.mark.parametrize("backward", [False, True])
def test_what_is_replayed_waits_for_no_host_and_does_the_same_work(ranks, name, backward):
    floors = dict.fromkeys(("local", *DISPATCHERS), 50.0)
    slow_host = replace(PAPER_LIKE, least_ms=floors, least_both_ms=floors)
    found = compare(FINE, BIGMAC, 4096, ranks, slow_host, backward=backward)
    assert found.ratio == pytest.approx(1, abs=0.02)  # both end at the host
    for said, launched in zip(found.replayed, (found.baseline, found.candidate), strict=True):
        assert (said.dispatcher, said.host_ms) == (name, 0)
        gather = launched["local" if ranks == 1 else "all_gather"]
        assert said.time_ms == pytest.approx(sum(gather.stages_ms.values()), rel=0.01)
    ratio = found.replayed[0].time_ms / found.replayed[1].time_ms
    assert (ratio > 1.05) == (ranks > 1)  # alone nothing is sent
    assert f"({name}), where nobody waits for the host: CDAC" in found.if_replayed()
    assert found.if_replayed().endswith(f"{ratio:.2f}x.")
