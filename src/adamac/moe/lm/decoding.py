"""Decoding: the same step for each token, so that a GPU can replay it.

A step adds one token to every text. One that is to be replayed launches the same work however much was read before: which column
comes next is a number on the device, all room is attended to, and nothing is read back. It is recorded once as a CUDA graph, and
from then on a token costs the host one launch, not some forty for each layer. Where that cannot be, a step attends to what was
read and no more (or, if it is the recording that fails, to all room all the same), and the reason is said. All add the same
tokens, up to rounding.

A recording is made of one shape and of the memory that the model's weights have now: a decoder lives as long as its texts. What
Python does in the model and in the choice, it does while recording and not again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adamac.moe.lm.cache import Cache
from adamac.moe.lm.model import GPT, View
from adamac.moe.lm.recording import unrecordable
from adamac.ops.replay import Replayed

Choose = Callable[[Tensor, Tensor], Tensor]
"""``[batch, vocab]`` logits and the ``[1]`` number of columns read to the next token of each text, ``[batch]`` int64."""

FEWEST = 8
"""Steps from which recording pays: it takes three steps to warm up, one to record, and about one more to make the graph."""


class Decoder:
    """Adds a token to each of some texts whose prompts are in a cache, again and again.

    Attributes:
        cache: What was read; it grows by a column a step.
    """

    def __init__(self, model: GPT, cache: Cache, last: Tensor, choose: Choose, *, tokens: int) -> None:
        """Take texts over.

        Args:
            model: In evaluation; it must neither move nor change its dtype meanwhile.
            cache: All of each text but its last token. Nobody else may write to it meanwhile.
            last: ``[batch]`` int64, the last token of each text.
            choose: Chooses the next. It may not read anything back from the device.
            tokens: How many steps will be asked for at most.
        """
        self.cache = cache
        self._ids, self._column = last[:, None], torch.full((1,), cache.length, device=last.device)
        self._obstacle = obstacle(model, tokens)
        # No methods of this object: memory that hangs in a cycle is freed late.
        view = (lambda column: cache.advance(1)) if self._obstacle else cache.at
        step = partial(_step, model, view, choose)
        self._step = step if self._obstacle else Replayed(step)

    @property
    def reason(self) -> str:
        """Why steps are not captured in a CUDA graph, in words; empty if nothing is in the way. The first may find one more."""
        return self._step.problem if isinstance(self._step, Replayed) else self._obstacle

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph; not before the first."""
        return isinstance(self._step, Replayed) and self._step.recorded

    @torch.no_grad()
    def step(self) -> Tensor:
        """Read the last token of each text and choose the next.

        Returns:
            ``[batch]`` int64; the device may not be done with it.

        Raises:
            ValueError: If the cache has no room.
        """
        if self.cache.length >= self.cache.room:
            raise ValueError(
                f"the cache has room for {self.cache.room} columns and all are written; give it more room or ask for fewer tokens"
            )
        read = self.cache.length
        try:
            self._ids, self._column = self._step(self._ids, self._column)
            read += 1
        finally:
            self.cache.length = read  # a step that failed can be tried again
        return self._ids[:, 0].clone()  # the next step writes over it


def obstacle(model: GPT, tokens: int) -> str:
    """Say why decoding so many tokens is not captured in a CUDA graph, in words; empty if it is."""
    if tokens < FEWEST:
        return f"{tokens} steps are fewer than the {FEWEST} from which recording pays"
    if torch.is_inference_mode_enabled():
        return "inference mode is on, and others could not record after what is recorded in it; use torch.no_grad"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, which casts weights anew in each step; cast the model itself"
    return unrecordable(model)


def _step(
    model: GPT, view: Callable[[Tensor], View], choose: Choose, ids: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """From the last tokens and their column to the next ones and theirs; with :meth:`Cache.at`, done twice is as if done once."""
    features = model.features(ids, view(column))
    read = column + 1
    return choose(model.logits(features[:, -1]), read)[:, None], read
