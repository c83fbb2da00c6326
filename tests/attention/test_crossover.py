"""Small calls stay dense where sparse attention was measured not to pay, and say so."""

import pytest
import torch

from adamac.attention import Schedule, crossover

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(crossover, "capability", lambda index: (9, 0))


def test_next_to_nothing_is_dense_everywhere(hopper):
    for device in (CPU, GPU):
        assert "fewer than 1,024" in crossover.too_small(1023, 24, 128, device)
    assert crossover.too_small(1024, 24, 128, CPU) is None


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "small"),
    [
        (17_550, 60, 64, False),
        (32_760, 12, 128, False),
        (75_600, 40, 128, False),
        (8192, 24, 128, True),
        (4368, 4, 64, True),
    ],
)
def test_the_work_decides_on_a_gpu(hopper, tokens, heads, head_dim, small):
    reason = crossover.too_small(tokens, heads, head_dim, GPU)
    assert (reason is not None) == small
    assert reason is None or "TFLOP" in reason


def test_the_work_is_that_of_two_products_of_matrices():
    assert crossover.work(100, 3, 64) == 2 * 2 * 3 * 64 * 100 * 100


def test_a_number_in_the_schedule_overrides_what_was_measured(hopper):
    assert Schedule(min_tokens=0).too_small(63, 1, 64, GPU) is None
    assert Schedule(min_tokens=5000).too_small(4999, 40, 128, GPU) == "schedule: fewer than 5000 video tokens"
    assert Schedule().too_small(4368, 4, 64, GPU) == crossover.too_small(4368, 4, 64, GPU)
