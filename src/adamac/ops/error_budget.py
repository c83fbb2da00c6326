"""The one rule for numerical error, shared by the tests and by implementations that are checked at first use.

A reference in higher precision says what is right, and the same computation done eagerly in the input's dtype says how much
error that dtype costs anyway. An implementation may err at most about twice as much as the eager computation does, plus the
rounding of its result.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How much more than the eager computation an implementation may err, how many roundings its result may cost, and how
# far the oracle itself can be trusted, relative to the size of the result.
_FACTOR = 2.0
_ROUNDINGS = 4.0
_TRUST = 1e-12


def over_budget(output: Tensor, oracle64: Tensor, eager: Tensor) -> str | None:
    """Say by how much an output errs too much, in its root mean square error or in its largest; waits for the device.

    Args:
        output: What the implementation computed.
        oracle64: The same in float64; where it is infinite the output has to be so as well.
        eager: The same, computed eagerly in the dtype of the inputs.

    Returns:
        One line, or ``None`` if the output is within the budget.
    """
    finite = oracle64.isfinite()
    if not torch.equal(output[~finite].double(), oracle64[~finite]):
        return "output is not infinite where the oracle is"
    if not finite.any():
        return None
    truth = oracle64[finite]
    error, allowed = output[finite].double() - truth, eager[finite].double() - truth
    rounding = max(_TRUST, _ROUNDINGS * torch.finfo(eager.dtype).eps)
    for name, size in (("root mean square", _root_mean_square), ("largest", _largest)):
        budget = _FACTOR * size(allowed) + rounding * size(truth)
        if not size(error) <= budget:  # written so that NaN is over the budget
            return f"{name} error {size(error):.3g} is over the budget of {budget:.3g}"
    return None


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _largest(values: Tensor) -> float:
    return float(values.abs().amax())
