"""A router's choice with a program for some tokens, which holds all their scores at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamac.ops.gate import LEAST_SUM
from adamac.ops.launch import power_of_two

# Scores that a program holds.
_SCORES = 2048
_LEAST_SUM = tl.constexpr(LEAST_SUM)
# Below any score; what is no number is taken to be this when choosing, so that a choice is always an expert.
_LOWEST = tl.constexpr(-3e38)


def gate(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`adamac.ops.gate.gate` in float32.

    Returns:
        Experts, weights, and ``[2 * num_experts + 1]`` sums over tokens: masses, loads, tokens with logits that are not finite.
    """
    tokens, experts = logits.shape
    block = _tokens_a_program(experts)
    programs = triton.cdiv(tokens, block)
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(tokens, top_k)
    sums = logits.new_empty(programs, 2 * experts + 1)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _gate[(programs,)](
            logits.contiguous(),
            logits if bias is None else bias,
            chosen,
            weights,
            sums,
            tokens,
            experts,
            TOP_K=top_k,
            SLOTS=power_of_two(top_k),
            SOFTMAX=score == "softmax",
            NORMALISE=normalise,
            BIASED=bias is not None,
            BLOCK=block,
            EXPERTS=power_of_two(experts),
        )
    return chosen, weights, sums.sum(0)


def gradient(
    logits: Tensor,
    experts: Tensor,
    of_weights: Tensor | None,
    of_mass: Tensor | None,
    score: str,
    normalise: bool,
) -> Tensor:
    """Gradient in the logits, of weights and of masses; ``None`` means zeros."""
    tokens, number = logits.shape
    top_k, block = experts.shape[1], _tokens_a_program(number)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(logits):
        _gradient[(triton.cdiv(tokens, block),)](
            logits.contiguous(),
            experts,
            logits if of_weights is None else of_weights.contiguous(),
            logits if of_mass is None else of_mass.contiguous(),
            out,
            tokens,
            number,
            TOP_K=top_k,
            OF_WEIGHTS=of_weights is not None,
            OF_MASS=of_mass is not None,
            SOFTMAX=score == "softmax",
            NORMALISE=normalise,
            BLOCK=block,
            EXPERTS=power_of_two(number),
        )
    return out


