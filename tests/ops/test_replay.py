"""Claims about recorded work: it follows its inputs, or says why it is not recorded."""

from __future__ import annotations

import pytest
import torch

from adamac.ops.replay import Replayed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_processor_a_function_is_just_called():
    calls = []
    step = Replayed(lambda x: (calls.append(x), x + 1)[1:])
    x = torch.randn(3)
    assert torch.equal(step(x)[0], x + 1)
    assert (len(calls), step.problem) == (1, "")
    step.record(x)
    assert (len(calls), step.recorded, step.held_bytes) == (1, False, 0)


@needs_gpu
def test_a_recorded_step_follows_its_inputs():
    step = Replayed(lambda x: (x.square().sum(),))
    for size in (3, 3, 5, 3):
        x = torch.randn(size, device="cuda")
        torch.testing.assert_close(step(x)[0], x.square().sum())
    assert step.problem == ""


@needs_gpu
def test_what_was_recorded_beforehand_writes_once_a_call():
    total, x = torch.zeros(2**20, device="cuda"), torch.randn(2**20, device="cuda")

    def add(x):
        total.add_(x.square())
        return (total.sum(),)

    step = Replayed(add)
    step.record(x)
    assert step.recorded, step.problem
    assert step.held_bytes > 0
    total.zero_()
    step(x), step(x)
    torch.testing.assert_close(total, 2 * x.square())


@needs_gpu
def test_a_step_that_cannot_be_recorded_is_called_plainly_and_says_why(caplog):
    def function(x):
        if x.shape[0] == 5 and torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return (x + 0 * torch.randn_like(x),)

    step = Replayed(function)
    for size in (3, 5, 3, 5):
        x = torch.randn(size, device="cuda")
        torch.testing.assert_close(step(x)[0], x)
    assert "recording failed" in caplog.text
    assert step.problem.startswith("recording failed: ")
    x = torch.randn(4, device="cuda")
    torch.testing.assert_close(Replayed(function)(x)[0], x)  # others can still be recorded
