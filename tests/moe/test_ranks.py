"""Claims about running on several ranks, and about what is refused there."""

from __future__ import annotations

import time

import pytest
from on_ranks import fail, refusals

from adamac.testing import run_ranks


def test_every_rank_returns():
    assert run_ranks(fail, 3, "not at all") == [0, 1, 2]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"(?s)rank 1 of 3 failed:.*on purpose"),
        ("dies", r"rank 1 of 3 failed:\s*it died .* exit code 7"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_says_why(how, message):
    begin_s = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_ranks(fail, 3, how, time_limit_s=60)
    assert time.monotonic() - begin_s < 30


def test_ranks_that_never_finish_are_ended():
    with pytest.raises(TimeoutError, match=r"rank 0, 1 of 2 had not finished after 3 s"):
        run_ranks(fail, 2, "hangs", time_limit_s=3)


def test_what_only_one_rank_sees_is_refused_by_all_in_one_line():
    first, second = run_ranks(refusals, 2)
    assert first[:-1] == second[:-1]
    assert all(line.startswith("the router's logits on rank 1 are NaN or infinite") for line in first[:3])
    assert first[3].startswith('dispatcher "static_gather" needs equally many tokens on every rank; got 3, 4')
    assert first[4].startswith(
        "num_experts must be divisible by the ranks it is spread over; got 5 experts on 2"
    )
    assert first[5].startswith('dispatcher "local" sends nothing, but the group has 2 ranks')
    assert first[6].startswith("expert_ranks must divide the number of ranks, 2; got 3")
    assert first[-1].startswith("could not write /nowhere/weights.safetensors")
    assert second[-1].startswith("the first rank could not write /nowhere")
    assert all("\n" not in line for line in first)