def _tokens_a_program(experts: int) -> int:
    return max(1, min(32, _SCORES // power_of_two(experts)))


@triton.jit
def _scores(x, inside, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        x = tl.where(inside, x, float("-inf"))
        e = tl.exp(x - tl.max(x, 1)[:, None])
        score = e / tl.sum(e, 1)[:, None]
    else:
        score = tl.where(inside, 1 / (1 + tl.exp(-x)), 0.0)
    return score


@triton.jit(do_not_specialize=["tokens"])
def _gate(
    logits,
    bias,
    chosen,
    weights,
    sums,
    tokens,
    experts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program * BLOCK + tl.arange(0, BLOCK)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    there = (token < tokens)[:, None]
    inside = expert[None, :] < experts
    x = tl.load(logits + token[:, None] * experts + expert[None, :], mask=there & inside, other=0.0)
    sick = tl.sum((tl.abs(x) < float("inf")).to(tl.int32) == 0, 1) > 0  # NaN is not below either
    score = _scores(x, inside, SOFTMAX)
    ranked = score
    if BIASED:
        ranked += tl.load(bias + expert, mask=expert < experts, other=0.0)[None, :]
    ranked = tl.where(ranked > _LOWEST, ranked, _LOWEST)
    ranked = tl.where(inside, ranked, float("-inf"))
    taken = tl.zeros([BLOCK, EXPERTS], tl.int32)
    picked = tl.zeros([BLOCK, SLOTS], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(ranked, 1)[:, None]
        # Of equal ones the first.
        index = tl.min(tl.where(ranked == best, expert[None, :], EXPERTS), 1)
        own = expert[None, :] == index[:, None]
        weight = tl.sum(tl.where(own, score, 0.0), 1)
        picked = tl.where(slot[None, :] == k, weight[:, None], picked)
        tl.store(chosen + token * TOP_K + k, index.to(tl.int64), mask=token < tokens)
        taken += own.to(tl.int32)
        ranked = tl.where(own, float("-inf"), ranked)
    if NORMALISE:
        picked /= tl.maximum(tl.sum(picked, 1), _LEAST_SUM)[:, None]
    place = weights + token[:, None] * TOP_K + slot[None, :]
    tl.store(place, picked, mask=there & (slot < TOP_K)[None, :])
    share = score
    if not SOFTMAX:
        share /= tl.maximum(tl.sum(score, 1), _LEAST_SUM)[:, None]
    row = sums + program * (2 * experts + 1)
    mass = tl.sum(tl.where(there & inside, share, 0.0), 0)
    load = tl.sum(tl.where(there, taken, 0), 0).to(tl.float32)
    tl.store(row + expert, mass, mask=expert < experts)
    tl.store(row + experts + expert, load, mask=expert < experts)
    tl.store(row + 2 * experts, tl.sum(sick.to(tl.float32), 0))


@triton.jit(do_not_specialize=["tokens"])
def _gradient(
    logits,
    chosen,
    of_weights,
    of_mass,
    out,
    tokens,
    experts,
    TOP_K: tl.constexpr,
    OF_WEIGHTS: tl.constexpr,
    OF_MASS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    there, inside = token < tokens, expert[None, :] < experts
    place = token[:, None] * experts + expert[None, :]
    x = tl.load(logits + place, mask=there[:, None] & inside, other=0.0)
    score = _scores(x, inside, SOFTMAX)
    wanted = tl.zeros([BLOCK, EXPERTS], tl.float32)  # gradient in the scores
    if OF_WEIGHTS:
        own = tl.zeros([BLOCK, EXPERTS], tl.int32)
        for k in tl.static_range(TOP_K):
            index = tl.load(chosen + token * TOP_K + k, mask=there, other=0)
            here = expert[None, :] == index[:, None]
            given = tl.load(of_weights + token * TOP_K + k, mask=there, other=0.0)
            wanted = tl.where(here, given[:, None], wanted)
            own += here.to(tl.int32)
        if NORMALISE:
            picked = tl.where(own > 0, score, 0.0)
            wanted = tl.where(own > 0, _through_normalising(wanted, picked), 0.0)
    if OF_MASS:
        given = tl.load(of_mass + expert, mask=expert < experts, other=0.0)[None, :]
        given = tl.zeros([BLOCK, EXPERTS], tl.float32) + given
        if not SOFTMAX:
            given = _through_normalising(given, score)
        wanted += given
    if SOFTMAX:
        apart = _apart(wanted, score)
        found = score * (apart - tl.sum(apart * score, 1)[:, None])
    else:  # not 1 - score, of which nothing but rounding is left where the score is nearly 1
        found = score * _scores(-x, inside, SOFTMAX) * wanted
    tl.store(out + place, found, mask=there[:, None] & inside)


@triton.jit
def _apart(wanted, score):
    """Shifted by the gradient at the largest score: the mean taken away next is nearly that, and the difference would cancel."""
    best = score == tl.max(score, 1)[:, None]
    return wanted - tl.max(tl.where(best, wanted, float("-inf")), 1)[:, None]


@triton.jit
def _through_normalising(wanted, score):
    """Gradient in scores of what they are once they add up to 1; a sum that was raised to the least is a constant."""
    total = tl.sum(score, 1)[:, None]
    scale = tl.maximum(total, _LEAST_SUM)
    apart = _apart(wanted, score)
    mean = tl.sum(apart * score, 1)[:, None] / scale
    return tl.where(total >= _LEAST_SUM, apart - mean, wanted) / scale
