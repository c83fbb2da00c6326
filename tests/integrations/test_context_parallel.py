"""Claims about videos spread over ranks: they equal those of one rank, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig
from spread import PIPES, Comparison, run_cases
from tiny import wan_pipe

from adamac.integrations.diffusers import parallelize
from adamac.testing import run_ranks

# On each of two gloo ranks, what became of every case: one start of processes serves all tests.
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return run_ranks(run_cases, 2)


def results(ranks: Ranks, case: str) -> list[Any]:
    found = [rank[case] for rank in ranks]
    for result in found:
        assert not isinstance(result, str), result
    return found


# A product of fewer rows, or of fewer heads at once, may round its last bit otherwise; another plan errs by 1e-4 and more.
ROUNDING = 1e-6


def assert_as_on_one_rank(comparison: Comparison) -> None:
    assert comparison.error <= ROUNDING
    spread, single = comparison.report, comparison.expected
    assert spread is not None
    assert single is not None
    assert spread.ranks == 2
    assert spread.sparse_calls == single.sparse_calls > 0
    assert spread.dense_calls == single.dense_calls
    assert spread.density == pytest.approx(single.density)


@pytest.mark.parametrize("name", PIPES)
def test_a_sparse_video_on_two_ranks_is_that_of_one_in_either_order_of_enabling(ranks, name):
    for order in ("sparse", "enabled first"):
        for comparison in results(ranks, f"{name}: {order}"):
            assert_as_on_one_rank(comparison)


@pytest.mark.parametrize("name", PIPES)
def test_tokens_and_heads_need_not_divide_among_ranks(ranks, name):
    for comparison in results(ranks, f"{name}: odd"):
        assert_as_on_one_rank(comparison)


@pytest.mark.parametrize("name", PIPES)
def test_without_a_handle_and_after_it_attention_is_dense_on_two_ranks_as_on_one(ranks, name):
    for comparison in results(ranks, f"{name}: dense"):
        assert comparison.error <= ROUNDING
    for comparison in results(ranks, f"{name}: dense, odd"):
        assert comparison.error <= ROUNDING


def test_diffusers_own_parallelism_of_wan_is_made_sparse_too(ranks):
    for order in ("sparse", "enabled first"):
        for comparison in results(ranks, f"wan by diffusers: {order}"):
            assert_as_on_one_rank(comparison)
    for comparison in results(ranks, "wan by diffusers: odd"):
        assert_as_on_one_rank(comparison)


def test_padded_text_of_one_length_is_cut_off_on_two_ranks_too(ranks):
    for comparison in results(ranks, "texts of one length"):
        assert_as_on_one_rank(comparison)


def test_a_layer_that_is_too_hard_for_one_rank_is_dense_on_all(ranks):
    for comparison in results(ranks, "layers too hard"):
        assert comparison.error <= ROUNDING
        assert comparison.report.dense_calls == comparison.expected.dense_calls
        assert any("keys need more" in reason for reason in comparison.report.dense_calls)


def test_a_dense_method_is_dense_on_two_ranks(ranks):
    for comparison in results(ranks, "dense method"):
        assert comparison.error <= ROUNDING
        assert comparison.report.dense_calls["method: dense"] == 6


def test_ranks_agree_in_the_first_sparse_step_of_a_video_and_never_again(ranks):
    for after_steps in results(ranks, "agreements"):
        dense, first_sparse, *later = after_steps
        assert dense == 0
        assert first_sparse >= 2 * 4  # two numbers at least, in two layers and two branches
        assert later == [first_sparse] * 2


def test_a_video_is_the_same_after_another_and_after_one_that_was_broken_off(ranks):
    assert results(ranks, "one after another") == [True, True]


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "wan by diffusers"])
def test_compiled_blocks_are_spread_as_uncompiled_ones_from_the_first_call_on(ranks, name):
    for comparison in results(ranks, f"{name}: compiled"):
        assert_as_on_one_rank(comparison)


def test_the_report_names_the_ranks_and_how_evenly_they_worked_when_all_ask(ranks):
    reports = [comparison.report for comparison in results(ranks, "wan: sparse")]
    assert reports[0].rank_seconds == reports[1].rank_seconds
    for rank, report in enumerate(reports):
        assert report.rank_seconds[rank] == pytest.approx(sum(report.seconds.values()))
        assert 1 <= report.imbalance < 2
        assert f"spread over 2 ranks; slowest rank over mean: {report.imbalance:.3f}" in str(report)


def test_ring_attention_is_refused_before_and_after_enabling(ranks):
    for refusals in results(ranks, "ring"):
        assert len(refusals) == 3
        assert all("ring attention (ring_degree=2)" in line and "ulysses_degree" in line for line in refusals)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "odd lengths under diffusers' config for even ones",
            "189 video tokens do not divide among 2 ranks; use",
        ),
        ("diffusers' exchange for text and video", "use adamac.integrations.diffusers.parallelize"),
        ("positions within the sequence", "image_condition_type 'token_replace'"),
        ("more ranks than heads", "2 ranks are more than the 1 heads"),
        ("a cache that decides by content, dense", "FirstBlockCache would hang"),
        ("a cache that decides by content", "FirstBlockCache would hang"),
        ("gradients", "use torch.no_grad()"),
    ],
)
def test_what_cannot_be_spread_is_refused_in_one_line(ranks, case, said):
    for refusals in results(ranks, "others"):
        assert said in refusals[case]
        assert "\n" not in refusals[case]


def test_a_number_is_no_configuration_and_a_machine_without_gpus_is_told(monkeypatch):
    pipe = wan_pipe()
    with pytest.raises(ValueError, match=r"ContextParallelConfig\(ulysses_degree=2\), got 2"):
        parallelize(pipe, 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="needs GPUs"):
        parallelize(pipe, ContextParallelConfig(ulysses_degree=2))
