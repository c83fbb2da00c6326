"""Sampling: several prompts of different lengths at once, a token a step, keys and values kept.

Every prompt draws its random numbers from a seed of its own before anything is computed, so that what it becomes does not depend
on which prompts it shares a batch with, nor on how many tokens are asked for, but for rounding: in half precision two tokens may
come so close that another order of additions decides between them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adamac.moe.lm.cache import Cache
from adamac.moe.lm.decoding import Decoder
from adamac.moe.lm.model import GPT


@torch.inference_mode(False)  # what a caller in that mode recorded would be in the way of other recordings
@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    temperature: float = 0.7,
    top_k: int | None = 50,
    seeds: Sequence[int] | None = None,
    end: int | None = None,
    watcher: Callable[[Decoder], None] | None = None,
) -> list[list[int]]:
    """Continue prompts.

    Args:
        model: On any device; computes in the dtype of its weights.
        prompts: Token ids of each, at least one.
        tokens: How many to add at most.
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_k: Sample from so many likeliest tokens only; ``None`` from all.
        seeds: One for each prompt; ``None`` is 0, 1, 2, ...
        end: Id at which a text ends; it is not part of the result. ``None``: none ends.
        watcher: Is told at the end what decoded: whether it was captured in a CUDA graph and, if not, for what reason.

    Returns:
        What was added to each prompt.

    Raises:
        ValueError: If an argument is out of range or a prompt and its continuation exceed the context.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    _check(model, prompts, tokens, temperature, top_k, seeds)
    weight = model.embedding.weight
    device, longest = weight.device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor(
        [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device
    )
    draws = torch.stack([_draws(seed, tokens) for seed in seeds]).to(device)
    cache = Cache(model.config, padding, longest + tokens, device, weight.dtype)

    def following(logits: Tensor, read: Tensor) -> Tensor:
        return choose(logits, draws.index_select(1, read - longest)[:, 0], temperature, top_k)

    with _in_evaluation(model):
        features = model.features(ids, cache.advance(longest))
        read = torch.full((1,), longest, device=device)
        added = [following(model.logits(features[:, -1]), read)]
        decoder = Decoder(model, cache, added[0], following, tokens=tokens - 1)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        while len(added) < tokens:
            if end is not None:
                ended |= added[-1] == end
                if ended.all():
                    break
            added.append(decoder.step())
    if watcher is not None:
        watcher(decoder)
    return [_until(row, end) for row in torch.stack(added, 1).tolist()]


def choose(logits: Tensor, draws: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Choose a token from each row of logits.

    Args:
        logits: ``[batch, vocab]``.
        draws: ``[batch]`` float64 in [0, 1), which part of the distribution each row takes.
        temperature: As in :func:`generate`.
        top_k: As in :func:`generate`.

    Returns:
        ``[batch]`` int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    best, ids = logits.double().topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    shares = (best / temperature).softmax(-1).cumsum(-1)
    place = (shares <= draws[:, None] * shares[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, place.clamp_max(ids.shape[1] - 1)).squeeze(1)


@contextmanager
def _in_evaluation(model: GPT) -> Generator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _draws(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    top_k: int | None,
    seeds: Sequence[int],
) -> None:
    if not prompts or not all(prompts):
        raise ValueError("expected at least one prompt, and at least one token in each")
    known = model.config.vocab
    if wrong := [i for prompt in prompts for i in prompt if not 0 <= i < known]:  # a GPU would die of it
        raise ValueError(f"token ids must be 0 to {known - 1}, got {wrong[0]}; was another tokenizer used?")
    if len(seeds) != len(prompts):
        raise ValueError(f"expected a seed for each of {len(prompts)} prompts, got {len(seeds)}")
    if wrong := [seed for seed in seeds if not -(2**63) <= seed < 2**64]:
        raise ValueError(f"seeds must lie in -2^63 to 2^64 - 1, got {wrong[0]}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    longest, context = max(map(len, prompts)), model.config.context
    if longest + tokens > context:
        remedy = (
            f"ask for at most {context - longest}"
            if longest < context
            else f"shorten it to at most {context - 1}"
        )
        raise ValueError(
            f"a prompt of {longest} tokens and {tokens} more exceed the model's context of {context}; {remedy}"
        )
