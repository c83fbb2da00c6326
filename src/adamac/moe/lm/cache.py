"""Keys and values of the tokens read so far, for several texts of different lengths.

Texts are padded on the left, so that all of them continue at the same place and a step of decoding writes one column. Room is
allocated once for all that will be read. What is read next is said in two ways: :meth:`Cache.advance` reads as much as there is
and knows on the host how much that is; :meth:`Cache.at` reads all room, the unwritten part of it with no weight, and knows its
column on the device alone, so that each step launches the same work.
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
        room: Columns in all.
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
        # Zeros: what has no weight yet must not be NaN either.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.room = 0, room
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

    def at(self, column: Tensor) -> View:
        """Say what one more token of each text is; the model's call must follow. :attr:`length` is left to the caller.

        Args:
            column: ``[1]`` int64, where it goes, on the device of the cache. A call with the same column writes over it.
        """
        columns = torch.arange(self.room, device=self.keys.device)
        unread = (columns > column) | (columns < self._padding)
        mask = torch.zeros(unread.shape, device=unread.device, dtype=self.keys.dtype)
        return View(
            positions=column - self._padding,
            mask=mask.masked_fill_(unread, float("-inf"))[:, None, None],
            keep=lambda layer, key, value: self._put(layer, column, key, value),
        )

    def _put(self, layer: int, column: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, column, key.to(keys.dtype))
        values.index_copy_(2, column, value.to(values.dtype))
        return keys, values

    def _keep(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer, :, :, start : self.length] = key
        self.values[layer, :, :, start : self.length] = value
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]
