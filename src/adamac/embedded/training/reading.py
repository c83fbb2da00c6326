"""The text encoder learns to read before it serves the pictures.

Trained through the pictures alone, the encoder of the first four runs became a bag of words: a linear
probe could not say better than a coin on which side of ", then cut to" a word stood (48 %), and letters
came in any order. The pictures reward order too little for it to be found in minutes. So four small
heads ask for it first, of every token: which token stands before it, which after it, at which place
of the caption it stands, and whether before or after the cut. The heads are thrown away.

An encoder that a transformer already knows is kept close to what it said before, so that the
transformer need not learn its language anew.
"""

from __future__ import annotations

import copy
import dataclasses
import time

import torch
from torch.nn import functional
from transformers import UMT5EncoderModel

KEEP = 0.3
"""Weight of staying close to a former encoder, mean square relative to its own."""
RATE = 1.5e-3
BATCH = 256
WARMUP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked of the tokens of a batch; tokens ``(batch, length)``, padded with 0.

    Attributes:
        before: Token to the left, 0 at the first.
        after: Token to the right, 0 at the last.
        place: Index in the caption.
        side: 1 after the word "cut", 0 before it.
        known: Where a token stands.
        has_side: Where a token stands in a caption with a cut.
    """

    before: torch.Tensor
    after: torch.Tensor
    place: torch.Tensor
    side: torch.Tensor
    known: torch.Tensor
    has_side: torch.Tensor


def questions(tokens: torch.Tensor, cut: int) -> Questions:
    """The right answers for captions in which the token ``cut`` parts two scenes."""
    known, is_cut = tokens.ne(0), tokens.eq(cut)
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Questions(
        before=functional.pad(tokens, (1, 0))[:, :-1],
        after=functional.pad(tokens, (0, 1))[:, 1:],
        place=place,
        side=is_cut.cumsum(1).clamp(max=1),
        known=known,
        has_side=known & is_cut.any(1, keepdim=True),
    )


class Heads(torch.nn.Module):
    """One linear layer for each question."""

    def __init__(self, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.before = torch.nn.Linear(width, vocabulary)
        self.after = torch.nn.Linear(width, vocabulary)
        self.place = torch.nn.Linear(width, length)
        self.side = torch.nn.Linear(width, 2)

    def loss(self, states: torch.Tensor, asked: Questions) -> torch.Tensor:
        """Mean cross-entropy of the four questions, summed; states ``(batch, length, width)``."""
        states = functional.layer_norm(states.float(), states.shape[-1:])
        total = states.new_zeros(())
        for name in ("before", "after", "place", "side"):
            where = asked.has_side if name == "side" else asked.known
            rows = functional.cross_entropy(
                getattr(self, name)(states).flatten(0, 1), getattr(asked, name).flatten(), reduction="none"
            )
            total = total + (rows * where.flatten()).sum() / where.sum().clamp(min=1)
        return total

    @torch.no_grad()
    def accuracy(self, states: torch.Tensor, asked: Questions) -> dict[str, float]:
        """Share of right answers to each question."""
        states = functional.layer_norm(states.float(), states.shape[-1:])
        shares = {}
        for name in ("before", "after", "place", "side"):
            where = asked.has_side if name == "side" else asked.known
            right = getattr(self, name)(states).argmax(-1) == getattr(asked, name)
            shares[name] = round(right[where].float().mean().item(), 4)
        return shares


def _states(encoder: UMT5EncoderModel, tokens: torch.Tensor) -> torch.Tensor:
    return encoder(tokens, tokens.ne(0).long()).last_hidden_state


def teach(
    encoder: UMT5EncoderModel, tokens: torch.Tensor, held_out: torch.Tensor, cut: int, seconds: float
) -> dict[str, float]:
    """Train in place to tell order.

    Args:
        encoder: The text encoder; on the device of the tokens.
        tokens: Captions to learn from, ``(n, length)`` token ids padded with 0.
        held_out: Captions to be judged by, in the same form.
        cut: Token id of the word "cut".
        seconds: How long.

    Returns:
        Share of right answers on the held-out captions, and under ``moved`` how far the states are
        from those of the encoder as it came (mean square, relative).
    """
    former = copy.deepcopy(encoder).requires_grad_(False).eval()
    heads = Heads(encoder.config.d_model, encoder.config.vocab_size, tokens.shape[1]).to(tokens.device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / max(seconds, 1e-9)) < 1 or step == 0:
        batch = tokens[torch.randint(len(tokens), (BATCH,), device=tokens.device)]
        asked = questions(batch, cut)
        states = _states(encoder, batch)
        loss = heads.loss(states, asked) + KEEP * _moved(states, _states(former, batch), asked.known)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        step += 1
        optimizer.param_groups[0]["lr"] = RATE * min(step / WARMUP_STEPS, 1.0) * max(1 - progress, 0.02)
        optimizer.step()
    with torch.no_grad():
        states, asked = _states(encoder, held_out), questions(held_out, cut)
        moved = _moved(states, _states(former, held_out), asked.known).item()
    return {**heads.accuracy(states, asked), "moved": round(moved, 4), "steps": step}


def _moved(states: torch.Tensor, former: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return (states - former)[known].square().mean() / former[known].square().mean()
