"""Which steps and layers stay dense.

Early steps decide what the video will show and are the least sparse, so most methods leave them dense. Users report that a
dense last step removes glitches, and that the first layer often tolerates sparsity badly. All three are for the user to set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adamac.attention import crossover


@dataclass(frozen=True)
class Schedule:
    """Dense steps and layers.

    Attributes:
        first: Dense steps at the start: a count (int), or a share of the steps (float), rounded up.
        last: Dense steps at the end, likewise.
        layers: Dense layers, by index; negative ones count from the end.
        min_tokens: Sequences with fewer video tokens stay dense, because planning would cost more than it saves. ``None`` means
            the crossover that was measured on such a device (:mod:`adamac.attention.crossover`); 0 means never.

    Raises:
        ValueError: If a number is negative, a share is above 1, or ``layers`` is no tuple of indices.
    """

    first: int | float = 0.1
    last: int | float = 0
    layers: tuple[int, ...] = ()
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            amount = getattr(self, name)
            known = isinstance(amount, int | float) and not isinstance(amount, bool)
            if not known or amount < 0 or (isinstance(amount, float) and amount > 1):
                raise ValueError(
                    f"Schedule.{name} must be a number of steps (int, 0 or more) or a share of them (float, 0 to 1), "
                    f"got {amount!r}"
                )
        if not isinstance(self.layers, tuple | list) or not all(type(layer) is int for layer in self.layers):
            raise ValueError(f"Schedule.layers must be a tuple of indices, as (0, -1), got {self.layers!r}")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise ValueError(f"Schedule.min_tokens must be 0 or more, got {self.min_tokens}")

    def dense_reason(self, step: int, num_steps: int | None, layer: int, num_layers: int) -> str | None:
        """Say why a call stays dense, or ``None`` if it may be sparse.

        Args:
            step: Index of the denoising step, from 0.
            num_steps: Steps of this video; ``None`` if unknown, which shares and last steps cannot do without.
            layer: Index of the layer, from 0.
            num_layers: How many layers have self-attention.

        Raises:
            ValueError: If the schedule needs the number of steps and it is unknown.
        """
        if step < self._steps(self.first, num_steps):
            return "schedule: first steps"
        if self.last:
            if num_steps is None:
                raise ValueError(f"a schedule with dense last steps ({self.last}) needs num_steps")
            if step >= num_steps - self._steps(self.last, num_steps):
                return "schedule: last steps"
        if layer in self.layers or layer - num_layers in self.layers:
            return "schedule: layer"
        return None

    def too_small(self, tokens: int, heads: int, head_dim: int, device: torch.device) -> str | None:
        """Say why a call is too small to be sparse, or ``None``; as :func:`adamac.attention.crossover.too_small`."""
        if self.min_tokens is None:
            return crossover.too_small(tokens, heads, head_dim, device)
        return f"schedule: fewer than {self.min_tokens} video tokens" if tokens < self.min_tokens else None

    @staticmethod
    def _steps(amount: int | float, num_steps: int | None) -> int:
        if isinstance(amount, int):
            return amount
        if num_steps is None:
            raise ValueError(
                f"a schedule with a share of the steps ({amount}) needs num_steps; give a count instead"
            )
        return math.ceil(amount * num_steps - 1e-9)
