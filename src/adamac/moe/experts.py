"""The experts that live on one rank, computed together: two grouped matrix products with an activation between.

Matrices are stored ``[experts, width_in, width_out]``, a gated expert's gate and up side by side in one, so that all experts' first
products are one kernel and their second another. Expert ``e`` of the layer is drawn from a seed of its own: whichever rank holds
it, it starts the same.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from adamac.moe.presets import MoEConfig
from adamac.moe.shares import written_whole
from adamac.ops.activation import activate
from adamac.ops.grouped_mlp import MlpImpl, check_fused, grouped_mlp
from adamac.ops.grouped_mm import chosen, torch_waits


class Experts(nn.Module):
    """Some experts of a layer, a consecutive range.

    Attributes:
        up: ``[local_experts, width, ffn]``, or ``2 * ffn`` with the gate first.
        down: ``[local_experts, ffn, width]``.
    """

    def __init__(
        self,
        config: MoEConfig,
        local_experts: int | None = None,
        first: int = 0,
        *,
        impl: MlpImpl = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.impl, self.first = config, impl, first
        self._kept: dict[tuple[str, torch.dtype, bool], Tensor] | None = None
        number = config.num_experts if local_experts is None else local_experts
        wide = 2 * config.ffn if config.gated else config.ffn
        self.up = nn.Parameter(torch.empty(number, config.width, wide, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(number, config.ffn, config.width, device=device, dtype=dtype))
        self.runs()  # refuses an implementation that cannot run

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Let each expert answer its rows.

        Args:
            rows: ``[n, width]``, sorted by expert.
            counts: ``[local_experts]`` integers, rows of each expert.

        Returns:
            ``[n, width]`` in the same order.
        """
        up, down = (self._cast(name, rows.dtype) for name in ("up", "down"))
        config = self.config
        return grouped_mlp(rows, up, down, counts, config.activation, gated=config.gated, impl=self.impl)

    def _cast(self, name: str, dtype: torch.dtype) -> Tensor:
        matrices = getattr(self, name)
        if matrices.dtype == dtype or self._kept is None:
            return matrices.to(dtype)
        # A cast that was made without gradients leads nowhere.
        key = name, dtype, torch.is_grad_enabled()
        if key not in self._kept:
            self._kept[key] = matrices.to(dtype)
        return self._kept[key]

    def runs(self, dtype: torch.dtype | None = None) -> Literal["fused", "torch", "reference"]:
        """Say how these experts are computed: with the activation fused into the products, or through which grouped product.

        ``"reference"``, a loop that waits for the device, is what ``impl="auto"`` falls back to, above all where a width is no
        multiple of 16 bytes.

        Args:
            dtype: Of the rows; ``None`` means that of the parameters.

        Raises:
            ValueError: If ``impl`` is unknown, or cannot run.
        """
        config, dtype, device = self.config, dtype or self.up.dtype, self.up.device
        rows = torch.empty(0, config.width, dtype=dtype, device=device)
        if self.impl == "fused":
            check_fused(rows, self.up, gated=config.gated)
            return "fused"
        inner = torch.empty(0, config.ffn, dtype=dtype, device=device)
        through = {chosen(self.impl, rows, self.up), chosen(self.impl, inner, self.down)}
        return "torch" if through == {"torch"} else "reference"

    def waits(self, dtype: torch.dtype | None = None) -> str | None:
        """Say why computing them on a GPU waits for the device; ``None`` if it does not.

        Args:
            dtype: Of the rows, which matrices are cast to; ``None`` means that of the parameters.
        """
        if self.runs(dtype) == "reference":
            return "the experts run in a loop that waits for the device (reference)"
        return torch_waits(dtype or self.up.dtype, self.up.device)

    def extra_repr(self) -> str:
        """What distinguishes the experts in a printed model."""
        runs = self.runs() if self.impl == "auto" else self.impl
        return f"{len(self.up)} from {self.first}, grouped products by {runs}"

    @torch.no_grad()
    def draw(self, up_std: float, down_std: float, seed: int) -> None:
        """Draw the matrices at random, each expert from a seed of its own; the same where FSDP2 divides them.

        Args:
            up_std: Standard deviation of ``up``.
            down_std: Of ``down``.
            seed: Of the layer; the same on all ranks.
        """
        if self.up.device.type == "meta":
            return
        generator = torch.Generator(self.up.device)
        with written_whole(self.up, self.down) as (up, down):
            for index in range(len(up)):
                generator.manual_seed(seed + self.first + index)
                up[index].normal_(0, up_std, generator=generator)
                down[index].normal_(0, down_std, generator=generator)


@contextmanager
def casts_kept(model: nn.Module) -> Generator[None]:
    """Cast the matrices of all experts once for all passes within, not once a pass; they must not change within.

    For gradient accumulation under autocast: casts are copies of all experts, and gradients pass through a kept one like
    through a fresh one. Experts that FSDP2 gathers for each pass, and whose gradients it takes after each, keep none.
    """
    experts = [
        module
        for module in model.modules()
        if isinstance(module, Experts) and not hasattr(module.up, "to_local")
    ]
    for each in experts:
        each._kept = {}
    try:
        yield
    finally:
        for each in experts:
            each._kept = None


class SharedExpert(nn.Module):
    """The expert that all tokens take. It reads the full width of the model, whatever the routed rows are narrowed to."""

    def __init__(
        self, config: MoEConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        wide = 2 * config.shared_ffn if config.gated else config.shared_ffn
        self.up = nn.Linear(config.hidden, wide, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(config.shared_ffn, config.hidden, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Answer every token: ``[tokens, hidden]`` to the same."""
        return self.down(activate(self.up(tokens), self.config.activation, gated=self.config.gated))
