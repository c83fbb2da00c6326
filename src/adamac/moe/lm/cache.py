"""Keys and values of the tokens read so far, for several texts of different lengths.

Texts are padded on the left, so that all of them continue at the same place and a step of decoding writes one column. Room is
allocated once for all that will be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamac.moe.lm.model import GPTConfig, View


class Cache:
    """Keys and values of a batch of texts.

    Attributes:
        length: Columns written, padding included.
    """

    def __init__(
        self, config: GPTConfig, padding: Sequence[int], room: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate.

        Args:
            config: Of the model.
            padding: Columns at the left of each text that are no tokens.
            room: Columns in all.
            device: Where.
            dtype: Of keys and values.
        """
        shape = (config.layers, len(padding), config.heads, room, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self._ragged = any(padding)
        self._padding = torch.tensor(padding, device=device)[:, None]

    def advance(self, tokens: int) -> View:
        """Make room for so many more columns and say what they are; the model's call must follow."""
        start, self.length = self.length, self.length + tokens
        columns = torch.arange(self.length, device=self.keys.device)
        new = columns[start:]
        valid = new >= self._padding
        mask = None
        if self._ragged or (start and tokens > 1):
            seen = (columns <= new[:, None]) & (columns >= self._padding[:, :, None])
            # Padding reads itself: a row that reads nothing would be NaN.
            mask = (seen | (columns == new[:, None]))[:, None]
        ragged_now = self._ragged and not start
        return View(
            positions=(new - self._padding).clamp_min(0),
            mask=mask,
            valid=valid if ragged_now else None,
            keep=lambda layer, key, value: self._keep(layer, start, key, value),
        )

    def _keep(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer, :, :, start : self.length] = key
        self.values[layer, :, :, start : self.length] = value
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
