"""Claims about the exchange between ranks by itself."""

from __future__ import annotations

import pytest
from exchanging import run_there_and_back
from hypothesis import given
from hypothesis import strategies as st

from adamac.integrations.diffusers.exchange import shares
from adamac.testing import run_ranks


@given(st.integers(0, 1000), st.integers(1, 64))
def test_shares_add_up_and_differ_by_one_at_most(amount, ranks):
    found = shares(amount, ranks)
    assert sum(found) == amount
    assert sorted(found, reverse=True) == found
    assert max(found) - min(found) <= 1


@pytest.fixture(scope="module")
def found():
    return run_ranks(run_there_and_back, 3)


@pytest.mark.parametrize("place", ["none", "before", "after"])
def test_heads_have_the_whole_sequence_in_its_order_and_tokens_come_back_to_the_bit(found, place):
    for rank in found:  # seven heads and twenty tokens on three ranks
        assert rank[f"{place}: heads"]
        assert rank[f"{place}: tokens"]
