"""Claims about experts whose matrices are cast for a step of several passes."""

from __future__ import annotations

import pytest
import torch

from adamac.moe import MoE, preset
from adamac.moe.experts import casts_kept


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(preset("bigmac", 64, 8, 2))


def gradients(made: MoE, kept: bool, passes: int = 3) -> list[torch.Tensor]:
    """Of several passes under autocast."""

    def accumulate() -> None:
        for number in range(passes):
            torch.manual_seed(number)
            x = torch.randn(20, 64)
            with torch.autocast("cpu", torch.bfloat16):
                output = made(x)
            output.square().sum().backward()

    if kept:
        with casts_kept(made):
            accumulate()
    else:
        accumulate()
    return [parameter.grad for parameter in made.parameters()]


def test_gradients_through_kept_casts_are_those_through_fresh_ones_to_the_bit():
    for kept, fresh in zip(gradients(layer(), True), gradients(layer(), False), strict=True):
        assert torch.equal(kept, fresh)


def test_within_they_are_cast_once_and_afterwards_not_held():
    made, casts = layer(), []
    x = torch.randn(5, 64)
    with casts_kept(made), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            made(x)
            casts.append(made.experts._kept["up", torch.bfloat16, False])
    assert casts[0] is casts[1]
    with torch.no_grad():
        before = made(x)
        made.experts.down.zero_()
        assert not torch.equal(before, made(x))


def test_a_pass_without_gradients_does_not_cut_off_the_next_one():
    made, x = layer(), torch.randn(5, 64)
    with casts_kept(made), torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            made(x)
        made(x).sum().backward()
    assert made.experts.up.grad is not None
    assert bool(made.experts.up.grad.any())


def test_a_step_that_fails_leaves_nothing_kept():
    made = layer()
    with pytest.raises(RuntimeError, match="stop"), casts_kept(made):
        raise RuntimeError("stop")
    assert made.experts._kept is None
