"""Claims about the experts' activation: the kernels are the reference, in one pass each way, over the rows that there are."""

from __future__ import annotations

import pytest
import torch

from adamac.ops.activation import ACTIVATIONS, activate
from adamac.ops.activation.triton import tile_of
from adamac.ops.launch import interpreted
from adamac.testing import assert_within_error_budget

# Less than a tile, several of them, several over a row, and more than two axes.
SHAPES = [(1, 1), (63, 100), (200, 100), (5, 1500), (3, 7, 24)]


@pytest.fixture(autouse=True)
def kernels_can_run(device):
    if device.type == "cpu" and not interpreted():
        pytest.skip("needs a GPU or Triton's interpreter")


def drawn(shape, gated, dtype, device):
    """Inner values of which many are far from zero."""
    return torch.randn(*shape[:-1], shape[-1] * (2 if gated else 1), dtype=dtype, device=device) * 3


def outcome(inner, wanted, activation, gated, impl, rows=None):
    """Answers, and the gradient in inner values given that in the answers."""
    leaf = inner.detach().requires_grad_()
    out = activate(leaf, activation, gated=gated, rows=rows, impl=impl)
    return out.detach(), torch.autograd.grad(out, leaf, wanted)[0]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_err_no_more_than_eager_torch(dtype, activation, gated, device):
    for shape in SHAPES:
        inner = drawn(shape, gated, dtype, device)
        wanted = torch.randn(shape, dtype=dtype, device=device)
        exact = outcome(inner.double(), wanted.double(), activation, gated, "torch")
        eager, ours = (outcome(inner, wanted, activation, gated, impl) for impl in ("torch", "triton"))
        for a, b, c in zip(ours, exact, eager, strict=True):
            assert a.dtype == dtype
            assert_within_error_budget(a, b, c)


def test_far_below_zero_a_gelu_keeps_more_digits_than_torchs(device):
    inner = torch.linspace(-9, -2, 1000, device=device).unsqueeze(1)
    exact = inner.double() * torch.special.erfc(-inner.double() * 0.5**0.5) / 2
    errors = [
        ((activate(inner, "gelu", impl=impl) - exact) / exact).abs().max() for impl in ("triton", "torch")
    ]
    assert errors[0] < 1e-4 < errors[1]


def test_a_gelu_of_one_value_has_its_digits_wherever_that_lies(device):
    """The budget of a tensor is by its largest values; here each value is looked at alone."""
    inner = torch.linspace(-3, 3, 4001, device=device).unsqueeze(1)
    exact = torch.nn.functional.gelu(inner.double())
    error = (activate(inner, "gelu", impl="triton") - exact).abs()
    assert (error <= 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_number_is_seen_and_what_is_large_is_not_made_one(activation, device):
    values = torch.tensor([[float("nan"), 1e38, -1e38, 1e19, -1e19]], device=device)
    wanted = torch.ones_like(values)
    for ours, torchs in zip(
        outcome(values, wanted, activation, False, "triton"),
        outcome(values, wanted, activation, False, "torch"),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, equal_nan=True)
    infinite = torch.tensor([[float("inf")]], device=device)
    assert activate(infinite, activation, impl="triton").item() == float("inf")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("number", [0, 1, 70, 128, 200, 300])
def test_rows_beyond_those_that_there_are_are_not_touched(number, gated, device):
    """Of three tiles; memory that is never written is NaN here, and so is what must not be read."""
    inner = drawn((200, 100), gated, torch.bfloat16, device)
    wanted = torch.randn(200, 100, dtype=torch.bfloat16, device=device)
    assert 64 <= 2 * tile_of(inner, gated)["ROWS"] <= 128
    whole = outcome(inner, wanted, "gelu", gated, "triton")
    inner[number:], wanted[number:] = float("nan"), float("nan")
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([number], dtype=dtype, device=device)
        for found, right in zip(outcome(inner, wanted, "gelu", gated, "triton", rows), whole, strict=True):
            assert torch.equal(found[:number], right[:number])
    inner.zero_()
    for found in outcome(inner, inner[:, :100], "gelu", gated, "triton", rows):
        assert not bool(found[:number].isnan().any())
        assert bool(found[number:].isnan().all())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_nothing_is_answered_with_nothing(shape, impl, device):
    inner = torch.empty(shape, device=device)
    for found in outcome(inner, torch.empty(shape, device=device), "silu", False, impl):
        assert found.shape == shape


def test_inner_values_and_gradients_may_lie_anyhow(device):
    inner, wanted = drawn((40, 24), True, torch.float32, device), torch.randn(40, 1, device=device)
    right = outcome(inner, wanted.expand(40, 24).contiguous(), "gelu", True, "triton")
    anyhow = inner.T.contiguous().T
    for found, expected in zip(
        outcome(anyhow, wanted.expand(40, 24), "gelu", True, "triton"), right, strict=True
    ):
        assert torch.equal(found, expected)


def test_inner_values_alone_are_kept_for_the_gradient(device):
    inner, kept = drawn((9, 24), True, torch.bfloat16, device).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        activate(inner, "gelu", gated=True, impl="triton")
    assert [tensor.data_ptr() for tensor in kept] == [inner.data_ptr()]


def test_a_second_derivative_is_refused_by_the_kernels_and_not_by_torch(device):
    for impl in ("torch", "triton"):
        leaf = drawn((4, 8), False, torch.float32, device).requires_grad_()
        out = activate(leaf, "gelu", impl=impl).square().sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        if impl == "torch":
            first.sum().backward()
            assert bool(leaf.grad.any())
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.sum().backward()


def test_what_does_not_fit_is_refused_in_one_line(device):
    inner = torch.zeros(4, 6, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    for given, activation, options, message in (
        (inner, "tanh", {}, "activation must be one of gelu, relu, silu, relu2; got 'tanh'"),
        (inner[:, :5], "gelu", {"gated": True}, r"the gate first; got \(4, 5\)"),
        (inner[0, 0], "gelu", {}, r"expected inner \[..., width\]; got \(\)"),
        (inner[0], "gelu", {"rows": one}, r"rows are counted of inner \[n, width\]; got \(6,\)"),
        (inner, "gelu", {"rows": one.expand(2)}, r"one integer on .*; got \(2,\) torch.int32"),
        (inner, "gelu", {"rows": one.float()}, r"one integer on .*; got \(1,\) torch.float32"),
        (inner, "gelu", {"rows": one.to("meta")}, r"one integer on .* on meta"),
        (inner, "gelu", {"impl": "fused"}, "impl must be one of auto, torch, triton"),
        (inner.double(), "gelu", {"impl": "triton"}, 'not torch.float64; use impl="auto"'),
    ):
        with pytest.raises(ValueError, match=message):
            activate(given, activation, **options)
