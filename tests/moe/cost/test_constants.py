"""Claims about costs: what a fit finds, and what it says of itself."""

from __future__ import annotations

import math

import pytest
import torch

from adamac.advise import Cost, Work
from adamac.moe.cost.constants import Sample, fit

TRUE = Cost(0.02, 400e12, 2e12)
WORKS = [
    Work("dense", 2.0 * rows * wide * narrow, 2.0 * (rows * wide + wide * narrow + rows * narrow))
    for rows in (256, 1024, 4096, 16384)
    for wide, narrow in ((256, 1024), (1024, 256), (2048, 512), (4096, 4096))
]


def samples(cost: Cost, noise: float) -> list[Sample]:
    factors = (1 + noise * torch.randn(len(WORKS), dtype=torch.float64)).tolist()
    return [Sample(work, cost.time_ms(work) * factor) for work, factor in zip(WORKS, factors, strict=True)]


def constants(cost: Cost) -> list[float]:
    return [cost.overhead_ms, 1 / cost.flops_per_s, 1 / cost.bytes_per_s]


def test_a_fit_without_noise_finds_the_constants():
    found = fit(samples(TRUE, 0))
    assert constants(found) == pytest.approx(constants(TRUE), rel=1e-9)
    assert found.error < 1e-9
    assert found.source == "measured"


@pytest.mark.parametrize("missing", ["overhead_ms", "flops_per_s", "bytes_per_s"])
def test_a_fit_without_noise_finds_what_costs_nothing(missing):
    value = 0.0 if missing == "overhead_ms" else math.inf
    true = Cost(**{**vars(Cost(0.02, 400e12, 2e12)), missing: value})
    assert constants(fit(samples(true, 0))) == pytest.approx(constants(true), rel=1e-6, abs=1e-22)


def test_a_fit_with_noise_predicts_other_shapes_better_than_the_noise_and_knows_its_error():
    noise = 0.05
    found = fit(samples(TRUE, noise))
    other = [Work("dense", 3e11, 1e8), Work("dense", 1e9, 3e7), Work("dense", 2e10, 1e8)]
    assert all(abs(found.time_ms(work) / TRUE.time_ms(work) - 1) < noise for work in other)
    assert noise / 2 < found.error < 2 * noise
    assert len(found.residuals) == len(WORKS)


def test_constants_of_a_fit_are_never_negative():
    times = (9.0, 5.0, 4.0, 3.5)  # faster the more there is to do
    odd = [Sample(Work("sort", nbytes=1e6 * (place + 1)), time) for place, time in enumerate(times)]
    assert min(constants(fit(odd))) >= 0


def test_efficiency_grows_with_size():
    rates = [work.flops / TRUE.time_ms(work) for work in WORKS[3::4]]
    assert rates == sorted(rates)
    assert rates[-1] < TRUE.flops_per_s / 1e3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"overhead_ms": -1.0}, "overhead_ms must be at least 0"),
        ({"flops_per_s": 0.0}, "flops_per_s must be above 0"),
        ({"bytes_per_s": math.nan}, "bytes_per_s must be above 0"),
        ({"source": "guessed"}, "source must be one of"),
    ],
)
def test_what_is_no_cost_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Cost(**arguments)


@pytest.mark.parametrize("times", [[], [1.0, 0.0], [math.nan]])
def test_nothing_is_fitted_to_nothing(times):
    with pytest.raises(ValueError, match="at least one sample"):
        fit([Sample(Work("sort", nbytes=1.0), time) for time in times])
