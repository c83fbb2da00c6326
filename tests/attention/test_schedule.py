"""Claims about which steps and layers stay dense."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamac.attention import Schedule


def dense_steps(schedule: Schedule, num_steps: int) -> list[int]:
    return [step for step in range(num_steps) if schedule.dense_reason(step, num_steps, 5, 30)]


def test_a_count_is_a_count_and_a_share_is_rounded_up():
    assert dense_steps(Schedule(first=3), 20) == [0, 1, 2]
    assert dense_steps(Schedule(first=0.1), 20) == [0, 1]
    assert dense_steps(Schedule(first=0.11), 20) == [0, 1, 2]
    assert dense_steps(Schedule(first=0, last=1), 20) == [19]
    assert dense_steps(Schedule(first=0, last=0.1), 20) == [18, 19]


def test_one_as_a_count_is_one_step_and_as_a_share_all_of_them():
    assert dense_steps(Schedule(first=1), 5) == [0]
    assert dense_steps(Schedule(first=1.0), 5) == [0, 1, 2, 3, 4]


@given(first=st.floats(0, 1), steps=st.integers(1, 60))
def test_a_share_never_makes_fewer_steps_dense_than_asked(first, steps):
    assert first * steps - 1e-6 <= len(dense_steps(Schedule(first=first), steps)) < first * steps + 1


def test_the_reason_names_its_rule():
    schedule = Schedule(first=1, last=1, layers=(0, -1))
    assert schedule.dense_reason(0, 4, 3, 10) == "schedule: first steps"
    assert schedule.dense_reason(3, 4, 3, 10) == "schedule: last steps"
    assert schedule.dense_reason(1, 4, 0, 10) == schedule.dense_reason(1, 4, 9, 10) == "schedule: layer"
    assert schedule.dense_reason(1, 4, 3, 10) is None


def test_a_count_at_the_start_needs_no_number_of_steps():
    schedule = Schedule(first=2)
    assert schedule.dense_reason(1, None, 3, 10) == "schedule: first steps"
    assert schedule.dense_reason(2, None, 3, 10) is None


@pytest.mark.parametrize(
    "schedule", [Schedule(first=0.1), Schedule(first=0, last=1), Schedule(first=0, last=0.1)]
)
def test_shares_and_last_steps_are_refused_when_the_number_of_steps_is_unknown(schedule):
    with pytest.raises(ValueError, match="needs num_steps"):
        schedule.dense_reason(5, None, 3, 10)


@pytest.mark.parametrize("amount", [-1, -0.1, 1.5, "10%", None, True])
@pytest.mark.parametrize("name", ["first", "last"])
def test_an_amount_out_of_range_is_refused(name, amount):
    with pytest.raises(ValueError, match=rf"Schedule\.{name} must be .* got {re.escape(repr(amount))}"):
        Schedule(**{name: amount})


@pytest.mark.parametrize("layers", [0, "0", (0.5,), None])
def test_layers_that_are_no_indices_are_refused(layers):
    with pytest.raises(ValueError, match=r"Schedule\.layers must be a tuple of indices"):
        Schedule(layers=layers)
